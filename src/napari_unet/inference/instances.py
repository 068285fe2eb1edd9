"""From probabilities to objects."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import cc3d
import numpy as np
from scipy import ndimage
from skimage import measure
from skimage.morphology import local_maxima
from skimage.segmentation import watershed

from napari_unet.errors import BadInput

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from napari_unet.models.model import Passport


@dataclass(frozen=True)
class ObjectSettings:
    """How objects are made of probabilities.

    Parameters
    ----------
    threshold : float
        A pixel belongs to an object where its probability is above it.
    minimal_size : int
        Smaller objects, in pixels or voxels, are left out.
    split_touching : bool
        Separate objects at their necks by a seeded watershed.
    grow : int
        Pixels by which objects grow back what was cut between them.
    """

    threshold: float = 0.5
    minimal_size: int = 0
    split_touching: bool = False
    grow: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1 or self.minimal_size < 0 or self.grow < 0:
            raise BadInput(
                f"A threshold of {self.threshold}, a minimal size of "
                f"{self.minimal_size} and growth by {self.grow} make no objects: the "
                "first is between 0 and 1, the others are not negative."
            )

    @classmethod
    def recommended(cls, passport: Passport) -> ObjectSettings:
        """Take what the model's passport recommends."""
        return cls(
            passport.threshold,
            passport.minimal_size,
            passport.split_touching,
            passport.grow,
        )


def label_objects(probability: NDArray, settings: ObjectSettings) -> NDArray:
    """Label the objects in a map of the probability to belong to one.

    Parameters
    ----------
    probability : array of shape (Y, X) or (Z, Y, X)
        float in [0, 1], or uint8 where 255 means 1. Exactly 0 is background
        for certain (NaN in the image) and never becomes part of an object.
    settings : ObjectSettings
        How objects are made.

    Returns
    -------
    unsigned integer array of the same shape
        0 is background, objects are 1 … n without gaps, connected by faces.
    """
    scale = 255 if probability.dtype == np.uint8 else 1
    mask = probability > settings.threshold * scale
    if settings.split_touching:
        labels = _split(mask)
    else:
        labels = _components(mask)
    if settings.grow:
        labels = _grow(labels, settings.grow)
    certain = probability == 0
    if labels[certain].any():
        # Neither filled as a hole nor grown into: nor across, which leaves crumbs.
        labels[certain] = 0
        pieces = measure.label(labels, connectivity=1)
        labels = np.where(np.isin(pieces, pieces[mask]), pieces, 0)
    return _drop_small(labels, settings.minimal_size)


def _components(mask: NDArray) -> NDArray:
    """Connected by faces, so that objects touching at a corner stay apart."""
    labels: NDArray = cc3d.connected_components(
        mask, connectivity=6 if mask.ndim == 3 else 4
    )
    return labels


def _split(mask: NDArray) -> NDArray:
    """Cut objects at their necks, by a watershed on the distance to the edge.

    Two hills of the distance map stay apart if the lower one rises above the
    saddle between them by 0.3 of its height and by a pixel, so that rough
    outlines are not cut.
    """
    mask = _fill_small_holes(mask)
    height = ndimage.gaussian_filter(ndimage.distance_transform_edt(mask), 1.0)
    seeds = _components(local_maxima(height) & mask).astype(np.int32)
    hills: NDArray = watershed(-height, seeds, mask=mask)
    # Of a tiny object the smoothed maximum may lie beside it.
    rest = mask & (hills == 0)
    hills[rest] = _components(rest)[rest] + hills.max()
    peaks = np.append(0, ndimage.maximum(height, hills, np.arange(1, hills.max() + 1)))
    root = np.arange(len(peaks))
    for saddle, first, second in _saddles(hills, height):
        one, other = _find(root, first), _find(root, second)
        if one == other:
            continue
        low, high = sorted((one, other), key=lambda hill: peaks[hill])
        if peaks[low] - saddle < max(1.0, 0.3 * peaks[low]):
            root[low] = high
    roots = np.array([_find(root, hill) for hill in range(len(root))])
    joined: NDArray = roots[hills]
    return joined


def _find(root: NDArray, hill: int) -> int:
    while root[hill] != hill:
        hill = root[hill]
    return hill


def _saddles(hills: NDArray, height: NDArray) -> list[tuple[float, int, int]]:
    """The highest pass between any two neighbouring hills, the highest first."""
    keys, passes = [], []
    count = int(hills.max()) + 1
    for axis in range(hills.ndim):
        here = np.moveaxis(hills, axis, 0)[:-1]
        there = np.moveaxis(hills, axis, 0)[1:]
        border = (here != there) & (here > 0) & (there > 0)
        a, b = here[border].astype(np.int64), there[border].astype(np.int64)
        keys.append(np.minimum(a, b) * count + np.maximum(a, b))
        levels = np.moveaxis(height, axis, 0)
        passes.append(np.minimum(levels[:-1][border], levels[1:][border]))
    key, level = np.concatenate(keys), np.concatenate(passes)
    order = np.lexsort((-level, key))
    pairs, first = np.unique(key[order], return_index=True)
    highest = level[order][first]
    columns = (highest, pairs // count, pairs % count)
    return sorted(zip(*(c.tolist() for c in columns), strict=True), reverse=True)


def _fill_small_holes(mask: NDArray) -> NDArray:
    """Fill holes below a tenth of a typical object: they would attract cuts."""
    objects = np.bincount(_components(mask).ravel())[1:]
    if not len(objects):
        return mask
    # uint8 and 18: cc3d 4.1 can fail with boolean arrays and 26 neighbours.
    empty = (~mask).astype(np.uint8)
    outside = cc3d.connected_components(empty, connectivity=18 if mask.ndim == 3 else 8)
    sizes = np.bincount(outside.ravel())
    small = sizes < np.median(objects) / 10
    small[0] = False
    for axis in range(mask.ndim):  # what reaches the edge of the image is no hole
        small[np.take(outside, [0, -1], axis)] = False
    return mask | small[outside]


def _grow(labels: NDArray, pixels: int) -> NDArray:
    distance, nearest = ndimage.distance_transform_edt(labels == 0, return_indices=True)
    grown: NDArray = np.where(distance <= pixels, labels[tuple(nearest)], 0)
    return grown


def _drop_small(labels: NDArray, minimal_size: int) -> NDArray:
    """Leave out small objects and close the gaps in the numbering."""
    sizes = np.bincount(labels.ravel())
    keep = sizes >= max(minimal_size, 1)
    keep[0] = False
    number = np.cumsum(
        keep, dtype=labels.dtype if labels.dtype.kind == "u" else np.uint32
    )
    number[~keep] = 0
    kept: NDArray = number[labels]
    return kept


def label_classes(
    probabilities: NDArray, passport: Passport, settings: ObjectSettings
) -> tuple[NDArray, NDArray]:
    """Label all classes of a model in one plane or volume.

    Parameters
    ----------
    probabilities : array of shape (class, *spatial)
        Of the classes after the background, float or uint8: the background's
        share is what is missing to 1.
    passport : Passport
        Says which classes are objects; the first class is the background.
    settings : ObjectSettings
        How objects are made.

    Returns
    -------
    labels : unsigned integer array of shape spatial
        A class of kind "region" keeps its index as label; objects are numbered
        from 1, or from the number of classes if there are regions.
    object_classes : int array of shape (number of objects,)
        The class index of each object, in the order of their labels.
    """
    kinds = [info.kind for info in passport.classes[1:]]
    if kinds == ["objects"]:
        labels = label_objects(probabilities[0], settings)
        return labels, np.ones(int(labels.max(initial=0)), dtype=np.intp)
    scale = 255 if probabilities.dtype == np.uint8 else 1
    rest = scale - probabilities.sum(axis=0, dtype=np.float32)
    best = probabilities.argmax(axis=0) + 1
    winner = np.where(probabilities.max(axis=0) > rest, best, 0)
    labels = np.zeros(winner.shape, dtype=np.uint32)
    first = len(passport.classes) if "region" in kinds else 1
    object_classes: list[int] = []
    for index, kind in enumerate(kinds, start=1):
        if kind == "region":
            labels[winner == index] = index
        elif kind == "objects":
            of_class = np.where(best == index, probabilities[index - 1], 0)
            found = label_objects(of_class, settings)
            offset = first - 1 + len(object_classes)
            labels[found > 0] = found[found > 0].astype(np.uint32) + offset
            object_classes += [index] * int(found.max(initial=0))
    return labels, np.array(object_classes, dtype=np.intp)


def describe_objects(
    labels: NDArray, probabilities: NDArray, object_classes: NDArray
) -> dict[str, NDArray]:
    """Measure the objects of one plane or volume.

    Parameters
    ----------
    labels : array of shape spatial
        From `label_classes`.
    probabilities : array of shape (class, *spatial)
        What they were made of.
    object_classes : int array of shape (n,)
        From `label_classes`.

    Returns
    -------
    dict of str to array of length n
        "class", "size" in pixels, "mean_probability" and "centroid" (n, ndim).
    """
    count = len(object_classes)
    if not count:
        empty = np.zeros(0)
        centroid = np.zeros((0, labels.ndim))
        names = ("class", "size", "mean_probability")
        return dict.fromkeys(names, empty) | {"centroid": centroid}
    statistics = cc3d.statistics(labels, no_slice_conversion=True)
    scale = 255 if probabilities.dtype == np.uint8 else 1
    total = np.bincount(
        labels.ravel(),
        weights=probabilities.sum(axis=0, dtype=np.float32).ravel() / scale,
    )
    sizes = np.asarray(statistics["voxel_counts"], dtype=np.int64)
    return {
        "class": object_classes,
        "size": sizes[-count:],
        "mean_probability": total[-count:] / sizes[-count:],
        "centroid": np.asarray(statistics["centroids"])[-count:],
    }


@dataclass
class ObjectTable:
    """One row for each object of an image, plane after plane.

    Parameters
    ----------
    columns : dict of str to list
        "label", "class", "size", "mean_probability", and the loop axes' and the
        centroid's positions by axis letter.
    """

    columns: dict[str, list[float]] = field(default_factory=dict)

    def add(
        self, rows: dict[str, NDArray], first_label: int, place: dict[str, int]
    ) -> None:
        """Append the objects of one plane or volume.

        Parameters
        ----------
        rows : dict
            From `describe_objects`.
        first_label : int
            The objects are numbered from here.
        place : dict of str to int
            Where the plane is.
        """
        count = len(rows["size"])
        spatial = "ZYX"[-rows["centroid"].shape[1] :]
        columns = {
            "label": np.arange(first_label, first_label + count),
            **{axis: np.full(count, index) for axis, index in place.items()},
            **{axis: rows["centroid"][:, i] for i, axis in enumerate(spatial)},
            **{name: rows[name] for name in ("size", "mean_probability", "class")},
        }
        for name, values in columns.items():
            self.columns.setdefault(name, []).extend(values.tolist())

    def __len__(self) -> int:
        return len(self.columns.get("label", ()))
