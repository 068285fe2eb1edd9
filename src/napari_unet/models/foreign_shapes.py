"""Networks whose names say nothing: recognised by the order and shapes alone."""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING

from napari_unet.models.foreign_names import Family
from napari_unet.models.layout import Convolution, Layer, Layout

if TYPE_CHECKING:
    from collections.abc import Iterator

    from napari_unet.network.config import NormPlace

SHAPE_ONLY = Family(
    "U-Net recognised by the order and shapes of its layers alone",
    (),
    bare_upsampling="bilinear",
    unknown="more than shapes, so that these were taken for granted: padding that "
    "keeps the size, max-pooling, ReLUs, the skip connection first where maps are "
    "joined, bilinear interpolation where no weights of an upsampling are stored. "
    "Compare the result with that of its own program",
)


def arrangements(layers: dict[str, Layer]) -> Iterator[Layout]:
    """Try what the layers of a plain encoder-decoder could be.

    Parameters
    ----------
    layers : dict
        By name, in the order in which they are stored.

    Yields
    ------
    Layout
        Whose channels still have to be followed; none if there are other layers than
        3x3 convolutions with or without norms, upsamplings and a 1x1 head, or blocks
        of different numbers of convolutions.
    """
    parts = _sort_out(layers)
    if parts is None:
        return
    convs, place, ups, head = parts
    depths = [len(ups)] if ups else range(1, 7)
    for depth in depths:
        count, rest = divmod(len(convs), 2 * depth + 1)
        if rest or not count:
            continue
        blocks = [convs[n : n + count] for n in range(0, len(convs), count)]
        stored: list[str | None] = [*ups, *(None,) * (depth - len(ups))]
        down, others = blocks[:depth], blocks[depth:]
        for bottom, up in ((others[0], others[1:]), (others[-1], others[:-1])):
            for decoder in (up, up[::-1]):
                for order in (stored, stored[::-1]):
                    yield Layout(
                        layers=layers,
                        encoder=down,
                        bottleneck=bottom,
                        ups=order,
                        decoder=decoder,
                        head=head,
                        norm_place=place,
                    )


def _sort_out(
    layers: dict[str, Layer],
) -> tuple[list[Convolution], NormPlace, list[str], str] | None:
    """Tell apart 3x3 convolutions with their norms, upsamplings and the head."""
    sides = {name: _side(layer) for name, layer in layers.items()}
    if set(sides.values()) - {0, 1, 2, 3} or 1 not in sides.values():
        return None
    head = [name for name, side in sides.items() if side == 1][-1]
    ups = [n for n, side in sides.items() if side in (1, 2) and n != head]
    convs = [name for name, side in sides.items() if side == 3]
    norms = [name for name, side in sides.items() if side == 0]
    if not convs or (norms and len(norms) != len(convs)):
        return None
    place: NormPlace = "before_activation"
    if norms:
        names = list(layers)
        if names.index(norms[0]) < names.index(convs[0]):
            place = "before_convolution"
        elif all(_gap(*pair) == 2 for pair in zip(convs, norms, strict=True)):
            place = "after_activation"  # whose number is the one between
    blocks = [Convolution(*pair) for pair in zip_longest(convs, norms)]
    return blocks, place, ups, head


def _gap(conv: str, norm: str) -> int:
    """Return by how much a norm's number is the higher one, 0 if they have none."""
    (block, _, first), (same, _, second) = conv.rpartition("."), norm.rpartition(".")
    numbered = block == same and first.isdecimal() and second.isdecimal()
    return int(second) - int(first) if numbered else 0


def _side(layer: Layer) -> int:
    """Return the side of a kernel, 0 of a norm, -1 of anything else."""
    if "weight" not in layer:
        return -1
    shape = layer["weight"].shape
    if len(shape) == 1:
        return 0
    return shape[2] if len(shape) in (4, 5) and len(set(shape[2:])) == 1 else -1
