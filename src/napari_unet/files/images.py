"""Reading images of microscopes: pixels, axes and pixel size, or a clear refusal."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from napari_unet.errors import BadInput
from napari_unet.files.ome_zarr import is_zarr, read_ome_zarr
from napari_unet.files.photo import read_photo
from napari_unet.files.source import AXES, UNNAMED, Source, pixels_size, reading
from napari_unet.files.tiff import read_tiff

if TYPE_CHECKING:
    import os

    import dask.array
    from numpy.typing import NDArray

SUFFIXES = (
    *(".tif", ".tiff", ".btf", ".tf2", ".tf8", ".lsm", ".stk"),
    *(".png", ".jpg", ".jpeg", ".bmp"),
)

# The contents decide, not the name: II or MM, then 42 (TIFF) or 43 (BigTIFF).
_TIFF = re.compile(rb"II[\x2a\x2b]\0|MM\0[\x2a\x2b]")
_PHOTO = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|BM")

# Names for axes that a file leaves unnamed, from the innermost outwards.
_NAMES_FOR_UNNAMED = "ZTC"


@dataclass(frozen=True, eq=False)
class ImageFile:
    """One image and what its file says of it.

    Parameters
    ----------
    data : numpy.ndarray or dask.array.Array
        The pixels. Large ones are lazy, read plane by plane or chunk by chunk.
    axes : str
        One letter for each dimension of ``data`` out of ``"TCZYXS"``; S are the
        samples of an RGB(A) pixel.
    pixel_size : dict
        Axis letter to micrometres, for those of Z, Y and X that are known.
    path : Path
        The file.
    notes : tuple of str
        Sentences that the user should see, e.g. of what was ignored.
    channel_names : tuple of str
        One for each channel along C, where the file names any; a number where it
        does not name that one.
    """

    data: NDArray[Any] | dask.array.Array
    axes: str
    pixel_size: dict[str, float] = field(default_factory=dict)
    path: Path = Path()
    notes: tuple[str, ...] = ()
    channel_names: tuple[str, ...] = ()


def read_image(
    path: str | os.PathLike[str],
    axes: str | None = None,
    *,
    max_bytes: int | None = None,
) -> ImageFile:
    """Read an image: TIFF of any kind, PNG, JPEG, BMP or OME-Zarr.

    Axes come from the metadata of ImageJ, OME and others; singleton axes other
    than Y and X are dropped. The unnamed leading axis of a plain multi-page TIFF
    is Z; of several unnamed ones the innermost is Z, the next T, then C. Samples
    are S only where the file says that they are colours, and channels otherwise.

    Parameters
    ----------
    path : path-like
        The file, or the folder of an OME-Zarr image. It is never written to.
    axes : str, optional
        One letter for each dimension that is longer than 1 (and for Y and X), which
        overrides what the file says, e.g. ``"ZYX"``.
    max_bytes : int, optional
        A larger image is lazy, and read when it is computed; without it, one that
        would take more than half of the free memory. PNG, JPEG and BMP never are.

    Returns
    -------
    ImageFile
        The first image of the file, at full resolution.

    Raises
    ------
    BadInput
        When the file is damaged, incomplete, too large or not an image, or when
        ``axes`` does not fit. An image is never returned in part. A lazy image
        raises it when the damaged plane is computed.
    """
    path = Path(path)
    _check_letters(axes)
    with reading(path):
        source = _read(path, max_bytes)
    return _settle_axes(source, axes)


def _read(path: Path, max_bytes: int | None) -> Source:
    if path.is_dir():
        if is_zarr(path):
            return read_ome_zarr(path, max_bytes)
        raise BadInput(f"{path} is a folder without an image; choose a file in it.")
    with open(path, "rb") as file:
        start = file.read(8)
    if _TIFF.match(start):
        return read_tiff(path, max_bytes)
    if _PHOTO.match(start):
        return read_photo(path)
    what = "empty" if not start else "not a readable image"
    raise BadInput(
        f"{path.name} is {what}; TIFF, OME-TIFF, OME-Zarr, PNG, JPEG and BMP can be "
        "read."
    )


def _check_letters(axes: str | None) -> None:
    if axes is None:
        return
    if set(axes) - set(AXES) or len(set(axes)) != len(axes) or not {*"YX"} <= {*axes}:
        raise BadInput(
            f"The axes {axes!r} cannot be used: give each dimension one of the letters "
            f"{AXES}, each once, among them Y and X, for example ZYX."
        )


def _settle_axes(source: Source, wanted: str | None) -> ImageFile:
    """Drop singleton axes and give every other axis its letter."""
    data, found = source.data, source.axes
    notes = list(source.notes)
    kept = [i for i, a in enumerate(found) if a in "YX" or data.shape[i] > 1]
    data = data[tuple(slice(None) if i in kept else 0 for i in range(data.ndim))]
    own = found = "".join(found[i] for i in kept)
    if wanted is not None:
        if len(wanted) != data.ndim:
            shown = found.replace(UNNAMED, "?")
            raise BadInput(
                f"{source.path.name} has {data.ndim} dimensions, "
                f"{pixels_size(data.shape)} ({shown}), which does not fit the axes "
                f"{wanted}; give {data.ndim} letters."
            )
        found = wanted
    axes = _name_unnamed(source.path, found, data.shape)
    if axes != found:
        notes.append(
            f"{source.path.name} does not name all its axes; "
            f"{pixels_size(data.shape)} is read as {axes}. If that is wrong, say which "
            "axes it has."
        )
    if {"Y", "X"} - set(axes):
        raise BadInput(f"{source.path.name} has no image plane (its axes are {axes}).")
    size = {a: s for a, s in source.pixel_size.items() if a in axes}
    place = axes.find("C")
    # Another axis may have been told to be the channels.
    count = data.shape[place] if place >= 0 and own[place] == "C" else 0
    names = _channel_names(source.channel_names, count)
    return ImageFile(data, axes, size, source.path, tuple(notes), names)


def _channel_names(names: tuple[str, ...], count: int) -> tuple[str, ...]:
    """Return a name in one line for each channel, if the file names any of them."""
    plain = ("".join(c if c.isprintable() else " " for c in name) for name in names)
    short = [" ".join(name.split())[:60] for name in plain]
    if len(short) != count or not any(short):
        return ()
    return tuple(name or str(number) for number, name in enumerate(short))


def _name_unnamed(path: Path, axes: str, shape: tuple[int, ...]) -> str:
    free = [letter for letter in _NAMES_FOR_UNNAMED if letter not in axes]
    letters = list(axes)
    for i in reversed(range(len(letters))):
        if letters[i] != UNNAMED:
            continue
        if not free:
            raise BadInput(
                f"{path.name} has too many dimensions ({pixels_size(shape)}); save a "
                "part of it with at most time, channel, Z, Y and X."
            )
        letters[i] = free.pop(0)
    return "".join(letters)


def _natural(path: Path) -> tuple[list[tuple[int, int, str]], str]:
    """Sort key for names: a2 before a10."""
    parts = re.split(r"([0-9]+)", path.name.casefold())
    key = [(0, int(p), "") if i % 2 else (1, 0, p) for i, p in enumerate(parts)]
    return key, path.name


def list_images(path: str | os.PathLike[str]) -> list[Path]:
    """List the images of a folder in natural order (``a2`` before ``a10``).

    Parameters
    ----------
    path : path-like
        A folder, which is not searched deeper, or one image.

    Returns
    -------
    list of Path
        Files whose names end like those of images, and OME-Zarr folders; without
        hidden and unfinished ones. For one image, that image.

    Raises
    ------
    BadInput
        When there is nothing of that name.
    """
    path = Path(path)
    with reading(path):
        if not path.is_dir():
            path.stat()
            return [path]
        if is_zarr(path):
            return [path]
        found = [child for child in path.iterdir() if _looks_readable(child)]
    return sorted(found, key=_natural)


def _looks_readable(path: Path) -> bool:
    name = path.name.lower()
    if name.startswith(".") or name.endswith(".part"):
        return False
    if path.is_dir():
        return is_zarr(path)
    # A link to what is not there is an image that cannot be read, not none.
    is_lost = path.is_symlink() and not path.exists()
    return name.endswith(SUFFIXES) and (path.is_file() or is_lost)
