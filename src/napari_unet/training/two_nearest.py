"""Distances to the two nearest objects, by torch on any device."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["two_nearest"]

_SLAB = 1 << 22  # pixels at once, for which about 300 MB are needed


def two_nearest(
    objects: NDArray[np.int32], reach: int, device: str
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Compute the Euclidean distances of every pixel to the two nearest objects.

    Parameters
    ----------
    objects : int32 array, 2D or 3D
        0 is background, every other value, all positive, one object.
    reach : int
        How far (pixels) is looked for objects.
    device : str
        A device of torch.

    Returns
    -------
    first, second : float32 array of the shape of `objects`
        Distances, 0 within an object. Exact up to `reach`; what is farther away may
        be infinite.
    """
    first = np.empty(objects.shape, np.float32)
    second = np.empty_like(first)
    bits = int(objects.max(initial=0)).bit_length()
    rows = max(_SLAB // max(math.prod(objects.shape[1:]), 1), 1)
    for start in range(0, len(objects), rows):
        before = min(start, reach)
        slab = torch.from_numpy(objects[start - before : start + rows + reach])
        squares = _nearest_in(slab.to(device), bits, reach)
        for whole, found in zip((first, second), squares, strict=True):
            part = whole[start : start + rows]
            square = found[before : before + len(part)].cpu().numpy()
            part[...] = np.where(square > objects.ndim * reach**2, np.inf, square)
            np.sqrt(part, out=part)
    return first, second


def _nearest_in(objects: Tensor, bits: int, reach: int) -> tuple[Tensor, Tensor]:
    """Go along one axis after the other, each time with squared distances.

    The nearest two objects of a pixel are among the nearest two of the pixels of any
    line through it, seen from there along the other axes. A distance and its object
    are one number, ``squared distance * 2**bits + object``, so that the smaller number
    is the nearer object.
    """
    farther = objects.ndim * reach**2 + 1
    fits = 2 * farther << bits < 2**31
    none, value = farther << bits, (1 << bits) - 1
    first = objects.to(torch.int32 if fits else torch.int64)
    first = torch.where(first == 0, none, first)
    second = torch.full_like(first, none)
    for axis, side in enumerate(objects.shape):
        seen = (first, second)
        first, second = torch.full_like(first, none), torch.full_like(first, none)
        furthest = min(reach, side - 1)
        for step in range(-furthest, furthest + 1):
            here = max(-step, 0), side - abs(step)
            there = max(step, 0), side - abs(step)
            nearest, next_ = first.narrow(axis, *here), second.narrow(axis, *here)
            for candidate in seen:
                other = candidate.narrow(axis, *there) + (step**2 << bits)
                lower, higher = nearest.minimum(other), nearest.maximum(other)
                same = (lower ^ higher) & value == 0
                torch.minimum(next_, higher.masked_fill_(same, none), out=next_)
                nearest.copy_(lower)
    return first >> bits, second >> bits
