"""The command line: ``napari-unet segment``, ``train``, ``evaluate``, ``models``."""

from napari_unet.cli.app import main

__all__ = ["main"]
