"""The U-Net: every variant that the package builds, trains and loads."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from napari_unet.errors import BadInput, BadModel
from napari_unet.network.blocks import (
    ConvBlock,
    Up,
    conv_type,
    crop_to,
    narrow,
    pad_to,
    prefer_first,
)

if TYPE_CHECKING:
    from napari_unet.network.cropping import Cropping

Padding = Literal["same", "valid"]
Upsampling = Literal[
    "transposed", "transposed_3x3", "nearest", "bilinear", "unpool", "pixel_shuffle"
]
Norm = Literal["batch", "group", "instance"]
NormPlace = Literal["before_activation", "after_activation", "before_convolution"]
Skips = Literal["concat", "add"]
Blocks = tuple[tuple[int, ...], ...]


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
        "transposed": 2x2 transposed convolution. "transposed_3x3": its windows
        overlap by a pixel. "nearest": repeat every value, then a 2x2 convolution.
        "bilinear": interpolate, then a 1x1 convolution. "unpool": 1x1 convolution,
        then back to where the maxima came from. "pixel_shuffle": 1x1 convolution,
        then trade channels for pixels.
    norm : "batch", "group", "instance" or None
        Normalisation of every convolution of a block; one that it follows
        directly has no bias.
    skip_connections : bool
        False leaves an encoder-decoder.
    dropout : float
        Rate at the end of the contracting path.
    ndim : 2 or 3
        Spatial dimensions.
    align_corners : bool
        How "bilinear" interpolates; True depends on the size of the input and
        so cannot be tiled exactly.
    skips : "concat" or "add"
        How a skip connection joins the upsampled map.
    norm_place : str
        "before_activation", "after_activation" or "before_convolution".
    negative_slope : float
        Of the activation for negative values; 0 is the ReLU.
    blocks : tuple of tuple of int, or None
        Channels after each 3x3 convolution of each block: the encoder's from the
        finest, the bottleneck, the decoder's from the coarsest. None: as the other
        numbers say, which must agree: ``base_channels`` is the most of the finest
        encoder block, ``convs_per_level`` that of all blocks.
    ups : tuple of int, or None
        Channels after each upsampling, from the coarsest; 0 where only the size
        changes. None: half of what comes in.
    bridge : int
        Channels of a bare convolution before the bottleneck, 0 without.

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
    # What only other people's networks need.
    skips: Skips = "concat"
    norm_place: NormPlace = "before_activation"
    negative_slope: float = 0.0
    blocks: Blocks | None = None
    ups: tuple[int, ...] | None = None
    bridge: int = 0

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
        _check(self.skips in get_args(Skips), "skips", self)
        _check(self.norm_place in get_args(NormPlace), "norm_place", self)
        for name in ("dropout", "negative_slope"):
            value = getattr(self, name)
            _check(isinstance(value, int | float) and 0 <= value < 1, name, self)
        _check(type(self.bridge) is int and 0 <= self.bridge <= 4096, "bridge", self)
        _check(self.ndim > 1, "ndim", self)
        if self.upsampling == "unpool" and self.padding == "valid":
            raise BadModel(
                "upsampling='unpool' needs padding='same': the maxima of a valid "
                "network lie outside its smaller maps. Choose another upsampling."
            )
        if self.blocks is not None:
            self._check_blocks(self.blocks)
        if self.ups is not None:
            _check(_are_widths(self.ups, 0, self.depth), "ups", self)
            bare = self.upsampling in ("nearest", "bilinear")
            _check(bare or all(self.ups), "ups", self)
        if self.skips == "add" and self.skip_connections:
            self._check_sums()

    def _check_blocks(self, blocks: Blocks) -> None:
        fits = isinstance(blocks, tuple) and len(blocks) == 2 * self.depth + 1
        fits = fits and all(_are_widths(block, 1) for block in blocks)
        fits = fits and all(blocks[: self.depth + 1])
        _check(fits, "blocks", self)
        _check(self.base_channels == max(blocks[0]), "base_channels", self)
        _check(self.convs_per_level == max(map(len, blocks)), "convs_per_level", self)

    def _check_sums(self) -> None:
        """Raise `BadModel` unless each skip has the channels it is added to."""
        for level, (_, joined, skip) in enumerate(self.joints):
            if joined != skip:
                raise BadModel(
                    f"Skip connection {level + 1} has {skip} channels and is added to "
                    f"{joined}; give ups and blocks of equal channels."
                )

    @property
    def block_widths(self) -> Blocks:
        """Channels after each convolution, block by block as they run."""
        if self.blocks is not None:
            return self.blocks
        down = [self.base_channels << level for level in range(self.depth + 1)]
        return tuple((width,) * self.convs_per_level for width in down + down[-2::-1])

    @property
    def joints(self) -> list[tuple[int, int, int]]:
        """Channels before and after each upsampling, and of its skip connection."""
        blocks = self.block_widths
        channels, found = blocks[self.depth][-1], []
        for index in range(self.depth):
            skip = blocks[self.depth - 1 - index][-1] if self.skip_connections else 0
            up = channels // 2 if self.ups is None else self.ups[index] or channels
            found.append((channels, up, skip))
            joined = up + skip if self.skips == "concat" else up
            channels = (blocks[self.depth + 1 + index] or (joined,))[-1]
        return found

    @property
    def smallest_side(self) -> int:
        """Side to which a padded network extends smaller images."""
        # A group or instance has no variance in a single pixel at the bottom.
        return (2 if self.norm in ("group", "instance") else 1) << self.depth

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain data.

        What only other people's networks need is left out where it is not used.
        """
        foreign = {f.name: f.default for f in fields(self)[_OUR_FIELDS:]}
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in foreign or value != foreign[name]
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> UNetConfig:
        """Rebuild a configuration; raise `BadModel` on keys it does not know."""
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise BadModel(
                f"The network configuration has unknown entries {sorted(unknown)}; "
                "the file was probably written by a newer napari-unet. Update it."
            )
        for name in ("blocks", "ups"):  # tuples, also from JSON
            if isinstance(values.get(name), list):
                values = values | {name: _tuples(values[name])}
        return cls(**values)


_OUR_FIELDS = 12  # those before ``skips``


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _are_widths(value: Any, least: int, count: int | None = None) -> bool:
    return (
        isinstance(value, tuple)
        and (len(value) <= 8 if count is None else len(value) == count)
        and all(type(width) is int and least <= width <= 4096 for width in value)
    )


def _check(holds: bool, name: str, config: UNetConfig) -> None:
    if not holds:
        value = getattr(config, name)
        raise BadModel(f"A U-Net cannot have {name}={value!r}; choose another value.")


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
        blocks, channels = config.block_widths, in_channels
        self.encoder = nn.ModuleList()
        for block in blocks[: config.depth]:
            self.encoder.append(ConvBlock(config, channels, block))
            channels = block[-1]
        if config.bridge:
            bare = 1 if config.padding == "same" else 0
            conv = conv_type(config.ndim)
            self.bridge = conv(channels, config.bridge, 3, padding=bare)
            channels = config.bridge
        self.bottleneck = ConvBlock(config, channels, blocks[config.depth])
        # From the bottom up, in the order in which they run.
        self.up, self.decoder = nn.ModuleList(), nn.ModuleList()
        for index, (before, after, skip) in enumerate(config.joints):
            convolved = config.ups is None or config.ups[index] > 0
            self.up.append(Up(config, before, after if convolved else 0))
            joined = after + skip if config.skips == "concat" else after
            block = blocks[config.depth + 1 + index]
            self.decoder.append(ConvBlock(config, joined, block))
            channels = (block or (joined,))[-1]
        self.head = conv_type(config.ndim)(channels, num_classes, 1)
        self.dropout = nn.Dropout(config.dropout)
        self._initialise()

    @classmethod
    def from_config(cls, config: UNetConfig) -> UNet:
        """Build an untrained network from its configuration."""
        return cls(**config.to_dict())

    def forward(self, image: Tensor, cropping: Cropping | None = None) -> Tensor:
        """Compute the logits.

        Parameters
        ----------
        image : Tensor of shape (batch, in_channels, *spatial)
            Any size with ``padding="same"``; with ``padding="valid"`` a size
            that can be halved at every level.
        cropping : Cropping, optional
            The part of the output that is wanted, so that less is computed;
            everything by default. Sides must then be multiples of ``2**depth``.

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
            x = pad_to(image, [max(side, config.smallest_side) for side in wanted])
        else:
            self._check_valid(wanted)
            x = image
        x, maps, places = self._contract(x)
        logits = self._expand(x, maps, places, cropping)
        if config.padding == "same" and cropping is None:
            logits = narrow(logits, [(0, side) for side in wanted])
        return logits

    def _contract(self, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
        """Run the contracting path; also return the skips and the places of maxima."""
        maps: list[Tensor] = []
        places: list[Tensor | None] = []
        for level, block in enumerate(self.encoder):
            x = block(x)
            if level == self.config.depth - 1:
                x = self.dropout(x)
            maps.append(x)
            x, indices = self._pool(x)
            places.append(indices)
        if self.config.bridge:
            x = self.bridge(x)
        return self.dropout(self.bottleneck(x)), maps, places

    def _expand(
        self,
        x: Tensor,
        maps: list[Tensor],
        places: list[Tensor | None],
        cropping: Cropping | None,
    ) -> Tensor:
        """Run the expanding path, which empties the lists, and the last layer."""
        config = self.config
        for step, (up, block) in enumerate(zip(self.up, self.decoder, strict=True)):
            skip = maps.pop()
            if cropping:
                x = narrow(x, cropping.below[step])
            size = list(skip.shape[2:])
            x = up(x, size, places.pop())
            if cropping:
                x = narrow(x, cropping.upsampled[step])
                skip = narrow(skip, cropping.skip[step])
            elif config.padding == "same":
                x = pad_to(x, size)
            if config.skip_connections:
                skip = crop_to(skip, list(x.shape[2:]))
                x = x + skip if config.skips == "add" else torch.cat([skip, x], dim=1)
            x = block(x)
        if cropping:
            x = narrow(x, cropping.kept)
        logits: Tensor = self.head(x)
        return logits

    def _pool(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        is_2d = self.config.ndim == 2
        if self.config.upsampling == "unpool":
            ranked = prefer_first(x)
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


NAMED_CONFIGS: dict[str, UNetConfig] = {
    "default": UNetConfig(),
    "paper": UNetConfig(padding="valid", norm=None, dropout=0.5),
    "paper-batchnorm": UNetConfig(padding="valid"),
    "padded-bilinear": UNetConfig(depth=3, upsampling="bilinear"),
    "small": UNetConfig(num_classes=1, depth=3, base_channels=16, convs_per_level=1),
    "repeat-conv": UNetConfig(upsampling="nearest"),
}
