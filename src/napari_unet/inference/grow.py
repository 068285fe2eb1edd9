"""Growing objects back by what was cut between them."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from napari_unet.inference.runs import bands
from napari_unet.inference.spread import spread_steps
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
    grown = np.empty_like(labels)

    def grow(band: slice) -> None:
        low, high = band.start - pixels, band.stop + pixels
        around = labels[max(low, 0) : high]
        beyond = max(-low, 0), max(high - len(labels), 0)
        padded = np.pad(around, [beyond, *[(pixels, pixels)] * (labels.ndim - 1)])
        grown[band] = _grow(padded, pixels, offsets)

    yield from spread_steps(grow, bands(labels.shape))
    return grown


def _grow(padded: NDArray, pixels: int, offsets: list[tuple[int, ...]]) -> NDArray:
    """Look for the nearest object of what is not far from any, but for the padding."""
    inner = (slice(pixels, -pixels),) * padded.ndim
    is_object = padded != 0
    is_near = np.zeros_like(is_object)
    is_near[inner] = _dilate(is_object, pixels)[inner] & ~is_object[inner]
    place = np.flatnonzero(is_near)
    strides = [step // padded.itemsize for step in padded.strides]
    labels = padded.reshape(-1)
    grown = labels.copy()
    for _, ring in itertools.groupby(offsets, _square):
        found = np.zeros(len(place), dtype=labels.dtype)
        for offset in ring:
            step = sum(i * stride for i, stride in zip(offset, strides, strict=True))
            np.copyto(found, labels[place + step], where=found == 0)
        grown[place] = found
        place = place[found == 0]
    result: NDArray = grown.reshape(padded.shape)[inner]
    return result


def _dilate(mask: NDArray, pixels: int) -> NDArray:
    """Set what lies in a box around anything that is set."""
    for axis in range(mask.ndim):
        wide = mask.copy()
        for step in range(1, pixels + 1):
            ahead = (*[slice(None)] * axis, slice(step, None))
            back = (*[slice(None)] * axis, slice(-step))
            wide[ahead] |= mask[back]
            wide[back] |= mask[ahead]
        mask = wide
    return mask


def _square(offset: tuple[int, ...]) -> int:
    return sum(i * i for i in offset)
