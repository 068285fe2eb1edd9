"""What a U-Net is made of: blocks of convolutions, and upsampling."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Sequence

    from napari_unet.network.config import UNetConfig


class ConvBlock(nn.Sequential):
    """3x3 convolutions to the given widths, each with its norm and activation."""

    def __init__(self, config: UNetConfig, channels: int, widths: tuple[int, ...]):
        layers: list[nn.Module] = []
        place = config.norm_place
        follows = config.norm is not None and place == "before_activation"
        for width in widths:
            if config.norm is not None and place == "before_convolution":
                layers.append(norm_layer(config, channels))
            layers.append(
                conv_type(config.ndim)(
                    channels,
                    width,
                    3,
                    padding=1 if config.padding == "same" else 0,
                    bias=not follows,
                )
            )
            if follows:
                layers.append(norm_layer(config, width))
            layers.append(_activation(config))
            if config.norm is not None and place == "after_activation":
                layers.append(norm_layer(config, width))
            channels = width
        super().__init__(*layers)


class Up(nn.Module):
    """Double the size and bring ``in_channels`` to ``out_channels``.

    Without convolution, so that the channels stay, where ``out_channels`` is 0.
    """

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int):
        super().__init__()
        self.kind = config.upsampling
        self.ndim = config.ndim
        self.align_corners = config.align_corners
        conv = conv_type(self.ndim)
        transposed = nn.ConvTranspose2d if self.ndim == 2 else nn.ConvTranspose3d
        if not out_channels:
            self.conv: nn.Module | None = None
        elif self.kind == "transposed":
            self.conv = transposed(in_channels, out_channels, 2, 2)
        elif self.kind == "transposed_3x3":
            self.conv = transposed(in_channels, out_channels, 3, 2, 1, 1)
        elif self.kind == "nearest":
            self.conv = conv(in_channels, out_channels, 2)
        elif self.kind == "pixel_shuffle":
            self.conv = conv(in_channels, out_channels << self.ndim, 1)
        else:
            self.conv = conv(in_channels, out_channels, 1)

    def forward(self, x: Tensor, size: list[int], indices: Tensor | None) -> Tensor:
        """Upsample; only unpooling uses the encoder's ``size`` and ``indices``."""
        if self.kind == "nearest":
            x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
            if self.conv is not None:
                x = functional.pad(x, [0, 1] * self.ndim)
            return self._convolve(x)
        if self.kind == "bilinear":
            mode = "bilinear" if self.ndim == 2 else "trilinear"
            x = functional.interpolate(
                x, scale_factor=2.0, mode=mode, align_corners=self.align_corners
            )
            return self._convolve(x)
        x = self._convolve(x)
        if self.kind == "pixel_shuffle":
            return _pixel_shuffle(x)
        if self.kind == "unpool":
            assert indices is not None
            if self.ndim == 2:
                return functional.max_unpool2d(x, indices, [2, 2], output_size=size)
            return functional.max_unpool3d(x, indices, [2, 2, 2], output_size=size)
        return x

    def _convolve(self, x: Tensor) -> Tensor:
        if self.conv is None:
            return x
        convolved: Tensor = self.conv(x)
        return convolved


def conv_type(ndim: int) -> type[nn.Conv2d] | type[nn.Conv3d]:
    """Return the convolution of 2 or 3 dimensions."""
    return nn.Conv2d if ndim == 2 else nn.Conv3d


def norm_layer(config: UNetConfig, channels: int) -> nn.Module:
    """Build the normalisation of a network for some channels."""
    if config.norm == "group":
        return nn.GroupNorm(math.gcd(8, channels), channels)
    if config.norm == "instance":
        instance = nn.InstanceNorm2d if config.ndim == 2 else nn.InstanceNorm3d
        return instance(channels, affine=True)
    return (nn.BatchNorm2d if config.ndim == 2 else nn.BatchNorm3d)(channels)


def _activation(config: UNetConfig) -> nn.Module:
    if config.negative_slope:
        return nn.LeakyReLU(config.negative_slope, inplace=True)
    return nn.ReLU(inplace=True)


def _pixel_shuffle(x: Tensor) -> Tensor:
    """(batch, c * 2**n, *spatial) -> (batch, c, *doubled), in 2D and 3D."""
    ndim = x.ndim - 2
    batch, channels = x.shape[0], x.shape[1] >> ndim
    x = x.reshape(batch, channels, *[2] * ndim, *x.shape[2:])
    order = [0, 1]
    for axis in range(ndim):
        order += [2 + ndim + axis, 2 + axis]
    x = x.permute(order)
    sides = [2 * x.shape[2 + 2 * axis] for axis in range(ndim)]
    return x.reshape(batch, channels, *sides)


def prefer_first(x: Tensor) -> Tensor:
    """Prefer the first of equal values, which rounding would tell apart."""
    for axis in range(2, x.ndim):
        shape = [1] * x.ndim
        shape[axis] = -1
        odd = torch.arange(x.shape[axis], device=x.device) % 2
        less = 1e-5 * (1 << (x.ndim - 1 - axis)) * odd.to(x.dtype).view(shape)
        # By more than rounding, also where what is not negative is almost zero.
        x = x - less * (x.abs() + 1)
    return x


def pad_to(x: Tensor, sides: list[int]) -> Tensor:
    """Append zeros where ``x`` is smaller."""
    missing = [side - have for side, have in zip(sides, x.shape[2:], strict=True)]
    if not any(missing):
        return x
    return functional.pad(x, [n for gap in reversed(missing) for n in (0, gap)])


def crop_to(x: Tensor, sides: list[int]) -> Tensor:
    """Cut out the centre."""
    gaps = [have - side for side, have in zip(sides, x.shape[2:], strict=True)]
    starts = [gap // 2 for gap in gaps]
    return narrow(x, [(a, a + side) for a, side in zip(starts, sides, strict=True)])


def narrow(x: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """Cut out what lies between a start and a stop along each spatial axis."""
    for axis, (start, stop) in enumerate(spans, start=2):
        x = x.narrow(axis, start, stop - start)
    return x
