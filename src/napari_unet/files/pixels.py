"""An image copied into a TIFF file, with all its values as they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import tifffile

from napari_unet.errors import BadInput
from napari_unet.files.atomic import atomic_path
from napari_unet.files.write_tiff import (
    CLASSIC_BYTES,
    IMAGEJ_AXES,
    SOFTWARE,
    imagej_options,
    ome_metadata,
)
from napari_unet.steps import Progress

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["Pixels", "file_order", "file_pixels", "write_pixels_steps"]

_BAND_BYTES = 1 << 25
# Types that OME-TIFF knows; the others become one that holds the same values.
_KEPT = frozenset("u1 u2 u4 i1 i2 i4 f4 f8".split())
_WIDER = {"b1": "u1", "f2": "f4"}
# ImageJ has fewer; what it has, Fiji opens without Bio-Formats.
_OF_IMAGEJ = {False: ("uint8", "uint16", "float32"), True: ("uint8",)}


@dataclass(frozen=True, eq=False)
class Pixels:
    """An image as a file has it: axes in the order TZCYXS, in the type of the file.

    Parameters
    ----------
    image : array
        Anything with ``shape``, ``dtype`` and numpy slicing: numpy, dask, zarr.
    given_axes : str
        Of ``image``, with C for samples that are no colours.
    dtype : numpy.dtype
        In the file; holds all values as they are.
    """

    image: Any
    given_axes: str
    dtype: np.dtype[Any]

    @property
    def axes(self) -> str:
        """One letter for each axis of the file."""
        return "".join(sorted(self.given_axes, key="TZCYXS".index))

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each axis of the file."""
        shape = self.image.shape
        return tuple(int(shape[self.given_axes.index(axis)]) for axis in self.axes)

    @property
    def nbytes(self) -> int:
        """Size of all pixels in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def bands(self) -> Iterator[NDArray[Any]]:
        """Read the image in the order of the file; only one band is in memory.

        Yields
        ------
        array
            Some planes of a stack or rows of a plane, contiguous.

        Raises
        ------
        BadInput
            If a lazy image cannot be read.
        """
        plane = self.axes.index("Y")
        budget = _BAND_BYTES // self.image.dtype.itemsize
        # Some planes of the innermost stack, or some rows of a large plane.
        cut = plane - (plane > 0 and math.prod(self.shape[plane:]) <= budget)
        count = max(1, budget // math.prod(self.shape[cut + 1 :]))
        left = [axis for axis in self.given_axes if axis in self.axes[cut:]]
        order = [left.index(axis) for axis in self.axes[cut:]]
        for index in np.ndindex(self.shape[:cut]):
            for first in range(0, self.shape[cut], count):
                where: dict[str, Any] = dict(zip(self.axes, index, strict=False))
                where[self.axes[cut]] = slice(first, first + count)
                key = tuple(where.get(axis, slice(None)) for axis in self.given_axes)
                try:
                    band = np.asarray(self.image[key])
                except (OSError, ValueError) as error:
                    raise BadInput(
                        f"The image cannot be read: {error}. Check its file."
                    ) from error
                yield np.ascontiguousarray(band.transpose(order), self.dtype)


def file_order(axes: str, shape: tuple[int, ...]) -> str:
    """Name the axes of an image as a file names them.

    Parameters
    ----------
    axes : str
        One letter for each axis, at most one of C and S among them.
    shape : tuple of int
        Their lengths.

    Returns
    -------
    str
        In the same order, with C instead of S unless there are 3 or 4 samples:
        fewer or more are no colours.
    """
    is_colour = "S" in axes and shape[axes.index("S")] in (3, 4)
    return axes if is_colour else axes.replace("S", "C")


def file_pixels(image: Any, axes: str) -> Pixels:
    """Prepare an image for a file without changing any of its values.

    Parameters
    ----------
    image : array
        Not empty. Whole 64-bit numbers are looked through once: they must fit
        into 32 bits.
    axes : str
        One letter for each axis.

    Returns
    -------
    Pixels

    Raises
    ------
    BadInput
        If a TIFF file that other programs read cannot hold the values.
    """
    if not hasattr(image, "shape") or not hasattr(image, "dtype"):
        image = np.asarray(image)
    given = file_order(axes, tuple(image.shape))
    dtype = np.dtype(image.dtype)
    kind = f"{dtype.kind}{dtype.itemsize}"
    kind = _WIDER.get(kind, kind)
    if kind in ("i8", "u8"):
        kind = _narrower(Pixels(image, given, dtype.newbyteorder("=")))
    if kind not in _KEPT:
        raise BadInput(
            f"Pixels of the type {dtype} cannot be kept in a TIFF file; convert the "
            "image to 8, 16 or 32 bits, or to float."
        )
    return Pixels(image, given, np.dtype(kind))


def write_pixels_steps(
    path: Path, pixels: Pixels, pixel_size: Mapping[str, float]
) -> Generator[Progress, None, None]:
    """Write an image uncompressed; a lazy one never lies in memory.

    Parameters
    ----------
    path : Path
        The file to make or to replace; all of it or nothing appears.
    pixels : Pixels
        What to write.
    pixel_size : mapping of str to float
        Axis letter to micrometres.

    Yields
    ------
    Progress
        Over the bytes.

    Raises
    ------
    BadOutput
        If it cannot be written.
    BadInput
        If a lazy image cannot be read.
    """
    lengths = dict(zip(pixels.axes, pixels.shape, strict=True))
    big = pixels.nbytes > CLASSIC_BYTES
    as_ome = bool(
        big
        or str(pixels.dtype) not in _OF_IMAGEJ["S" in lengths]
        or lengths.get("S", 3) != 3
        # ImageJ's calibration always has X and Y.
        or (pixel_size and not {"X", "Y"} <= set(pixel_size))
    )
    if as_ome:
        metadata = ome_metadata(pixels.axes, pixel_size, {})
        options: dict[str, Any] = {"shape": pixels.shape, "metadata": metadata}
    else:
        # With fewer axes tifffile takes an X of length 1 for the samples.
        shape = tuple(lengths.get(axis, 1) for axis in IMAGEJ_AXES)
        options = imagej_options(shape, pixel_size, {})
    with atomic_path(path) as part, open(part, "wb+") as file:
        with tifffile.TiffWriter(
            file, bigtiff=big, ome=as_ome, imagej=not as_ome, byteorder="<"
        ) as writer:
            # The header, and room for the pixels.
            place = writer.write(
                dtype=pixels.dtype.newbyteorder("<"),
                photometric="rgb" if "S" in lengths else "minisblack",
                software=SOFTWARE,
                returnoffset=True,
                **options,
            )
        assert place is not None
        file.seek(place[0])
        done = 0
        for band in pixels.bands():
            file.write(band.astype(band.dtype.newbyteorder("<"), copy=False).data)
            done += band.nbytes
            yield Progress(done, pixels.nbytes, f"writing {path.name}")


def _narrower(pixels: Pixels) -> str:
    """Return the type of 32 bits that holds all values of 64 bits."""
    low, high = 0, 0
    for band in pixels.bands():
        low, high = min(low, int(band.min())), max(high, int(band.max()))
    for kind in ("i4", "u4"):
        limits = np.iinfo(kind)
        if limits.min <= low and high <= limits.max:
            return kind
    raise BadInput(
        f"The pixels run from {low} to {high}, and a TIFF file that other programs "
        "read holds 32 bits; scale the image, or convert it to float."
    )
