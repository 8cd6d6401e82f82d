"""Blipstream's own tiny BLIP-2: a rendered world, the training of the model on it, and the evaluation."""
