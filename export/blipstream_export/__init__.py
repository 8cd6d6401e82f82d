"""From a Hugging Face checkpoint to a bundle: torch wrappers, ONNX graphs, parity."""
