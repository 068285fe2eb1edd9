"""What the expanding path need not compute when only a part of its output is wanted.

Only the contracting path needs the whole halo of a tile: on the way up, every level
is cropped to what the wanted part depends on. What remains is computed as before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from napari_unet.network.receptive_field import before_upsampling

if TYPE_CHECKING:
    from collections.abc import Sequence

    from napari_unet.network.config import UNetConfig

Span = tuple[int, int]  # start and stop along one axis
Box = tuple[Span, ...]  # along all spatial axes


@dataclass(frozen=True)
class Cropping:
    """What is cut out of the maps of the expanding path, step by step.

    Parameters
    ----------
    below : tuple of Box
        Of the map that a step upsamples, from the coarsest.
    upsampled : tuple of Box
        Of the upsampled map.
    skip : tuple of Box
        Of the map that is joined to it.
    kept : Box
        Of the last map: what is wanted.
    """

    below: tuple[Box, ...]
    upsampled: tuple[Box, ...]
    skip: tuple[Box, ...]
    kept: Box


def can_crop(config: UNetConfig) -> bool:
    """Tell whether cropping leaves the wanted part as it is.

    Statistics of a whole map, and places of maxima in it, would change; a valid
    network computes only what is wanted anyhow.
    """
    return (
        config.padding == "same"
        and config.upsampling != "unpool"
        and config.norm not in ("group", "instance")
        and not (config.upsampling == "bilinear" and config.align_corners)
    )


def cropping(
    config: UNetConfig, keep: Sequence[Span], sides: Sequence[int]
) -> Cropping:
    """Compute the cropping for a part of the output.

    Parameters
    ----------
    config : UNetConfig
        One that can be cropped; see `can_crop`.
    keep : sequence of (int, int)
        What is wanted of the output: start and stop along each axis.
    sides : sequence of int
        Of the input, multiples of ``2**depth``.

    Returns
    -------
    Cropping
    """
    axes = [_along(config, *axis) for axis in zip(keep, sides, strict=True)]
    below, upsampled, skip = (
        tuple(zip(*(axis[part] for axis in axes), strict=True)) for part in range(3)
    )
    return Cropping(below, upsampled, skip, tuple(axis[3] for axis in axes))


def _along(
    config: UNetConfig, keep: Span, side: int
) -> tuple[list[Span], list[Span], list[Span], Span]:
    """Compute the cropping along one axis, from the finest level down."""
    counts = [len(block) for block in config.block_widths[: config.depth : -1]]
    wanted: list[Span] = [keep]  # of what each level computes
    joined: list[Span] = []
    for level, count in enumerate(counts):
        size = side >> level
        start, stop = wanted[-1]
        start, stop = max(start - count, 0), min(stop + count, size)
        joined.append((start, stop))
        first, last = before_upsampling(config, level, (start, stop - 1))
        wanted.append((max(first, 0), min(last + 1, size // 2)))
    # A level holds what was joined there; the bottleneck holds everything.
    held = [start for start, _ in joined] + [0]
    below = [_shift(w, -h) for w, h in zip(wanted[1:], held[1:], strict=True)]
    upsampled = [_shift(j, -2 * w[0]) for j, w in zip(joined, wanted[1:], strict=True)]
    kept = _shift(keep, -held[0])
    return below[::-1], upsampled[::-1], joined[::-1], kept


def _shift(span: Span, by: int) -> Span:
    return span[0] + by, span[1] + by
