"""Which class a pixel belongs to, and whether it is above the threshold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


def code_type(kinds: Sequence[str]) -> np.dtype:
    """The dtype of what `encode` returns."""
    return np.min_scalar_type(2 * len(kinds) + 1)


def encode(
    probabilities: NDArray, kinds: Sequence[str], threshold: float
) -> NDArray[np.unsignedinteger]:
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
    unsigned integer array of shape spatial
        Twice the index of the class that the pixel belongs to, or would belong to;
        and 1 more where that is an object.
    """
    scale = 255 if probabilities.dtype == np.uint8 else 1
    if list(kinds) == ["objects"]:
        is_possible = probabilities[0] > 0
        codes: NDArray[np.unsignedinteger] = is_possible.view(np.uint8)
        codes += codes
        codes += probabilities[0] > threshold * scale
        return codes
    owner, strength = assign_classes(probabilities, kinds)
    codes = 2 * owner.astype(code_type(kinds))
    are_objects = np.array([False, *(kind == "objects" for kind in kinds)])
    codes += (strength > threshold * scale) & are_objects[owner]
    return codes


def assign_classes(
    probabilities: NDArray, kinds: Sequence[str]
) -> tuple[NDArray, NDArray]:
    """Decide which class a pixel belongs to, or would belong to.

    Parameters
    ----------
    probabilities, kinds
        See `encode`.

    Returns
    -------
    owner : unsigned integer array of shape spatial
        Of a class of kind "objects" where it is the likeliest of all but the
        background, and possible at all; of a "region" where it beats the
        background, too. 0 elsewhere.
    strength : array of shape spatial
        The probability of the likeliest class.
    """
    scale = 255 if probabilities.dtype == np.uint8 else 1
    strength = probabilities.max(axis=0)
    dtype = np.min_scalar_type(len(probabilities))
    owner = probabilities.argmax(axis=0).astype(dtype)
    owner += 1
    rest = scale - probabilities.sum(axis=0, dtype=np.float32)
    beaten = {"objects": strength == 0, "region": strength <= rest}
    for index, kind in enumerate(kinds, start=1):
        is_lost = beaten.get(kind, True)
        owner[(owner == index) & is_lost] = 0
    return owner, strength
