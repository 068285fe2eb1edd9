"""How the network is run: what several docks let the user choose in the same words."""

from __future__ import annotations

from magicgui.widgets import CheckBox, ComboBox, FloatSpinBox

from napari_unet.inference.settings import DEVICES


def choose_device() -> ComboBox:
    """Let the user choose where to compute; auto at first."""
    return ComboBox(
        choices=DEVICES,
        label="Device",
        tooltip="auto takes a working GPU, else the CPU.",
    )


def choose_tile() -> FloatSpinBox:
    """Let the user choose the side of the tiles; 0 at first."""
    tile = FloatSpinBox(
        max=8192,
        step=64,
        label="Tile size",
        tooltip="Side of a tile in pixels; 0 chooses by memory. The result does "
        "not depend on it, unless a note says that the tiles are blended.",
    )
    return _automatic_at_0(tile, decimals=0, unit=" pixels")


def choose_memory_limit() -> FloatSpinBox:
    """Let the user limit the network's memory; 0 at first."""
    limit = FloatSpinBox(
        max=1024,
        step=0.1,
        label="Memory limit",
        tooltip="What the network may take, of the GPU's memory if it computes there; "
        "0 takes a part of what is free. Less means smaller tiles, not other results.",
    )
    return _automatic_at_0(limit, decimals=1, unit=" GB")


def _automatic_at_0(box: FloatSpinBox, decimals: int, unit: str) -> FloatSpinBox:
    """Show a word for 0, which magicgui's box of integers cannot."""
    box.native.setDecimals(decimals)
    box.native.setSuffix(unit)
    box.native.setSpecialValueText("automatic")
    return box


def choose_averaging() -> CheckBox:
    """Let the user choose test-time augmentation; off at first."""
    return CheckBox(
        text="Average 8 flips and rotations",
        tooltip="Test-time augmentation: a little better, eight times slower.",
    )
