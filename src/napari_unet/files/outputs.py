"""Writing label and probability files that Fiji and napari read with their axes."""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tifffile

from napari_unet.errors import BadOutput
from napari_unet.files.atomic import atomic_path

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

# Order in which ImageJ stores a hyperstack; OME-TIFF is written in it, too.
STACK_AXES = "TZCYX"
IMAGEJ_AXES = "TZCYXS"

# Classic TIFF has 32-bit addresses; the margin is for headers and metadata.
CLASSIC_BYTES = 2**32 - 2**25
# Larger planes are tiled, so that a viewer can read a part of one.
TILED_PIXELS = 2**26
TILE = (512, 512)
STRIP_BYTES = 2**18

SOFTWARE = "napari-unet"


def write_labels(
    path: str | os.PathLike[str],
    labels: NDArray[Any],
    *,
    axes: str,
    pixel_size: Mapping[str, float],
    description: str = "",
    overwrite: bool = False,
) -> Path:
    """Write a label image as compressed TIFF, uint16 or uint32 as it needs.

    Parameters
    ----------
    path : path-like
        The file to make. A name that ends in ``.ome.tif`` gets OME metadata; any
        other gets ImageJ's, which Fiji opens without Bio-Formats, or OME where
        ImageJ's do not suffice (uint32, or more than 4 GB).
    labels : numpy.ndarray
        Whole numbers from 0, which is the background.
    axes : str
        One letter for each dimension out of ``"TZCYX"``.
    pixel_size : mapping
        Axis letter to micrometres, as :class:`~napari_unet.files.images.ImageFile`
        has it.
    description : str, optional
        A sentence that is kept in the file, e.g. which model made it.
    overwrite : bool, optional
        Whether an existing file may be replaced.

    Returns
    -------
    Path
        The file. The same arguments always give the same bytes.

    Raises
    ------
    BadOutput
        When the file exists, the labels do not fit into 32 bits, or writing fails;
        there is then no new file.
    """
    path = Path(path)
    labels = np.asarray(labels)
    if labels.dtype.kind not in "bui":
        raise BadOutput(
            f"Cannot write {path}: labels are whole numbers, not {labels.dtype}."
        )
    smallest = int(labels.min(initial=0))
    largest = int(labels.max(initial=0))
    if smallest < 0 or largest > np.iinfo(np.uint32).max:
        raise BadOutput(
            f"Cannot write {path}: a label file holds numbers from 0 to "
            f"{np.iinfo(np.uint32).max}, and these run from {smallest} to {largest}; "
            "number the objects anew from 1."
        )
    dtype = np.uint16 if largest <= np.iinfo(np.uint16).max else np.uint32
    names = {"Description": description} if description else {}
    return _write(path, labels, dtype, axes, pixel_size, names, overwrite)


def write_probabilities(
    path: str | os.PathLike[str],
    probabilities: NDArray[Any],
    *,
    axes: str,
    pixel_size: Mapping[str, float],
    class_names: Sequence[str],
    overwrite: bool = False,
) -> Path:
    """Write the probabilities of each class as compressed 32-bit TIFF.

    Parameters
    ----------
    path : path-like
        The file to make, as for :func:`write_labels`.
    probabilities : numpy.ndarray
        One of the axes enumerates the classes.
    axes : str
        One letter for each dimension out of ``"TZCYX"``; C are the classes.
    pixel_size : mapping
        Axis letter to micrometres.
    class_names : sequence of str
        One name for each class, kept in the file.
    overwrite : bool, optional
        Whether an existing file may be replaced.

    Returns
    -------
    Path
        The file. Its axes are in the order TZCYX.

    Raises
    ------
    BadOutput
        When the file exists or writing fails; there is then no new file.
    """
    path = Path(path)
    probabilities = np.asarray(probabilities)
    classes = 1
    if len(axes) == probabilities.ndim and "C" in axes:
        classes = probabilities.shape[axes.index("C")]
    if len(class_names) != classes:
        raise BadOutput(
            f"Cannot write {path}: there are {classes} classes along C and "
            f"{len(class_names)} names for them."
        )
    channels = {"Channel": {"Name": list(class_names)}}
    return _write(
        path, probabilities, np.float32, axes, pixel_size, channels, overwrite
    )


def _write(
    path: Path,
    data: NDArray[Any],
    dtype: type[np.generic],
    axes: str,
    pixel_size: Mapping[str, float],
    metadata: dict[str, Any],
    overwrite: bool,
) -> Path:
    _check_axes(path, data.shape, axes)
    order = sorted(range(data.ndim), key=lambda i: STACK_AXES.index(axes[i]))
    axes = "".join(axes[i] for i in order)
    data = np.ascontiguousarray(data.transpose(order), dtype)
    options = _layout(data)
    bigtiff = data.nbytes > CLASSIC_BYTES
    as_ome = bool(
        path.name.lower().endswith((".ome.tif", ".ome.tiff"))
        or bigtiff
        or "tile" in options
        or data.dtype == np.uint32
        # ImageJ's calibration always has X and Y.
        or (pixel_size and not {"X", "Y"} <= set(pixel_size))
    )
    describe = _ome_metadata if as_ome else _imagej_metadata
    options |= describe(data, axes, pixel_size, metadata)
    if not as_ome:
        # With fewer axes tifffile takes an X of length 1 for the samples.
        lengths = dict(zip(axes, data.shape, strict=True))
        data = data.reshape([lengths.get(axis, 1) for axis in IMAGEJ_AXES])
    with atomic_path(path) as part:
        # Checked here, last, so that the time for another program to make the
        # file is short; the block also says why when the folder is missing.
        if not overwrite and os.path.lexists(path):
            raise BadOutput(
                f"{path} exists already; use --overwrite to replace it, or choose "
                "another name."
            )
        # Opened here: tifffile does not close its file when the header fails.
        with (
            open(part, "wb") as file,
            tifffile.TiffWriter(
                file, bigtiff=bigtiff, ome=as_ome, imagej=not as_ome, byteorder="<"
            ) as writer,
        ):
            writer.write(data, **options)
    return path


def _check_axes(path: Path, shape: tuple[int, ...], axes: str) -> None:
    if (
        len(axes) != len(shape)
        or set(axes) - set(STACK_AXES)
        or len(set(axes)) != len(axes)
        or {"Y", "X"} - set(axes)
    ):
        raise BadOutput(
            f"Cannot write {path}: the axes {axes!r} do not describe an array of "
            f"{'×'.join(map(str, shape))}; give each dimension one letter of "
            f"{STACK_AXES}."
        )
    if 0 in shape:
        raise BadOutput(f"Cannot write {path}: there are no pixels to write.")


def _layout(data: NDArray[Any]) -> dict[str, Any]:
    """Choose strips, which ImageJ needs, or tiles for planes of a slide scanner."""
    height, width = data.shape[-2:]
    layout: dict[str, Any] = {
        "photometric": "minisblack",
        "compression": "zlib",
        # Neighbouring labels are equal or unrelated: differences compress worse.
        "predictor": False,
        "software": SOFTWARE,
    }
    if height * width > TILED_PIXELS:
        return {**layout, "tile": TILE}
    rows = max(1, STRIP_BYTES // (width * data.itemsize))
    return {**layout, "rowsperstrip": min(rows, height)}


def _imagej_metadata(
    data: NDArray[Any],
    axes: str,
    pixel_size: Mapping[str, float],
    metadata: dict[str, Any],
) -> dict[str, Any]:
    described: dict[str, Any] = {"axes": IMAGEJ_AXES}
    if "Description" in metadata:
        described["Info"] = metadata["Description"]
    if "Channel" in metadata:
        # ImageJ labels planes, not channels.
        lengths = dict(zip(axes, data.shape, strict=True))
        planes = lengths.get("T", 1) * lengths.get("Z", 1)
        described["Labels"] = metadata["Channel"]["Name"] * planes
    options: dict[str, Any] = {"metadata": described}
    if not pixel_size:
        return options
    described["unit"] = "micron"
    options["resolution"] = (1 / pixel_size["X"], 1 / pixel_size["Y"])
    if "Z" in pixel_size:
        described["spacing"] = pixel_size["Z"]
    return options


def _ome_metadata(
    data: NDArray[Any],
    axes: str,
    pixel_size: Mapping[str, float],
    metadata: dict[str, Any],
) -> dict[str, Any]:
    described = {"axes": axes, "Creator": SOFTWARE, **metadata}
    for letter in "ZYX":
        if letter in pixel_size:
            described[f"PhysicalSize{letter}"] = pixel_size[letter]
            described[f"PhysicalSize{letter}Unit"] = "µm"
    # tifffile would draw a UUID by time: the same result would differ every time.
    digest = hashlib.sha256(repr((data.shape, sorted(described.items()))).encode())
    digest.update(data.data)
    described["UUID"] = str(uuid.UUID(bytes=digest.digest()[:16], version=4))
    return {"metadata": described}
