"""What U-Nets are built from: their configurations, without torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from napari_unet.errors import BadModel
from napari_unet.network.program_config import ProgramConfig, field_values

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

    @property
    def inexact_reason(self) -> str | None:
        """Why its tiles cannot agree with the whole image, as a clause, if so."""
        if self.norm in ("group", "instance"):
            return (
                f"it uses {self.norm} normalisation, whose statistics are those of "
                "each tile"
            )
        if self.upsampling == "bilinear" and self.align_corners:
            return (
                "it interpolates with aligned corners, which depends on the tile size"
            )
        return None

    @property
    def weights(self) -> int:
        """How many numbers a training changes, counted without building the network."""
        channels, blocks = self.in_channels, iter(self.block_widths)
        count = 0
        for _ in range(self.depth):
            count += self._block_weights(channels, block := next(blocks))
            channels = block[-1]
        if self.bridge:
            count += self._conv_weights(channels, self.bridge)
            channels = self.bridge
        count += self._block_weights(channels, next(blocks))
        for index, ((before, after, skip), block) in enumerate(
            zip(self.joints, blocks, strict=True)
        ):
            if self.ups is None or self.ups[index]:
                count += self._up_weights(before, after)
            joined = after + skip if self.skips == "concat" else after
            count += self._block_weights(joined, block)
            channels = (block or (joined,))[-1]
        return count + self._conv_weights(channels, self.num_classes, side=1)

    def _block_weights(self, channels: int, widths: tuple[int, ...]) -> int:
        count = 0
        for width in widths:
            count += self._conv_weights(channels, width)
            if self.norm is not None:
                first = self.norm_place == "before_convolution"
                count += 2 * (channels if first else width)
                if self.norm_place == "before_activation":
                    count -= width  # its bias is the norm's
            channels = width
        return count

    def _up_weights(self, channels: int, width: int) -> int:
        if self.upsampling == "pixel_shuffle":
            return self._conv_weights(channels, width << self.ndim, side=1)
        side = {"transposed": 2, "transposed_3x3": 3, "nearest": 2}
        return self._conv_weights(channels, width, side.get(self.upsampling, 1))

    def _conv_weights(self, channels: int, width: int, side: int = 3) -> int:
        kernel: int = side**self.ndim
        return (channels * kernel + 1) * width

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
        return cls(**field_values(cls, values))


_OUR_FIELDS = 12  # those before ``skips``


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


NAMED_CONFIGS: dict[str, UNetConfig] = {
    "default": UNetConfig(),
    "paper": UNetConfig(padding="valid", norm=None, dropout=0.5),
    "paper-batchnorm": UNetConfig(padding="valid"),
    "padded-bilinear": UNetConfig(depth=3, upsampling="bilinear"),
    "small": UNetConfig(num_classes=1, depth=3, base_channels=16, convs_per_level=1),
    "repeat-conv": UNetConfig(upsampling="nearest"),
}


Config = UNetConfig | ProgramConfig


def config_from_dict(values: dict[str, Any]) -> Config:
    """Rebuild the configuration of any network; raise `BadModel` if it is none."""
    if "kind" in values:
        return ProgramConfig.from_dict(values)
    return UNetConfig.from_dict(values)
