"""Make the sample images and their true labels: ``python generate.py [FOLDER]``.

Every image is simulated from the physics of its microscope. Nothing is copied from a
real image, so the samples are free of rights and their labels are exact. The seeds
are fixed: the same versions of the libraries write the same bytes again.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import tifffile
from electron import make_membrane
from fluorescence import make_nuclei, make_nuclei3d, make_timelapse
from numpy.random import default_rng

# name: (function, seed, smallest object in pixels, axes, µm per pixel, more metadata)
SAMPLES = {
    "nuclei": (make_nuclei, 7, 30, "YX", 0.325, {}),
    "timelapse": (make_timelapse, 3, 20, "TYX", 0.65, {"finterval": 600.0}),
    "membrane": (make_membrane, 4, 1, "YX", 0.004, {}),
    "nuclei3d": (make_nuclei3d, 1, 60, "ZYX", 0.325, {"spacing": 1.0}),
}


def tidy(labels: np.ndarray, smallest: int) -> np.ndarray:
    """Number labels from 1, without the slivers that the edge left of some objects."""
    sizes = np.bincount(labels.ravel())
    keep = np.flatnonzero(sizes >= smallest)[1:]
    number = np.zeros(len(sizes), np.uint16)
    number[keep] = np.arange(1, len(keep) + 1)
    return number[labels]


def write(name: str, folder: Path) -> None:
    """Write one sample and its true labels as TIFF files that ImageJ reads too."""
    make, seed, smallest, axes, pixel_size, more = SAMPLES[name]
    image, labels = make(default_rng(seed))
    for data, suffix in ((image, ""), (tidy(labels, smallest), "_labels")):
        tifffile.imwrite(
            folder / f"{name}{suffix}.tif",
            data,
            imagej=True,
            compression="zlib",
            resolution=(1 / pixel_size, 1 / pixel_size),
            metadata={"axes": axes, "unit": "um", **more},
        )


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for sample in SAMPLES:
        write(sample, target)
