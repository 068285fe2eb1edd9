"""An array of any size and kind, walked through in the order in which it is stored."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

# Order in which ImageJ stores a hyperstack; everything else is written in it, too.
STACK_AXES = "TZCYX"

# Larger planes are read and written in bands of so many rows.
TILED_PIXELS = 2**26
BAND_ROWS = 1024

# Chunks that are several planes deep are read together up to this many pixels:
# plane by plane each of them would be decompressed as often as it is deep.
SLAB_PIXELS = 2**24


@dataclass(frozen=True, eq=False)
class Stack:
    """Whatever has a shape, a dtype and numpy's slicing, as if its axes were TZCYX.

    Parameters
    ----------
    data : array
        Of numpy, zarr, dask and the like. Only what is asked for is read.
    axes : str
        One letter for each dimension out of ``"TZCYX"``, in any order.
    """

    data: Any
    axes: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of T, Z, C, Y and X; 1 for those that the array does not have."""
        lengths = dict(zip(self.axes, self.data.shape, strict=True))
        return tuple(int(lengths.get(axis, 1)) for axis in STACK_AXES)

    @property
    def stored_axes(self) -> str:
        """The axes that the array has, in the order TZCYX."""
        return "".join(axis for axis in STACK_AXES if axis in self.axes)

    @property
    def is_tiled(self) -> bool:
        """Whether one plane is too large to be handled at once."""
        return self.shape[-2] * self.shape[-1] > TILED_PIXELS

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Their lengths in this order."""
        lengths = dict(zip(STACK_AXES, self.shape, strict=True))
        return tuple(lengths[axis] for axis in self.stored_axes)

    def read(self, region: Sequence[slice]) -> NDArray[Any]:
        """Return a region: one slice for each of T, Z, C, Y and X.

        Parameters
        ----------
        region : sequence of slice
            As for a five-dimensional array.

        Returns
        -------
        numpy.ndarray
            Five-dimensional; of an array in memory a view.
        """
        wanted = dict(zip(STACK_AXES, region, strict=True))
        part = np.asarray(self.data[tuple(wanted[axis] for axis in self.axes)])
        order = [self.axes.index(axis) for axis in self.stored_axes]
        missing = [i for i, axis in enumerate(STACK_AXES) if axis not in self.axes]
        return np.expand_dims(part.transpose(order), missing)

    def regions(self) -> Iterator[tuple[slice, ...]]:
        """Yield regions, one after another in C order, that make up the stack.

        Yields
        ------
        tuple of slice
            One plane; several where the chunks of the array are that deep; a band
            of rows where the planes are huge.
        """
        times, depth, channels, height, width = self.shape
        slab = self._slab_depth()
        rows = BAND_ROWS if self.is_tiled else height
        # A slab has all channels: after Z they are next in the order.
        together = channels if slab > 1 else 1
        for t, z, c, y in itertools.product(
            range(times),
            range(0, depth, slab),
            range(0, channels, together),
            range(0, height, rows),
        ):
            yield (
                slice(t, t + 1),
                slice(z, min(z + slab, depth)),
                slice(c, c + together),
                slice(y, min(y + rows, height)),
                slice(0, width),
            )

    def blocks(self) -> Iterator[NDArray[Any]]:
        """Read the regions of :meth:`regions` one by one."""
        return (self.read(region) for region in self.regions())

    def _slab_depth(self) -> int:
        """Return how many Z planes are read together."""
        # Shards are zarr's chunks of chunks; dask lists the length of every chunk.
        chunks = getattr(self.data, "shards", None) or getattr(
            self.data, "chunks", None
        )
        if chunks is None or "Z" not in self.axes or self.is_tiled:
            return 1
        deep = chunks[self.axes.index("Z")]
        deep = int(max(deep) if isinstance(deep, tuple) else deep)
        _, _, channels, height, width = self.shape
        return max(1, min(deep, SLAB_PIXELS // (channels * height * width)))
