"""From probabilities to objects."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import cc3d
import numpy as np
from scipy import ndimage

from napari_unet.errors import BadInput
from napari_unet.inference.split import components, split_touching

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from napari_unet.models.model import Passport

NOWHERE = np.iinfo(np.int64).max  # is the first pixel of what has none


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
        0 is background, objects are 1 … n without gaps, connected by faces, in
        the order of their first pixels above the threshold.
    """
    scale = 255 if probability.dtype == np.uint8 else 1
    mask = probability > settings.threshold * scale
    labels = split_touching(mask) if settings.split_touching else components(mask)
    if settings.grow:
        labels = grow_objects(labels, settings.grow)
    certain = probability == 0
    if labels[certain].any():
        # Neither filled as a hole nor grown into: nor across, which leaves crumbs.
        labels[certain] = 0
        labels = components(labels)
    sizes = np.bincount(labels.ravel())
    first = first_pixels(np.where(mask, labels, 0), len(sizes))
    number = number_objects(sizes, first, settings.minimal_size)
    numbered: NDArray = number.astype(np.min_scalar_type(len(sizes)))[labels]
    return numbered


def grow_objects(labels: NDArray, pixels: int) -> NDArray:
    """Grow objects by some pixels, as far as the middle between two.

    Parameters
    ----------
    labels : unsigned integer array
        Of any number of axes.
    pixels : int
        A distance between the centres of pixels.
    """
    distance, nearest = ndimage.distance_transform_edt(labels == 0, return_indices=True)
    grown: NDArray = np.where(distance <= pixels, labels[tuple(nearest)], 0)
    return grown


def first_pixels(labels: NDArray, count: int) -> NDArray[np.int64]:
    """Find where labels begin.

    Parameters
    ----------
    labels : unsigned integer array
        Of any number of axes.
    count : int
        Above the largest label.

    Returns
    -------
    int64 array of shape (count,)
        For each label the index of its first pixel in the flattened array, or
        `NOWHERE`; that of 0 is always `NOWHERE`.
    """
    flat = labels.ravel()
    starts = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    starts = np.append(0, starts)[::-1]  # of several, the last one stays
    first = np.full(count, NOWHERE)
    first[flat[starts]] = starts
    first[0] = NOWHERE
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
    owner, strength = assign_classes(probabilities, passport)
    labels = np.zeros(owner.shape, dtype=np.uint32)
    first = len(passport.classes) if "region" in kinds else 1
    object_classes: list[int] = []
    for index, kind in enumerate(kinds, start=1):
        if kind == "region":
            labels[owner == index] = index
        elif kind == "objects":
            of_class = np.where(owner == index, strength, 0)
            found = label_objects(of_class, settings)
            offset = first - 1 + len(object_classes)
            labels[found > 0] = found[found > 0].astype(np.uint32) + offset
            object_classes += [index] * int(found.max(initial=0))
    return labels, np.array(object_classes, dtype=np.intp)


def assign_classes(
    probabilities: NDArray, passport: Passport
) -> tuple[NDArray, NDArray]:
    """Decide which class a pixel belongs to, or would belong to.

    Parameters
    ----------
    probabilities, passport
        See `label_classes`.

    Returns
    -------
    owner : unsigned integer array of shape spatial
        Of a class of kind "objects" where it is the likeliest of all but the
        background, and possible at all; of a "region" where it beats the
        background, too. 0 elsewhere.
    strength : array of shape spatial
        The probability of the likeliest class.
    """
    scale = 255 if probabilities.dtype == np.uint8 else 1
    strength = probabilities.max(axis=0)
    dtype = np.min_scalar_type(len(probabilities))
    owner = probabilities.argmax(axis=0).astype(dtype)
    owner += 1
    rest = scale - probabilities.sum(axis=0, dtype=np.float32)
    beaten = {"objects": strength == 0, "region": strength <= rest}
    for index, info in enumerate(passport.classes[1:], start=1):
        is_lost = beaten.get(info.kind, True)
        owner[(owner == index) & is_lost] = 0
    return owner, strength


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
