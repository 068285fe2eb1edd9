"""PNG, JPEG and BMP."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import imagecodecs
import numpy as np
import PIL.Image

from napari_unet.errors import BadInput
from napari_unet.files.source import Source, check_fits, reading

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

FORMATS = ("PNG", "JPEG", "BMP")

# Modes of Pillow whose pixels are numbers as they are.
_GREY = {"1", "L", "I", "F", "I;16", "I;16B", "I;16L"}
_COLOUR = {"RGB", "RGBA"}


def read_photo(path: Path) -> Source:
    """Read a PNG, JPEG or BMP file.

    Parameters
    ----------
    path : Path
        A file that begins like one of them.

    Returns
    -------
    Source
        With axes YX, or YXS for colours. The resolution in such files is for
        printing: there is no pixel size.
    """
    notes: list[str] = []
    with reading(path), warnings.catch_warnings():
        # Our own budget is the check; Pillow's limit is fixed.
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
        with PIL.Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            check_fits(path, width * height * 8, f"an image of {width}×{height}")
            if getattr(image, "n_frames", 1) > 1:
                notes.append("The file holds several images; only the first is used.")
            data = _pixels(path, image, notes)
    return Source(path, data, "YXS"[: data.ndim], notes=tuple(notes))


def _pixels(path: Path, image: PIL.Image.Image, notes: list[str]) -> NDArray[Any]:
    with open(path, "rb") as file:
        header = file.read(26)
    if image.format == "PNG" and header[24] == 16 and header[25] != 0:
        # Pillow reads 16-bit colours as 8-bit ones.
        data: NDArray[Any] = imagecodecs.png_decode(path.read_bytes())
        return _without_grey_alpha(data, notes)
    mode = image.mode
    if mode in ("P", "PA"):
        notes.append("The file has a colour table; the displayed colours are used.")
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        colours = np.asarray(image)
        grey = (colours[..., :1] == colours[..., :3]).all()
        opaque = colours.shape[-1] == 3 or (colours[..., 3] == 255).all()
        return colours[..., 0].copy() if grey and opaque else colours.copy()
    if mode in ("LA", "La"):
        return _without_grey_alpha(np.asarray(image), notes)
    if mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        notes.append(f"The colours of the file ({mode}) were converted to RGB.")
        return np.array(image.convert("RGB"))
    if mode not in _GREY | _COLOUR:
        raise BadInput(f"{path.name} has pixels of an unsupported kind ({mode}).")
    data = np.array(image)
    return data.astype(data.dtype.newbyteorder("="), copy=False)


def _without_grey_alpha(data: NDArray[Any], notes: list[str]) -> NDArray[Any]:
    """Drop the transparency of a grey image."""
    if data.ndim == 3 and data.shape[-1] == 2:
        notes.append("The transparency of the grey image was dropped.")
        return data[..., 0].copy()
    return data
