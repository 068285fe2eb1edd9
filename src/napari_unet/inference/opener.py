"""The planes or volumes of an image, opened: what their tiles are read from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from concurrent.futures import Future

    from numpy.typing import NDArray

    from napari_unet.inference.grid import Grid
    from napari_unet.inference.source import Source
    from napari_unet.models.normalize import Normalization, Scaling

    Box = tuple[Sequence[int], Sequence[int]]  # start and stop along each axis

__all__ = ["Opened", "Opener"]

_BLOCK = 1 << 24  # pixels that are looked through at a time


@dataclass(frozen=True)
class Opened:
    """A plane or volume that can be read, and how its pixels are normalised.

    Parameters
    ----------
    unit : mapping of str to int
        Its place along the loop axes.
    source : Source
        Of all or a part of it.
    grid : Grid
        On which the network sees it.
    scaling : callable
        Waits for that of the image, or of this plane.
    """

    unit: Mapping[str, int]
    source: Source
    grid: Grid
    scaling: Callable[[], Scaling]

    def read(
        self, start: Sequence[int], stop: Sequence[int]
    ) -> tuple[NDArray, Scaling | None]:
        """Read a box of the grid; see `Grid.read`."""
        return self.grid.read(self.source, self.scaling, self.unit, start, stop)


class Opener:
    """Opens planes or volumes, and fits the normalisation of an image once.

    Parameters
    ----------
    source : Source
        The image.
    grid : Grid
        On which the network sees it.
    how : Normalization
        Of the model.
    count : callable
        See `Normalization.fit`.
    say : callable
        Gets what the user should know.
    submit : callable
        Runs a function with arguments beside this one and returns its future.
    """

    def __init__(
        self,
        source: Source,
        grid: Grid,
        how: Normalization,
        count: Callable[[NDArray], NDArray[np.int64]],
        say: Callable[[str], None],
        submit: Callable[..., Future[Scaling]],
    ):
        self._source, self._grid, self._how = source, grid, how
        self._count, self._say, self._submit = count, say, submit
        # Of the whole image under (), of a plane under its place in the loop.
        self._scalings: dict[tuple[int, ...], Future[Scaling]] = {}
        self.non_finite = 0  # pixels that were cleared

    def open(self, unit: Mapping[str, int], box: Box | None = None) -> Opened:
        """Read a plane or volume, or a box of it, if it is lazy and small.

        Its first tiles can be read while the normalisation is fitted.
        """
        if box is None:
            source = self._source.in_memory(unit)
        else:
            source = self._source.windowed(unit, *box)
        of_plane = self._how.scope == "plane"
        key = tuple(unit.values()) if of_plane else ()
        if key not in self._scalings:
            # What was read is enough if nothing else belongs to it.
            is_all = box is None and (of_plane or not self._source.loop)
            fitted = source if is_all else self._source
            self._scalings[key] = self._submit(
                self._fit, fitted, unit if of_plane else None
            )
        return Opened(unit, source, self._grid, self._scalings[key].result)

    def _fit(self, source: Source, unit: Mapping[str, int] | None) -> Scaling:
        scaling = source.scaling(self._how, unit, self._count)
        if unit is None and not scaling.gain.any():
            self._say("The image is constant: nothing can be found in it.")
        return scaling

    def clear_non_finite(
        self, opened: Opened, part: NDArray, start: Sequence[int], background: NDArray
    ) -> None:
        """Make pixels background where any channel is NaN or infinite, and count them.

        Parameters
        ----------
        opened : Opened
            Where they are read.
        part : array of shape (kept, *spatial)
            What was found in a part of the image; changed in place.
        start : sequence of int
            Where the part begins.
        background : array of shape (kept, 1)
            What background is.
        """
        rows, *others = part.shape[1:]
        stop = [first + n for first, n in zip(start[1:], others, strict=True)]
        step = max(1, _BLOCK // math.prod(others))
        for first in range(0, rows, step):
            last = min(first + step, rows)
            low, high = [start[0] + first, *start[1:]], [start[0] + last, *stop]
            bad = ~np.isfinite(opened.source.read(opened.unit, low, high)).all(axis=0)
            if bad.any():
                part[:, first:last][:, bad] = background
                self.non_finite += int(bad.sum())
