"""Many images: a folder in, labels and measurements out, nothing lost."""
