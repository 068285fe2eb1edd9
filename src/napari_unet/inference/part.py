"""Objects of the part that somebody looks at, before those of the whole."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from napari_unet.inference.objects import find_objects_steps
from napari_unet.steps import Progress, run_to_end

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from napari_unet.inference.settings import ObjectSettings

FIRST_MARGIN, LAST_MARGIN = 32, 512  # pixels around it that are labelled with it


@dataclass(frozen=True, kw_only=True)
class LabelledPart(Progress):
    """A part of an image, labelled.

    Parameters
    ----------
    place : tuple of slice
        In the image without channels.
    labels : unsigned integer array of the shape of the part
        Numbers of their own. Objects reach as far as in the whole, but for those
        that are larger than `LAST_MARGIN`; they may be split a little differently.
    first : int
        The label of the first object; smaller ones are regions.
    """

    place: tuple[slice, ...]
    labels: NDArray
    first: int


def label_part(
    data: Any,
    place: Mapping[str, slice],
    loop: str,
    kinds: Sequence[str],
    settings: ObjectSettings,
) -> LabelledPart | None:
    """Label a part of a plane or volume, with as much around it as its objects reach.

    Parameters
    ----------
    data : array of shape (class, *axes)
        Probabilities: see `find_objects_steps`.
    place : mapping of str to slice
        The part along all axes, in their order: of the ``loop`` axes one place.
    loop : str
        Axes that the network goes through one by one.
    kinds, settings
        See `find_objects_steps`.

    Returns
    -------
    LabelledPart or None
        None if it is empty, or not much smaller than the whole.
    """
    sides = dict(zip(place, data.shape[1:], strict=True))
    spatial = [axis for axis in place if axis not in loop]
    whole = [sides[axis] for axis in spatial]
    inner = [place[axis] for axis in spatial]
    pixels = math.prod(part.stop - part.start for part in inner)
    if not 0 < pixels <= math.prod(whole) // 4:
        return None
    margin = FIRST_MARGIN
    while True:
        around = [
            slice(max(part.start - margin, 0), min(part.stop + margin, n))
            for part, n in zip(inner, whole, strict=True)
        ]
        boxes = dict(zip(spatial, around, strict=True))
        index = [boxes.get(axis, part.start) for axis, part in place.items()]
        probabilities = np.asarray(data[(slice(None), *index)])
        # Small ones are left out later: what is small here may be cut.
        steps = find_objects_steps(
            probabilities, kinds, replace(settings, minimal_size=0)
        )
        objects = run_to_end(steps)
        labels = objects.labels
        part = labels[
            tuple(
                slice(a.start - b.start, a.stop - b.start)
                for a, b in zip(inner, around, strict=True)
            )
        ]
        margin *= 2
        if margin > LAST_MARGIN or not _go_on(labels, part, around, whole):
            sizes = np.bincount(objects.runs.value, objects.runs.sizes, minlength=1)
            is_small = sizes < settings.minimal_size
            is_small[: objects.first] = False
            part[is_small[part]] = 0
            shape = [box.stop - box.start for box in place.values()]
            return LabelledPart(
                done=0,
                total=1,
                message="making objects",
                place=tuple(place.values()),
                labels=part.reshape(shape),
                first=objects.first,
            )


def _go_on(
    labels: NDArray, part: NDArray, around: Sequence[slice], whole: Sequence[int]
) -> bool:
    """Tell whether objects of a part go on where nothing was labelled."""
    is_reached = np.zeros(int(labels.max(initial=0)) + 1, dtype=bool)
    for axis, (box, n) in enumerate(zip(around, whole, strict=True)):
        if box.start > 0:
            is_reached[labels.take(0, axis)] = True
        if box.stop < n:
            is_reached[labels.take(-1, axis)] = True
    is_reached[0] = False
    return bool(is_reached[part].any())
