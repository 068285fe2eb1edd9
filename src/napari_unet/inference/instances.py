"""From probabilities to objects."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from napari_unet.inference.objects import find_objects_steps
from napari_unet.steps import run_to_end

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from napari_unet.inference.settings import ObjectSettings
    from napari_unet.models.model import Passport


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
    steps = find_objects_steps(probability[None], ["objects"], settings)
    return run_to_end(steps).labels


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
    steps = find_objects_steps(
        probabilities, [info.kind for info in passport.classes[1:]], settings
    )
    objects = run_to_end(steps)
    return objects.labels, objects.classes


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
            From `Objects.describe`.
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
