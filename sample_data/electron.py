"""Simulated sections of nervous tissue in the electron microscope."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage as ndi
from scipy.spatial import cKDTree
from skimage.measure import label as components
from skimage.segmentation import find_boundaries

if TYPE_CHECKING:
    from numpy.random import Generator


def field(rng: Generator, shape: tuple[int, ...], grain: float) -> np.ndarray:
    """Return a smooth random field of mean 0 and deviation 1."""
    noise = ndi.gaussian_filter(rng.normal(size=shape), grain, mode="wrap")
    return (noise - noise.mean()) / noise.std()


def tissue(rng: Generator, shape: tuple[int, int]) -> np.ndarray:
    """Return cells in section: a warped Voronoi diagram with rounded corners."""
    pixels = np.indices(shape).astype(float)
    # Thick and thin processes lie in bundles: the spacing of the seeds varies.
    spacing = np.maximum(42 * np.exp(0.5 * field(rng, shape, 45)), 25)
    seeds: list[np.ndarray] = []
    for seed in rng.uniform(-20, np.array(shape) + 20, (6000, 2)):
        near = spacing[tuple(np.clip(seed.astype(int), 0, np.array(shape) - 1))]
        if all(np.hypot(*(seed - other)) > near for other in seeds):
            seeds.append(seed)
    for grain, amplitude in ((45, 22), (15, 5), (5, 1.2)):
        pixels += amplitude * np.stack([field(rng, shape, grain) for _ in range(2)])
    _, nearest = cKDTree(np.array(seeds)).query(np.moveaxis(pixels, 0, -1))
    nearest += 1
    depth = ndi.distance_transform_edt(~find_boundaries(nearest, mode="inner"))
    # An opening with a disc rounds the corners; half the membrane comes off as well.
    corner, membrane = 5.0, 1.2
    core = depth > corner + membrane
    distance, (rows, columns) = ndi.distance_transform_edt(~core, return_indices=True)
    is_cell = (distance <= corner) & (nearest[rows, columns] == nearest)
    pieces = components(np.where(is_cell, nearest, 0), connectivity=1)
    sizes = np.bincount(pieces.ravel())
    return np.where(sizes[pieces] < 120, 0, pieces)


def add_mitochondrion(rng: Generator, grey: np.ndarray, inside: np.ndarray) -> None:
    """Darken an ellipse with a double membrane and cristae in a cell's interior."""
    axes = rng.uniform(12, 19), rng.uniform(8, 12)
    places = np.argwhere(ndi.distance_transform_edt(inside) > 0.85 * axes[0])
    if not len(places):
        return
    angle = rng.uniform(0, np.pi)
    offset = np.indices(grey.shape) - places[rng.integers(len(places))][:, None, None]
    along = np.cos(angle) * offset[0] + np.sin(angle) * offset[1]
    across = np.cos(angle) * offset[1] - np.sin(angle) * offset[0]
    radius = np.hypot(along / axes[0], across / axes[1]) + 0.06 * field(
        rng, grey.shape, 5
    )
    cristae = np.sin(2 * np.pi * (along + 2.5 * field(rng, grey.shape, 6)) / 5.5)
    matrix = (radius < 1) & inside
    grey[matrix] -= 42 + 18 * cristae[matrix]
    grey[(np.abs(radius - 1) < 0.1) & inside] -= 40


def add_vesicles(rng: Generator, grey: np.ndarray, inside: np.ndarray) -> None:
    """Draw a group of vesicles, small rings, around one place of a cell."""
    places = np.argwhere(ndi.distance_transform_edt(inside) > 5)
    if not len(places):
        return
    around = places[rng.integers(len(places))]
    close = places[np.hypot(*(places - around).T) < rng.uniform(12, 40)]
    rows, columns = np.indices(grey.shape, sparse=True)
    for row, column in close[rng.integers(len(close), size=2 + len(close) // 70)]:
        radius = np.hypot(rows - row, columns - column) / rng.uniform(2.6, 4.2)
        grey += 14 * (radius < 0.7) - 30 * np.exp(-(((radius - 1) / 0.28) ** 2))


def make_membrane(rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return a section of nervous tissue in the electron microscope, 4 nm a pixel."""
    shape = (512, 512)
    cells = tissue(rng, shape)
    sizes = np.bincount(cells.ravel())
    level = rng.normal(0, 11, len(sizes))
    # Cytoplasm: ribosomes and filaments, more of them in some cells than in others.
    richness = rng.uniform(0.8, 1.7, len(sizes))[cells]
    dots = np.maximum(field(rng, shape, 1.2) - 1.1, 0)
    grain = 9 * field(rng, shape, 1.3) + 9 * field(rng, shape, 3.0) - 22 * dots
    grey = 155 + level[cells] + richness * grain
    for label in np.flatnonzero(sizes)[1:]:
        inside = cells == label
        if sizes[label] > 1800 and rng.random() < 0.6:
            add_mitochondrion(rng, grey, inside)
        if sizes[label] > 900 and rng.random() < 0.6:
            add_vesicles(rng, grey, inside)
    # Where a membrane runs obliquely through the section it looks wide and soft.
    wall = (cells == 0).astype(float)
    oblique = np.clip(field(rng, shape, 22) - 0.9, 0, 1)
    soft = np.minimum(1.5 * ndi.gaussian_filter(wall, 4.0), 1)
    stain = np.maximum(ndi.gaussian_filter(wall, 0.8), oblique * soft)
    dark = 48 + 12 * field(rng, shape, 3)
    grey = grey * (1 - stain) + dark * stain
    grey = ndi.gaussian_filter(grey, 0.7) + 9 * field(rng, shape, 90)
    grey += 7 * rng.normal(size=shape) + 10 * field(rng, shape, 0.8)
    return np.clip(np.rint(grey), 0, 255).astype(np.uint8), cells
