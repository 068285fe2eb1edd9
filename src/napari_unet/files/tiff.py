"""TIFF in all its flavours, strictly: damage is an error, never a partial image."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import tifffile

from napari_unet.errors import BadInput
from napari_unet.files import tiff_metadata
from napari_unet.files.source import (
    UNNAMED,
    Source,
    assemble,
    check_array,
    pixels_size,
    reading,
)
from napari_unet.files.tiff_log import listening
from napari_unet.files.tiff_planes import planes_of

if TYPE_CHECKING:
    from pathlib import Path

    import dask.array
    from numpy.typing import NDArray

    from napari_unet.files.tiff_planes import PagePlanes, RawPlanes

RGB, PALETTE, SEPARATED, YCBCR = 2, 3, 5, 6
MIN_IS_WHITE = 0
# Decoders of these give back RGB where the file says YCbCr; the others do not.
KEEPS_YCBCR = {1, 5, 8, 32773, 32946, 34925, 50000, 50013}
SAMPLES = {SEPARATED: "CMYK inks", YCBCR: "YCbCr values", 8: "CIE L*a*b* values"}

# What tifffile calls axes that we have, too.
SAME_AXES = {"E": "C", "L": "C"}


def read_tiff(path: Path, max_bytes: int | None = None) -> Source:
    """Read the first image of a TIFF file.

    Parameters
    ----------
    path : Path
        A file that begins like a TIFF.
    max_bytes : int, optional
        A larger image is lazy.

    Returns
    -------
    Source
        Its pixels, checked to be all there, and what the metadata says of them.

    Raises
    ------
    BadInput
        For whatever is damaged, incomplete, forged or unsupported.
    """
    notes: list[str] = []
    with (
        reading(path),
        listening(path, notes),
        tifffile.TiffFile(path) as tiff,
    ):
        if not len(tiff.pages):
            raise BadInput(f"{path.name} holds no image.")
        ome = None
        if tiff.ome_metadata is None and "<OME" in tiff.pages.first.description[:4096]:
            raise BadInput(
                f"{path.name}: its OME-XML header is cut off; get a fresh copy."
            )
        if tiff.ome_metadata is not None:
            # Before ``series``, which opens the files that the header names.
            ome = tiff_metadata.read_ome(tiff.ome_metadata, path)
        series = tiff.series[0]
        planes = _checked_planes(path, tiff, series, ome)
        pixel_size = _pixel_size(tiff, series, ome)
        notes += _notes(tiff, series, ome)
        axes = series.get_axes(squeeze=False)
        keyframe = series.keyframe
        is_rgb = _is_rgb(keyframe)
        names = ome.channel_names if ome is not None and series.kind == "ome" else ()
    data, axes = _settle_samples(path, assemble(planes, max_bytes), axes, is_rgb)
    return Source(path, data, axes, pixel_size, tuple(notes), names)


def _checked_planes(
    path: Path,
    tiff: tifffile.TiffFile,
    series: tifffile.TiffPageSeries,
    ome: tiff_metadata.OmeFile | None,
) -> RawPlanes | PagePlanes:
    """Check that the image is one that we read, and all of it."""
    if series.keyframe.dtype is None or series.transform is not None:
        raise BadInput(
            f"{path.name} holds pixels of an unsupported kind "
            f"({series.keyframe.bitspersample} bits); save it again as 8 or 16 bits."
        )
    axes, shape = series.get_axes(squeeze=False), series.get_shape(squeeze=False)
    check_array(path, shape, axes, np.dtype(series.dtype))
    if ome is not None and ome.images and series.kind in ("generic", "uniform"):
        raise BadInput(
            f"{path.name}: its OME-XML header does not describe the pages of the file; "
            "save it again with the program that made it."
        )
    planes = planes_of(path, series)
    there = math.prod(planes.shape[: planes.stack_ndim])
    declared = 0 if ome is None or series.kind != "ome" else ome.planes
    if series.kind == "imagej":
        # Colours may be counted as images of their own.
        metadata = tiff.imagej_metadata or {}
        declared = int(metadata.get("images", 1))
        there *= series.keyframe.samplesperpixel
    if there < declared:
        raise BadInput(
            f"{path.name} is incomplete: it declares {declared} plane(s) and has "
            f"{there}; get a fresh copy."
        )
    return planes


def _pixel_size(
    tiff: tifffile.TiffFile,
    series: tifffile.TiffPageSeries,
    ome: tiff_metadata.OmeFile | None,
) -> dict[str, float]:
    if ome is not None:
        return ome.pixel_size
    if series.kind == "imagej":
        metadata = tiff.imagej_metadata or {}
        return tiff_metadata.imagej_pixel_size(metadata, tiff.pages.first)
    return tiff_metadata.plain_pixel_size(tiff.pages.first)


def _notes(
    tiff: tifffile.TiffFile,
    series: tifffile.TiffPageSeries,
    ome: tiff_metadata.OmeFile | None,
) -> list[str]:
    """Say what a user might not expect of the file."""
    notes = []
    keyframe = series.keyframe
    photometric = int(keyframe.photometric)
    if ome is not None and ome.part_of:
        notes.append(
            f"This file is a part of the image that {ome.part_of} describes; only "
            "this part is read."
        )
    if len(tiff.series) > 1:
        notes.append(
            f"The file holds {len(tiff.series)} images; only the first "
            f"({pixels_size(series.shape)}) is used."
        )
    if photometric == MIN_IS_WHITE:
        notes.append("White is stored as 0 in this file; the values are kept so.")
    elif photometric == PALETTE and series.kind != "imagej":
        notes.append("The file has a colour table; the stored values are used.")
    elif keyframe.samplesperpixel > 1 and not _is_rgb(keyframe):
        name = SAMPLES.get(photometric, "samples")
        notes.append(
            f"The {keyframe.samplesperpixel} {name} of each pixel are read as channels."
        )
    return notes


def _is_rgb(page: tifffile.TiffPage) -> bool:
    """Tell whether the samples of a pixel are red, green, blue (and alpha)."""
    photometric = int(page.photometric)
    coloured = photometric == RGB or (
        photometric == YCBCR and int(page.compression) not in KEEPS_YCBCR
    )
    return coloured and page.samplesperpixel in (3, 4)


def _settle_samples(
    path: Path, data: NDArray | dask.array.Array, axes: str, is_rgb: bool
) -> tuple[NDArray | dask.array.Array, str]:
    """Put colours last; samples that are no colours are channels before Y."""
    axes = "".join(SAME_AXES.get(letter, letter) for letter in axes)
    axes = "".join(a if a in "TCZYXS" else UNNAMED for a in axes)
    # Without this, two axes of one name would hide each other.
    for letter in "TCZ":
        first = axes.find(letter)
        axes = axes[: first + 1] + axes[first + 1 :].replace(letter, UNNAMED)
    for letter in "YX":
        last = axes.rfind(letter)
        axes = axes[:last].replace(letter, UNNAMED) + axes[last:]
    sample = axes.find("S")
    if sample < 0 or data.shape[sample] == 1:
        return data, axes
    if is_rgb:
        target, letter = len(axes) - 1, "S"
    else:
        channel = axes.find("C")
        if channel >= 0 and data.shape[channel] > 1:
            raise BadInput(
                f"{path.name} has {data.shape[channel]} channels of "
                f"{data.shape[sample]} samples each; save them as plain channels."
            )
        axes = axes.replace("C", UNNAMED)
        target, letter = axes.index("Y"), "C"
    rest = axes[:sample] + axes[sample + 1 :]
    if not is_rgb and sample < target:
        target -= 1
    order = [i for i in range(data.ndim) if i != sample]
    order.insert(target, sample)
    return data.transpose(order), rest[:target] + letter + rest[target:]
