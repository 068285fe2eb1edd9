"""How much context a network needs: computed from the config, and measured.

Everything here speaks of one axis; U-Nets treat all spatial axes alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from napari_unet.network.program_config import ProgramConfig
from napari_unet.network.unet import UNet

if TYPE_CHECKING:
    from napari_unet.network.config import Config, UNetConfig

Interval = tuple[int, int]  # first and last index, both included


@dataclass(frozen=True)
class ReceptiveField:
    """The context of an output tile that starts and ends on the pooling grid.

    Parameters
    ----------
    alignment : int
        2**depth. Tiles start at multiples of it in the output.
    remainder : int
        Legal input sides are ``remainder`` more than a multiple of ``alignment``.
    shrink : int
        Pixels that the output lacks on each side (0 with ``padding="same"``).
    before, after : int
        Pixels of real input that an output tile depends on before its first
        and after its last pixel. They contain ``shrink``.
    minimum : int
        No legal input side is smaller.
    """

    alignment: int
    remainder: int
    shrink: int
    before: int
    after: int
    minimum: int = 1

    def input_size(self, at_least: int) -> int:
        """Return the smallest legal input side that is not below ``at_least``."""
        smallest = max(at_least, self._minimum)
        return smallest + (self.remainder - smallest) % self.alignment

    @property
    def _minimum(self) -> int:
        least = 2 * self.shrink + 1 if self.shrink else self.alignment
        return max(least, self.minimum)

    @property
    def halo(self) -> tuple[int, int]:
        """Context per side, rounded so that the input starts on the grid.

        The first value is ``shrink`` plus a multiple of ``alignment``.
        """
        before = self.shrink + _round_up(self.before - self.shrink, self.alignment)
        return before, self.after


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@lru_cache
def receptive_field(config: Config) -> ReceptiveField:
    """Compute the context of a network from its configuration.

    The dependence of an aligned output tile is followed backwards through the
    layers as an interval of indices, level by level.

    Parameters
    ----------
    config : UNetConfig or ProgramConfig
        Any variant; for those that are not tile-exact (see ``inexact_reason``)
        the context is that of their convolutions alone, or the one that is given.

    Returns
    -------
    ReceptiveField
    """
    if isinstance(config, ProgramConfig):
        return ReceptiveField(
            alignment=config.alignment,
            remainder=0,
            shrink=config.shrink,
            before=config.shrink + config.halo,
            after=config.shrink + config.halo,
            minimum=config.minimum,
        )
    alignment = 2**config.depth
    shrinks = [0] * (config.depth + 1)  # by which the sub-network at a level shrinks
    remainder = 0
    if config.padding == "valid":
        down, bottom, up = _convolutions(config)
        shrinks[config.depth] = 2 * bottom
        for level in reversed(range(config.depth)):
            shrinks[level] = 2 * (down[level] + up[level] + shrinks[level + 1])
        remainder = sum(n << (level + 1) for level, n in enumerate(down)) % alignment
    length = 64 * alignment  # long enough that both ends are independent
    first, last = _input_interval(config, shrinks, 0, (0, length - 1))
    shrink = shrinks[0] // 2
    return ReceptiveField(
        alignment=alignment,
        remainder=remainder,
        shrink=shrink,
        before=shrink - first,
        after=last - (length - 1) - shrink,
    )


def _convolutions(config: UNetConfig) -> tuple[list[int], int, list[int]]:
    """3x3 convolutions of the encoder by level, at the bottom, of the decoder."""
    counts = [len(block) for block in config.block_widths]
    depth = config.depth
    return counts[:depth], counts[depth] + bool(config.bridge), counts[:depth:-1]


def _input_interval(
    config: UNetConfig, shrinks: list[int], level: int, output: Interval
) -> Interval:
    """Input of the sub-network at ``level`` that an interval of its output needs."""
    down, bottom, up = _convolutions(config)
    if level == config.depth:
        return _before_convs(config, bottom, output)
    output = _before_convs(config, up[level], output)
    first, last = before_upsampling(config, level, output)
    below = _input_interval(config, shrinks, level + 1, (first, last))
    needed = [(2 * below[0], 2 * below[1] + 1)]
    if config.skip_connections:
        crop = shrinks[level + 1]
        needed.append((output[0] + crop, output[1] + crop))
    if config.upsampling == "unpool":
        needed.append((2 * first, 2 * last + 1))  # where the maxima were
    first, last = min(i[0] for i in needed), max(i[1] for i in needed)
    return _before_convs(config, down[level], (first, last))


def _before_convs(config: UNetConfig, count: int, interval: Interval) -> Interval:
    first, last = interval
    if config.padding == "valid":
        return first, last + 2 * count
    return first - count, last + count


def before_upsampling(config: UNetConfig, level: int, interval: Interval) -> Interval:
    """Return what of the level below an interval of an upsampled map depends on."""
    first, last = interval
    bare = config.ups is not None and not config.ups[config.depth - 1 - level]
    if config.upsampling == "nearest" and not bare:
        last += 1  # the 2x2 convolution looks one pixel ahead
    if config.upsampling == "transposed_3x3":
        last += 1  # an odd output also takes the next input
    if config.upsampling == "bilinear":
        # Output i interpolates at (i + 1/2) / 2 - 1/2.
        return (first - 1) // 2, (last + 1) // 2
    return first // 2, last // 2


def measured_receptive_field(config: UNetConfig) -> ReceptiveField:
    """Measure the context with impulses, at every phase of the pooling grid.

    A copy of the network with positive weights is monotone, so an impulse
    changes every output that depends on it.

    Parameters
    ----------
    config : UNetConfig
        A tile-exact variant.

    Returns
    -------
    ReceptiveField
        Equal to `receptive_field` if that is right.
    """
    computed = receptive_field(config)
    network = _monotone(config)
    margin = computed.before + computed.after + 2 * computed.alignment
    length = computed.input_size(2 * margin)
    narrow = computed.input_size(1)
    # Several random images, because ties hide where unpooling puts a maximum.
    baseline = 1 + torch.rand(
        8, config.in_channels, length, *[narrow] * (config.ndim - 1)
    )
    baseline = baseline.double()
    with torch.inference_mode():
        quiet = network(baseline)
        before = after = 0
        middle = length // 2 // computed.alignment * computed.alignment
        for position in range(middle, middle + computed.alignment):
            impulse = baseline.clone()
            impulse[:, :, position] += 10.0
            changed = (network(impulse) != quiet).transpose(0, 2).flatten(1).any(dim=1)
            outputs = torch.nonzero(changed).flatten()
            # An aligned tile that contains the first (last) changed output.
            first = int(outputs[0]) // computed.alignment * computed.alignment
            last = int(outputs[-1]) // computed.alignment * computed.alignment
            last += computed.alignment - 1
            place = position - computed.shrink
            after = max(after, place - (first + computed.alignment - 1))
            before = max(before, last - computed.alignment + 1 - place)
    return ReceptiveField(
        computed.alignment, computed.remainder, computed.shrink, before, after
    )


def _monotone(config: UNetConfig) -> UNet:
    network = UNet.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.abs_()
            # Keep the signal near 1, so that no change is lost to rounding.
            if parameter.ndim > 1:
                parameter.add_(parameter.mean())
                parameter.div_(parameter.sum() / len(parameter))
    return network
