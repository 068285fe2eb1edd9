"""What every reader shares: one image as found in a file, and the limits on it."""

from __future__ import annotations

import math
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import psutil

from napari_unet.errors import BadInput, UnetError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    import dask.array
    from numpy.typing import NDArray

AXES = "TCZYXS"
UNNAMED = "Q"

# Larger planes are read tile by tile, or strip by strip, about so many pixels square.
LARGE_PLANE_BYTES = 2**26
PIECE_SIDE = 2048

DTYPE_KINDS = "buif"

# What the decoders run into when a forged header has a text where they expect a
# number: the words of these errors mean nothing to a user.
_NONSENSE = (TypeError, AttributeError, LookupError, ArithmeticError, AssertionError)


@dataclass(frozen=True, eq=False)
class Source:
    """One image as found in a file, before its axes are settled.

    Parameters
    ----------
    path : Path
        Where it was found.
    data : array
        The pixels, in memory or lazy.
    axes : str
        One letter an axis out of ``"TCZYXS"``, or ``"Q"`` where the file gives an
        axis no name that we know.
    pixel_size : dict
        Axis letter to micrometres.
    notes : tuple of str
        What the user should know.
    channel_names : tuple of str
        As the file names its channels, "" for one that it does not name.
    """

    path: Path
    data: NDArray[Any] | dask.array.Array
    axes: str
    pixel_size: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    channel_names: tuple[str, ...] = ()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever a decoder raises into one sentence about the file."""
    try:
        yield
    except UnetError:
        raise
    except FileNotFoundError as error:
        raise BadInput(f"{path} does not exist; check the name.") from error
    except PermissionError as error:
        raise BadInput(
            f"{path} cannot be opened: you are not allowed to read it."
        ) from error
    except MemoryError as error:
        raise BadInput(
            f"{path.name} does not fit into memory; crop it, or save it as OME-Zarr."
        ) from error
    except Exception as error:
        # tifffile, imagecodecs, Pillow, zarr and numcodecs raise about twenty
        # unrelated types for damaged files; none of them is a bug of ours to show.
        reason = one_line(error)
        if isinstance(error, _NONSENSE):
            reason = "its header makes no sense"
        raise BadInput(
            f"{path.name} cannot be read: {reason}. It may be damaged or of an "
            "unsupported kind; get a fresh copy or save it again as TIFF."
        ) from error


def one_line(text: object, limit: int = 160) -> str:
    """Shorten a message of a library to a part of a sentence."""
    words = " ".join(str(text).split()) or type(text).__name__
    words = words if len(words) <= limit else words[: limit - 1] + "…"
    return words.rstrip(".")


def byte_size(nbytes: int) -> str:
    """Write a number of bytes for people."""
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if nbytes >= 1000**power:
            return f"{nbytes / 1000**power:.3g} {unit}"
    return f"{nbytes} bytes"


def pixels_size(shape: tuple[int, ...]) -> str:
    """Write the lengths of the axes for people."""
    return "×".join(str(n) for n in shape)


def memory_budget() -> int:
    """Return how many bytes one image may take: half of the free memory."""
    return int(psutil.virtual_memory().available) // 2


def check_array(
    path: Path, shape: tuple[int, ...], axes: str, dtype: np.dtype[Any]
) -> None:
    """Refuse an image without pixels, or with pixels that are not plain numbers."""
    for letter, length in zip(axes, shape, strict=True):
        if length < 1:
            raise BadInput(f"{path.name}: axis {letter} has length {length}.")
    if dtype.kind == "c":
        raise BadInput(
            f"{path.name} holds complex numbers; take the magnitude first and save "
            "that."
        )
    if dtype.kind not in DTYPE_KINDS:
        raise BadInput(
            f"{path.name} holds pixels of the kind {dtype}; save the image as whole "
            "or floating-point numbers first."
        )


def check_fits(path: Path, nbytes: int, what: str) -> None:
    """Refuse to start to read what will not fit into memory."""
    budget = memory_budget()
    if nbytes > budget:
        raise BadInput(
            f"{path.name}: {what} needs {byte_size(nbytes)}, and half of the free "
            f"memory is {byte_size(budget)}; crop or downsample it, or save it as "
            "OME-Zarr in chunks."
        )


class Planes(Protocol):
    """An image that is stored in pieces of equal size, the planes."""

    @property
    def path(self) -> Path:
        """The file that was opened."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the image: the stack axes, then those of a plane."""
        ...

    @property
    def stack_ndim(self) -> int:
        """How many axes enumerate planes."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Data type of the planes."""
        ...

    def read(self, indices: Iterable[int]) -> Iterator[NDArray[Any]]:
        """Yield planes by their number in the flattened stack."""
        ...

    @property
    def segment(self) -> tuple[int, int] | None:
        """Rows and columns of what can be read alone, if a part of a plane can."""
        ...

    def read_part(self, index: int, rows: slice, columns: slice) -> NDArray[Any]:
        """Read some rows and columns of a plane that has segments."""
        ...


class LazyPlanes:
    """Planes in the form that dask reads from: an array that knows slicing.

    Parameters
    ----------
    planes : Planes
        Where the pixels come from.
    in_parts : bool
        Whether only the part of a plane that is asked for is read.
    """

    def __init__(self, planes: Planes, in_parts: bool = False) -> None:
        self._planes = planes
        self._in_parts = in_parts
        self.shape = planes.shape
        self.dtype = planes.dtype
        self.ndim = len(planes.shape)

    def __getitem__(self, key: tuple[Any, ...]) -> NDArray[Any]:
        depth = self._planes.stack_ndim
        stack_shape = self.shape[:depth]
        numbers = np.arange(int(np.prod(stack_shape))).reshape(stack_shape)
        chosen = numbers[key[:depth]]
        if not chosen.size:
            nothing: NDArray[Any] = np.broadcast_to(self.dtype.type(), self.shape)[key]
            return nothing
        if not self._in_parts:
            planes = [
                plane.reshape(self.shape[depth:])[key[depth:]]
                for plane in self._planes.read(int(i) for i in chosen.flat)
            ]
        else:
            rows, row = _span(key[depth], self.shape[depth])
            columns, column = _span(key[depth + 1], self.shape[depth + 1])
            inner = (row, column, *key[depth + 2 :])
            planes = [
                self._planes.read_part(int(i), rows, columns)[inner]
                for i in chosen.flat
            ]
        return np.stack(planes).reshape(chosen.shape + planes[0].shape)


def _span(index: slice | int, length: int) -> tuple[slice, slice | int]:
    """Return what must be read for an index, and the index in what was read."""
    if not isinstance(index, slice):
        at = range(length)[index]
        return slice(at, at + 1), 0
    chosen = range(*index.indices(length))
    if not chosen:
        return slice(0, 0), slice(None)
    first, last = sorted((chosen[0], chosen[-1]))
    return slice(first, last + 1), slice(None, None, chosen.step)


def assemble(
    planes: Planes, max_bytes: int | None = None
) -> NDArray[Any] | dask.array.Array:
    """Read an image, or make it lazy where it is larger than a limit.

    Parameters
    ----------
    planes : Planes
        Its planes.
    max_bytes : int, optional
        The limit; half of the free memory where there is none.

    Returns
    -------
    array
        Of numpy or, lazy, of dask.
    """
    shape, dtype, depth = planes.shape, planes.dtype, planes.stack_ndim
    count = int(np.prod(shape[:depth], dtype=np.int64))
    nbytes = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if nbytes <= (memory_budget() if max_bytes is None else max_bytes):
        result = np.empty((count, *shape[depth:]), dtype)
        for target, plane in zip(result, planes.read(range(count)), strict=True):
            target[...] = plane.reshape(target.shape)
        return result.reshape(shape)
    in_parts = planes.segment is not None and nbytes // count > LARGE_PLANE_BYTES
    piece = _piece(planes) if in_parts else shape[depth:]
    what = "a part of one plane" if in_parts else "one plane"
    check_fits(planes.path, math.prod(piece) * dtype.itemsize, what)
    lazy = LazyPlanes(planes, in_parts)
    return lazy_array(planes.path, lazy, (1,) * depth + piece)


def _piece(planes: Planes) -> tuple[int, ...]:
    """Return the shape of what is read at once: whole strips or tiles of a plane."""
    height, width, *samples = planes.shape[planes.stack_ndim :]
    assert planes.segment is not None
    rows, columns = planes.segment
    across = min(width, max(1, PIECE_SIDE // columns) * columns)
    down = max(1, PIECE_SIDE**2 // (rows * across)) * rows
    return min(height, down), across, *samples


def lazy_array(
    path: Path, source: Any, chunks: tuple[int, ...] | str
) -> dask.array.Array:
    """Make a dask array of whatever has a shape, a dtype and slicing."""
    import dask.array  # takes a second the first time, and most images fit

    from_array: Any = dask.array.from_array
    array: dask.array.Array = from_array(
        source,
        chunks=chunks,
        # Not the contents: to hash them is to read them.
        name=f"{path.name}-{uuid.uuid4().hex}",
        meta=np.empty((0,) * len(source.shape), source.dtype),
    )
    return array
