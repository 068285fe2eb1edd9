"""The command line: ``napari-unet segment``, ``evaluate`` and ``models``."""

from napari_unet.cli.app import main

__all__ = ["main"]
