"""Which pixels belong together, and cutting what only touches."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import cc3d
import numpy as np
from scipy import ndimage
from skimage.morphology import local_maxima
from skimage.segmentation import watershed

from napari_unet.inference.runs import Runs
from napari_unet.inference.spread import spread_steps

if TYPE_CHECKING:
    from collections.abc import Generator

    from numpy.typing import NDArray

# The smoothing looks 4 pixels aside, at distances to what lies within 4 * sqrt(3).
CONTEXT = 12
CELL = {2: 512, 3: 256}  # sides of what is split at a time: it stays in the cache


def components(mask: NDArray) -> NDArray:
    """Label what is connected by faces: objects touching at a corner stay apart.

    Parameters
    ----------
    mask : bool or unsigned integer array of shape (Y, X) or (Z, Y, X)
        Pixels of different numbers are not connected.

    Returns
    -------
    unsigned integer array of the same shape
        0 where ``mask`` is 0, else from 1 without gaps.
    """
    # cc3d 4.1 loses pixels of a column (n, 1, 1) that is cut out of a larger array.
    labels: NDArray = cc3d.connected_components(
        np.ascontiguousarray(mask), connectivity=6 if mask.ndim == 3 else 4
    )
    return labels


def split_touching_steps(runs: Runs) -> Generator[None, None, Runs]:
    """Fill small holes, which would attract cuts, and cut objects at their necks.

    Parameters
    ----------
    runs : Runs
        Of pixels in objects.

    Yields
    ------
    None
        For each part.

    Returns
    -------
    Runs
        Valued by object, from 1.
    """
    component, count = runs.join()
    sizes = np.bincount(component, runs.sizes, count)
    mask = runs.valued(np.ones(len(runs), dtype=bool)).array().view(bool)
    filled = fill_small_holes(mask, largest_hole(sizes))
    if filled is not mask:
        runs = Runs.find(filled)
        component, count = runs.join()
    low, high = runs.boxes(component, count)
    group_of = _groups(low, high)
    order = np.argsort(group_of[component], kind="stable")
    ends = np.cumsum(
        np.bincount(group_of[component], minlength=int(group_of.max(initial=-1)) + 1)
    )
    parts = [slice(*ends) for ends in pairwise([0, *ends.tolist()])]

    def split(group: int) -> Runs:
        of_group = group_of == group
        corner = np.maximum(low[of_group].min(axis=0) - CONTEXT, 0).tolist()
        far = (high[of_group].max(axis=0) + CONTEXT).tolist()
        crop = filled[tuple(slice(a, b) for a, b in zip(corner, far, strict=True))]
        own = runs.where(order[parts[group]]).moved(crop.shape, [-a for a in corner])
        mine = own.valued(np.ones(len(own), dtype=bool)).array().view(bool)
        hills = Runs.find(split_at_necks(crop) * mine)
        _, number = np.unique(hills.value, return_inverse=True)
        return hills.valued(number + 1).moved(runs.shape, corner)

    found, count = [], 0
    for pieces in (yield from spread_steps(split, range(len(parts)))):
        found.append(pieces.valued(pieces.value + count))
        count += int(pieces.value.max(initial=0))
    return Runs.merge(runs.shape, found)


def _groups(low: NDArray[np.int64], high: NDArray[np.int64]) -> NDArray[np.int64]:
    """Put components together that lie in one cell of a grid; the large ones, too."""
    side = CELL[low.shape[1]]
    cell = (low + high) // (2 * side)
    cell[(high - low > side).any(axis=1)] = -1
    _, group = np.unique(cell, axis=0, return_inverse=True)
    numbers: NDArray[np.int64] = group.reshape(-1).astype(np.int64)
    return numbers


def largest_hole(sizes: NDArray) -> float:
    """Return the size that holes to fill are below: a tenth of a typical object."""
    return float(np.median(sizes)) / 10 if len(sizes) else 0


def split_at_necks(mask: NDArray) -> NDArray:
    """Cut objects at their necks, by a watershed on the distance to the edge.

    Two hills of the distance map stay apart if the lower one rises above the
    saddle between them by 0.3 of its height and by a pixel, so that rough
    outlines are not cut. What becomes of an object depends on nothing that is
    more than `CONTEXT` pixels away.

    Parameters
    ----------
    mask : bool array of shape (Y, X) or (Z, Y, X)
        True in objects.

    Returns
    -------
    integer array of the same shape
        Numbers with gaps.
    """
    height = ndimage.gaussian_filter(ndimage.distance_transform_edt(mask), 1.0)
    seeds = components(local_maxima(height) & mask).astype(np.int32)
    hills = _flood(height, seeds, mask)
    # Of a tiny object the smoothed maximum may lie beside it.
    rest = mask & (hills == 0)
    hills[rest] = components(rest)[rest] + hills.max()
    peaks = np.zeros(int(hills.max()) + 1)
    np.maximum.at(peaks, hills[mask], height[mask])
    root = np.arange(len(peaks))
    for saddle, first, second in _saddles(hills, height):
        one, other = _find(root, first), _find(root, second)
        if one == other:
            continue
        low, high = sorted((one, other), key=lambda hill: peaks[hill])
        if peaks[low] - saddle < max(1.0, 0.3 * peaks[low]):
            root[low] = high
    roots = np.array([_find(root, hill) for hill in range(len(root))])
    joined: NDArray = roots[hills]
    return joined


def _flood(height: NDArray, seeds: NDArray, mask: NDArray) -> NDArray[np.int32]:
    """Do the watershed of objects with several seeds; one seed needs none."""
    pieces = components(mask)
    piece_of = np.zeros(int(seeds.max()) + 1, dtype=np.int64)
    is_seed = seeds > 0
    piece_of[seeds[is_seed]] = pieces[is_seed]
    count = np.bincount(piece_of[1:], minlength=int(pieces.max()) + 1)
    seed_of = np.zeros(len(count), dtype=np.int32)
    seed_of[piece_of] = np.arange(len(piece_of))
    seed_of[count != 1] = 0
    hills: NDArray[np.int32] = seed_of[pieces]
    are_several = (count > 1)[pieces]
    if are_several.any():
        flooded = watershed(-height, seeds * are_several, mask=are_several)
        hills[are_several] = flooded[are_several]
    return hills


def _find(root: NDArray, hill: int) -> int:
    while root[hill] != hill:
        hill = root[hill]
    return hill


def _saddles(hills: NDArray, height: NDArray) -> list[tuple[float, int, int]]:
    """The highest pass between any two neighbouring hills, the highest first."""
    keys, passes = [], []
    count = int(hills.max()) + 1
    for axis in range(hills.ndim):
        here = np.moveaxis(hills, axis, 0)[:-1]
        there = np.moveaxis(hills, axis, 0)[1:]
        border = (here != there) & (here > 0) & (there > 0)
        a, b = here[border].astype(np.int64), there[border].astype(np.int64)
        keys.append(np.minimum(a, b) * count + np.maximum(a, b))
        levels = np.moveaxis(height, axis, 0)
        passes.append(np.minimum(levels[:-1][border], levels[1:][border]))
    key, level = np.concatenate(keys), np.concatenate(passes)
    order = np.lexsort((-level, key))
    pairs, first = np.unique(key[order], return_index=True)
    highest = level[order][first]
    columns = (highest, pairs // count, pairs % count)
    return sorted(zip(*(c.tolist() for c in columns), strict=True), reverse=True)


def fill_small_holes(mask: NDArray, size: float) -> NDArray:
    """Fill the holes of objects that have fewer pixels than ``size``.

    Parameters
    ----------
    mask : bool array of shape (Y, X) or (Z, Y, X)
        What reaches the edge of it is no hole.
    size : float
        See `largest_hole`.
    """
    if size <= 1:
        return mask
    empty = Runs.find(~mask)
    component, count = empty.join(corners=True)
    is_small = np.bincount(component, empty.sizes, count) < size
    low, high = empty.boxes(component, count)
    is_small &= ((low > 0) & (high < mask.shape)).all(axis=1)
    holes = empty.where(is_small[component])
    return mask | holes.array().view(bool) if len(holes) else mask
