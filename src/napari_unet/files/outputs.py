"""Writing label and probability files that Fiji and napari read with their axes.

The pixels may lie in memory or in a file; they are read plane by plane, twice: to
find out which numbers there are, and to write them.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from napari_unet.errors import BadOutput
from napari_unet.files.atomic import atomic_folder, atomic_path
from napari_unet.files.ome_zarr import is_zarr
from napari_unet.files.stack import STACK_AXES, Stack
from napari_unet.files.write_ome_zarr import is_zarr_name, write_ome_zarr
from napari_unet.files.write_tiff import is_ome, ome_metadata, write_tiff

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


def write_labels(
    path: str | os.PathLike[str],
    labels: Any,
    *,
    axes: str,
    pixel_size: Mapping[str, float],
    description: str = "",
    overwrite: bool = False,
) -> Path:
    """Write a label image as compressed TIFF or OME-Zarr, uint16 or uint32 as needed.

    Parameters
    ----------
    path : path-like
        The file to make. A name that ends in ``.ome.tif`` gets OME metadata; any
        other gets ImageJ's, which Fiji opens without Bio-Formats, or OME where
        ImageJ's do not suffice (uint32, or more than 4 GB). A name that ends in
        ``.zarr`` becomes the folder of an OME-Zarr label image with all its levels.
    labels : array
        Whole numbers from 0, which is the background. Of numpy, zarr or whatever
        has a shape, a dtype and numpy's slicing: it is read plane by plane.
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
    stack = _stack(path, labels, axes)
    kind = np.dtype(labels.dtype).kind
    if kind not in "bui":
        raise BadOutput(
            f"Cannot write {path}: labels are whole numbers, not {labels.dtype}."
        )
    names = {"Description": description} if description else {}
    found = _scan(stack, np.dtype(np.uint32), pixel_size, names)
    if found.smallest < 0 or found.largest > np.iinfo(np.uint32).max:
        raise BadOutput(
            f"Cannot write {path}: a label file holds numbers from 0 to "
            f"{np.iinfo(np.uint32).max}, and these run from {found.smallest} to "
            f"{found.largest}; number the objects anew from 1."
        )
    fits = found.largest <= np.iinfo(np.uint16).max
    dtype = np.dtype(np.uint16 if fits else np.uint32)
    if is_zarr_name(path):
        with _new(path, overwrite) as part:
            write_ome_zarr(
                part, stack, dtype, pixel_size, path.name, description=description
            )
        return path
    identity = found.identity if is_ome(path, stack, dtype, pixel_size) else None
    with _new(path, overwrite) as part:
        write_tiff(part, stack, dtype, pixel_size, names, identity)
    return path


def write_probabilities(
    path: str | os.PathLike[str],
    probabilities: Any,
    *,
    axes: str,
    pixel_size: Mapping[str, float],
    class_names: Sequence[str],
    overwrite: bool = False,
) -> Path:
    """Write the probabilities of each class as compressed 32-bit TIFF or OME-Zarr.

    Parameters
    ----------
    path : path-like
        The file to make, as for :func:`write_labels`.
    probabilities : array
        One of the axes enumerates the classes. Read plane by plane, as labels are.
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
    stack = _stack(path, probabilities, axes)
    classes = stack.shape[STACK_AXES.index("C")]
    if len(class_names) != classes:
        raise BadOutput(
            f"Cannot write {path}: there are {classes} classes along C and "
            f"{len(class_names)} names for them."
        )
    names = {"Channel": {"Name": list(class_names)}}
    dtype = np.dtype(np.float32)
    if is_zarr_name(path):
        with _new(path, overwrite) as part:
            write_ome_zarr(
                part, stack, dtype, pixel_size, path.name, channel_names=class_names
            )
        return path
    identity = None
    if is_ome(path, stack, dtype, pixel_size):
        identity = _scan(stack, dtype, pixel_size, names).identity
    with _new(path, overwrite) as part:
        write_tiff(part, stack, dtype, pixel_size, names, identity)
    return path


def _stack(path: Path, data: Any, axes: str) -> Stack:
    """Check that the axes describe the array."""
    shape = tuple(data.shape)
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
    return Stack(data, axes)


@dataclass(frozen=True)
class _Contents:
    """What one pass over the pixels finds out."""

    smallest: int
    largest: int
    identity: uuid.UUID


def _scan(
    stack: Stack,
    dtype: np.dtype[Any],
    pixel_size: Mapping[str, float],
    names: dict[str, Any],
) -> _Contents:
    """Find the range of the pixels, and an identity that depends on contents only.

    The identity is a hash of axes, names, pixel size and pixels as ``dtype``: the
    same result has the same one, wherever its pixels were kept and whenever it is
    written.
    """
    described = sorted(ome_metadata(stack.stored_axes, pixel_size, names).items())
    digest = hashlib.sha256(repr((stack.stored_shape, described)).encode())
    smallest = largest = 0
    for block in stack.blocks():
        if block.dtype.kind in "bui":
            smallest = min(smallest, int(block.min()))
            largest = max(largest, int(block.max()))
        digest.update(np.ascontiguousarray(block, dtype.newbyteorder("<")).data)
    identity = uuid.UUID(bytes=digest.digest()[:16], version=4)
    return _Contents(smallest, largest, identity)


@contextmanager
def _new(path: Path, overwrite: bool) -> Iterator[Path]:
    """Make a file or folder atomically, unless one must not be replaced."""
    atomic = atomic_folder if is_zarr_name(path) else atomic_path
    with atomic(path) as part:
        # Checked here, last, so that the time for another program to make the
        # file is short; the block also says why when the folder is missing.
        if not overwrite and os.path.lexists(path):
            raise BadOutput(
                f"{path} exists already; use --overwrite to replace it, or choose "
                "another name."
            )
        if path.is_dir() and not is_zarr(path):
            raise BadOutput(
                f"{path} is a folder without an OME-Zarr image, which is not replaced; "
                "choose another name."
            )
        yield part
