"""Layers that show what is computed while the user paints and the network learns."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
from napari.layers import Image, Labels

from napari_unet.steps import Progress
from napari_unet.training.settings import View
from napari_unet.widgets import _layers

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from napari.layers import Layer
    from napari.viewer import Viewer
    from numpy.typing import NDArray

    from napari_unet.models.model import BorderWeights
    from napari_unet.training.annotations import Annotation
    from napari_unet.widgets._image_chooser import ImageChooser


LARGEST_PREVIEW = 1 << 20  # pixels; of larger planes what the canvas shows
_DEEPEST_PREVIEW = 16  # planes of a larger volume


class PlaneLayers:
    """One computed layer on each image, filled plane by plane.

    Parameters
    ----------
    viewer : Viewer
    make : callable
        Makes a layer of an image's name, a shape and a placement.
    """

    def __init__(
        self,
        viewer: Viewer,
        make: Callable[[str, list[int], dict[str, Any]], Layer],
    ):
        self._viewer = viewer
        self._make = make
        self._layers: weakref.WeakKeyDictionary[Image, weakref.ref[Layer]]
        self._layers = weakref.WeakKeyDictionary()
        self._hidden: weakref.WeakSet[Layer] = weakref.WeakSet()

    def find(self, image: Image) -> Layer | None:
        """Return the layer on an image, if it is in the viewer."""
        found = self._layers.get(image)
        layer = found() if found is not None else None
        return layer if layer in self._viewer.layers else None

    def put(
        self, image: Image, axes: str, region: dict[str, slice], values: NDArray
    ) -> Layer | None:
        """Show values in a part of an image; nothing if the image has gone.

        Parameters
        ----------
        image : Image
            On which it is shown.
        axes : str
            Of its layer.
        region : dict of str to slice
            By axis letter.
        values : array
            Of the shape of the region, without channels.
        """
        if image not in self._viewer.layers:
            return None
        letters = axes.replace("S", "")
        pixels = _layers.image_array(image).shape
        kept = [(n, a) for n, a in zip(pixels, letters, strict=False) if a != "C"]
        box = tuple(region.get(axis, slice(None)) for _, axis in kept)
        shape = [n for n, _ in kept]
        layer = self.find(image)
        if layer is None or list(layer.data.shape) != shape:
            space = _layers.label_space(image, axes)
            layer = self._make(image.name, shape, space)
            self._layers[image] = weakref.ref(layer)
            active = self._viewer.layers.selection.active
            self._viewer.add_layer(layer)
            if isinstance(layer, Image):  # else it would hide what is painted
                above = self._viewer.layers.index(image) + 1
                self._viewer.layers.move(len(self._viewer.layers) - 1, above)
            # Whoever paints goes on painting in the same layer.
            self._viewer.layers.selection.active = active
        part = layer.data[box]
        if part.size != values.size:
            return layer  # the image was replaced meanwhile
        part[...] = np.reshape(values, part.shape)
        if layer in self._hidden:
            self._hidden.discard(layer)
            layer.visible = True
        layer.refresh()
        return layer

    def hide(self) -> None:
        """Empty and hide the layers; napari is slow to remove some."""
        for image in list(self._layers):
            layer = self.find(image)
            if layer is not None:
                layer.data[...] = 0
                layer.visible = False
                self._hidden.add(layer)


class Previews:
    """What the network finds now in the image that the user looks at.

    Parameters
    ----------
    viewer : Viewer
    chooser : ImageChooser
        Says which image that is.
    """

    def __init__(self, viewer: Viewer, chooser: ImageChooser):
        self._viewer = viewer
        self._chooser = chooser
        self._layers = PlaneLayers(viewer, make_preview)
        self._images: list[weakref.ref[Image]] = []
        self._axes: list[str] = []
        self._ndim = 2
        self._view: View | None = None

    def begin(self, images: list[Image], ndim: int) -> View | None:
        """Start with these images, by identity; return what is looked at."""
        self._images = [weakref.ref(image) for image in images]
        self._axes = [self._chooser.axes_of(image) for image in images]
        self._ndim = ndim
        return self.begin_again()

    def begin_again(self) -> View | None:
        """Go on with the same images."""
        self._view = None
        return self.next_view()

    def next_view(self) -> View | None:
        """Return what is looked at if it is something else than before."""
        image = self._chooser.layer
        images = [ref() for ref in self._images]
        if image is None or image not in images:
            return None
        index = images.index(image)
        try:
            region = _layers.looked_at(
                self._viewer, image, self._axes[index], self._ndim, LARGEST_PREVIEW
            )
        except (KeyError, ValueError):
            return None  # axes that do not fit; the training will say so
        if any(part.start >= part.stop for part in region.values()):
            return None  # the canvas shows nothing of the image
        letters = self._axes[index].replace("S", "")
        here = _layers.current_index(self._viewer, image)
        plane = dict(zip(letters, here, strict=False)).get("Z", 0)
        view = View(index, limit_preview(region, plane))
        if view == self._view:
            return None
        self._view = view
        return view

    def show(self, view: View, outlines: NDArray) -> None:
        """Show the outlines of objects in a view, if its image is still there."""
        image = self._images[view.annotation]()
        if image is not None:
            axes = self._axes[view.annotation]
            self._layers.put(image, axes, dict(view.region), outlines)

    def hide(self) -> None:
        """Show nothing until the next training."""
        self._layers.hide()


def limit_preview(
    region: dict[str, slice], plane: int, most: int = LARGEST_PREVIEW
) -> dict[str, slice]:
    """Shrink what the canvas shows to what is segmented in a moment.

    Parameters
    ----------
    region : dict of str to slice
        By axis letter; without Y and X the image is small, and seen whole.
    plane : int
        Around which planes are kept; of Y and X the centre is.
    most : int
        Pixels that are kept.
    """
    if not {"Y", "X"} <= region.keys():
        return region
    limited = dict(region)
    if "Z" in limited:
        limited["Z"] = _shrink(limited["Z"], plane, _DEEPEST_PREVIEW)
    sizes = {axis: part.stop - part.start for axis, part in limited.items()}
    pixels = sizes.get("Z", 1) * sizes["Y"] * sizes["X"]
    if pixels > most:
        factor = (most / pixels) ** 0.5
        for axis in "YX":
            part = limited[axis]
            size = max(1, int(sizes[axis] * factor))
            limited[axis] = _shrink(part, (part.start + part.stop) // 2, size)
    return limited


def _shrink(part: slice, centre: int, size: int) -> slice:
    """Keep at most so many pixels around one of them, inside of a part."""
    start = max(min(centre - size // 2, part.stop - size), part.start)
    return slice(start, min(start + size, part.stop))


def make_preview(name: str, shape: list[int], space: dict[str, Any]) -> Labels:
    """Make an empty layer for the outlines of what a network finds now."""
    layer = Labels(
        np.zeros(shape, np.uint8),  # other types are slow to draw
        name=f"{name} preview",
        metadata={_layers.PREVIEW: True},
        opacity=0.9,
        **space,
    )
    layer.editable = False
    return layer


def make_weights(name: str, shape: list[int], space: dict[str, Any]) -> Image:
    """Make an empty layer for weights."""
    return Image(
        np.zeros(shape, np.float32),
        name=f"{name} weight map",
        metadata={_layers.WEIGHTS: True},
        colormap="magma",
        contrast_limits=(0, 1),
        opacity=0.7,
        **space,
    )


def weight_steps(
    annotation: Annotation, ndim: int, border: BorderWeights | None
) -> Generator[Progress, None, NDArray[np.float32]]:
    """Weight one plane or volume as the training does, on the image's own grid.

    Returns
    -------
    float32 array of the shape of the labels
    """
    yield Progress(0, 1, "weight map")
    from napari_unet.training.annotations import derive_truths
    from napari_unet.training.weight_map import border_weight_map

    shape = annotation.labels.shape
    truth = next((t for _, t in derive_truths(annotation, 2 if ndim == 2 else 3)), None)
    if truth is None:
        return np.zeros(shape, np.float32)
    if border is None:
        weights = truth.known.astype(np.float32)
    else:
        weights = border_weight_map(
            truth.objects,
            border.w0,
            border.sigma,
            preset=border.preset,
            known=truth.known,
        )
    spatial = "ZYX"[-weights.ndim :]
    order = [spatial.index(axis) for axis in annotation.label_axes if axis in spatial]
    return weights.transpose(order).reshape(shape)
