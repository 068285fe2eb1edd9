"""Growing objects back by what was cut between them."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from napari_unet.inference.runs import bands
from napari_unet.steps import run_to_end

if TYPE_CHECKING:
    from collections.abc import Generator

    from numpy.typing import NDArray

MAX_NEIGHBOURS = 100  # beyond, a distance transform is faster than looking at each


def grow_objects(labels: NDArray, pixels: int) -> NDArray:
    """Do what `grow_steps` does, at once."""
    return run_to_end(grow_steps(labels, pixels))


def grow_steps(labels: NDArray, pixels: int) -> Generator[None, None, NDArray]:
    """Grow objects by some pixels, as far as the middle between two.

    Parameters
    ----------
    labels : unsigned integer array
        Of two or three axes.
    pixels : int
        A distance between the centres of pixels.

    Yields
    ------
    None
        Many times a second, unless objects grow by many pixels.

    Returns
    -------
    array of the same shape and dtype
    """
    reach = range(-pixels, pixels + 1)
    offsets = [
        offset
        for offset in itertools.product(reach, repeat=labels.ndim)
        if 0 < _square(offset) <= pixels**2
    ]
    if len(offsets) > MAX_NEIGHBOURS:
        distance, nearest = ndimage.distance_transform_edt(
            labels == 0, return_indices=True
        )
        return np.where(distance <= pixels, labels[tuple(nearest)], 0).astype(
            labels.dtype
        )
    # Of several as near, the one that the distance transform would find.
    offsets.sort(key=lambda offset: (_square(offset), offset[::-1]))
    grown = labels.copy()
    for band in bands(labels.shape):
        yield
        low = max(band.start - pixels, 0)
        around = labels[low : band.stop + pixels]
        inner = slice(band.start - low, band.stop - low)
        _grow_band(around, inner, pixels, offsets, grown[band])
    return grown


def _grow_band(
    around: NDArray,
    inner: slice,
    pixels: int,
    offsets: list[tuple[int, ...]],
    grown: NDArray,
) -> None:
    """Look for the nearest object of what is not far from any."""
    padded = np.pad(around, pixels)
    is_object = padded != 0
    near = is_object
    for axis in range(padded.ndim):
        wide = near.copy()
        for step in range(1, pixels + 1):
            ahead = [slice(None)] * axis + [slice(step, None)]
            back = [slice(None)] * axis + [slice(-step)]
            wide[tuple(ahead)] |= near[tuple(back)]
            wide[tuple(back)] |= near[tuple(ahead)]
        near = wide
    near &= ~is_object
    rest = np.flatnonzero(_unpadded(near, pixels)[inner])
    index = list(np.unravel_index(rest, grown.shape))
    index[0] = index[0] + inner.start
    place = np.ravel_multi_index([i + pixels for i in index], padded.shape)
    strides = [step // padded.itemsize for step in padded.strides]
    flat = padded.ravel()
    target = grown.reshape(-1)
    for offset in offsets:
        step = sum(i * stride for i, stride in zip(offset, strides, strict=True))
        found = flat[place + step]
        is_found = found != 0
        target[rest[is_found]] = found[is_found]
        rest, place = rest[~is_found], place[~is_found]


def _unpadded(values: NDArray, pixels: int) -> NDArray:
    return values[tuple(slice(pixels, n - pixels) for n in values.shape)]


def _square(offset: tuple[int, ...]) -> int:
    return sum(i * i for i in offset)
