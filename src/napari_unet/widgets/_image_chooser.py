"""Choose an image layer and say what its axes and channels are."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from qtpy.QtCore import QObject
from qtpy.QtWidgets import QComboBox, QFormLayout, QHBoxLayout, QLabel, QLineEdit
from superqt.utils import signals_blocked

from napari_unet.errors import BadInput
from napari_unet.inference.source import open_source
from napari_unet.widgets import _layers
from napari_unet.widgets._channels import ChannelChoosers, resolve, take_channels
from napari_unet.widgets._dock import narrow, while_alive
from napari_unet.widgets._file_facts import is_being_read, read_file_facts

if TYPE_CHECKING:
    from collections.abc import Callable

    import napari.viewer
    from napari.layers import Image

    from napari_unet.models.model import Model

READING = "The header of the file is being read."


class ImageChooser(QObject):
    """The rows "Image", "Axes" and, where needed, one for each channel.

    The list follows the viewer's layers, the choice the active layer.

    Parameters
    ----------
    viewer : napari.viewer.Viewer
        Its image layers can be chosen.
    form : QFormLayout
        Gets the rows.
    on_change : callable
        Called when the choice, its axes or channels change.
    """

    def __init__(
        self,
        viewer: napari.viewer.Viewer,
        form: QFormLayout,
        on_change: Callable[[], None],
    ):
        super().__init__(form)
        self._viewer = viewer
        self._on_change = on_change
        self._axes_by_layer: weakref.WeakKeyDictionary[Image, str]
        self._axes_by_layer = weakref.WeakKeyDictionary()
        self._list = narrow(QComboBox())
        self._list.setToolTip("The image layer to work on.")
        self._list.currentIndexChanged.connect(lambda _: self._on_choice())
        self._axes = QLineEdit()
        self._axes.setMaxLength(6)
        self._axes.setToolTip(
            "One letter for each axis of the layer: T time, C channel, Z, Y, X, and S "
            "for the colours of RGB.\nCorrect it if a stack is taken for a movie, or "
            "the other way round."
        )
        self._axes.textEdited.connect(self._on_axes)
        form.addRow("Image", self._list)
        self._guessed = QLabel("guessed")
        self._guessed.setToolTip("Neither the layer nor its file says its axes.")
        policy = self._guessed.sizePolicy()
        policy.setRetainSizeWhenHidden(True)
        self._guessed.setSizePolicy(policy)
        row = QHBoxLayout()
        row.addWidget(self._axes)
        row.addWidget(self._guessed)
        form.addRow("Axes", row)
        self._channels = ChannelChoosers(form, on_change)
        viewer.layers.events.inserted.connect(self.reset)
        viewer.layers.events.removed.connect(self.reset)
        viewer.layers.selection.events.active.connect(self._follow_active)

    @property
    def layer(self) -> Image | None:
        """The chosen image layer."""
        layer: Image | None = self._list.currentData()
        return layer

    @property
    def pending(self) -> str:
        """Why nothing can be done with the chosen layer for a moment, or ""."""
        layer = self.layer
        return READING if layer is not None and is_being_read(layer) else ""

    @property
    def axes(self) -> str:
        """One letter for each axis of the chosen layer, as the user corrected it."""
        return self._axes.text().strip().upper()

    def axes_of(self, layer: Image) -> str:
        """Return the axes of any image layer, as far as the user corrected them."""
        return self._axes_by_layer.get(layer) or _layers.guess_axes(layer)

    @property
    def channels(self) -> tuple[object, ...]:
        """What was chosen for the model's channels; empty if there is no choice."""
        return self._channels.chosen

    def choose(self, layer: Any) -> None:
        """Choose an image, as the user does; ignore what is none."""
        for index in range(self._list.count()):
            if self._list.itemData(index) is layer:
                self._list.setCurrentIndex(index)

    def engine_input(self) -> tuple[Any, str, list[int] | None]:
        """Return image, axes and channels for the engine; raise `BadInput`."""
        layer = self.layer
        if self.pending:
            raise BadInput(self.pending)
        if layer is not None and layer.rgb != ("S" in self.axes):
            raise BadInput(
                "The layer is RGB: its last axis is S, for example YXS."
                if layer.rgb
                else "Only an RGB layer has an axis S; use C for channels."
            )
        return resolve(_layers.image_array(layer), self.axes, self.channels)

    def input_of(self, layer: Image, model: Model | None) -> tuple[Any, str]:
        """Return the pixels of any image that a model gets, and their axes.

        Without a model these are all.
        """
        axes = self.axes_of(layer)
        chosen = self._channels.chosen_for(layer, axes, model)
        image, axes, numbers = resolve(_layers.image_array(layer), axes, chosen)
        return take_channels(image, axes, numbers) if numbers else (image, axes)

    def check(self, model: Model) -> None:
        """Raise `BadInput` in words if the image does not fit the model."""
        image, axes, channels = self.engine_input()
        open_source(image, model, axes, channels)

    def offer_channels(self, model: Model | None) -> None:
        """Show the channel rows that the model needs."""
        self._channels.update(self._viewer, self.layer, self.axes, model)

    @while_alive
    def reset(self, event: object = None) -> None:
        """List the image layers again."""
        before = self.layer
        listed = [self._list.itemData(i) for i in range(self._list.count())]
        layers = _layers.image_layers(self._viewer)
        active = self._viewer.layers.selection.active
        is_new = active in layers and active not in listed
        wanted = before if before in layers and not is_new else active
        with signals_blocked(self._list):
            self._list.clear()
            for layer in layers:
                self._list.addItem(layer.name, layer)
                # napari keeps one callback, however often it is connected.
                layer.events.name.connect(self._on_renamed)
                if not _layers.is_described(layer):
                    read_file_facts(layer, self._on_read)
            first = min(len(layers), 1) - 1
            self._list.setCurrentIndex(
                layers.index(wanted) if wanted in layers else first
            )
        self._on_choice()

    @while_alive
    def _follow_active(self, event: object = None) -> None:
        self.choose(self._viewer.layers.selection.active)

    @while_alive
    def _on_renamed(self, event: object = None) -> None:
        for index in range(self._list.count()):
            self._list.setItemText(index, self._list.itemData(index).name)

    @while_alive
    def _on_read(self, layer: Image) -> None:
        if layer is self.layer:
            self._on_choice()

    @while_alive
    def _on_choice(self) -> None:
        layer = self.layer
        self._axes.setText("" if layer is None else self.axes_of(layer))
        self._say_if_guessed()
        self._on_change()

    def _on_axes(self, text: str) -> None:
        if self.layer is not None:
            self._axes_by_layer[self.layer] = text.strip().upper()
        self._say_if_guessed()
        self._on_change()

    def _say_if_guessed(self) -> None:
        layer = self.layer
        self._guessed.setVisible(
            layer is not None
            and layer.ndim > 2
            and not self.pending
            and layer not in self._axes_by_layer
            and not _layers.known_axes(layer)
        )
