"""Sample images with true labels, for napari's File > Open Sample menu."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import tifffile

if TYPE_CHECKING:
    from numpy.typing import NDArray

    # napari's own type of that name, without importing napari.
    LayerData = tuple[NDArray, dict[str, Any], str]

__all__ = ["membrane", "nuclei", "nuclei3d", "sample_dir", "timelapse"]

_SCALES: dict[str, tuple[tuple[float, str], ...]] = {
    "nuclei": ((0.325, "um"), (0.325, "um")),
    "timelapse": ((10.0, "min"), (0.65, "um"), (0.65, "um")),
    "membrane": ((0.004, "um"), (0.004, "um")),
    "nuclei3d": ((1.0, "um"), (0.325, "um"), (0.325, "um")),
}


def sample_dir() -> Path:
    """Return the folder of bundled sample images (wheel or source checkout)."""
    package = Path(__file__).parent
    packaged = package / "sample_data"
    return packaged if packaged.is_dir() else package.parents[1] / "sample_data"


def nuclei() -> list[LayerData]:
    """Return fluorescent nuclei in a dish, many of them touching."""
    return _layers("nuclei")


def timelapse() -> list[LayerData]:
    """Return a film of nuclei that move, divide and bleach."""
    return _layers("timelapse")


def membrane() -> list[LayerData]:
    """Return cells and their membranes in the electron microscope."""
    return _layers("membrane")


def nuclei3d() -> list[LayerData]:
    """Return a stack of nuclei with coarser sampling along z."""
    return _layers("nuclei3d")


def _layers(name: str) -> list[LayerData]:
    """Return the image and, hidden until the user asks for them, its true labels."""
    folder = sample_dir()
    scale, units = zip(*_SCALES[name], strict=True)
    place = {"scale": scale, "units": units}
    image = tifffile.imread(folder / f"{name}.tif")
    labels = tifffile.imread(folder / f"{name}_labels.tif")
    hidden = {"name": f"{name} true labels", "visible": False}
    return [
        (image, {"name": name, **place}, "image"),
        (labels, {**hidden, **place}, "labels"),
    ]
