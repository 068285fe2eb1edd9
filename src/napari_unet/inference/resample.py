"""Rescaling on one global grid, so that it does not depend on the tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True)
class Resampling:
    """Linear interpolation of one axis, with anti-aliasing when it shrinks.

    Parameters
    ----------
    source, target : int
        Lengths of the whole axis before and after. Both span the same distance.
    """

    source: int
    target: int

    def reach(self, start: int, stop: int) -> tuple[int, int]:
        """Return the source interval that target pixels ``start:stop`` are made of."""
        first, last = (self._centre(i) for i in (start, stop - 1))
        radius = self._radius
        low = max(int(np.floor(first - radius)), 0)
        return low, min(int(np.ceil(last + radius)) + 1, self.source)

    def weights(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return the matrix from the source interval of `reach` to ``start:stop``."""
        low, high = self.reach(start, stop)
        centres = self._centre(np.arange(start, stop))[:, None]
        distance = np.abs(np.arange(low, high)[None, :] - centres) / self._radius
        triangle = np.maximum(1 - distance, 0)
        weights: NDArray[np.float32] = (
            triangle / triangle.sum(axis=1, keepdims=True)
        ).astype(np.float32)
        return weights

    @property
    def _step(self) -> float:
        return self.source / self.target

    @property
    def _radius(self) -> float:
        return max(self._step, 1.0)

    def _centre(self, index: NDArray | int) -> NDArray:
        return np.asarray((np.asarray(index) + 0.5) * self._step - 0.5)


def resample(
    block: NDArray[np.float32],
    axes: Sequence[Resampling],
    start: Sequence[int],
    stop: Sequence[int],
) -> NDArray[np.float32]:
    """Resample the last axes of a block.

    Parameters
    ----------
    block : float32 array of shape (channel, *spatial)
        Exactly the source intervals that `Resampling.reach` names.
    axes : sequence of Resampling
        One for each spatial axis.
    start, stop : sequence of int
        The wanted target intervals.

    Returns
    -------
    float32 array of shape (channel, *(stop - start))
    """
    for position, (axis, a, b) in enumerate(zip(axes, start, stop, strict=True), 1):
        moved = np.tensordot(axis.weights(a, b), block, axes=(1, position))
        block = np.moveaxis(moved, 0, position)
    return np.ascontiguousarray(block)
