"""A small picture of an image with its objects outlined."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from napari_unet.files.images import ImageFile

__all__ = ["make_thumbnail"]

SIDE = 256
OUTLINE = (255, 221, 0)


def make_thumbnail(image: ImageFile, labels: Any, axes: str, channel: int = 0) -> bytes:
    """Draw the middle plane, coarsely, with the outlines of its objects.

    Parameters
    ----------
    image : ImageFile
        Only what is drawn is read.
    labels : array
        Numpy or zarr, of the axes ``axes``.
    axes : str
        Those of the image without channels.
    channel : int
        Which one is shown.

    Returns
    -------
    bytes
        A JPEG of at most 256 x 256 pixels.
    """
    lengths = dict(zip(image.axes, image.data.shape, strict=True))
    step = -(-max(lengths["Y"], lengths["X"]) // SIDE)
    chosen: dict[str, int | slice] = {axis: n // 2 for axis, n in lengths.items()}
    chosen |= {"Y": slice(None, None, step), "X": slice(None, None, step)}
    chosen |= {"S": slice(None), "C": channel}
    pixels = np.asarray(image.data[tuple(chosen[axis] for axis in image.axes)])
    found = np.asarray(labels[tuple(chosen[axis] for axis in axes)])
    kept = [axis for axis in image.axes if axis in "YXS"]
    pixels = pixels.transpose([kept.index(a) for a in "YXS" if a in kept])
    if axes.index("Y") > axes.index("X"):
        found = found.T
    picture = _gray_levels(pixels)
    if picture.ndim == 2:
        picture = np.stack([picture] * 3, axis=-1)
    picture = np.ascontiguousarray(picture[..., :3])
    picture[_outlines(found)] = OUTLINE
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=85)
    return file.getvalue()


def _gray_levels(pixels: NDArray) -> NDArray[np.uint8]:
    """Stretch the contrast as viewers do."""
    values = pixels.astype(np.float64)
    finite = values[np.isfinite(values)]
    low, high = np.percentile(finite, (1, 99.8)) if finite.size else (0, 1)
    values = np.nan_to_num((values - low) / max(high - low, 1e-12), posinf=1, neginf=0)
    levels: NDArray[np.uint8] = (255 * values.clip(0, 1)).astype(np.uint8)
    return levels


def _outlines(labels: NDArray) -> NDArray[np.bool_]:
    """Tell which pixels of an object have another neighbour."""
    edge = np.zeros(labels.shape, bool)
    for axis in (0, 1):
        for side in (1, -1):
            neighbour = np.roll(labels, side, axis)
            edge |= neighbour != labels
    return edge & (labels > 0)
