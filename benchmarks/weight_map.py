"""Border weights against one distance transform of the whole image per object.

Usage::

    python benchmarks/weight_map.py [--full] [--device cuda]

Images of touching objects, a one-pixel gap cut between them: relaxed Voronoi cells,
parts further from their centres left as background. The peer does what the formula
says: for each object a distance transform of the whole image, of which the two
smallest values are kept. It is measured on 40 objects, evenly spread, and its time
multiplied by all / 40; with ``--full`` (several minutes) it does all of them. The
ratio for 2048 x 2048 pixels and 1000 objects should be 30 at least. The largest
difference of the weights, 1e-4 at most, is that on a crop; with ``--full`` on all. On a
device that is named torch computes the distances, else scipy.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from scipy.ndimage import distance_transform_edt
from scipy.spatial import cKDTree

from napari_unet import border_weight_map
from napari_unet.training.weight_map import cut_gaps

CASES = (((2048, 2048), 1000), ((64, 256, 256), 200))
MEASURED = 40
CROPPED = 256
# w0 and sigma of the formulas.
PRESETS = {"paper": (10.0, 5.0), "falk": (50.0, 6.0)}


def tessellation(shape: tuple[int, ...], count: int) -> np.ndarray:
    """Draw Voronoi cells of about the same size, a fifth of all as background."""
    centres = np.random.default_rng(0).uniform(0, shape, (count, len(shape)))
    spacing = (np.prod(shape) / count) ** (1 / len(shape))
    grid = np.mgrid[tuple(slice(0, side, max(1, spacing // 8)) for side in shape)]
    coarse = grid.reshape(len(shape), -1).T
    for _ in range(8):  # Lloyd: each centre moves to the middle of its cell
        _, cell = cKDTree(centres).query(coarse)
        size = np.maximum(np.bincount(cell, minlength=count), 1)
        sums = [np.bincount(cell, along, count) for along in coarse.T]
        centres = np.stack(sums, axis=-1) / size[:, None]
    pixels = np.indices(shape).reshape(len(shape), -1).T
    distance, cell = cKDTree(centres).query(pixels)
    labels = np.where(distance < np.quantile(distance, 0.85), cell + 1, 0)
    return cut_gaps(labels.reshape(shape).astype(np.int32))


def two_smallest(
    labels: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Transform the whole image for each object; keep the two smallest distances."""
    first = np.full(labels.shape, np.inf)
    second = first.copy()
    for value in values:
        distance = distance_transform_edt(labels != value)
        np.minimum(second, np.maximum(first, distance), out=second)
        np.minimum(first, distance, out=first)
    return first, second


def weights(
    labels: np.ndarray, first: np.ndarray, second: np.ndarray, preset: str
) -> np.ndarray:
    """Apply the formulas of `border_weight_map` to the distances."""
    w0, sigma = PRESETS[preset]
    background = labels == 0
    border = np.where(
        background, w0 * np.exp(-(((first + second) / sigma) ** 2) / 2), 0
    )
    if preset == "falk":
        near = 0.1 + 0.9 * np.exp(-((first / 10) ** 2) / 2)
        return border + np.where(background, near, 1)
    part = background.mean()
    return border + np.where(background, 0.5 / part, 0.5 / (1 - part))


def crop(labels: np.ndarray) -> np.ndarray:
    """Cut out the first corner, small enough for the peer to do all its objects."""
    deep = labels.ndim > 2
    return labels[(slice(CROPPED // 4),) * deep + (slice(CROPPED // (1 + deep)),) * 2]


def compare(
    shape: tuple[int, ...], count: int, *, full: bool = False, device: str | None = None
) -> list[tuple[str, float, float, float]]:
    """Return for each preset its name, our time, the peer's, and the difference."""
    labels = tessellation(shape, count)
    values = np.unique(labels[labels > 0])
    measured = len(values) if full else min(MEASURED, len(values))
    some = values[np.linspace(0, len(values) - 1, measured).astype(int)]
    start = time.perf_counter()
    first, second = two_smallest(labels, some)
    peer = (time.perf_counter() - start) * len(values) / measured
    checked = labels
    if not full:
        checked = crop(labels)
        first, second = two_smallest(checked, np.unique(checked[checked > 0]))
    rows = []
    for preset in PRESETS:
        # Before the clock starts: a device may need time for its first computation.
        found = border_weight_map(checked, preset=preset, device=device)
        start = time.perf_counter()
        border_weight_map(labels, preset=preset, device=device)
        ours = time.perf_counter() - start
        difference = np.abs(found - weights(checked, first, second, preset)).max()
        rows.append((preset, ours, peer, float(difference)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--full", action="store_true", help="measure every object")
    parser.add_argument("--device", help="of torch; by default scipy computes")
    arguments = parser.parse_args()
    full, device = arguments.full, arguments.device
    how = "all measured" if full else f"{MEASURED} measured, scaled up to all"
    where = "everywhere" if full else "on a crop"
    for shape, count in CASES:
        print(f"{' x '.join(map(str, shape))}, {count} objects ({how})")
        for preset, ours, peer, difference in compare(
            shape, count, full=full, device=device
        ):
            print(
                f"  {preset:6} {ours:7.2f} s  peer {peer:7.1f} s  ratio "
                f"{peer / ours:5.0f}  largest difference {where} {difference:.1e}"
            )


if __name__ == "__main__":
    main()
