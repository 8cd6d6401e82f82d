"""The stages of a BLIP-2 checkpoint as torch modules written for serving; each loads the weights of transformers."""
