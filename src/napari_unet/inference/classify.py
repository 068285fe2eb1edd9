"""What is kept of the probabilities of a tile, made where they were computed.

A GPU then sends one byte of a pixel instead of a float of every class.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

Array = TypeVar("Array", "NDArray", Tensor)

__all__ = [
    "Reduction",
    "code_type",
    "encode",
    "foreground",
    "keep_all",
    "quantise",
    "to_codes",
]

# From float32 probabilities of shape (class, *spatial) to what is kept of them, of
# shape (kept, *spatial). Each pixel by itself: tiles are reduced one by one.
Reduction: TypeAlias = Callable[[Tensor], Tensor]


def keep_all(probabilities: Tensor) -> Tensor:
    """Keep the probabilities as they are."""
    return probabilities


def quantise(probabilities: Tensor) -> Tensor:
    """Keep the foreground's probabilities as uint8, 255 meaning 1.

    0 is left for what is background for certain: NaN, or not predicted.
    """
    found = foreground(probabilities)
    levels = (found * 255).round_()
    return torch.where(found > 0, levels.clamp(min=1), levels).to(torch.uint8)


def to_codes(kinds: Sequence[str], threshold: float) -> Reduction:
    """Return what keeps what objects are made of; see `encode`."""
    return partial(_codes_of_all, kinds=tuple(kinds), threshold=threshold)


def _codes_of_all(
    probabilities: Tensor, kinds: Sequence[str], threshold: float
) -> Tensor:
    return _encode(foreground(probabilities), kinds, threshold)[None]


def foreground(probabilities: Array) -> Array:
    """Leave out the background's probabilities; a sigmoid has none.

    Parameters
    ----------
    probabilities : array or Tensor of shape (class, ...)
        As the engine gives them.

    Returns
    -------
    array or Tensor of shape (class without background, ...)
        A view.
    """
    return probabilities[1:] if len(probabilities) > 1 else probabilities


def code_type(kinds: Sequence[str]) -> np.dtype:
    """The dtype of what `encode` returns."""
    return np.dtype(np.uint8 if 2 * len(kinds) + 1 < 256 else np.int32)


def encode(probabilities: NDArray, kinds: Sequence[str], threshold: float) -> NDArray:
    """Say in one number what objects need to know of a pixel.

    Parameters
    ----------
    probabilities : array of shape (class, *spatial)
        Of the classes after the background, float or uint8 where 255 means 1.
    kinds : sequence of str
        What each of them is: "objects" or "region".
    threshold : float
        Above it a pixel belongs to an object.

    Returns
    -------
    array of shape spatial, of `code_type`
        Twice the index of the class that the pixel belongs to, or would belong to;
        and 1 more where that is an object.
    """
    if list(kinds) == ["objects"]:  # by numpy ten times as fast on a CPU
        least = _least_above(threshold, probabilities.dtype == np.uint8)
        codes: NDArray = _encode_one(probabilities[0], least, np.uint8)
        return codes
    values = torch.from_numpy(np.require(probabilities, requirements=["C", "W"]))
    codes = _encode(values, kinds, threshold).numpy()
    return codes


def _least_above(threshold: float, is_quantised: bool) -> float:
    """Return what a pixel of an object is above; between integers there is nothing."""
    return math.floor(255 * threshold) if is_quantised else threshold


def _encode_one(probability: Any, least: float, byte: Any) -> Any:
    """Encode one class of objects, by numpy or by torch."""
    codes = (probability > 0).view(byte)
    codes += codes
    codes += probability > least
    return codes


def _encode(probabilities: Tensor, kinds: Sequence[str], threshold: float) -> Tensor:
    least = _least_above(threshold, probabilities.dtype == torch.uint8)
    if list(kinds) == ["objects"]:
        codes: Tensor = _encode_one(probabilities[0], least, torch.uint8)
        return codes
    owner, strength = _assign_classes(probabilities, kinds)
    is_object = torch.zeros_like(owner, dtype=torch.bool)
    for index, kind in enumerate(kinds, start=1):
        if kind == "objects":
            is_object |= owner == index
    dtype = torch.uint8 if code_type(kinds).itemsize == 1 else torch.int32
    codes = 2 * owner.to(dtype)
    codes += (strength > least) & is_object
    return codes


def _assign_classes(
    probabilities: Tensor, kinds: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Decide which class a pixel belongs to, or would belong to.

    Returns
    -------
    owner : int64 Tensor of shape spatial
        Of a class of kind "objects" where it is the likeliest of all but the
        background, and possible at all; of a "region" where it beats the
        background, too. 0 elsewhere.
    strength : Tensor of shape spatial
        The probability of the likeliest class.
    """
    scale = 255 if probabilities.dtype == torch.uint8 else 1
    strength = probabilities.amax(dim=0)
    owner = probabilities.argmax(dim=0)  # of equal ones the first
    owner += 1
    rest = scale - probabilities.sum(dim=0, dtype=torch.float32)
    beaten = {"objects": strength == 0, "region": strength <= rest}
    for index, kind in enumerate(kinds, start=1):
        is_lost = beaten.get(kind)
        if is_lost is None:
            owner[owner == index] = 0
        else:
            owner[(owner == index) & is_lost] = 0
    return owner, strength
