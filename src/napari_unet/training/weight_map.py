"""Pixel weights that make a network learn the borders between touching objects."""

from __future__ import annotations

import math
from itertools import product
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy.ndimage import distance_transform_edt, find_objects

from napari_unet.errors import BadInput
from napari_unet.training.settings import W0_SIGMA

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = ["border_weight_map", "cut_gaps", "number_objects"]

_SMALL = 0xFFFF  # numbers that may be left as they are, also with gaps between them
# Border weights below this are left out: it bounds how far an object reaches.
_NEGLIGIBLE = 1e-5


def border_weight_map(
    labels: ArrayLike,
    w0: float | None = None,
    sigma: float | None = None,
    *,
    preset: Literal["paper", "falk"] = "paper",
    known: ArrayLike | None = None,
    balance_classes: bool = True,
    v: float = 0.1,
    sigma_balance: float = 10.0,
    device: str | None = None,
) -> NDArray[np.float32]:
    """Weight the pixels of a training image.

    With d1 and d2 the Euclidean distances of a background pixel to the nearest and
    to the second-nearest object, its border term is
    ``w0 * exp(-(d1 + d2)**2 / (2 * sigma**2))``; it is 0 where there are fewer than
    two objects. The weights are

    - "paper" (Ronneberger et al. 2015, equation 2): ``w_c + border`` on background,
      ``w_c`` on objects. The class weight is
      ``w_c = known pixels / (classes present * known pixels of class c)`` for the two
      classes background and object: both classes have the same sum of ``w_c``, and
      its mean over the known pixels is 1.
    - "falk" (Falk et al. 2019): ``v + border
      + (1 - v) * exp(-d1**2 / (2 * sigma_balance**2))`` on background, 1 on objects.

    Parameters
    ----------
    labels : integer array, 2D or 3D
        0 is background, every other value one object, connected or not. Touching
        objects have no background between them to weight: see `cut_gaps`.
    w0, sigma : float, optional
        Height and width (pixels) of the border term: by default 10 and 5, for
        "falk" 50 and 6.
    preset : "paper" or "falk", optional
        Which of the two formulas.
    known : bool array of the shape of `labels`, optional
        False where the truth is unknown: weight 0 there, and these pixels do not
        count for ``w_c``. Objects there still make borders around them.
    balance_classes : bool, optional
        False sets ``w_c`` to 1. Only for "paper".
    v, sigma_balance : float, optional
        Lowest background weight, and how fast (pixels) it is reached away from the
        objects. Only for "falk".
    device : str, optional
        Where torch computes d1 and d2: worth it on a GPU only, and much so in 3D. By
        default, and where memory runs out there, scipy does.

    Returns
    -------
    float32 array of the shape of `labels`
        Exact to 1e-5.

    Raises
    ------
    BadInput
        If the arrays or numbers cannot be used.

    Examples
    --------
    >>> labels = np.zeros((5, 7), np.uint8)
    >>> labels[:, :3], labels[:, 4:] = 1, 2
    >>> border_weight_map(labels, balance_classes=False)[2].round(1)
    array([ 1. ,  1. ,  1. , 10.2,  1. ,  1. ,  1. ], dtype=float32)
    """
    array = _as_labels(labels)
    mask = None if known is None else _as_mask(known, array.shape)
    if preset not in W0_SIGMA:
        raise BadInput(f"There is no preset {preset!r}: use 'paper' or 'falk'.")
    w0 = W0_SIGMA[preset][0] if w0 is None else w0
    sigma = W0_SIGMA[preset][1] if sigma is None else sigma
    _check_number("w0", w0, w0 >= 0, "0 or more")
    _check_number("sigma", sigma, sigma > 0, "more than 0")
    _check_number("v", v, 0 <= v <= 1, "between 0 and 1")
    _check_number("sigma_balance", sigma_balance, sigma_balance > 0, "more than 0")

    background = array == 0
    weights = _border_term(array, w0, sigma, device)
    if preset == "falk":
        near = np.zeros(array.shape)
        if not background.all():  # without objects the distance is infinite
            near = np.exp(
                -((distance_transform_edt(background) / sigma_balance) ** 2) / 2
            )
        weights += np.where(background, v + (1 - v) * near, 1.0)
    elif balance_classes:
        weights += _class_weights(background, mask)
    else:
        weights += 1.0
    if mask is not None:
        weights[~mask] = 0.0
    return weights.astype(np.float32)


def cut_gaps(labels: ArrayLike) -> NDArray:
    """Cut a one-pixel background gap between touching objects.

    As Falk et al. 2019: a pixel of an object becomes background if any of its
    neighbours that come before it in memory order (4 of 8 in 2D, 13 of 26 in 3D)
    belongs to another object. Afterwards no two objects touch, not even at a
    corner. An object loses one pixel of its border at most, so that growing it by
    one pixel restores it, unless it was so thin that nothing is left.

    Parameters
    ----------
    labels : integer array, 2D or 3D
        0 is background, every other value one object.

    Returns
    -------
    array of the same shape and type
        A copy.

    Raises
    ------
    BadInput
        If `labels` is not an integer array with two or three axes.
    """
    array = _as_labels(labels)
    cut = array.copy()
    steps = list(product((-1, 0, 1), repeat=array.ndim))
    for step in steps[: len(steps) // 2]:  # those that lead back in memory order
        here = tuple(slice(max(0, -s), min(0, -s) or None) for s in step)
        before = tuple(slice(max(0, s), min(0, s) or None) for s in step)
        neighbour = array[before]
        cut[here][(neighbour != 0) & (neighbour != array[here])] = 0
    return cut


def _border_term(
    labels: NDArray, w0: float, sigma: float, device: str | None
) -> NDArray[np.float64]:
    """Compute the border term from the two smallest distances of every pixel.

    An object cannot matter where its own distance alone makes the term negligible.
    """
    term = np.zeros(labels.shape)
    if w0 <= _NEGLIGIBLE:
        return term
    reach = math.ceil(sigma * math.sqrt(2 * math.log(w0 / _NEGLIGIBLE)))
    objects = _numbered(labels)
    found = _two_nearest_on(device, objects, reach) if device else None
    first, second = found or _two_nearest(objects, reach)
    between = (labels == 0) & np.isfinite(second)
    both = first[between].astype(np.float64) + second[between]
    term[between] = w0 * np.exp(-((both / sigma) ** 2) / 2)
    return term


def _two_nearest_on(
    device: str, objects: NDArray[np.int32], reach: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """Let torch compute; None if the device is full."""
    from napari_unet.inference.backends import is_out_of_memory
    from napari_unet.training.two_nearest import two_nearest

    try:
        return two_nearest(objects, reach, device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def _two_nearest(
    objects: NDArray[np.int32], reach: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Look at each object in its bounding box and a margin only."""
    first = np.full(objects.shape, np.inf, np.float32)
    second = first.copy()
    for number, box in enumerate(find_objects(objects), start=1):
        if box is None:
            continue
        window = tuple(
            slice(max(0, side.start - reach), side.stop + reach) for side in box
        )
        distance = distance_transform_edt(objects[window] != number)
        distance = distance.astype(np.float32)
        nearest = first[window]
        np.minimum(second[window], np.maximum(nearest, distance), out=second[window])
        np.minimum(nearest, distance, out=nearest)
    return first, second


def _class_weights(
    background: NDArray[np.bool_], known: NDArray[np.bool_] | None
) -> NDArray[np.float64]:
    """Compute w_c for every pixel."""
    counted = background if known is None else background[known]
    n_background = int(np.count_nonzero(counted))
    n_object = counted.size - n_background
    present = (n_background > 0) + (n_object > 0)
    # A class without a known pixel weighs nothing anywhere that counts.
    of_background = counted.size / (present * n_background) if n_background else 0.0
    of_object = counted.size / (present * n_object) if n_object else 0.0
    return np.where(background, of_background, of_object)


def _numbered(labels: NDArray) -> NDArray[np.int32]:
    """Give the objects small numbers, whatever their values."""
    if labels.min(initial=0) >= 0 and labels.max(initial=0) <= _SMALL:
        return labels.astype(np.int32)
    return number_objects(labels)


def number_objects(labels: NDArray) -> NDArray[np.int32]:
    """Number objects 1 … n whatever their values."""
    numbers = np.zeros(labels.shape, np.int32)
    foreground = labels != 0
    _, index = np.unique(labels[foreground], return_inverse=True)
    numbers[foreground] = index + 1
    return numbers


def _as_labels(labels: ArrayLike) -> NDArray:
    array = np.asarray(labels)
    if array.dtype.kind not in "biu" or array.ndim not in (2, 3):
        raise BadInput(
            f"Labels of type {array.dtype} with {array.ndim} axes cannot be used: "
            "give whole numbers in a 2D or 3D array."
        )
    return array


def _as_mask(known: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    mask = np.asarray(known)
    if mask.shape != shape or mask.dtype != bool:
        raise BadInput(
            f"The mask of known pixels is {mask.dtype} of shape {mask.shape}; it must "
            f"be true or false for every pixel of the labels, shape {shape}."
        )
    return mask


def _check_number(name: str, value: float, holds: bool, wanted: str) -> None:
    if not (holds and math.isfinite(value)):
        raise BadInput(f"{name} is {value!r}; it must be {wanted}.")
