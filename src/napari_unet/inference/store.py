"""Probabilities kept after a run, so that objects can be made of them again."""

from __future__ import annotations

import math
import shutil
import tempfile
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import psutil
import zarr

from napari_unet.inference.classify import quantise
from napari_unet.inference.engine import Predictor
from napari_unet.inference.instances import ObjectTable
from napari_unet.inference.objects import ObjectFinder, find_objects_steps
from napari_unet.inference.part import label_part
from napari_unet.inference.segment import Numbering
from napari_unet.inference.tile_run import result_steps
from napari_unet.steps import Progress, mapped_steps

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping
    from concurrent.futures import Future

    from numpy.typing import NDArray

    from napari_unet.inference.objects import Objects
    from napari_unet.inference.predict import PredictOptions
    from napari_unet.inference.settings import ObjectSettings
    from napari_unet.models.model import Model

MAX_BYTES = 2 << 30  # of probabilities in memory; beyond, a temporary zarr


class ProbabilityStore:
    """uint8 probabilities of an image's foreground classes, 255 meaning 1.

    What no run has covered is 0, so that slices and views can be added one
    after the other.

    Parameters
    ----------
    shape : tuple of int
        (class without background, *axes of the image without channels).
    axes : str
        Letters of the axes after the first.
    loop : str
        Those that the network goes through one by one.
    """

    def __init__(self, shape: tuple[int, ...], axes: str, loop: str):
        self.shape = shape
        self.axes = axes
        self._loop = loop
        self.computed_by = ""  # see `Predictor`
        self._covered: set[tuple[int, ...]] = set()
        limit = min(MAX_BYTES, psutil.virtual_memory().available // 4)
        self.data: Any
        if math.prod(shape) <= limit:
            self.data = np.zeros(shape, dtype=np.uint8)
        else:
            folder = tempfile.mkdtemp(prefix="napari-unet-")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            chunks = tuple(
                1 if axis in loop else min(512 if len(axes) - len(loop) == 2 else 64, n)
                for axis, n in zip(axes, shape[1:], strict=True)
            )
            self.data = zarr.create_array(
                store=folder,
                shape=shape,
                chunks=(1, *chunks),
                dtype="uint8",
            )

    @property
    def n_units(self) -> int:
        """Planes or volumes that are covered."""
        return len(self._covered)

    def fill_steps(
        self, predictor: Predictor, settings: ObjectSettings
    ) -> Generator[Progress, None, dict[tuple[int, ...], Future[Objects]]]:
        """Predict and keep what the predictor's region covers.

        Parameters
        ----------
        predictor : Predictor
            Of the image; it is left open.
        settings : ObjectSettings
            Of the objects that will be made.

        Yields
        ------
        Progress

        Returns
        -------
        dict
            By the places of planes or volumes: their objects, made while the network
            computes the next. Of those that the region covers as a whole, where memory
            holds all of them.
        """
        region, self.computed_by = predictor.region, predictor.computed_by
        kinds = _kinds(predictor.model)
        makes_objects = isinstance(self.data, np.ndarray) and self._is_whole(predictor)
        found: dict[tuple[int, ...], Future[Objects]] = {}
        before: Future[Objects] | None = None
        for index, unit in enumerate(predictor.units):
            place = tuple(unit[axis] for axis in self._loop)
            where = {axis: unit.get(axis, region[axis]) for axis in self.axes}
            finder = None
            if makes_objects:
                shape = self.data[(0, *self._index(place))].shape
                finder = ObjectFinder(shape, kinds, settings)
            keep = partial(self._keep, predictor, where, finder)
            yield from predictor.strip_steps(index, keep, quantise)
            self._covered.add(place)
            if before is not None:
                yield from predictor.wait_steps(before, index)
            if finder is not None:
                before = predictor.submit_steps(finder.find_steps())
                found[place] = before
        return found

    def _is_whole(self, predictor: Predictor) -> bool:
        """Tell whether a prediction covers whole planes or volumes, axes in order."""
        sides = dict(zip(self.axes, self.shape[1:], strict=True))
        spatial = [axis for axis in self.axes if axis not in self._loop]
        return spatial == list(predictor.source.spatial) and all(
            predictor.region[axis] == slice(0, sides[axis]) for axis in spatial
        )

    def _index(self, place: tuple[int, ...]) -> tuple[int | slice, ...]:
        """Index of a plane or volume in the image without channels."""
        unit = dict(zip(self._loop, place, strict=True))
        return tuple(unit.get(axis, slice(None)) for axis in self.axes)

    def _keep(
        self,
        predictor: Predictor,
        where: Mapping[str, int | slice],
        finder: ObjectFinder | None,
        rows: slice,
        part: NDArray[np.uint8],
    ) -> None:
        """Write a part of a plane or volume to its place."""
        first = predictor.source.spatial[0]
        start = predictor.region[first].start
        place = {**where, first: slice(start + rows.start, start + rows.stop)}
        self.data[(slice(None), *place.values())] = predictor.to_output(part)
        if finder is not None:
            finder.take(rows, part)

    def label_steps(
        self,
        model: Model,
        settings: ObjectSettings,
        first: Mapping[str, slice] | None = None,
        found: dict[tuple[int, ...], Future[Objects]] | None = None,
    ) -> Generator[Progress, None, tuple[ProbabilityStore, NDArray, ObjectTable]]:
        """Make objects of everything that is covered.

        Parameters
        ----------
        model : Model
            Says which classes are objects.
        settings : ObjectSettings
            How objects are made.
        first : mapping of str to slice, optional
            By axis letter, what somebody looks at: it comes as `LabelledPart`
            before all else, if it is much smaller than the whole.
        found : dict, optional
            From `fill_steps` with the same settings. Each is taken out of it.

        Yields
        ------
        Progress
            Over the planes or volumes.

        Returns
        -------
        store : ProbabilityStore
            This one.
        labels : unsigned integer array
            Shape of the image without channels.
        table : ObjectTable
            One row for each object.
        """
        kinds = _kinds(model)
        if first is not None and (box := self._place(first)):
            part = label_part(self.data, box, self._loop, kinds, settings)
            if part is not None:
                yield part
        numbering = Numbering(model.passport)
        labels: NDArray | None = None
        table = ObjectTable()
        for done, where in enumerate(sorted(self._covered)):
            tick = partial(Progress, done, len(self._covered), "making objects")
            place = self._index(where)
            probabilities = np.asarray(self.data[(slice(None), *place)])
            if found and where in found:
                objects = yield from result_steps(found.pop(where), tick)
            else:
                finding = find_objects_steps(probabilities, kinds, settings)
                objects = yield from _ticking(finding, tick)
            number = numbering.next_label
            numbers = numbering.renumber(objects.runs.value, objects.classes)
            labels = _make_room(labels, self.shape[1:], numbering.next_label)
            objects.runs.valued(numbers).paint(labels[place])
            yield tick()
            unit = dict(zip(self._loop, where, strict=True))
            table.add(objects.describe(probabilities), number, unit)
        if labels is None:
            labels = _make_room(labels, self.shape[1:], 0)
        return self, labels, table

    def _place(self, box: Mapping[str, slice]) -> dict[str, slice]:
        """Complete a box by all axes; it is empty where nothing is covered."""
        sides = zip(self.axes, self.shape[1:], strict=True)
        place = {axis: box.get(axis, slice(0, n)) for axis, n in sides}
        where = tuple(place[axis].start for axis in self._loop)
        return place if where in self._covered else {}


def _kinds(model: Model) -> list[str]:
    """Say of each class after the background whether it is objects or a region."""
    return [info.kind for info in model.passport.classes[1:]]


def _ticking(
    steps: Generator[None, None, Objects], tick: Callable[[], Progress]
) -> Generator[Progress, None, Objects]:
    """Yield the same progress for each step."""
    return mapped_steps(steps, lambda _: (tick(),))


def _make_room(labels: NDArray | None, shape: tuple[int, ...], largest: int) -> NDArray:
    """Return an array that can hold a label, with what is in it so far."""
    # Viewers draw 16 bits much faster; half of them are left for labels to come.
    dtype = np.dtype(np.uint16 if largest < 1 << 15 else np.uint32)
    if largest >= 1 << 32:
        dtype = np.dtype(np.uint64)
    if labels is None:
        return np.zeros(shape, dtype=dtype)
    return labels if labels.itemsize >= dtype.itemsize else labels.astype(dtype)


def segment_stored_steps(
    store: ProbabilityStore | None,
    image: Any,
    model: Model,
    settings: ObjectSettings,
    **options: Unpack[PredictOptions],
) -> Generator[Progress, None, tuple[ProbabilityStore, NDArray, ObjectTable]]:
    """Segment an image, or a part of it, so that it can be thresholded again.

    Parameters
    ----------
    store : ProbabilityStore or None
        Of the same image and model, to add to it; None makes a new one.
    image, model, **options
        See `predict`.
    settings : ObjectSettings
        How objects are made.

    Yields
    ------
    Progress

    Returns
    -------
    store, labels, table
        See `ProbabilityStore.label_steps`. The planes that a cancelled run has
        finished stay in the store.
    """
    predictor = Predictor(image, model, **options)
    try:
        source = predictor.source
        if store is None:
            classes = max(1, model.network.config.num_classes - 1)
            sides = [source.size(axis) for axis in source.output_axes]
            store = ProbabilityStore((classes, *sides), source.output_axes, source.loop)
        found = yield from store.fill_steps(predictor, settings)
        return (yield from store.label_steps(model, settings, found=found))
    finally:
        predictor.close()
