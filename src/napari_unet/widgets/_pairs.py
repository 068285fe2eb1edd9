"""Images, the layers they are annotated in, and what these say."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from napari.layers import Image, Labels, Shapes

from napari_unet.widgets import _layers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from napari.viewer import Viewer
    from numpy.typing import NDArray

    from napari_unet.training.annotations import Annotation

_ELLIPSE_CORNERS = 64


@dataclass(frozen=True)
class Pair:
    """An image layer and the layers that annotate it."""

    image: Image
    labels: Labels
    regions: Shapes | None


@dataclass(frozen=True)
class Meaning:
    """What the user says about all annotations: see `Annotation`."""

    unpainted: Literal["background", "unknown"] = "background"
    labels_are: Literal["objects", "classes"] = "objects"


class Pairs:
    """Which layers annotate which image, by identity, as long as they are there."""

    def __init__(self, viewer: Viewer):
        self._viewer = viewer
        self._labels: weakref.WeakKeyDictionary[Image, weakref.ref[Labels]]
        self._labels = weakref.WeakKeyDictionary()
        self._regions: weakref.WeakKeyDictionary[Image, weakref.ref[Shapes]]
        self._regions = weakref.WeakKeyDictionary()

    def all(self) -> list[Pair]:
        """Return the pairs whose image and annotation are in the viewer."""
        pairs = []
        for image in self._viewer.layers:
            labels = self.labels_of(image)
            if labels is not None:
                pairs.append(Pair(image, labels, self.regions_of(image)))
        return pairs

    def labels_of(self, image: Image | None) -> Labels | None:
        """Return the layer that an image is painted in."""
        found = self._labels.get(image) if image is not None else None
        labels = found() if found is not None else None
        return labels if labels in self._viewer.layers else None

    def regions_of(self, image: Image | None) -> Shapes | None:
        """Return the layer of an image's regions."""
        found = self._regions.get(image) if image is not None else None
        regions = found() if found is not None else None
        return regions if regions in self._viewer.layers else None

    def set_labels(self, image: Image, labels: Labels | None) -> None:
        """Say in which layer an image is painted."""
        self._labels.pop(image, None)
        if labels is not None:
            self._labels[image] = weakref.ref(labels)

    def set_regions(self, image: Image, regions: Shapes | None) -> None:
        """Say in which layer its regions are."""
        self._regions.pop(image, None)
        if regions is not None:
            self._regions[image] = weakref.ref(regions)


def make_annotation(viewer: Viewer, image: Image, axes: str) -> tuple[Labels, str]:
    """Add an editable copy of the objects found in an image, or an empty layer.

    Returns
    -------
    Labels
        Of type int32, placed on the image, selected.
    str
        What was made, in words.
    """
    found = _layers.find_segmentation(viewer, image)
    letters = axes.replace("S", "")
    pixels = _layers.image_array(image).shape
    shape = [n for n, axis in zip(pixels, letters, strict=False) if axis != "C"]
    if found is not None and list(found.data.shape) == shape:
        data = np.array(found.data, np.int32)
        found.visible = False
        words = f"{found.name!r} was copied: correct it with the brush."
    else:
        data = np.zeros(shape, np.int32)
        words = "Nothing is segmented yet, so the layer is empty: paint some objects."
    space = _layers.label_space(image, axes)
    labels = Labels(data, name=f"{image.name} annotations", **space)
    viewer.add_layer(labels)
    viewer.layers.selection.active = labels
    labels.selected_label = int(data.max()) + 1
    return labels, words


def make_regions(viewer: Viewer, name: str, space: dict[str, Any]) -> Shapes:
    """Add a layer in which rectangles can be drawn on an image at once.

    Parameters
    ----------
    viewer : Viewer
        Gets the layer.
    name : str
        Of the image.
    space : dict
        From `label_space`.
    """
    regions = Shapes(
        ndim=len(space["scale"]),
        name=f"{name} regions",
        face_color="transparent",
        edge_color="yellow",
        edge_width=2,
        **space,
    )
    viewer.add_layer(regions)
    return regions


def draw_rectangles(viewer: Viewer, regions: Shapes) -> None:
    """Make the next drag on the canvas a rectangle."""
    regions.visible = True
    viewer.layers.selection.active = regions
    regions.mode = "add_rectangle"


def region_vertices(regions: Shapes, labels: Labels) -> list[NDArray]:
    """Return boxes and polygons in pixels of the labels, wherever they are drawn."""
    ndim = regions.ndim
    # The way from one layer to the other is affine: a few points tell all of it.
    points = [
        labels.world_to_data(regions.data_to_world(point))
        for point in np.vstack([np.zeros(ndim), np.eye(ndim)])
    ]
    moved = np.asarray(points, float)[:, -ndim:]
    found = []
    kinds: Sequence[str] = regions.shape_type
    for vertices, kind in zip(regions.data, kinds, strict=True):
        corners = np.asarray(vertices, float)
        if kind == "ellipse":
            corners = _ellipse(corners)
        # A box stays a box: the way there and back is exact to rounding only.
        found.append(np.round(moved[0] + corners @ (moved[1:] - moved[0]), 6))
    return found


def _ellipse(corners: NDArray) -> NDArray:
    angles = np.linspace(0, 2 * np.pi, _ELLIPSE_CORNERS, endpoint=False)[:, None]
    a, b = (corners[1] - corners[0]) / 2, (corners[3] - corners[0]) / 2
    outline: NDArray = corners.mean(0) + np.cos(angles) * a + np.sin(angles) * b
    return outline


def read_pair(pair: Pair, axes: str, meaning: Meaning) -> Annotation:
    """Read the layers, on the main thread; the arrays are the layers' own.

    Parameters
    ----------
    pair : Pair
        The layers.
    axes : str
        Of the image layer.
    meaning : Meaning
        Of the labels.

    Returns
    -------
    Annotation
    """
    from napari_unet.training.annotations import Annotation

    regions = pair.regions
    return Annotation(
        _layers.image_array(pair.image),
        pair.labels.data,
        [] if regions is None else region_vertices(regions, pair.labels),
        axes=axes,
        pixel_size=_layers.pixel_size(pair.image, axes),
        unpainted=meaning.unpainted,
        labels_are=meaning.labels_are,
        name=pair.image.name,
    )


def show_pair(viewer: Viewer, annotation: Annotation) -> Pair:
    """Add the layers of an annotation.

    Parameters
    ----------
    viewer : Viewer
        Layers that are there stay.
    annotation : Annotation
        Its arrays become the layers' own.

    Returns
    -------
    Pair
    """
    axes, pixels = annotation.image_axes, annotation.image
    letters, sizes = axes.replace("S", ""), annotation.pixel_size
    if "S" in axes:
        pixels = np.moveaxis(pixels, axes.index("S"), -1)
    image = Image(
        pixels,
        name=annotation.name or "image",
        rgb="S" in axes,
        scale=[sizes.get(axis, 1) for axis in letters],
        units=["um" if axis in sizes else "pixel" for axis in letters],
        axis_labels=list(letters.lower()),
    )
    viewer.add_layer(image)
    painted = np.asarray(annotation.labels)
    if painted.max(initial=0) < 2**31:
        painted = painted.astype(np.int32)  # room for more objects
    space = _layers.label_space(image, axes)
    labels = Labels(painted, name=f"{image.name} annotations", **space)
    viewer.add_layer(labels)
    regions = _show_regions(viewer, annotation, labels) if annotation.regions else None
    viewer.layers.selection.active = labels
    return Pair(image, labels, regions)


def _show_regions(viewer: Viewer, annotation: Annotation, labels: Labels) -> Shapes:
    outlines = [np.asarray(outline, float) for outline in annotation.regions]
    ndim = max(outline.shape[1] for outline in outlines)
    space = {
        "scale": labels.scale[-ndim:],
        "units": labels.units[-ndim:],
        "axis_labels": labels.axis_labels[-ndim:],
    }
    regions = make_regions(viewer, annotation.name or "image", space)
    # Those that lack an axis hold at each of its positions.
    full = [
        np.hstack([np.tile(index, (len(outline), 1)), outline])
        for outline in outlines
        for index in np.ndindex(labels.data.shape[-ndim:][: ndim - outline.shape[1]])
    ]
    regions.add(full, shape_type=[_shape_type(outline) for outline in full])
    return regions


def _shape_type(outline: NDArray) -> str:
    """Tell a box, whose corners can be dragged, from other polygons."""
    is_box = (
        len(outline) == 4
        and np.array_equal(outline[0] + outline[2], outline[1] + outline[3])
        and all(len(set(column)) <= 2 for column in outline.T)
    )
    return "rectangle" if is_box else "polygon"


def cut_plane(annotation: Annotation, region: dict[str, slice]) -> Annotation:
    """Return the annotation of one plane or volume, without its image."""
    axes = annotation.label_axes
    box = tuple(region.get(axis, slice(None)) for axis in axes)
    labels = np.array(annotation.labels[box])
    regions = []
    for vertices in annotation.regions:
        moved = np.array(vertices, float)
        for axis, letter in enumerate(axes[-moved.shape[1] :]):
            moved[:, axis] -= region.get(letter, slice(0, None)).start or 0
        regions.append(moved)
    pixels: Any = np.broadcast_to(np.uint8(0), labels.shape)
    return replace(annotation, image=pixels, labels=labels, regions=regions, axes=axes)
