"""The U-Net: every variant that the package builds, trains and loads."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from napari_unet.errors import BadInput, BadModel

Padding = Literal["same", "valid"]
Upsampling = Literal["transposed", "nearest", "bilinear", "unpool", "pixel_shuffle"]
Norm = Literal["batch", "group", "instance"]


@dataclass(frozen=True)
class UNetConfig:
    """All that is needed to rebuild a :class:`UNet`; JSON-able.

    Parameters
    ----------
    in_channels : int
        Channels of the image.
    num_classes : int
        Output channels; 1 means a sigmoid (foreground against background), two
        or more a softmax.
    depth : int
        Number of poolings by 2.
    base_channels : int
        Channels of the first level; they double with each level.
    convs_per_level : int
        3x3 convolutions in each block.
    padding : "same" or "valid"
        "valid" is the network of the paper: the output is smaller than the input.
    upsampling : str
        "transposed": 2x2 transposed convolution. "nearest": repeat every value,
        then a 2x2 convolution. "bilinear": interpolate, then a 1x1 convolution.
        "unpool": 1x1 convolution, then back to where the maxima came from.
        "pixel_shuffle": 1x1 convolution, then trade channels for pixels.
    norm : "batch", "group", "instance" or None
        Normalisation after every convolution of a block, which then has no bias.
    skip_connections : bool
        False leaves an encoder-decoder.
    dropout : float
        Rate at the end of the contracting path.
    ndim : 2 or 3
        Spatial dimensions.
    align_corners : bool
        How "bilinear" interpolates; True depends on the size of the input and
        so cannot be tiled exactly.

    Raises
    ------
    BadModel
        If the values do not describe a network.
    """

    in_channels: int = 1
    num_classes: int = 2
    depth: int = 4
    base_channels: int = 64
    convs_per_level: int = 2
    padding: Padding = "same"
    upsampling: Upsampling = "transposed"
    norm: Norm | None = "batch"
    skip_connections: bool = True
    dropout: float = 0.0
    ndim: int = 2
    align_corners: bool = False

    def __post_init__(self) -> None:
        for name, largest in (
            ("in_channels", 4096),
            ("num_classes", 4096),
            ("depth", 8),
            ("base_channels", 4096),
            ("convs_per_level", 8),
            ("ndim", 3),
        ):
            value = getattr(self, name)
            _check(type(value) is int and 1 <= value <= largest, name, self)
        for name in ("skip_connections", "align_corners"):
            _check(isinstance(getattr(self, name), bool), name, self)
        _check(self.padding in get_args(Padding), "padding", self)
        _check(self.upsampling in get_args(Upsampling), "upsampling", self)
        _check(self.norm in (*get_args(Norm), None), "norm", self)
        is_number = isinstance(self.dropout, int | float)
        _check(is_number and 0 <= self.dropout < 1, "dropout", self)
        _check(self.ndim > 1, "ndim", self)
        if self.upsampling == "unpool" and self.padding == "valid":
            raise BadModel(
                "upsampling='unpool' needs padding='same': the maxima of a valid "
                "network lie outside its smaller maps. Choose another upsampling."
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of every level, from the finest to the bottom."""
        return tuple(self.base_channels << level for level in range(self.depth + 1))

    @property
    def smallest_side(self) -> int:
        """Side to which a padded network extends smaller images."""
        # A group or instance has no variance in a single pixel at the bottom.
        return (2 if self.norm in ("group", "instance") else 1) << self.depth

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> UNetConfig:
        """Rebuild a configuration; raise `BadModel` on keys it does not know."""
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise BadModel(
                f"The network configuration has unknown entries {sorted(unknown)}; "
                "the file was probably written by a newer napari-unet. Update it."
            )
        return cls(**values)


def _check(holds: bool, name: str, config: UNetConfig) -> None:
    if not holds:
        value = getattr(config, name)
        raise BadModel(f"A U-Net cannot have {name}={value!r}; choose another value.")


class ConvBlock(nn.Sequential):
    """3x3 convolutions, each with its normalisation and ReLU."""

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int):
        layers: list[nn.Module] = []
        for index in range(config.convs_per_level):
            layers.append(
                _conv(config.ndim)(
                    out_channels if index else in_channels,
                    out_channels,
                    3,
                    padding=1 if config.padding == "same" else 0,
                    bias=config.norm is None,
                )
            )
            if config.norm is not None:
                layers.append(_norm(config, out_channels))
            layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)


class Up(nn.Module):
    """Double the size and bring ``in_channels`` to ``out_channels``."""

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int):
        super().__init__()
        self.kind = config.upsampling
        self.ndim = config.ndim
        self.align_corners = config.align_corners
        conv = _conv(config.ndim)
        if self.kind == "transposed":
            transposed = nn.ConvTranspose2d if self.ndim == 2 else nn.ConvTranspose3d
            self.conv: nn.Module = transposed(in_channels, out_channels, 2, 2)
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
        convolved: Tensor = self.conv(x)
        return convolved


class UNet(nn.Module):
    """U-Net (Ronneberger, Fischer & Brox 2015, figure 1) and its common variants.

    Parameters
    ----------
    in_channels, num_classes
        See :class:`UNetConfig`.
    **options
        The further fields of :class:`UNetConfig`.

    Examples
    --------
    >>> network = UNet(1, 2, depth=2, base_channels=4)
    >>> network(torch.zeros(1, 1, 33, 20)).shape
    torch.Size([1, 2, 33, 20])
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 2, **options: Any):
        super().__init__()
        config = UNetConfig(in_channels, num_classes, **options)
        self.config = config
        widths = config.widths
        self.encoder = nn.ModuleList(
            ConvBlock(config, widths[level - 1] if level else in_channels, width)
            for level, width in enumerate(widths[:-1])
        )
        self.bottleneck = ConvBlock(config, widths[-2], widths[-1])
        skip = 2 if config.skip_connections else 1
        # From the bottom up, in the order in which they run.
        self.up = nn.ModuleList(
            Up(config, 2 * width, width) for width in reversed(widths[:-1])
        )
        self.decoder = nn.ModuleList(
            ConvBlock(config, skip * width, width) for width in reversed(widths[:-1])
        )
        self.head = _conv(config.ndim)(widths[0], num_classes, 1)
        self.dropout = nn.Dropout(config.dropout)
        self._initialise()

    @classmethod
    def from_config(cls, config: UNetConfig) -> UNet:
        """Build an untrained network from its configuration."""
        return cls(**config.to_dict())

    def forward(self, image: Tensor) -> Tensor:
        """Compute the logits.

        Parameters
        ----------
        image : Tensor of shape (batch, in_channels, *spatial)
            Any size with ``padding="same"``; with ``padding="valid"`` a size
            that can be halved at every level.

        Returns
        -------
        Tensor of shape (batch, num_classes, *spatial)
            Smaller than the image with ``padding="valid"``.

        Raises
        ------
        BadInput
            If a valid network cannot halve this size, or nothing would be left.
        """
        config = self.config
        wanted = list(image.shape[2:])
        if config.padding == "same":
            x = _pad_to(image, [max(side, config.smallest_side) for side in wanted])
        else:
            self._check_valid(wanted)
            x = image
        maps: list[Tensor] = []
        places: list[Tensor | None] = []
        for level, block in enumerate(self.encoder):
            x = block(x)
            if level == config.depth - 1:
                x = self.dropout(x)
            maps.append(x)
            x, indices = self._pool(x)
            places.append(indices)
        x = self.dropout(self.bottleneck(x))
        for up, block in zip(self.up, self.decoder, strict=True):
            skip = maps.pop()
            size = list(skip.shape[2:])
            x = up(x, size, places.pop())
            if config.padding == "same":
                x = _pad_to(x, size)
            if config.skip_connections:
                x = torch.cat([_crop_to(skip, list(x.shape[2:])), x], dim=1)
            x = block(x)
        logits: Tensor = self.head(x)
        if config.padding == "same":
            for axis, side in enumerate(wanted, start=2):
                logits = logits.narrow(axis, 0, side)
        return logits

    def _pool(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        is_2d = self.config.ndim == 2
        if self.config.upsampling == "unpool":
            ranked = _ranked(x)
            if is_2d:
                _, indices = functional.max_pool2d_with_indices(ranked, [2, 2])
            else:
                _, indices = functional.max_pool3d_with_indices(ranked, [2, 2, 2])
            return x.flatten(2).gather(2, indices.flatten(2)).view_as(indices), indices
        return (functional.max_pool2d if is_2d else functional.max_pool3d)(x, 2), None

    def _check_valid(self, sides: list[int]) -> None:
        from napari_unet.network.receptive_field import receptive_field

        field = receptive_field(self.config)
        for side in sides:
            legal = field.input_size(side)
            if legal != side:
                raise BadInput(
                    f"A valid U-Net of depth {self.config.depth} cannot halve a side "
                    f"of {side} pixels at every level; use {legal} "
                    f"(always {field.remainder} more than a multiple of "
                    f"{field.alignment})."
                )

    def _initialise(self) -> None:
        """Draw weights as in the paper, section 3: std sqrt(2 / incoming nodes)."""
        if self.head.weight.is_meta:
            return  # to be loaded; and torch imports its compiler to draw nothing
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            elif isinstance(module, nn.ConvTranspose2d | nn.ConvTranspose3d):
                # Kernel equals stride, so a pixel sees each input channel once.
                nn.init.normal_(module.weight, std=math.sqrt(2 / module.in_channels))
            else:
                continue
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _conv(ndim: int) -> type[nn.Conv2d] | type[nn.Conv3d]:
    return nn.Conv2d if ndim == 2 else nn.Conv3d


def _norm(config: UNetConfig, channels: int) -> nn.Module:
    if config.norm == "group":
        return nn.GroupNorm(math.gcd(8, channels), channels)
    if config.norm == "instance":
        instance = nn.InstanceNorm2d if config.ndim == 2 else nn.InstanceNorm3d
        return instance(channels, affine=True)
    return (nn.BatchNorm2d if config.ndim == 2 else nn.BatchNorm3d)(channels)


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


def _ranked(x: Tensor) -> Tensor:
    """Prefer the first of equal values, which rounding would tell apart."""
    for axis in range(2, x.ndim):
        shape = [1] * x.ndim
        shape[axis] = -1
        odd = torch.arange(x.shape[axis], device=x.device) % 2
        less = 1e-5 * (1 << (x.ndim - 1 - axis)) * odd.to(x.dtype).view(shape)
        # By more than rounding, also where what is not negative is almost zero.
        x = x - less * (x.abs() + 1)
    return x


def _pad_to(x: Tensor, sides: list[int]) -> Tensor:
    """Append zeros where ``x`` is smaller."""
    missing = [side - have for side, have in zip(sides, x.shape[2:], strict=True)]
    if not any(missing):
        return x
    return functional.pad(x, [n for gap in reversed(missing) for n in (0, gap)])


def _crop_to(x: Tensor, sides: list[int]) -> Tensor:
    """Cut out the centre."""
    for axis, side in enumerate(sides, start=2):
        x = x.narrow(axis, (x.shape[axis] - side) // 2, side)
    return x


NAMED_CONFIGS: dict[str, UNetConfig] = {
    "default": UNetConfig(),
    "paper": UNetConfig(padding="valid", norm=None, dropout=0.5),
    "paper-batchnorm": UNetConfig(padding="valid"),
    "padded-bilinear": UNetConfig(depth=3, upsampling="bilinear"),
    "small": UNetConfig(num_classes=1, depth=3, base_channels=16, convs_per_level=1),
    "repeat-conv": UNetConfig(upsampling="nearest"),
}
