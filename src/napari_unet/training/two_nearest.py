"""Distances to the two nearest objects, by torch on any device."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["two_nearest"]

# Pixels at once, for which about 300 MB are needed; with a long reach or many objects
# 550, because their numbers have 64 bits then.
_BLOCK = 1 << 22


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
    for core in _cores(objects.shape, reach):
        before = [min(side.start, reach) for side in core]
        around = tuple(
            slice(side.start - margin, side.stop + reach)
            for side, margin in zip(core, before, strict=True)
        )
        block = torch.from_numpy(objects[around]).to(device)
        wanted = list(zip(before, first[core].shape, strict=True))
        squares = _nearest_in(block, wanted, bits, reach)
        for whole, found in zip((first, second), squares, strict=True):
            square = found.cpu().numpy()
            part = whole[core]
            part[...] = np.where(square > objects.ndim * reach**2, np.inf, square)
            np.sqrt(part, out=part)
    return first, second


def _cores(shape: tuple[int, ...], reach: int) -> Iterator[tuple[slice, ...]]:
    """Cut an array into parts of which each, with what is around it, is a block.

    Where the reach is long, blocks are larger, because most of the work would be for
    what is around parts that are smaller than that.
    """
    sides = np.maximum(shape, 1)
    while np.minimum(sides + 2 * reach, shape).prod() > _BLOCK:
        longest = sides.argmax()
        if sides[longest] <= 2 * reach:
            break
        sides[longest] = -(-sides[longest] // 2)
    for start in product(*map(range, [0] * len(shape), shape, sides)):
        stop = np.minimum(start + sides, shape)
        yield tuple(map(slice, start, stop.tolist()))


def _nearest_in(
    objects: Tensor, wanted: Sequence[tuple[int, int]], bits: int, reach: int
) -> tuple[Tensor, Tensor]:
    """Go along one axis after the other, each time with squared distances.

    The nearest two objects of a pixel are among the nearest two of the pixels of any
    line through it, seen from there along the other axes. A distance and its object
    are one number, ``squared distance * 2**bits + object``, so that the smaller number
    is the nearer object.

    Of each axis only a start and length are wanted; what is around them is let go of
    after its axis.
    """
    farther = objects.ndim * reach**2 + 1
    fits = 2 * farther << bits < 2**31
    none, value = farther << bits, (1 << bits) - 1
    first = objects.to(torch.int32 if fits else torch.int64)
    first = torch.where(first == 0, none, first)
    second = torch.full_like(first, none)
    for axis, (start, length) in enumerate(wanted):
        seen, side = (first, second), first.shape[axis]
        first = torch.full_like(first.narrow(axis, start, length), none)
        second = first.clone()
        stop = start + length
        for step in range(-min(reach, stop - 1), min(reach, side - 1 - start) + 1):
            # Those that have a pixel so far away.
            least = max(start, -step)
            count = min(stop, side - step) - least
            nearest = first.narrow(axis, least - start, count)
            next_ = second.narrow(axis, least - start, count)
            for candidate in seen:
                other = candidate.narrow(axis, least + step, count)
                other = other + (step**2 << bits)
                lower, higher = nearest.minimum(other), nearest.maximum(other)
                same = (lower ^ higher) & value == 0
                torch.minimum(next_, higher.masked_fill_(same, none), out=next_)
                nearest.copy_(lower)
    return first >> bits, second >> bits
