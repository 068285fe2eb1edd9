"""A model is a network and its passport; its files."""
