"""Streaming a stack into a TIFF that Fiji and napari read with its axes."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import tifffile

if TYPE_CHECKING:
    import uuid
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from napari_unet.files.stack import Stack

IMAGEJ_AXES = "TZCYXS"

# Classic TIFF has 32-bit addresses; the margin is for headers and metadata.
CLASSIC_BYTES = 2**32 - 2**25
TILE = (512, 512)
STRIP_BYTES = 2**18
# What tifffile may hold beside the plane that is being compressed.
BUFFER_BYTES = 2**24

SOFTWARE = "napari-unet"


def is_ome(
    path: Path, stack: Stack, dtype: np.dtype[Any], pixel_size: Mapping[str, float]
) -> bool:
    """Tell whether a file gets OME metadata, because of its name or needs.

    Parameters
    ----------
    path : Path
        Its name.
    stack : Stack
        What is written.
    dtype : numpy.dtype
        As what it is written.
    pixel_size : mapping
        Axis letter to micrometres.

    Returns
    -------
    bool
        True for OME, False for ImageJ's metadata.
    """
    return bool(
        path.name.lower().endswith((".ome.tif", ".ome.tiff"))
        or _is_big(stack, dtype)
        or stack.is_tiled
        or dtype == np.uint32
        # ImageJ's calibration always has X and Y.
        or (pixel_size and not {"X", "Y"} <= set(pixel_size))
    )


def write_tiff(
    part: Path,
    stack: Stack,
    dtype: np.dtype[Any],
    pixel_size: Mapping[str, float],
    metadata: dict[str, Any],
    ome_uuid: uuid.UUID | None,
) -> None:
    """Write a stack plane by plane, or tile by tile where the planes are huge.

    Parameters
    ----------
    part : Path
        The file to write to.
    stack : Stack
        The pixels.
    dtype : numpy.dtype
        As what they are written.
    pixel_size : mapping
        Axis letter to micrometres.
    metadata : dict
        ``Description`` and ``Channel`` as tifffile has them for OME.
    ome_uuid : UUID, optional
        Identity of an OME file; without one the metadata are ImageJ's.
    """
    if ome_uuid is None:
        options = _imagej_options(stack, pixel_size, metadata)
    else:
        options = _ome_options(stack, pixel_size, metadata, ome_uuid)
    # Opened here: tifffile does not close its file when the header fails.
    with (
        open(part, "wb") as file,
        tifffile.TiffWriter(
            file,
            bigtiff=_is_big(stack, dtype),
            ome=ome_uuid is not None,
            imagej=ome_uuid is None,
            byteorder="<",
        ) as writer,
    ):
        writer.write(
            _pieces(stack, dtype),
            dtype=dtype,
            photometric="minisblack",
            compression="zlib",
            # Neighbouring labels are equal or unrelated: differences compress worse.
            predictor=False,
            software=SOFTWARE,
            buffersize=BUFFER_BYTES,
            **_layout(stack, dtype),
            **options,
        )


def _is_big(stack: Stack, dtype: np.dtype[Any]) -> bool:
    """Tell whether 32-bit addresses do not suffice."""
    return math.prod(stack.shape) * dtype.itemsize > CLASSIC_BYTES


def _pieces(stack: Stack, dtype: np.dtype[Any]) -> Iterator[NDArray[Any]]:
    """Yield what tifffile asks for: planes, or the tiles of planes."""
    for block in stack.blocks():
        for plane in block.reshape(-1, *block.shape[-2:]):
            if not stack.is_tiled:
                yield plane.astype(dtype, copy=False)
                continue
            # The block is a band of whole tiles; tifffile pads those at the edge.
            for y, x in itertools.product(*map(range, (0, 0), plane.shape, TILE)):
                tile = plane[y : y + TILE[0], x : x + TILE[1], None]
                yield tile.astype(dtype, copy=False)


def _layout(stack: Stack, dtype: np.dtype[Any]) -> dict[str, Any]:
    """Choose strips, which ImageJ needs, or tiles for planes of a slide scanner."""
    if stack.is_tiled:
        return {"tile": TILE}
    height, width = stack.shape[-2:]
    rows = max(1, STRIP_BYTES // (width * dtype.itemsize))
    return {"rowsperstrip": min(rows, height)}


def _imagej_options(
    stack: Stack, pixel_size: Mapping[str, float], metadata: dict[str, Any]
) -> dict[str, Any]:
    described: dict[str, Any] = {}
    if "Description" in metadata:
        described["Info"] = metadata["Description"]
    if "Channel" in metadata:
        # ImageJ labels planes, not channels.
        times, depth = stack.shape[:2]
        described["Labels"] = metadata["Channel"]["Name"] * (times * depth)
    # With fewer axes tifffile takes an X of length 1 for the samples.
    return imagej_options((*stack.shape, 1), pixel_size, described)


def _ome_options(
    stack: Stack,
    pixel_size: Mapping[str, float],
    metadata: dict[str, Any],
    ome_uuid: uuid.UUID,
) -> dict[str, Any]:
    described = {
        **ome_metadata(stack.stored_axes, pixel_size, metadata),
        # tifffile would draw one by time: the same result would differ every time.
        "UUID": str(ome_uuid),
    }
    return {"shape": stack.stored_shape, "metadata": described}


def imagej_options(
    shape: tuple[int, ...], pixel_size: Mapping[str, float], metadata: dict[str, Any]
) -> dict[str, Any]:
    """Return shape, calibration and metadata of an ImageJ TIFF, in tifffile's words."""
    described: dict[str, Any] = {"axes": IMAGEJ_AXES, **metadata}
    options: dict[str, Any] = {"shape": shape, "metadata": described}
    if not pixel_size:
        return options
    described["unit"] = "micron"
    options["resolution"] = (1 / pixel_size["X"], 1 / pixel_size["Y"])
    if "Z" in pixel_size:
        described["spacing"] = pixel_size["Z"]
    return options


def ome_metadata(
    axes: str, pixel_size: Mapping[str, float], metadata: dict[str, Any]
) -> dict[str, Any]:
    """Return what the header of an OME-TIFF says of an image, in tifffile's words."""
    described = {"axes": axes, "Creator": SOFTWARE, **metadata}
    for letter in "ZYX":
        if letter in pixel_size:
            described[f"PhysicalSize{letter}"] = pixel_size[letter]
            described[f"PhysicalSize{letter}Unit"] = "µm"
    return described
