"""Moved to `words`; kept for a moment."""

from napari_unet.cli.words import duration, one_line

__all__ = ["duration", "one_line"]
