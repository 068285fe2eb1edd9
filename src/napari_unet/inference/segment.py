"""Segment: predict, then objects."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack

import numpy as np

from napari_unet.inference.engine import Predictor
from napari_unet.inference.instances import label_classes
from napari_unet.inference.objects import ObjectFinder
from napari_unet.inference.predict import PredictOptions
from napari_unet.inference.settings import ObjectSettings
from napari_unet.steps import Progress, mapped_steps, run_to_end

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from concurrent.futures import Future

    from numpy.typing import NDArray

    from napari_unet.models.model import Model, Passport

    Made = Future[tuple[NDArray, NDArray, "Found"]]

Result = TypeVar("Result")

BAND_ROWS = 2048  # of a plane: tiles as high waste little on what lies around them


class SegmentOptions(PredictOptions, total=False):
    """The keyword arguments of `segment`."""

    threshold: float | None
    minimal_size: int | None
    split_touching: bool | None


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


def foreground(probabilities: NDArray) -> NDArray:
    """Leave out the background's probabilities; a sigmoid has none.

    Parameters
    ----------
    probabilities : array of shape (class, ...)
        As the engine gives them.

    Returns
    -------
    array of shape (class without background, ...)
        A view.
    """
    return probabilities[1:] if len(probabilities) > 1 else probabilities


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
    def count(
        cls, labels: NDArray, object_classes: NDArray, passport: Passport
    ) -> Self:
        """Count what `label_classes` has found."""
        kinds = [info.kind for info in passport.classes]
        number = len(kinds) if "region" in kinds else 1
        objects, pixels = [0] * len(kinds), [0] * len(kinds)
        for index, kind in enumerate(kinds):
            if kind == "region":
                pixels[index] = int(np.count_nonzero(labels == index))
            elif kind == "objects":
                objects[index] = int(np.count_nonzero(object_classes == index))
                end = number + objects[index]
                of_class = (labels >= number) & (labels < end)
                pixels[index] = int(np.count_nonzero(of_class))
                number = end
        pixels[0] = labels.size - sum(pixels)
        return cls(passport, tuple(objects), tuple(pixels))

    def __add__(self, other: Found) -> Found:
        objects, pixels = (
            tuple(np.add(mine, its).tolist())
            for mine, its in (
                (self.objects, other.objects),
                (self.pixels, other.pixels),
            )
        )
        return Found(self.passport, objects, pixels)

    @property
    def covered(self) -> float:
        """The part of the image that is not background."""
        return 1 - self.pixels[0] / max(sum(self.pixels), 1)

    def describe(self) -> str:
        """Say how many objects there are, and how much each region covers."""
        parts = []
        classes = self.passport.classes
        if any(info.kind == "objects" for info in classes):
            count = sum(self.objects)
            parts.append(f"{count} object{'s' * (count != 1)}")
        for info, pixels in zip(classes, self.pixels, strict=True):
            if info.kind == "region":
                parts.append(f"{pixels / max(sum(self.pixels), 1):.1%} {info.name}")
        return ", ".join(parts)


def segment_units_steps(
    predictor: Predictor,
    settings: ObjectSettings,
    write: Callable[[tuple[int | slice, ...], NDArray, NDArray[np.float32]], None],
) -> Generator[Progress, None, Found]:
    """Segment plane after plane, or volume after volume.

    Of one, objects are made while the network computes the next; no more than
    these two are in memory.

    Parameters
    ----------
    predictor : Predictor
        Of the image; it is left open.
    settings : ObjectSettings
        How objects are made.
    write : callable
        Gets each plane or volume once, in order: its place in the image without
        channels, its labels and its probabilities (class, ...), with the axes in
        the image's order.

    Yields
    ------
    Progress
        Over the tiles.

    Returns
    -------
    Found
    """
    passport = predictor.model.passport
    numbering = Numbering(passport)
    total = Found.nothing(passport)

    def finish_steps(
        unit: dict[str, int], probabilities: NDArray, making: Made, index: int
    ) -> Generator[Progress, None, Found]:
        labels, classes, found = yield from predictor.wait_steps(making, index)
        labels = numbering.renumber(labels, classes)
        write(
            predictor.place(unit),
            predictor.to_output(labels[None])[0],
            predictor.to_output(probabilities),
        )
        return total + found

    before = None
    for index, unit in enumerate(predictor.units):
        probabilities = yield from predictor.unit_steps(index)
        if before is not None:
            total = yield from finish_steps(*before, index)
        making = predictor.submit(_make_objects, probabilities, passport, settings)
        before = unit, probabilities, making
    assert before is not None  # no image is empty
    return (yield from finish_steps(*before, len(predictor.units) - 1))


def _make_objects(
    probabilities: NDArray, passport: Passport, settings: ObjectSettings
) -> tuple[NDArray, NDArray, Found]:
    labels, classes = label_classes(foreground(probabilities), passport, settings)
    return labels, classes, Found.count(labels, classes, passport)


def segment_steps(
    image: Any, model: Model, **options: Unpack[SegmentOptions]
) -> Generator[Progress, None, NDArray]:
    """Segment an image; see `segment`."""
    labels, _ = yield from _steps(image, model, options, keep=False)
    return labels


def segment_and_predict_steps(
    image: Any, model: Model, **options: Unpack[SegmentOptions]
) -> Generator[Progress, None, tuple[NDArray, NDArray[np.float32]]]:
    """Do what `segment` and `predict` do, with one pass of the network."""
    labels, probabilities = yield from _steps(image, model, options, keep=True)
    assert probabilities is not None
    return labels, probabilities


def _steps(
    image: Any, model: Model, options: SegmentOptions, *, keep: bool
) -> Generator[Progress, None, tuple[NDArray, NDArray[np.float32] | None]]:
    settings = ObjectSettings.recommended(model.passport)
    for name in ("threshold", "minimal_size", "split_touching"):
        value = options.pop(name, None)  # type: ignore[misc]
        if value is not None:
            settings = replace(settings, **{name: value})
    predictor = Predictor(image, model, **options)  # type: ignore[misc]
    try:
        if not keep and _goes_by_bands(predictor):
            return (yield from _bands_steps(predictor, settings)), None
        result: NDArray = np.zeros(predictor.output_shape[1:], dtype=np.uint32)
        kept = np.empty(predictor.output_shape, dtype=np.float32) if keep else None

        def write(
            place: tuple[int | slice, ...], labels: NDArray, probabilities: NDArray
        ) -> None:
            nonlocal result
            result = result.astype(labels.dtype, copy=False)
            result[place] = labels
            if kept is not None:
                kept[(slice(None), *place)] = probabilities

        yield from segment_units_steps(predictor, settings, write)
        return result, kept
    finally:
        predictor.close()


def _goes_by_bands(predictor: Predictor) -> bool:
    """Tell whether planes are large, and what is predicted the same in parts."""
    rows, *others = (predictor.region[axis] for axis in predictor.source.spatial)
    is_large = len(others) == 1 and rows.stop - rows.start > BAND_ROWS
    return is_large and not predictor.model.inexact_reason


def _bands_steps(
    predictor: Predictor, settings: ObjectSettings
) -> Generator[Progress, None, NDArray]:
    """Segment planes without keeping more of the probabilities than two bands.

    What is above the threshold in one is looked up while the network computes the
    next.
    """
    kinds = [info.kind for info in predictor.model.passport.classes[1:]]
    spatial = predictor.source.spatial
    shape = tuple(predictor.region[a].stop - predictor.region[a].start for a in spatial)
    bands = [
        slice(first, min(first + BAND_ROWS, shape[0]))
        for first in range(0, shape[0], BAND_ROWS)
    ]
    numbering = Numbering(predictor.model.passport)
    labels: NDArray = np.zeros(predictor.output_shape[1:], dtype=np.uint32)
    order = [a for a in predictor.source.output_axes if a in spatial]
    tick = Progress(0, len(predictor.units) * len(bands))
    for index, unit in enumerate(predictor.units):
        finder = ObjectFinder(shape, kinds, settings)
        adding: Future[None] | None = None
        for number, band in enumerate(bands):
            region = {axis: slice(i, i + 1) for axis, i in unit.items()}
            start = predictor.region[spatial[0]].start
            region[spatial[0]] = slice(start + band.start, start + band.stop)
            part = predictor.within(region)
            steps = part.unit_steps(0)
            before = index * len(bands) + number
            total = len(predictor.units) * len(bands) * part.total
            probabilities = yield from _shifted_steps(steps, before, part.total, total)
            tick = Progress((before + 1) * part.total, total, "making objects")
            if adding is not None:
                yield from _wait_steps(predictor, adding, tick)
            adding = predictor.submit(finder.add, band, foreground(probabilities))
            del probabilities  # not kept while the next band is predicted
        assert adding is not None  # no image is empty
        yield from _wait_steps(predictor, adding, tick)
        finding = predictor.submit(run_to_end, finder.find_steps())
        objects = yield from _wait_steps(predictor, finding, tick)
        numbers = numbering.renumber(objects.runs.value, objects.classes)
        labels = labels.astype(numbers.dtype, copy=False)
        plane = labels[predictor.place(unit)]
        objects.runs.valued(numbers).paint(
            plane.transpose([order.index(axis) for axis in spatial])
        )
    for note in predictor.last_notes():
        yield replace(tick, note=note)
    return labels


def _shifted_steps(
    steps: Generator[Progress, None, NDArray], before: int, tiles: int, total: int
) -> Generator[Progress, None, NDArray]:
    """Count the tiles of a part among those of all parts."""

    def shifted(step: Progress) -> Progress:
        done = before * tiles + min(step.done, tiles)
        message = f"tile {min(done + 1, total)} of {total}"
        return Progress(done, total, message, step.note)

    return mapped_steps(steps, shifted)


def _wait_steps(
    predictor: Predictor, future: Future[Result], tick: Progress
) -> Generator[Progress, None, Result]:
    """Wait with heartbeats."""
    for _ in predictor.wait_steps(future, 0):
        yield tick
    return future.result()


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
