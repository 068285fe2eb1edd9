"""From somebody else's layers in their places to one of our networks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from napari_unet.errors import BadModel
from napari_unet.models.checkpoint import build_unet
from napari_unet.network.config import Norm, NormPlace, UNetConfig, Upsampling

if TYPE_CHECKING:
    from torch import Tensor

    from napari_unet.models.foreign_names import Family
    from napari_unet.network.unet import UNet

Layer = dict[str, "Tensor"]  # the tensors of one layer: weight, bias, …


@dataclass(frozen=True)
class Convolution:
    """A 3x3 convolution and its norm, by the names of their layers."""

    name: str
    norm: str | None = None


@dataclass
class Layout:
    """Which layer is what: the blocks and upsamplings in the order they run.

    Parameters
    ----------
    layers : dict
        All layers of the network by name.
    encoder, decoder : list of blocks
        From the finest level down, from the coarsest up.
    bottleneck : block
    ups : list of str or None
        None where nothing is stored for an upsampling.
    head : str
    bridge : str or None
    norm_place : str
    silent_norm : bool
        Whether instance norms without weights come before the convolutions.
    """

    layers: dict[str, Layer]
    encoder: list[list[Convolution]]
    bottleneck: list[Convolution]
    ups: list[str | None]
    decoder: list[list[Convolution]]
    head: str
    bridge: str | None = None
    norm_place: NormPlace = "before_activation"
    silent_norm: bool = False
    problems: list[str] = field(default_factory=list)

    @property
    def blocks(self) -> list[list[Convolution]]:
        """All blocks in the order in which they run."""
        return [*self.encoder, self.bottleneck, *self.decoder]

    def weight(self, name: str) -> Tensor:
        """Return the weights of a layer."""
        return self.layers[name]["weight"]


def infer_config(layout: Layout, family: Family) -> UNetConfig | None:
    """Read the configuration off the shapes.

    Parameters
    ----------
    layout : Layout
        What does not fit is added to its ``problems``.
    family : Family
        For what shapes do not tell.

    Returns
    -------
    UNetConfig or None
        None if there are problems.

    Raises
    ------
    BadModel
        If all fits but for transposed convolutions that were never saved.
    """
    walk = _Walk(layout, family)
    walk.encode()
    walk.decode()
    if layout.problems:
        return None
    blocks = tuple(
        tuple(len(layout.weight(one.name)) for one in block) for block in layout.blocks
    )
    first, norm = layout.encoder[0][0].name, _norm(layout, family)
    if layout.problems:
        return None
    plain: dict[str, Any] = {
        "in_channels": layout.weight(first).shape[1],
        "num_classes": len(layout.weight(layout.head)),
        "depth": len(layout.ups),
        "base_channels": max(blocks[0]),
        "convs_per_level": max(map(len, blocks)),
        "padding": family.padding,
        "upsampling": walk.upsampling,
        "norm": norm,
        "ndim": walk.ndim,
        "align_corners": family.align_corners and walk.upsampling == "bilinear",
        "skips": family.skips,
        "norm_place": layout.norm_place if norm else "before_activation",
        "negative_slope": family.negative_slope,
        "bridge": len(layout.weight(layout.bridge)) if layout.bridge else 0,
    }
    config = UNetConfig(**plain, blocks=blocks, ups=tuple(walk.ups))
    # Say only what is out of the ordinary.
    if family.skips == "concat" and all(walk.ups):
        simpler = replace(config, ups=None)
        config = simpler if simpler.joints == config.joints else config
    if UNetConfig(**plain).block_widths == blocks:
        config = replace(config, blocks=None)
    return config


class _Walk:
    """Follows the channels through a network and notes what does not fit."""

    def __init__(self, layout: Layout, family: Family):
        self.layout, self.family = layout, family
        weight = layout.weight(layout.encoder[0][0].name)
        self.ndim = weight.ndim - 2
        self.channels = weight.shape[1]
        self.skips: list[int] = []
        self.ups: list[int] = []
        self.upsampling: Upsampling = "transposed"

    def encode(self) -> None:
        for block in self.layout.encoder:
            self._block(block)
            self.skips.append(self.channels)
        if self.layout.bridge:
            self._convolve(self.layout.bridge)
        self._block(self.layout.bottleneck)

    def decode(self) -> None:
        layout = self.layout
        found = {self._upsampling(name) for name in layout.ups}
        if len(found) > 1 and not layout.problems:
            layout.problems.append(f"upsamplings of {len(found)} kinds")
        for name, block in zip(layout.ups, layout.decoder, strict=True):
            skip = self.skips.pop()
            if name is None:
                self.ups.append(0)
                self._check_saved(block, skip)
            else:
                self._up(name)
            if self.family.skips == "concat":
                self.channels += skip
            elif self.channels != skip:
                self._problem(f"{skip} channels are added to {self.channels}")
            self._block(block)
        head = layout.weight(layout.head)
        self._kernel(layout.head, head, 1)
        if head.shape[1] != self.channels:
            self._shape(layout.head, head, self.channels)

    def _block(self, block: list[Convolution]) -> None:
        for one in block:
            before = self.channels
            self._convolve(one.name)
            comes_first = self.layout.norm_place == "before_convolution"
            if one.norm is not None:
                self._lengths(one.norm, before if comes_first else self.channels)

    def _convolve(self, name: str) -> None:
        weight = self.layout.weight(name)
        self._kernel(name, weight, 3)
        if weight.ndim > 1 and weight.shape[1] != self.channels:
            self._shape(name, weight, self.channels)
        self.channels = weight.shape[0]
        self._lengths(name, self.channels)

    def _lengths(self, name: str, channels: int) -> None:
        """Check all tensors of a layer but the kernels of convolutions."""
        for kind, tensor in self.layout.layers[name].items():
            if kind != "num_batches_tracked":
                is_kernel = kind == "weight" and tensor.ndim == self.ndim + 2
                if not is_kernel and tuple(tensor.shape) != (channels,):
                    shape = tuple(tensor.shape)
                    self._problem(f"{name}.{kind} is {shape}, not ({channels},)")

    def _upsampling(self, name: str | None) -> Upsampling | None:
        """Tell the kind by the kernel and the order of the channels."""
        if name is None:
            self.upsampling = self.family.bare_upsampling or self.upsampling
            return None
        weight = self.layout.weight(name)
        incoming = self._incoming(name)
        if set(weight.shape[2:]) == {3}:
            self.upsampling = "transposed_3x3"
        elif set(weight.shape[2:]) == {1}:
            self.upsampling = "bilinear"
        elif set(weight.shape[2:]) != {2}:
            self._kernel(name, weight, 2)
        elif weight.shape[0] != incoming and weight.shape[1] == incoming:
            self.upsampling = "nearest"
        else:
            self.upsampling = "transposed"
        return self.upsampling

    def _incoming(self, name: str) -> int:
        index = self.layout.ups.index(name)
        depth = len(self.layout.ups)
        for block in reversed(self.layout.blocks[: depth + 1 + index]):
            if block:
                return len(self.layout.weight(block[-1].name))
        return 0

    def _up(self, name: str) -> None:
        weight = self.layout.weight(name)
        before, after = weight.shape[:2]
        if not self.upsampling.startswith("transposed"):
            before, after = after, before
        if before != self.channels:
            self._shape(name, weight, self.channels)
        self.channels = after
        self.ups.append(after)

    def _check_saved(self, block: list[Convolution], skip: int) -> None:
        wanted = self.layout.weight(block[0].name).shape[1] if block else 0
        if wanted == self.channels + skip and self.family.bare_upsampling:
            return
        shrinks = skip < wanted < self.channels + skip
        if shrinks and self.family.layers and not self.layout.problems:
            raise BadModel(
                f"This is a {self.family.title}, but its {len(self.layout.ups)} "
                "upsampling layers were never saved: its program makes new, random "
                "transposed convolutions each time it runs, so that what it learnt "
                "there is lost. Correct the program (make them once, in __init__), "
                "train again and import the new file."
            )
        self._problem("no weights of its upsampling")

    def _kernel(self, name: str, weight: Tensor, side: int) -> None:
        have = tuple(weight.shape[2:])
        if have != (side,) * self.ndim:
            text = "x".join(map(str, have)) or "none"
            self._problem(f"{name} has a kernel of {text}, not {side}")

    def _shape(self, name: str, weight: Tensor, channels: int) -> None:
        self._problem(
            f"{name}.weight is {tuple(weight.shape)}, but {channels} channels come in"
        )

    def _problem(self, text: str) -> None:
        self.layout.problems.append(text)


def _norm(layout: Layout, family: Family) -> Norm | None:
    names = {one.norm for block in layout.blocks for one in block}
    if layout.silent_norm:
        return "instance"
    if names == {None}:
        return None
    kinds: set[Literal["batch", "instance"] | None] = set()
    for name in names:
        has = layout.layers[name] if name else {}
        kinds.add("batch" if "running_mean" in has else family.plain_norm)
    if None in names or len(kinds) > 1:
        layout.problems.append("convolutions with and without a norm")
    elif kinds == {None}:
        layout.problems.append(
            f"{sorted(filter(None, names))[0]} has no running statistics, so that it "
            "is a group or instance norm, which the file does not tell apart"
        )
    return kinds.pop()


def build_network(layout: Layout, family: Family, config: UNetConfig) -> UNet:
    """Build our network with the weights of theirs.

    A bias before a batch norm becomes part of its mean, one before an instance norm
    has no effect; joined maps are brought into our order.

    Parameters
    ----------
    layout, family
        As for `infer_config`.
    config : UNetConfig
        What that returned.

    Returns
    -------
    UNet
        In evaluation mode.
    """
    parts = [f"encoder.{level}" for level in range(config.depth)]
    parts += ["bottleneck", *(f"decoder.{step}" for step in range(config.depth))]
    state: dict[str, Tensor] = {}
    for part, block in zip(parts, layout.blocks, strict=True):
        for index, one in enumerate(block):
            # Joined maps are the input of a decoder block's first convolution.
            swaps = family.up_first and not index and part.startswith("decoder")
            up = config.joints[int(part.split(".")[1])][1] if swaps else 0
            state |= _convolution(layout, config, f"{part}.", index, one, up)
    for step, name in enumerate(layout.ups):
        if name is not None:
            outputs = config.joints[step][1]
            state |= _biased(f"up.{step}.conv", layout.layers[name], outputs)
    if layout.bridge:
        state |= _biased("bridge", layout.layers[layout.bridge])
    state |= _biased("head", layout.layers[layout.head])
    return build_unet(config, state, "the file")


def _convolution(
    layout: Layout,
    config: UNetConfig,
    part: str,
    index: int,
    one: Convolution,
    up: int,
) -> dict[str, Tensor]:
    """Return the tensors of a convolution and its norm under our names.

    ``up`` channels of the input are moved behind the others.
    """
    conv = layout.layers[one.name]
    weight = conv["weight"].roll(-up, 1)
    bias = conv.get("bias", weight.new_zeros(len(weight)))
    if config.norm is None:
        place = f"{part}{2 * index}."
        return {f"{place}weight": weight, f"{place}bias": bias}
    offsets = {
        "before_activation": (0, 1),
        "after_activation": (0, 2),
        "before_convolution": (1, 0),
    }[config.norm_place]
    place, norm_place = (f"{part}{3 * index + offset}." for offset in offsets)
    channels = weight.shape[1 if config.norm_place == "before_convolution" else 0]
    norm = _norm_tensors(layout.layers[one.norm] if one.norm else {}, channels, config)
    found = {f"{place}weight": weight}
    if config.norm_place == "before_convolution":
        norm = {key: t.roll(-up, 0) if t.ndim else t for key, t in norm.items()}
    if config.norm_place != "before_activation":
        found[f"{place}bias"] = bias
    elif config.norm == "batch":
        norm["running_mean"] = norm["running_mean"] - bias
    return found | {f"{norm_place}{key}": tensor for key, tensor in norm.items()}


def _norm_tensors(
    stored: Layer, channels: int, config: UNetConfig
) -> dict[str, Tensor]:
    norm = {"weight": torch.ones(channels), "bias": torch.zeros(channels)}
    if config.norm == "batch":
        norm["running_mean"] = torch.zeros(channels)
        norm["running_var"] = torch.ones(channels)
        norm["num_batches_tracked"] = torch.tensor(0)
    return norm | stored


def _biased(name: str, stored: Layer, outputs: int | None = None) -> Layer:
    """Return weights and bias under our name; a bias of 0 where there is none."""
    weight = stored["weight"]
    outputs = len(weight) if outputs is None else outputs
    bias = stored.get("bias", weight.new_zeros(outputs))
    return {f"{name}.weight": weight, f"{name}.bias": bias}
