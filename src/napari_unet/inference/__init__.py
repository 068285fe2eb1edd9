"""From an image to probabilities and objects."""
