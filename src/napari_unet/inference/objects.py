"""Objects as runs of pixels: how they are found, numbered and measured."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from napari_unet.inference.classify import code_type, encode
from napari_unet.inference.grow import grow_steps
from napari_unet.inference.runs import BAND, Runs, bands
from napari_unet.inference.split import split_touching_steps
from napari_unet.inference.spread import FEWEST, count_cores, spread_steps
from napari_unet.steps import run_to_end

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from numpy.typing import NDArray

    from napari_unet.inference.settings import ObjectSettings

NOWHERE = np.iinfo(np.int64).max  # is the first pixel of what has none


@dataclass(frozen=True)
class Objects:
    """The objects, and regions, of one plane or volume.

    Parameters
    ----------
    runs : Runs
        Their values are the labels: a class of kind "region" keeps its index,
        objects are numbered from 1, or from the number of classes if there are
        regions.
    classes : int array of shape (number of objects,)
        The class index of each object, in the order of their labels.
    first : int
        The label of the first object.
    """

    runs: Runs
    classes: NDArray[np.intp]
    first: int

    @property
    def labels(self) -> NDArray:
        """The labels as an unsigned integer array."""
        return self.runs.array()

    def describe(self, probabilities: NDArray) -> dict[str, NDArray]:
        """Measure the objects.

        Parameters
        ----------
        probabilities : array of shape (class, *spatial)
            What they were made of.

        Returns
        -------
        dict of str to array of length n
            "class", "size" in pixels, "mean_probability" and "centroid" (n, ndim).
        """
        runs = self.runs.where(self.runs.value >= self.first)
        count, number = len(self.classes), runs.value.astype(np.int64) - self.first
        sizes = _add_up(runs.sizes, number, count)
        scale = 255 if probabilities.dtype == np.uint8 else 1
        certainty = np.zeros(len(runs))
        for of_class in probabilities:
            certainty += runs.sums(of_class)
        middle = [index.astype(np.float64) for index in runs.index]
        middle[-1] += (runs.sizes - 1) / 2
        sums = [np.bincount(number, runs.sizes * along, count) for along in middle]
        return {
            "class": self.classes,
            "size": sizes,
            "mean_probability": np.bincount(number, certainty, count) / sizes / scale,
            "centroid": np.stack(sums, axis=-1) / sizes[:, None],
        }


def _add_up(
    values: NDArray, number: NDArray[np.int64], count: int
) -> NDArray[np.int64]:
    return np.bincount(number, values, count).astype(np.int64)


def find_objects_steps(
    probabilities: NDArray, kinds: Sequence[str], settings: ObjectSettings
) -> Generator[None, None, Objects]:
    """Find the objects of all classes of a model in one plane or volume.

    Parameters
    ----------
    probabilities : array of shape (class, *spatial)
        Of the classes after the background, float in [0, 1] or uint8 where 255
        means 1: the background's share is what is missing to 1. Exactly 0 is
        background for certain (NaN in the image) and never becomes part of an
        object.
    kinds : sequence of str
        What each of these classes is: "objects" or "region".
    settings : ObjectSettings
        How objects are made.

    Yields
    ------
    None
        Many times a second.

    Returns
    -------
    Objects
        Connected by faces; within each class in the order of their first pixels
        above the threshold.
    """
    shape = probabilities.shape[1:]
    finder = ObjectFinder(shape, kinds, settings)
    # torch encodes on all cores, and what is found in its codes is spread, too.
    for rows in bands(shape, max(FEWEST, count_cores()) * BAND):
        yield
        finder.take(rows, probabilities[:, rows])
    return (yield from finder.find_steps())


class ObjectFinder:
    """Finds objects in a plane or volume that comes in parts.

    Parameters
    ----------
    shape : tuple of int
        Of the plane or volume.
    kinds, settings
        See `find_objects_steps`.
    """

    def __init__(
        self, shape: tuple[int, ...], kinds: Sequence[str], settings: ObjectSettings
    ):
        self._kinds = kinds
        self._settings = settings
        self._found: list[Runs] = []
        self._shape = shape
        self._codes: NDArray | None = None
        if settings.split_touching or settings.grow:
            self._codes = np.empty(shape, dtype=code_type(kinds))

    def add(self, rows: slice, codes: NDArray) -> None:
        """Take some rows, or planes.

        Parameters
        ----------
        rows : slice
            Along the first axis.
        codes : array of shape spatial
            From `encode`.
        """

        def look_up(band: slice) -> Runs:
            part = codes[band]
            place = slice(rows.start + band.start, rows.start + band.stop)
            if self._codes is not None:
                self._codes[place] = part
            decided = part * _is_decided(part, self._kinds)
            return Runs.find_in(self._shape, place, decided)

        self._found += run_to_end(spread_steps(look_up, bands(codes.shape)))

    def take(self, rows: slice, probabilities: NDArray) -> None:
        """Do what `add` does, of probabilities: see `find_objects_steps`."""
        self.add(rows, encode(probabilities, self._kinds, self._settings.threshold))

    def find_steps(self) -> Generator[None, None, Objects]:
        """Make objects of what was added; see `find_objects_steps`."""
        runs = Runs.merge(self._shape, self._found)
        first = len(self._kinds) + 1 if "region" in self._kinds else 1
        whole = []
        classes: list[int] = []
        for index, kind in enumerate(self._kinds, start=1):
            if kind == "region":
                of_class = runs.where(runs.value == 2 * index)
                whole.append(of_class.valued(np.full(len(of_class), index)))
            elif kind == "objects":
                of_class = runs.where(runs.value == 2 * index + 1)
                pieces, number = yield from self._number_steps(of_class, index)
                is_kept = number > 0
                number[is_kept] += first - 1 + len(classes)
                whole.append(pieces.valued(number[pieces.value]))
                classes += [index] * int(np.count_nonzero(is_kept))
        labelled = Runs.merge(self._shape, whole)
        return Objects(labelled, np.array(classes, dtype=np.intp), first)

    def _number_steps(
        self, runs: Runs, index: int
    ) -> Generator[None, None, tuple[Runs, NDArray[np.int64]]]:
        """Return pieces of a class, and the number of the object that each is."""
        if self._codes is None:
            pieces = runs.valued(runs.join()[0] + 1)
            first = first_of_runs(pieces, int(pieces.value.max(initial=0)) + 1)
        else:
            steps = _shape_steps(runs, self._codes, index, self._settings)
            pieces, first = yield from steps
        sizes = _add_up(pieces.sizes, pieces.value, len(first))
        return pieces, number_objects(sizes, first, self._settings.minimal_size)


def _is_decided(codes: NDArray, kinds: Sequence[str]) -> NDArray:
    """Tell what is a region, or above the threshold of an object."""
    is_above = codes & 1
    if "region" in kinds:
        is_above |= np.array([False, *(kind == "region" for kind in kinds)])[codes >> 1]
    return is_above


def _shape_steps(
    runs: Runs, codes: NDArray, index: int, settings: ObjectSettings
) -> Generator[None, None, tuple[Runs, NDArray[np.int64]]]:
    """Split and grow the objects of a class, from the runs above the threshold.

    Returns
    -------
    runs : Runs
        Valued by piece.
    first : int64 array
        From `first_pixels`, of what is above the threshold.
    """
    if settings.split_touching:
        pieces = yield from split_touching_steps(runs)
    else:
        pieces = runs.valued(runs.join()[0] + 1)
    labels = pieces.array()
    if settings.grow:
        labels = yield from grow_steps(labels, settings.grow)
    trim = partial(_trim, labels, codes, index)
    found = yield from spread_steps(trim, bands(codes.shape))
    pieces = Runs.merge(codes.shape, [part for part, _ in found])
    if any(is_cut for _, is_cut in found):
        pieces = pieces.valued(pieces.join()[0] + 1)
    count = int(pieces.value.max(initial=0)) + 1
    return pieces, first_of_runs(pieces.met(runs), count)


def _trim(
    labels: NDArray, codes: NDArray, index: int, band: slice
) -> tuple[Runs, bool]:
    """Take from the objects of a class what is none of it for certain.

    Returns
    -------
    runs : Runs
        What is left in a band.
    is_cut : bool
        Whether it was filled as a hole or grown into: nor across, which leaves crumbs.
    """
    part = labels[band]
    lost = (codes[band] >> 1 != index) & (part != 0)
    is_cut = bool(lost.any())
    if is_cut:
        part[lost] = 0
    return Runs.find_in(labels.shape, band, part), is_cut


def first_pixels(labels: NDArray, count: int) -> NDArray[np.int64]:
    """Find where labels begin.

    Parameters
    ----------
    labels : unsigned integer array
        Of two or three axes.
    count : int
        Above the largest label.

    Returns
    -------
    int64 array of shape (count,)
        For each label the index of its first pixel in the flattened array, or
        `NOWHERE`; that of 0 is always `NOWHERE`.
    """
    return first_of_runs(Runs.find(labels), count)


def first_of_runs(runs: Runs, count: int) -> NDArray[np.int64]:
    """Do what `first_pixels` does."""
    first = np.full(count, NOWHERE)
    first[runs.value[::-1]] = runs.flat[::-1]  # of several, the last one stays
    return first


def number_objects(
    sizes: NDArray[np.int64], first: NDArray[np.int64], minimal_size: int
) -> NDArray[np.int64]:
    """Number objects in the order of their first pixels.

    Parameters
    ----------
    sizes : int64 array
        Pixels of each object.
    first : int64 array of the same shape
        From `first_pixels`, of what is above the threshold.
    minimal_size : int
        Smaller objects get 0, as do those without a pixel above the threshold:
        filled holes, and crumbs of what grew.

    Returns
    -------
    int64 array of the same shape
        Numbers from 1, without gaps.
    """
    kept = np.flatnonzero((sizes >= minimal_size) & (first < NOWHERE))
    number = np.zeros(len(sizes), dtype=np.int64)
    number[kept[np.argsort(first[kept])]] = np.arange(1, len(kept) + 1)
    return number
