"""Parts of an image: the pixels of boxes and polygons, and a box around pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.ndimage import find_objects
from skimage.draw import polygon

from napari_unet.errors import BadInput

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = ["box_of", "fill_region"]

_FLAT = 1e-3  # pixels by which the corners of a region may leave their plane


def fill_region(known: NDArray[np.bool_], region: ArrayLike, number: int) -> None:
    """Set the pixels whose centres lie in a box or polygon, or on its edge.

    Parameters
    ----------
    known : bool array
        Changed in place. A region may reach beyond it, or lie outside.
    region : array of shape (vertex, axis)
        The corners in pixels, in order; the centre of the first pixel is 0. They
        lie in one plane. If there are fewer axes than `known` has, the first ones
        are missing and every position along them is set.
    number : int
        What to call the region in messages.

    Raises
    ------
    BadInput
        If the corners enclose nothing or do not lie in a plane of the array.
    """
    vertices = np.asarray(region, np.float64)
    if vertices.ndim != 2 or not 2 <= vertices.shape[1] <= known.ndim:
        raise BadInput(
            f"Region {number} has vertices of shape {vertices.shape}; the labels have "
            f"{known.ndim} axes. Draw it on the annotated image."
        )
    if len(vertices) < 3 or not np.isfinite(vertices).all():
        raise BadInput(
            f"Region {number} encloses nothing. Delete it, or draw a rectangle or "
            "polygon instead."
        )
    lies_in = np.flatnonzero(np.ptp(vertices, axis=0) > _FLAT).tolist()
    if len(lies_in) > 2:
        raise BadInput(
            f"Region {number} does not lie in one plane of the stack. Draw it again "
            "in one plane."
        )
    if len(lies_in) < 2:
        return  # a line or a point, as a click leaves it
    index: list[int | slice] = [slice(None)] * known.ndim
    first = known.ndim - vertices.shape[1]
    for axis in set(range(vertices.shape[1])) - set(lies_in):
        position = int(np.floor(vertices[0, axis] + 0.5))
        if not 0 <= position < known.shape[first + axis]:
            return
        index[first + axis] = position
    _fill_polygon(known[tuple(index)], vertices[:, lies_in])


def box_of(mask: NDArray[np.bool_]) -> tuple[slice, ...]:
    """Return the box around the pixels of a mask, which has some."""
    (box,) = find_objects(mask.astype(np.uint8))
    return tuple(box)


def _fill_polygon(planes: NDArray[np.bool_], vertices: NDArray) -> None:
    """Fill a polygon in the last two axes."""
    if _is_box(vertices):  # much faster
        low = np.maximum(np.ceil(vertices.min(axis=0)), 0).astype(int)
        high = np.maximum(np.floor(vertices.max(axis=0)) + 1, 0).astype(int)
        planes[..., low[0] : high[0], low[1] : high[1]] = True
        return
    rows, columns = polygon(vertices[:, 0], vertices[:, 1], planes.shape[-2:])
    planes[..., rows, columns] = True


def _is_box(vertices: NDArray) -> bool:
    edges = vertices - np.roll(vertices, 1, axis=0)
    parallel = bool((edges == 0).any(axis=1).all())
    return len(vertices) == 4 == len(np.unique(vertices, axis=0)) and parallel
