"""An annotated image, and what it says about each of its pixels."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import cc3d
import numpy as np

from napari_unet.errors import BadInput
from napari_unet.inference.source import DEFAULT_AXES
from napari_unet.training.regions import fill_region
from napari_unet.training.weight_map import cut_gaps, number_objects

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import ArrayLike, NDArray

__all__ = [
    "MAX_CLASS",
    "Annotation",
    "Truth",
    "check_annotations",
    "checked_labels",
    "derive_truths",
    "find_problems",
    "known_pixels",
]

MAX_CLASS = 255  # more are objects that were taken for classes


@dataclass(frozen=True, eq=False)
class Annotation:
    """An image, what is painted on it, and how much of that is meant.

    - With regions, everything inside them is known: 0 is background, every other
      label an object (or a class). Nothing is known outside them, whatever is
      painted there.
    - Without regions, `unpainted` says what the pixels of label 0 are. If they are
      background, everything is known. If they are unknown, the labels are
      scribbles: 1 is background, 2 and more are objects (or the classes 1 and more).

    Nothing is checked before the annotation is used: see `find_problems`.

    Parameters
    ----------
    image : array
        Anything with ``shape`` and numpy slicing: numpy, dask, zarr.
    labels : integer array
        As the image without its channels.
    regions : sequence of array of shape (vertex, axis), optional
        The corners of boxes and polygons in pixels of `labels`, as the layers of
        shapes in napari give them; the centre of the first pixel is 0. Each lies in
        one plane of a stack. One with fewer axes than `labels` lacks the first
        ones and holds at each of their positions. Ellipses and paths must be made
        polygons before.
    axes : str, optional
        Of the image, e.g. "TCZYX" or "YXS"; by default "YX", "ZYX" or "TZYX".
    pixel_size : mapping of str to float, optional
        Axis letter to micrometres.
    unpainted : "background" or "unknown", optional
        What label 0 means. Not used where there are regions.
    labels_are : "objects" or "classes", optional
        Whether one label is one object, connected or not, or one class, whose
        connected components are objects.
    name : str, optional
        What to call the image in messages.
    """

    image: Any
    labels: Any
    regions: Sequence[ArrayLike] = ()
    _: KW_ONLY
    axes: str | None = None
    pixel_size: Mapping[str, float] = field(default_factory=dict)
    unpainted: Literal["background", "unknown"] = "background"
    labels_are: Literal["objects", "classes"] = "objects"
    name: str = ""

    @property
    def image_axes(self) -> str:
        """One letter for each axis of the image."""
        default = DEFAULT_AXES.get(len(np.shape(self.image)), "")
        return default if self.axes is None else self.axes.upper()

    @property
    def label_axes(self) -> str:
        """One letter for each axis of the labels."""
        return "".join(axis for axis in self.image_axes if axis not in "CS")

    @property
    def are_scribbles(self) -> bool:
        """Whether label 1 is background and unpainted pixels are unknown."""
        return self.unpainted == "unknown" and not len(self.regions)


@dataclass(frozen=True, eq=False)
class Truth:
    """What is known about each pixel of a plane or volume.

    Parameters
    ----------
    target : uint8 array
        The class, 0 for background and where nothing is known.
    objects : int32 array
        Objects are 1 … n; 0 where the target is 0. Between touching objects of one
        class a gap of one pixel is cut, which is background; those of different
        classes touch (as Falk et al. 2019).
    known : bool array
        False where the loss must not look.
    """

    target: NDArray[np.uint8]
    objects: NDArray[np.int32]
    known: NDArray[np.bool_]


def derive_truths(
    annotation: Annotation, ndim: Literal[2, 3]
) -> Iterator[tuple[dict[str, int], Truth]]:
    """Derive what is known, plane by plane or volume by volume.

    It depends on nothing that is painted where nothing is known: an object that
    reaches out of all regions ends at their edge.

    Parameters
    ----------
    annotation : Annotation
        See there for what is known.
    ndim : int
        2 for a network of planes, 3 for one of volumes. Objects of a stack that
        touch only across planes need no gaps in planes.

    Yields
    ------
    unit : dict of str to int
        Index along every axis that the network does not see.
    truth : Truth
        Of shape (Y, X) or (Z, Y, X). Units of which nothing is known are left out.

    Raises
    ------
    BadInput
        If the annotation cannot be used at all, or has no such planes or volumes.
    """
    labels, known = _read(annotation)
    spatial = "ZYX"[-ndim:]
    axes = annotation.label_axes
    if missing := set(spatial) - set(axes):
        raise BadInput(
            f"The model needs the axes {spatial}; the labels have {axes} and lack "
            f"{', '.join(sorted(missing))}. Train a {5 - ndim}D model instead."
        )
    loop = "".join(axis for axis in axes if axis not in spatial)
    order = [axes.index(axis) for axis in loop + spatial]
    labels, known = labels.transpose(order), known.transpose(order)
    for index in np.ndindex(labels.shape[: len(loop)]):
        if known[index].any():
            truth = _derive(annotation, labels[index], known[index])
            yield dict(zip(loop, index, strict=True)), truth


def known_pixels(annotation: Annotation) -> NDArray[np.bool_]:
    """Return where the annotation says what is in the image.

    Parameters
    ----------
    annotation : Annotation
        Its image is not looked at.

    Returns
    -------
    bool array of the shape of the labels

    Raises
    ------
    BadInput
        If a region is no box or polygon in one plane.
    """
    labels = np.asarray(annotation.labels)
    if annotation.are_scribbles:
        return np.asarray(labels != 0)
    if not len(annotation.regions):
        return np.ones(labels.shape, bool)
    known = np.zeros(labels.shape, bool)
    for number, region in enumerate(annotation.regions, start=1):
        fill_region(known, region, number)
    return known


def find_problems(annotations: Sequence[Annotation]) -> list[str]:
    """Say in sentences why nothing could be learnt from these annotations.

    One image may be all background, or without any annotation, if another is not.

    Parameters
    ----------
    annotations : sequence of Annotation
        All that a network is to be trained on.

    Returns
    -------
    list of str
        Empty if training can start.
    """
    problems = []
    classes: set[int] = set()
    for annotation in annotations:
        try:
            labels, known = _read(annotation)
            classes |= _known_classes(annotation, labels, known)
        except BadInput as error:
            where = f"{annotation.name}: " if annotation.name else ""
            problems.append(f"{where}{error}")
    if problems:
        return problems
    if not annotations:
        return ["No image is annotated: choose an image and its annotation."]
    if len(classes) < 2:
        scribbles = all(annotation.are_scribbles for annotation in annotations)
        return [_say_what_is_missing(classes, scribbles)]
    return []


def check_annotations(annotations: Sequence[Annotation]) -> None:
    """Refuse annotations from which nothing could be learnt.

    Parameters
    ----------
    annotations : sequence of Annotation
        All that a network is to be trained on.

    Raises
    ------
    BadInput
        With the sentences of `find_problems`.
    """
    if problems := find_problems(annotations):
        raise BadInput("\n".join(problems))


def _derive(annotation: Annotation, labels: NDArray, known: NDArray) -> Truth:
    """Derive the truth of one plane or volume."""
    painted = _painted(annotation, labels, known)
    if annotation.labels_are == "classes":
        target = painted.astype(np.uint8)
        objects = number_objects(_cut_within_classes(_components(target), target))
        target[objects == 0] = 0
    else:
        objects = number_objects(cut_gaps(painted))
        target = (objects > 0).astype(np.uint8)
    return Truth(target, objects, np.ascontiguousarray(known))


def _painted(annotation: Annotation, labels: NDArray, known: NDArray) -> NDArray:
    """Return the labels where they mean something, with 0 for background."""
    painted: NDArray = np.where(known, labels, 0)
    if annotation.are_scribbles:
        painted = painted - (painted > 0).astype(painted.dtype)
    return painted


def _components(target: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Connect pixels of one class by faces, as the objects of a prediction are."""
    components = cc3d.connected_components(
        np.ascontiguousarray(target), connectivity=6 if target.ndim == 3 else 4
    )
    return np.asarray(components, np.int32)


def _cut_within_classes(
    objects: NDArray[np.int32], target: NDArray[np.uint8]
) -> NDArray[np.int32]:
    """Cut gaps between touching objects of the same class only.

    Background between tissues, or within a cell around its nucleus, is not there
    to be learnt.
    """
    cut = objects.copy()
    classes = np.flatnonzero(np.bincount(target.ravel()))
    for number in classes[classes > 0]:
        of_class = target == number
        cut[of_class] = cut_gaps(np.where(of_class, objects, 0))[of_class]
    return cut


def _known_classes(annotation: Annotation, labels: NDArray, known: NDArray) -> set[int]:
    """Return which classes are known to be somewhere; every object is class 1."""
    painted = _painted(annotation, labels, known)
    if annotation.labels_are == "classes":
        return set(np.unique(painted[known]).tolist())
    found = painted != 0
    classes = set(np.unique(found[known]).astype(int).tolist())
    # Where cells lie side by side everywhere, the gaps between them are background.
    return classes | {0} if classes == {1} and _any_touch(painted) else classes


def _say_what_is_missing(classes: set[int], scribbles: bool) -> str:
    if not classes:
        return "Nothing is known about any pixel: " + (
            "paint background with label 1 and objects with 2 and more."
            if scribbles
            else "no region covers any of its image. Draw one around what is right."
        )
    if classes == {0}:
        return "There is nothing to learn: no object is painted. " + (
            "Label 1 is background; paint objects with 2 and more."
            if scribbles
            else "Paint some, inside the regions if there are any."
        )
    return "No background is known, so everything would become object. " + (
        "Paint some background with label 1."
        if scribbles
        else "Leave some unpainted, inside the regions if there are any."
    )


def _any_touch(painted: NDArray) -> bool:
    for axis in (-2, -1):
        values = np.moveaxis(painted, axis, 0)
        here, there = values[:-1], values[1:]
        if ((here != there) & (here != 0) & (there != 0)).any():
            return True
    return False


def checked_labels(annotation: Annotation) -> NDArray:
    """Return the labels after checking that they lie on the image.

    Parameters
    ----------
    annotation : Annotation
        Its regions are not looked at.

    Returns
    -------
    array
        In memory.

    Raises
    ------
    BadInput
        If its axes, sizes, types or meanings cannot be.
    """
    axes, shape = annotation.image_axes, np.shape(annotation.image)
    labels = np.asarray(annotation.labels)
    for value, allowed in (
        (annotation.unpainted, ("background", "unknown")),
        (annotation.labels_are, ("objects", "classes")),
    ):
        if value not in allowed:
            raise BadInput(f"{value!r} is neither {allowed[0]!r} nor {allowed[1]!r}.")
    if (
        len(axes) != len(shape)
        or len(set(axes)) != len(axes)
        or not {"Y", "X"} <= set(axes) <= set("TCZYXS")
        or {"C", "S"} <= set(axes)
    ):
        raise BadInput(
            f"The image of shape {_sides(shape)} cannot have the axes {axes!r}: give "
            "one letter of TCZYXS for each, Y and X among them, and S (the colours of "
            "RGB) only instead of C."
        )
    if labels.dtype.kind not in "biu":
        raise BadInput(
            f"The labels are numbers of type {labels.dtype}; they must be whole "
            "numbers. Convert the layer to Labels."
        )
    sides = tuple(n for n, axis in zip(shape, axes, strict=True) if axis not in "CS")
    if labels.shape != sides:
        raise BadInput(
            f"The sizes differ: the labels are {_sides(labels.shape)}, the image "
            f"({axes}) is {_sides(shape)}. Annotate this image, or name its axes."
        )
    if not labels.size:
        raise BadInput("The image is empty.")
    if labels.min() < 0:
        raise BadInput(
            f"The labels go down to {labels.min()}; use 0 and more. Replace the "
            "negative ones."
        )
    return labels


def _read(annotation: Annotation) -> tuple[NDArray, NDArray[np.bool_]]:
    """Return the labels and where they are known, or raise `BadInput`."""
    labels = checked_labels(annotation)
    known = known_pixels(annotation)  # also checks the regions
    if annotation.labels_are == "classes":
        highest = int(np.max(_painted(annotation, labels, known)))
        if highest > MAX_CLASS:
            raise BadInput(
                f"The labels go up to {labels.max()}: too many for classes. If each "
                'is an object, choose "labels are objects".'
            )
    return labels, known


def _sides(shape: tuple[int, ...]) -> str:
    return " x ".join(str(n) for n in shape)
