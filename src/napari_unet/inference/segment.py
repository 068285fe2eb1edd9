"""Segment: predict, then objects."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from operator import add
from typing import TYPE_CHECKING, Any, Self, Unpack

import numpy as np

from napari_unet.inference.classify import encode, foreground, keep_all, to_codes
from napari_unet.inference.engine import Predictor
from napari_unet.inference.objects import ObjectFinder
from napari_unet.inference.predict import PredictOptions
from napari_unet.inference.settings import ObjectSettings
from napari_unet.models.model import check_model
from napari_unet.steps import run_to_end

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from concurrent.futures import Future

    from numpy.typing import NDArray

    from napari_unet.inference.objects import Objects
    from napari_unet.inference.runs import Runs
    from napari_unet.models.model import Model, Passport
    from napari_unet.steps import Progress

    Unit = dict[str, int]
    Place = tuple[int | slice, ...]


class SegmentOptions(PredictOptions, total=False):
    """The keyword arguments of `segment`."""

    threshold: float | None
    minimal_size: int | None
    split_touching: bool | None


def take_settings(options: SegmentOptions, passport: Passport) -> ObjectSettings:
    """Take out of options how objects are made; the passport recommends the rest."""
    settings = ObjectSettings.recommended(passport)
    for name in ("threshold", "minimal_size", "split_touching"):
        value = options.pop(name, None)  # type: ignore[misc]
        if value is not None:
            settings = replace(settings, **{name: value})
    return settings


class Numbering:
    """Keeps object numbers running through the planes of a stack.

    Parameters
    ----------
    passport : Passport
        Regions keep their class index in every plane.
    """

    def __init__(self, passport: Passport):
        kinds = [info.kind for info in passport.classes]
        self._first = len(kinds) if "region" in kinds else 1
        self.count = 0

    @property
    def next_label(self) -> int:
        """The number of the next object."""
        return self._first + self.count

    def renumber(self, labels: NDArray, object_classes: NDArray) -> NDArray:
        """Continue the numbers of the planes before; widen the dtype if needed."""
        largest = self.next_label + len(object_classes)
        dtype = np.uint32 if largest < 2**32 else np.uint64
        is_object = labels >= self._first
        numbered = labels.astype(dtype)
        np.add(numbered, dtype(self.count), out=numbered, where=is_object)
        self.count += len(object_classes)
        return numbered


@dataclass(frozen=True)
class Found:
    """What was found in an image, or in a part of it.

    Parameters
    ----------
    passport : Passport
        Names the classes.
    objects : tuple of int
        Their number in each class.
    pixels : tuple of int
        How many belong to each class; to the first, what belongs to no other.
    """

    passport: Passport
    objects: tuple[int, ...]
    pixels: tuple[int, ...]

    @classmethod
    def nothing(cls, passport: Passport) -> Self:
        """Begin to add up."""
        none = (0,) * len(passport.classes)
        return cls(passport, none, none)

    @classmethod
    def count(cls, found: Objects, passport: Passport) -> Self:
        """Count the objects of a plane or volume, and the pixels of every class."""
        count = len(passport.classes)
        # A region's value is its class; an object's follow them.
        class_of = np.concatenate([np.arange(found.first), found.classes])
        pixels = np.bincount(class_of[found.runs.value], found.runs.sizes, count)
        pixels[0] = math.prod(found.runs.shape) - pixels[1:].sum()
        objects = np.bincount(found.classes, minlength=count)
        return cls(passport, tuple(objects.tolist()), tuple(map(int, pixels)))

    def __add__(self, other: Found) -> Found:
        objects = tuple(map(add, self.objects, other.objects))
        return Found(self.passport, objects, tuple(map(add, self.pixels, other.pixels)))

    @property
    def covered(self) -> float:
        """The part of the image that is not background."""
        return 1 - self.pixels[0] / max(sum(self.pixels), 1)

    def describe(self) -> str:
        """Say how many objects there are, and how much each region covers.

        Of several regions, only those that there are.
        """
        parts = []
        classes = self.passport.classes
        one = sum(info.kind == "region" for info in classes) == 1
        if any(info.kind == "objects" for info in classes):
            count = sum(self.objects)
            parts.append(f"{count} object{'s' * (count != 1)}")
        for info, pixels in zip(classes, self.pixels, strict=True):
            if info.kind == "region" and (pixels or one):
                parts.append(f"{pixels / max(sum(self.pixels), 1):.1%} {info.name}")
        return ", ".join(parts) or "only background"


def segment_units_steps(
    predictor: Predictor,
    settings: ObjectSettings,
    paint: Callable[[Place, Runs], None],
    keep: Callable[[Place, NDArray[np.float32]], None] | None = None,
) -> Generator[Progress, None, Found]:
    """Segment plane after plane, or volume after volume.

    What is above the threshold in one part is looked up while the network computes
    the next; and of one plane, objects are made while it computes the next plane.

    Parameters
    ----------
    predictor : Predictor
        Of the image; it is left open.
    settings : ObjectSettings
        How objects are made.
    paint : callable
        Gets each plane or volume once, in order: its place in the image without
        channels, and its labels, with the axes in the network's order.
    keep : callable, optional
        Gets the probabilities in parts, in order: the place of a part in an output
        with classes, and a float32 array with the axes in the image's order.

    Yields
    ------
    Progress
        Over the tiles.

    Returns
    -------
    Found
    """
    passport = predictor.model.passport
    kinds = [info.kind for info in passport.classes[1:]]
    sides = (predictor.region[axis] for axis in predictor.source.spatial)
    shape = tuple(side.stop - side.start for side in sides)
    reduce = keep_all if keep else to_codes(kinds, settings.threshold)
    numbering = Numbering(passport)
    total = Found.nothing(passport)

    def take(finder: ObjectFinder, unit: Unit, rows: slice, part: NDArray) -> None:
        codes = part[0]
        if keep is not None:
            codes = encode(foreground(part), kinds, settings.threshold)
            place = slice(None), *predictor.place(unit, rows)
            keep(place, predictor.to_output(part))
        finder.add(rows, codes)

    def finish_steps(
        unit: Unit, finding: Future[Objects], index: int
    ) -> Generator[Progress, None, Found]:
        objects = yield from predictor.wait_steps(finding, index)
        numbers = numbering.renumber(objects.runs.value, objects.classes)
        paint(predictor.place(unit), objects.runs.valued(numbers))
        return total + Found.count(objects, passport)

    before = None
    for index, unit in enumerate(predictor.units):
        finder = ObjectFinder(shape, kinds, settings)
        yield from predictor.strip_steps(index, partial(take, finder, unit), reduce)
        if before is not None:
            total = yield from finish_steps(*before, index)
        before = unit, predictor.submit_steps(finder.find_steps())
        del finder
    assert before is not None  # no image is empty
    return (yield from finish_steps(*before, len(predictor.units) - 1))


def segment_steps(
    image: Any, model: Model, **options: Unpack[SegmentOptions]
) -> Generator[Progress, None, NDArray]:
    """Segment an image; see `segment`."""
    check_model(model)
    settings = take_settings(options, model.passport)
    predictor = Predictor(image, model, **options)  # type: ignore[misc]
    try:
        labels: NDArray = np.zeros(predictor.output_shape[1:], dtype=np.uint32)
        spatial = predictor.source.spatial
        order = [a for a in predictor.source.output_axes if a in spatial]
        axes = [order.index(axis) for axis in spatial]

        def paint(place: Place, runs: Runs) -> None:
            nonlocal labels
            labels = labels.astype(runs.value.dtype, copy=False)
            runs.paint(labels[place].transpose(axes))

        yield from segment_units_steps(predictor, settings, paint)
        return labels
    finally:
        predictor.close()


def segment(image: Any, model: Model, **options: Unpack[SegmentOptions]) -> NDArray:
    """Segment an image into objects, or into classes where the model says so.

    Parameters
    ----------
    image : array
        See `predict`.
    model : Model
        Its passport recommends the settings that are not given.
    **options
        threshold : probability above which a pixel belongs to an object.
        minimal_size : in pixels or voxels.
        split_touching : whether to split objects at their necks.
        Further options: see `predict`.

    Returns
    -------
    uint32 (uint64 beyond 2**32 objects) array
        Shape of the image without channels. Object numbers run on through the
        planes of a stack.

    Raises
    ------
    BadInput, OutOfMemory
        See `predict`.
    """
    return run_to_end(segment_steps(image, model, **options))
