"""Which part of the annotations is held out, to score models with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import cc3d
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from napari_unet.training.annotations import Truth

__all__ = ["AnnotatedUnit", "hold_out"]

_ORDERS = 64  # random choices that are tried


@dataclass(frozen=True, eq=False)
class AnnotatedUnit:
    """A plane or volume of which something is known.

    Parameters
    ----------
    annotation : int
        Index of its annotation.
    place : dict of str to int
        Index along every axis that the network does not see.
    truth : Truth
        What is known.
    has_regions : bool
        Whether its known part consists of regions.
    """

    annotation: int
    place: dict[str, int]
    truth: Truth
    has_regions: bool = False


class _Atom(NamedTuple):
    """Known pixels that stay together: masks by the index of their unit."""

    masks: dict[int, NDArray[np.bool_]]
    foreground: int
    background: int


class _Choice(NamedTuple):
    """What could be held out, and how good that would be."""

    rank: int
    masks: dict[int, NDArray[np.bool_]]


def hold_out(
    units: Sequence[AnnotatedUnit], fraction: float, seed: int
) -> list[NDArray[np.bool_]]:
    """Choose the known pixels that are held out.

    Whole images if there are several; else neighbouring planes of a stack; else
    whole regions; else a strip of the only region or image. The first of these that
    leaves objects and background to learn from, and holds out some object, is taken,
    and if none does, the best of them. Among images, and among regions, those are
    chosen that have about their share of the objects' pixels: nearly empty ones
    would say little about the others.

    Parameters
    ----------
    units : sequence of AnnotatedUnit
        All, in order; two known pixels at least.
    fraction : float
        How much to hold out, about.
    seed : int
        Chooses among images and regions that serve equally well; the same seed
        chooses the same.

    Returns
    -------
    list of bool array
        One for each unit, of its shape. Neither all known pixels are held out nor
        none.
    """
    by_image: dict[int, list[int]] = {}
    for number, unit in enumerate(units):
        by_image.setdefault(unit.annotation, []).append(number)
    images = [
        _atom(units, {n: units[n].truth.known for n in by_image[i]}) for i in by_image
    ]
    planes = [_atom(units, {n: unit.truth.known}) for n, unit in enumerate(units)]
    best = _Choice(-1, {})
    for choices in (
        _choose(images, fraction, _shuffled(len(images), seed), typical=True),
        _choose(planes, fraction, _rotated(len(planes)), typical=False),
        _choose_regions(units, fraction, seed),
        [_cut(units, planes, fraction)],
    ):
        best = max([best, *choices], key=lambda choice: choice.rank)
        if best.rank >= _GOOD:
            break
    return [
        best.masks.get(n, np.zeros(unit.truth.known.shape, bool))
        for n, unit in enumerate(units)
    ]


_GOOD = 6


def _rank(
    left: tuple[NDArray | int, NDArray | int], held: tuple[NDArray | int, NDArray | int]
) -> NDArray:
    """Prefer most that both classes can be learnt, then that an object is scored."""
    learnable = (np.asarray(left[0]) > 0) & (np.asarray(left[1]) > 0)
    return 4 * learnable + 2 * (np.asarray(held[0]) > 0) + (np.asarray(held[1]) > 0)


def _atom(units: Sequence[AnnotatedUnit], masks: dict[int, NDArray[np.bool_]]) -> _Atom:
    inside = [units[n].truth.target[mask] != 0 for n, mask in masks.items()]
    foreground = sum(int(np.count_nonzero(found)) for found in inside)
    return _Atom(masks, foreground, sum(map(len, inside)) - foreground)


def _shuffled(count: int, seed: int) -> Iterator[NDArray[np.intp]]:
    random = np.random.default_rng((seed, count))
    for _ in range(_ORDERS):
        yield random.permutation(count)


def _rotated(count: int) -> Iterator[NDArray[np.intp]]:
    """Begin with the last, with the first, and then in between."""
    yield np.arange(count)[::-1]
    for first in range(count):
        yield np.roll(np.arange(count), -first)


def _choose(
    atoms: Sequence[_Atom],
    fraction: float,
    orders: Iterable[NDArray[np.intp]],
    *,
    typical: bool,
) -> list[_Choice]:
    """Hold out the first atoms of the best order, of the first one of equals."""
    if len(atoms) < 2:
        return []
    counts = np.array([atom[1:] for atom in atoms])
    held = min(max(round(fraction * len(atoms)), 1), len(atoms) - 1)
    best, chosen = -np.inf, np.array([], np.intp)
    for order in orders:
        sums = counts[order[:held]].sum(0), counts[order[held:]].sum(0)
        merit = float(_rank(tuple(sums[1]), tuple(sums[0])))
        if typical:  # the distance from the wanted share is below 1
            merit -= abs(sums[0][0] / max(counts[:, 0].sum(), 1) - fraction)
        if merit > best:
            best, chosen = merit, order[:held]
    masks: dict[int, NDArray[np.bool_]] = {}
    for number in chosen:
        for unit, mask in atoms[number].masks.items():
            masks[unit] = masks[unit] | mask if unit in masks else mask
    return [_Choice(math.ceil(best), masks)]


def _choose_regions(
    units: Sequence[AnnotatedUnit], fraction: float, seed: int
) -> list[_Choice]:
    """Hold out regions; those that overlap or touch are one."""
    atoms = []
    for number, unit in enumerate(units):
        if not unit.has_regions:
            return []
        known = unit.truth.known
        parts = cc3d.connected_components(
            # Of bool, cc3d 4.1.1 connects some pixels wrongly over corners.
            known.astype(np.uint8),
            connectivity=26 if known.ndim == 3 else 8,
        )
        for part in range(1, int(parts.max()) + 1):
            atoms.append(_atom(units, {number: parts == part}))
    return _choose(atoms, fraction, _shuffled(len(atoms), seed), typical=True)


def _cut(
    units: Sequence[AnnotatedUnit], planes: Sequence[_Atom], fraction: float
) -> _Choice:
    """Hold out a strip of the unit with the most objects, from one of its edges."""
    number = max(range(len(units)), key=lambda n: planes[n].foreground)
    truth = units[number].truth
    total = planes[number].foreground + planes[number].background
    everything = np.array([atom[1:] for atom in planes]).sum(0)
    inside = np.stack([truth.known & (truth.target != 0), truth.known])
    inside[1] &= ~inside[0]
    best, box = -np.inf, None
    for axis in range(truth.known.ndim):
        others = tuple(1 + n for n in range(truth.known.ndim) if n != axis)
        low = inside.sum(others).cumsum(1)[:, :-1]
        high = np.array(planes[number][1:])[:, None] - low
        for held, at_start in ((high, False), (low, True)):
            left = everything[:, None] - held
            # The distance from the wanted fraction is below 1.
            merit = _rank(tuple(left), tuple(held)) - abs(
                held.sum(0) / total - fraction
            )
            merit[(held.sum(0) == 0) | (left.sum(0) == 0)] = -np.inf
            if merit.size and merit.max() > best:
                best, position = merit.max(), int(merit.argmax()) + 1
                part = slice(None, position) if at_start else slice(position, None)
                box = (*[slice(None)] * axis, part)
    if box is None:
        return _Choice(-1, {})
    mask = np.zeros(truth.known.shape, bool)
    mask[box] = truth.known[box]
    return _Choice(int(np.ceil(best)), {number: mask})
