"""Which channel of which layer each input channel of the model gets."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
from qtpy.QtWidgets import QComboBox, QFormLayout

from napari_unet.errors import BadInput
from napari_unet.widgets._dock import narrow
from napari_unet.widgets._layers import image_array, image_layers

if TYPE_CHECKING:
    from collections.abc import Callable

    import napari.viewer
    from napari.layers import Image

    from napari_unet.models.model import Model


class ChannelChoosers:
    """One row for each input channel that cannot be known without asking.

    An image with a channel axis offers its channels; without one, a model with
    several channels takes them from several layers.

    Parameters
    ----------
    form : QFormLayout
        Rows are inserted here, after those that are there now.
    on_change : callable
    """

    def __init__(self, form: QFormLayout, on_change: Callable[[], None]):
        self._form = form
        self._row = form.rowCount()
        self._on_change = on_change
        self._boxes: list[QComboBox] = []
        self._shown: object = None
        # What was chosen last: channels for all images that have some, else layers.
        self._numbers: tuple[int, ...] = ()
        self._layers: weakref.WeakKeyDictionary[Image, tuple[Any, ...]]
        self._layers = weakref.WeakKeyDictionary()

    def update(
        self,
        viewer: napari.viewer.Viewer,
        layer: Image | None,
        axes: str,
        model: Model | None,
    ) -> None:
        """Show the rows that this image and model need."""
        names: tuple[str, ...] = () if model is None else model.passport.channels
        options: list[tuple[str, Any]] = []
        if layer is not None and "S" not in axes:
            count = 1
            if "C" in axes and len(axes) == image_array(layer).ndim:
                count = image_array(layer).shape[axes.index("C")]
                if count != len(names):
                    options = [(f"channel {i + 1}", i) for i in range(count)]
            elif len(names) > 1:
                shape = image_array(layer).shape
                options = [
                    (other.name, other)
                    for other in image_layers(viewer)
                    if image_array(other).shape == shape
                ]
        items = [data for _, data in options]
        if (names, items) == self._shown:
            for box in self._boxes:
                for index, (text, _) in enumerate(options):
                    box.setItemText(index, text)
        else:
            self._shown = (names, items)
            self._show(names, options, layer)
        numbers = [item for item in self.chosen if isinstance(item, int)]
        if numbers:
            self._numbers = tuple(numbers)
        elif self.chosen and layer is not None:
            self._layers[layer] = self.chosen

    def _show(
        self,
        names: tuple[str, ...],
        options: list[tuple[str, Any]],
        layer: Image | None,
    ) -> None:
        items = [data for _, data in options]
        before = self.chosen
        for box in self._boxes:
            self._form.removeRow(box)
        self._boxes = []
        for index, name in enumerate(names if options else ()):
            box = narrow(QComboBox())
            for text, data in options:
                box.addItem(text, data)
            mine = items.index(layer) if layer in items else 0
            if index < len(before) and before[index] in items:
                box.setCurrentIndex(items.index(before[index]))
            else:
                box.setCurrentIndex((mine + index) % len(options))
            box.currentIndexChanged.connect(lambda _: self._on_change())
            self._form.insertRow(self._row + index, name, box)
            self._boxes.append(box)

    @property
    def chosen(self) -> tuple[object, ...]:
        """Channel numbers or layers, in the model's order."""
        return tuple(box.currentData() for box in self._boxes)

    def chosen_for(
        self, layer: Image, axes: str, model: Model | None
    ) -> tuple[object, ...]:
        """Return the choice for any image, without rows for it being shown.

        A choice of channels holds for all images. What was never asked is what would
        be proposed.
        """
        wanted = 0 if model is None else len(model.passport.channels)
        if "C" not in axes:
            layers = self._layers.get(layer, ())
            return layers if len(layers) == wanted else ()
        count = image_array(layer).shape[axes.index("C")]
        if count == wanted:
            return ()
        if len(self._numbers) == wanted and max(self._numbers, default=0) < count:
            return self._numbers
        return tuple(index % count for index in range(wanted))


def resolve(
    image: Any, axes: str, chosen: tuple[object, ...]
) -> tuple[Any, str, list[int] | None]:
    """Return the image, its axes and the chosen channels for the engine."""
    if not chosen:
        return image, axes, None
    numbers = [item for item in chosen if isinstance(item, int)]
    if numbers:
        return image, axes, numbers
    arrays = [image_array(layer) for layer in chosen]
    if any(array.shape != image.shape for array in arrays):
        raise BadInput("The channel layers differ in size; choose others.")
    lazy = not all(isinstance(array, np.ndarray) for array in arrays)
    if not lazy:
        return np.stack(arrays), "C" + axes, None
    import dask.array as da  # takes a second the first time

    return da.stack(arrays), "C" + axes, None


def take_channels(image: Any, axes: str, numbers: list[int]) -> tuple[Any, str]:
    """Return some channels of an image, lazily, and its axes."""
    before = (slice(None),) * axes.index("C")
    if len(numbers) == 1:
        return image[(*before, numbers[0])], axes.replace("C", "")
    if isinstance(image, np.ndarray):
        import dask.array as da  # takes a second the first time

        image = da.from_array(image, name=False)
    return image[(*before, numbers)], axes
