"""Intensity normalisation: one implementation for inference and training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from napari_unet.errors import BadModel

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import Tensor

LARGEST = 1e6  # a normalised value of an image is near 0 to 1
_BLOCK = 1 << 20  # pixels that are counted at a time: they stay in the cache


class Normalization(BaseModel):
    """How intensities are brought to the range a network was trained on.

    Parameters
    ----------
    method : str
        "percentile": ``lower`` and ``upper`` are percentiles that become 0 and 1.
        "mean_std": zero mean, unit standard deviation. "fixed": ``lower`` and
        ``upper`` are grey values that become 0 and 1.
    lower, upper : float
        See ``method``. Values beyond them are not clipped.
    scope : "image" or "plane"
        Whether the planes of a stack share their statistics.
    joint_channels : bool
        Whether all channels share their statistics, as RGB should.
    ranges : tuple of (float, float)
        With "fixed", instead of ``lower`` and ``upper``, those of each channel.
    eps : float
        What is added to the distance from ``lower`` to ``upper``, or to the standard
        deviation. Other programs do so instead of looking for constant images.
    clip : tuple of float or None
        Limits of the normalised values; None where there is none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["percentile", "mean_std", "fixed"] = "percentile"
    lower: float = 1.0
    upper: float = 99.8
    scope: Literal["image", "plane"] = "image"
    joint_channels: bool = False
    # What only other people's models need.
    ranges: tuple[tuple[float, float], ...] = ()
    eps: float = Field(0.0, ge=0, le=0.1)
    clip: tuple[float | None, float | None] | None = None

    @model_serializer(mode="wrap")
    def _to_dict(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        told: dict[str, Any] = dump(self)
        for name in ("ranges", "eps", "clip"):  # the hashes of older files stay
            if not told.get(name):
                told.pop(name, None)
        return told

    def fit(
        self,
        pixels: NDArray,
        count: Callable[[NDArray], NDArray[np.int64]] | None = None,
    ) -> Scaling:
        """Derive the scaling of an image from its pixels.

        Parameters
        ----------
        pixels : array of shape (channel, ...), real
            The whole image or a sample of it. NaN and infinity are left out.
        count : callable, optional
            Does what `count_values` does, but faster.

        Returns
        -------
        Scaling
            A constant channel is mapped to 0.

        Raises
        ------
        BadModel
            If there are ``ranges`` for another number of channels.
        """
        groups = [pixels] if self.joint_channels else list(pixels)
        fixed = (self.ranges if self.method == "fixed" else ()) or (
            ((self.lower, self.upper),) * len(groups)
        )
        if len(fixed) != len(groups):
            raise BadModel(
                f"The model's grey values are those of {len(fixed)} channels, not of "
                f"{len(groups)}. Correct the brightness in the Models dock."
            )
        fits = [
            self._fit_one(values, limits, count or count_values)
            for values, limits in zip(groups, fixed, strict=True)
        ]
        if self.joint_channels:
            fits *= len(pixels)
        offset, gain, fill = np.array(fits, dtype=np.float64).T
        return Scaling(offset, gain, fill, self.clip)

    def _fit_one(
        self,
        values: NDArray,
        fixed: tuple[float, float],
        count: Callable[[NDArray], NDArray[np.int64]],
    ) -> tuple[float, float, float]:
        """Return the offset and gain of a channel, and the median."""
        if values.dtype.kind == "f":
            values = values[np.isfinite(values)]
        if not values.size:
            return 0.0, 0.0, np.nan
        spread = (
            _Counted(values, count)
            if values.dtype.kind in "bui" and values.dtype.itemsize <= 2
            else _Spread(values)
        )
        if self.method == "fixed":
            low, high = fixed
        elif self.method == "mean_std":
            low, deviation = spread.mean_std()
            high = low + deviation
        else:
            low, high = spread.percentiles(self.lower, self.upper)
            if high <= low:  # few bright pixels on a constant background
                low, high = spread.percentiles(0, 100)
        distance = high - low
        gain = 1.0 / (distance + self.eps) if distance > 0 else 0.0
        return low, gain, spread.percentiles(50)[0]


class _Spread:
    """How the values of a channel are spread."""

    def __init__(self, values: NDArray):
        # Between signed values far apart, numpy's differences wrap around; half sums
        # of 16-bit floats overflow.
        if values.dtype.kind in "iu":
            values = values.astype(np.float64)
        elif values.dtype == np.float16:
            values = values.astype(np.float32)
        self._values = values

    def percentiles(self, *percents: float) -> list[float]:
        """Interpolate linearly between the sorted values."""
        found: list[float] = np.percentile(self._values, percents).tolist()
        return found

    def mean_std(self) -> tuple[float, float]:
        """Return the mean and the standard deviation of all values."""
        values = self._values
        return (
            float(values.mean(dtype=np.float64)),
            float(values.std(dtype=np.float64)),
        )


class _Counted(_Spread):
    """The same of integers of up to 16 bits, which are counted instead of sorted."""

    def __init__(self, values: NDArray, count: Callable[[NDArray], NDArray[np.int64]]):
        counts = count(values)
        there = np.flatnonzero(counts)
        self._counts = counts[there]
        self._values = there + float(_least(values.dtype))
        self._until = np.cumsum(self._counts)  # pixels up to each value

    def percentiles(self, *percents: float) -> list[float]:
        """See `_Spread.percentiles`."""
        place = np.array(percents) / 100 * (self._until[-1] - 1)
        low, high = (
            self._values[np.searchsorted(self._until, whole, side="right")]
            for whole in (np.floor(place), np.ceil(place))
        )
        found: list[float] = (low + (high - low) * (place % 1)).tolist()
        return found

    def mean_std(self) -> tuple[float, float]:
        """See `_Spread.mean_std`."""
        share = self._counts / self._until[-1]
        mean = float(share @ self._values)
        return mean, float(np.sqrt(share @ (self._values - mean) ** 2))


def count_values(values: NDArray) -> NDArray[np.int64]:
    """Count how often each value of an integer type occurs.

    Parameters
    ----------
    values : array
        Of bool, or of integers of up to 16 bits.

    Returns
    -------
    int64 array of length 256 or 65536
        From the least value of the type.
    """
    bins, least = 256**values.dtype.itemsize, _least(values.dtype)
    total = np.zeros(bins, dtype=np.int64)
    rows = max(1, _BLOCK * len(values) // values.size)
    for first in range(0, len(values), rows):
        block = values[first : first + rows].reshape(-1)
        total += np.bincount(block - least if least else block, minlength=bins)
    return total


def _least(dtype: np.dtype) -> np.intp:
    return np.intp(np.iinfo(dtype).min if dtype.kind == "i" else 0)


@dataclass(frozen=True)
class Scaling:
    """``(pixel - offset) * gain`` per channel; ``fill`` replaces NaN and infinity.

    Parameters
    ----------
    offset, gain, fill : float64 array of shape (channel,)
        ``fill`` is the median of the finite pixels, NaN if there are none.
    clip : tuple of float or None
        Limits of the result.
    """

    offset: NDArray[np.float64]
    gain: NDArray[np.float64]
    fill: NDArray[np.float64]
    clip: tuple[float | None, float | None] | None = None

    def apply(self, tile: NDArray) -> NDArray[np.float32]:
        """Normalise pixels.

        Parameters
        ----------
        tile : array of shape (channel, *spatial)
            Real, in any byte order.

        Returns
        -------
        float32 array of the same shape
            Finite everywhere.
        """
        # 32-bit and wider values may differ by less than float32 resolves.
        wide = tile.dtype.itemsize > 2 and tile.dtype != np.float32
        values = tile.astype(np.float64 if wide else np.float32)
        shape = (-1, *[1] * (tile.ndim - 1))
        if values.dtype.kind == "f" and tile.dtype.kind == "f":
            bad = ~np.isfinite(values)
            if bad.any():
                fill = np.nan_to_num(self.fill).reshape(shape)
                values = np.where(bad, fill.astype(values.dtype), values)
        offset = self.offset.reshape(shape).astype(values.dtype)
        gain = self.gain.reshape(shape).astype(values.dtype)
        with np.errstate(over="ignore"):
            scaled = (values - offset) * gain
        return np.clip(scaled, *self._limits, out=scaled).astype(np.float32)

    def apply_to_tensor(self, tile: Tensor) -> Tensor:
        """Normalise pixels on the device where they are.

        Parameters
        ----------
        tile : Tensor of shape (channel, *spatial)
            Of integers of up to 16 bits.

        Returns
        -------
        float32 Tensor of the same shape
            Equal to what `apply` gives.
        """
        values = tile.float()
        shape = (-1, *[1] * (tile.ndim - 1))
        values -= values.new_tensor(self.offset).reshape(shape)
        values *= values.new_tensor(self.gain).reshape(shape)
        return values.clamp_(*self._limits)

    @property
    def _limits(self) -> tuple[float, float]:
        # The largest float is a common mark for "no data"; it must not overflow.
        low, high = self.clip or (None, None)
        return -LARGEST if low is None else low, LARGEST if high is None else high
