"""Streaming a stack into an OME-Zarr image with all its levels.

Version 0.4 on Zarr 2, which readers have known for years; 0.5 on Zarr 3 is still
unknown to several that people use, among them some of Fiji's. The metadata are a page
of JSON: a library for them would be one more dependency.
"""

from __future__ import annotations

import itertools
import json
import operator
import re
from typing import TYPE_CHECKING, Any

import imagecodecs
import numpy as np
import zarr
from zarr.storage import LocalStore

from napari_unet.files.stack import BAND_ROWS, STACK_AXES, Stack
from napari_unet.files.write_tiff import SOFTWARE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

VERSION = "0.4"

BLOSC: dict[str, Any] = {"cname": "zstd", "clevel": 5}

# One plane of one chunk: viewers show planes, and a band of rows is made of these.
CHUNK = (1, 1, 1, BAND_ROWS, 1024)

# Z, Y and X are halved from level to level until they are short enough to be shown
# whole.
HALVED = tuple(STACK_AXES.index(axis) for axis in "ZYX")
SHORT = 512

_TYPES = {"T": "time", "C": "channel"}


def is_zarr_name(path: Path) -> bool:
    """Tell whether a name asks for an OME-Zarr image."""
    return path.name.lower().endswith(".zarr")


def write_ome_zarr(
    part: Path,
    stack: Stack,
    dtype: np.dtype[Any],
    pixel_size: Mapping[str, float],
    name: str,
    *,
    description: str = "",
    channel_names: Sequence[str] | None = None,
) -> None:
    """Write a stack plane by plane, then each coarser level from the one before.

    Parameters
    ----------
    part : Path
        The empty folder to write to.
    stack : Stack
        The pixels.
    dtype : numpy.dtype
        As what they are written.
    pixel_size : mapping
        Axis letter to micrometres.
    name : str
        Of the folder, and without its suffix of the image.
    description : str, optional
        Kept in the metadata.
    channel_names : sequence of str, optional
        What C enumerates. Without them it is a label image.
    """
    name = re.sub(r"(\.ome)?\.zarr$", "", name, flags=re.IGNORECASE)
    axes = _ordered(stack)
    _write_json(part / ".zgroup", {"zarr_format": 2})
    datasets = []
    for level, factors in enumerate(_write_levels(part, stack, dtype)):
        # Every second pixel lies where it lay: there is no translation.
        scale = [
            pixel_size.get(axis, 1.0) * factors[STACK_AXES.index(axis)] for axis in axes
        ]
        transform = {"type": "scale", "scale": scale}
        datasets.append({"path": str(level), "coordinateTransformations": [transform]})
    image = {
        "version": VERSION,
        "name": name,
        "axes": [_axis(axis, pixel_size) for axis in axes],
        "datasets": datasets,
        "type": "nearest",
        "metadata": {"description": description, "creator": SOFTWARE},
    }
    attributes: dict[str, Any] = {"multiscales": [image]}
    if channel_names is None:
        attributes["image-label"] = {"version": VERSION}
    else:
        channels = [_channel(channel) for channel in channel_names]
        attributes["omero"] = {"version": VERSION, "name": name, "channels": channels}
    _write_json(part / ".zattrs", attributes)


def _write_levels(
    folder: Path, stack: Stack, dtype: np.dtype[Any]
) -> list[tuple[int, ...]]:
    """Write the stack and ever coarser ones; return by how much along TZCYX."""
    factors = [(1,) * len(STACK_AXES)]
    level = _write_level(folder / "0", stack, factors[0], dtype)
    while max(level.shape[i] for i in HALVED) > SHORT:
        steps = tuple(
            2 if i in HALVED and length > SHORT else 1
            for i, length in enumerate(level.shape)
        )
        level = _write_level(folder / str(len(factors)), level, steps, dtype)
        factors.append(tuple(map(operator.mul, factors[-1], steps)))
    return factors


def _write_level(
    folder: Path, finer: Stack, steps: tuple[int, ...], dtype: np.dtype[Any]
) -> Stack:
    """Write every nth pixel of a stack along each axis, n being 1 or 2."""
    axes = _ordered(finer)
    kept = [STACK_AXES.index(axis) for axis in axes]
    lengths = [
        -(-length // step) for length, step in zip(finer.shape, steps, strict=True)
    ]
    shape = tuple(lengths[i] for i in kept)
    chunk = tuple(min(lengths[i], CHUNK[i]) for i in kept)
    described = {
        "zarr_format": 2,
        "shape": shape,
        "chunks": chunk,
        "dtype": dtype.newbyteorder("<").str,
        "compressor": {"id": "blosc", **BLOSC, "shuffle": 1, "blocksize": 0},
        "fill_value": 0,
        "order": "C",
        "filters": None,
        "dimension_separator": "/",
    }
    folder.mkdir()
    _write_json(folder / ".zarray", described)
    level = Stack(zarr.open_array(LocalStore(folder, read_only=True), mode="r"), axes)
    # As the pixels lie in what is read first, which may not be ours.
    walked = finer if max(steps) == 1 else level
    for region in walked.regions():
        wanted = [
            slice(part.start * step, part.stop * step, step)
            for part, step in zip(region, steps, strict=True)
        ]
        # Without the axes that the array does not have, in its order.
        missing = tuple(set(range(len(STACK_AXES))) - set(kept))
        order = [finer.stored_axes.index(axis) for axis in axes]
        block = finer.read(wanted).squeeze(missing).transpose(order)
        first = [region[i].start for i in kept]
        _write_chunks(folder, chunk, first, block.astype(dtype, copy=False))
    return level


def _write_chunks(
    folder: Path, chunk: tuple[int, ...], first: Sequence[int], block: NDArray[Any]
) -> None:
    """Write a block of whole chunks, also those that are all zeros.

    Not through zarr: after an error it goes on with other chunks in the background,
    and readers, ours too, cannot tell a chunk that it left out from a lost one.
    """
    grid = [range(0, n, side) for n, side in zip(block.shape, chunk, strict=True)]
    for starts in itertools.product(*grid):
        part = block[tuple(slice(a, a + n) for a, n in zip(starts, chunk, strict=True))]
        whole = np.zeros(chunk, block.dtype.newbyteorder("<"))
        whole[tuple(map(slice, part.shape))] = part
        encoded = imagecodecs.blosc_encode(
            whole.tobytes(),
            level=BLOSC["clevel"],
            compressor=BLOSC["cname"],
            shuffle="byte",
            typesize=whole.itemsize,
            numthreads=1,
        )
        key = [str((a + b) // n) for a, b, n in zip(first, starts, chunk, strict=True)]
        file = folder.joinpath(*key)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def _ordered(stack: Stack) -> str:
    """Return the axes in the order that the specification demands."""
    return "".join(axis for axis in "TCZYX" if axis in stack.axes)


def _axis(letter: str, pixel_size: Mapping[str, float]) -> dict[str, str]:
    axis = {"name": letter.lower(), "type": _TYPES.get(letter, "space")}
    return {**axis, "unit": "micrometer"} if letter in pixel_size else axis


def _channel(name: str) -> dict[str, Any]:
    window = {"min": 0.0, "start": 0.0, "end": 1.0, "max": 1.0}
    return {"label": name, "color": "FFFFFF", "active": True, "window": window}
