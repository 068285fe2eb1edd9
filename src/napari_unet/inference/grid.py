"""The grid on which a network sees an image: its own pixels, or the model's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from napari_unet.inference.resample import Resampling, resample
from napari_unet.inference.source import read_mirrored
from napari_unet.inference.tiling import mirror_indices

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from napari_unet.inference.source import Source
    from napari_unet.models.normalize import Scaling


@dataclass(frozen=True)
class Grid:
    """One grid over the whole image, so that rescaling does not depend on tiles.

    Parameters
    ----------
    image_shape : tuple of int
        Sides of a plane or volume of the image.
    shape : tuple of int
        The same in pixels of the grid; equal if nothing is rescaled.
    """

    image_shape: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def over(
        cls, image_shape: tuple[int, ...], factors: Sequence[float] | None
    ) -> Grid:
        """Lay a grid over an image that is rescaled by one factor for each axis."""
        if factors is None:
            return cls(image_shape, image_shape)
        pairs = zip(image_shape, factors, strict=True)
        return cls(image_shape, tuple(max(1, round(n * f)) for n, f in pairs))

    @property
    def rescales(self) -> bool:
        """Whether the grid is not that of the image."""
        return self.shape != self.image_shape

    @property
    def _there(self) -> list[Resampling]:
        pairs = zip(self.image_shape, self.shape, strict=True)
        return [Resampling(n, m) for n, m in pairs]

    @property
    def _back(self) -> list[Resampling]:
        pairs = zip(self.image_shape, self.shape, strict=True)
        return [Resampling(m, n) for n, m in pairs]

    def region(self, wanted: Sequence[slice]) -> list[slice]:
        """Return the part of the grid that a part of the image is made of."""
        if not self.rescales:
            return list(wanted)
        return [
            slice(*axis.reach(part.start, part.stop))
            for axis, part in zip(self._back, wanted, strict=True)
        ]

    def reach(
        self, start: Sequence[int], stop: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """Return the box of the image that a box of the grid is made of.

        Parameters
        ----------
        start, stop : sequence of int
            May reach beyond the grid, which is mirrored there.

        Returns
        -------
        start, stop : list of int
            Inside the image.
        """
        low, high = [], []
        for axis, a, b in zip(self._there, start, stop, strict=True):
            inside = mirror_indices(a, b, axis.target)
            i, j = int(inside.min()), int(inside.max()) + 1
            i, j = axis.reach(i, j) if self.rescales else (i, j)
            low.append(i)
            high.append(j)
        return low, high

    def read(
        self,
        source: Source,
        scaling: Callable[[], Scaling],
        unit: Mapping[str, int],
        start: Sequence[int],
        stop: Sequence[int],
    ) -> tuple[NDArray, Scaling | None]:
        """Read a box of the grid, mirrored beyond its edges.

        Parameters
        ----------
        source : Source
            What is read.
        scaling : callable
            Returns how it is normalised, and may wait for that.
        unit : mapping of str to int
            See `Source.read`.
        start, stop : sequence of int
            Along the axes of the grid.

        Returns
        -------
        pixels : array of shape (channel, *spatial)
        scaling : Scaling or None
            What still has to be applied to them.
        """
        if not self.rescales:
            return source.read_mirrored(unit, start, stop), scaling()
        axes = self._there

        def read(low: Sequence[int], high: Sequence[int]) -> NDArray[np.float32]:
            reach = [a.reach(i, j) for a, i, j in zip(axes, low, high, strict=True)]
            pixels = source.read(unit, [i for i, _ in reach], [j for _, j in reach])
            return resample(scaling().apply(pixels), axes, low, high)

        return read_mirrored(read, self.shape, start, stop), None

    def back(
        self, block: NDArray[np.float32], wanted: Sequence[slice]
    ) -> NDArray[np.float32]:
        """Bring what was computed on `region` back to a part of the image."""
        if not self.rescales:
            return block
        start = [part.start for part in wanted]
        return resample(block, self._back, start, [part.stop for part in wanted])
