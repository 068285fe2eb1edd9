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
    from numpy.typing import NDArray


LARGEST = 1e6  # a normalised value of an image is near 0 to 1


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

    def fit(self, pixels: NDArray) -> Scaling:
        """Derive the scaling of an image from its pixels.

        Parameters
        ----------
        pixels : array of shape (channel, ...), real
            The whole image or a sample of it. NaN and infinity are left out.

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
        fits = [self._fit_one(*both) for both in zip(groups, fixed, strict=True)]
        if self.joint_channels:
            fits *= len(pixels)
        offset, gain, fill = np.array(fits, dtype=np.float64).T
        return Scaling(offset, gain, fill, self.clip)

    def _fit_one(
        self, values: NDArray, fixed: tuple[float, float]
    ) -> tuple[float, float, float]:
        if values.dtype.kind == "f":
            values = values[np.isfinite(values)]
        if values.dtype.kind == "b" or values.dtype == np.float16:
            values = values.astype(np.float32)  # half sums and differences overflow
        if not values.size:
            return 0.0, 0.0, np.nan
        median = float(np.median(values))
        if self.method == "fixed":
            low, high = fixed
        elif self.method == "mean_std":
            mean = values.mean(dtype=np.float64)
            low, high = mean, mean + values.std(dtype=np.float64)
        else:
            low, high = (float(v) for v in self._percentiles(values))
            if high <= low:  # few bright pixels on a constant background
                low, high = float(values.min()), float(values.max())
        spread = float(high) - float(low)
        gain = 1.0 / (spread + self.eps) if spread > 0 else 0.0
        return float(low), gain, median

    def _percentiles(self, values: NDArray) -> NDArray:
        # Between signed values far apart, numpy's differences wrap around.
        if values.dtype.kind == "i" or values.dtype.itemsize > 4:
            small = values.dtype.itemsize < 4
            values = values.astype(np.float32 if small else np.float64)
        percentiles: NDArray = np.percentile(values, [self.lower, self.upper])
        return percentiles


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
        # The largest float is a common mark for "no data"; it must not overflow.
        low, high = self.clip or (None, None)
        low, high = -LARGEST if low is None else low, LARGEST if high is None else high
        return np.clip(scaled, low, high, out=scaled).astype(np.float32)
