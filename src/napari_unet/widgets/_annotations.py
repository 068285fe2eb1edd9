"""The rows that say what is annotated, in which layers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from napari.layers import Labels, Shapes
from qtpy.QtWidgets import (
    QButtonGroup,
    QComboBox,
    QFormLayout,
    QHBoxLayout,
    QPushButton,
    QRadioButton,
    QVBoxLayout,
    QWidget,
)
from superqt.utils import signals_blocked

from napari_unet.widgets import _layers, _pairs
from napari_unet.widgets._dock import TextLabel, heading, narrow, while_alive
from napari_unet.widgets._image_chooser import ImageChooser

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import napari.viewer
    from napari.layers import Image, Layer

    from napari_unet.models.model import Model
    from napari_unet.training.annotations import Annotation

UNPAINTED = {
    "background": "The annotation is complete: what is not painted is background.\n"
    "True where everything was checked; never for a few painted examples.",
    "unknown": "Scribbles: only painted pixels count. Label 1 is background, 2 and "
    "more are objects.\nPaint some of both. Inside regions everything counts anyway.",
}

START_TIP = (
    "Copy what Segment found in this image into a layer to be corrected.\nWithout a "
    "segmentation the layer is empty."
)
ANNOTATED_TIP = (
    "This image has an annotation already. Choose another layer above, or delete it to "
    "start anew."
)
ADD_TIP = (
    "Then drag a box over a part of the image in which every object is right.\nA few "
    "small boxes that are completely right teach more than a large one that is half "
    "right."
)


class AnnotationPanel(QWidget):
    """Which layers annotate which image, and the buttons that make such layers.

    Parameters
    ----------
    viewer : napari.viewer.Viewer
    unpainted : str
        "background" or "unknown", to begin with.
    on_change : callable
        Called whenever something is shown differently, or edited.
    on_edit : callable
        Called before that when something is painted, drawn or paired.
    on_words : callable
        Gets a sentence after a button was clicked.
    """

    def __init__(
        self,
        viewer: napari.viewer.Viewer,
        unpainted: str,
        on_change: Callable[[], None],
        on_edit: Callable[[], None],
        on_words: Callable[[str], None],
    ):
        super().__init__()
        self._viewer = viewer
        self._on_change = on_change
        self._edited = on_edit
        self._on_words = on_words
        self.pairs = _pairs.Pairs(viewer)
        self._ready = False
        self._build(unpainted)
        self._ready = True
        for event in ("inserted", "removed"):
            getattr(viewer.layers.events, event).connect(self._on_layers)
        viewer.layers.selection.events.active.connect(self._follow_active)
        self._update()

    # --- building ---------------------------------------------------------

    def _build(self, unpainted: str) -> None:
        column = QVBoxLayout(self)
        column.setContentsMargins(0, 0, 0, 0)
        column.setSpacing(6)
        column.addWidget(heading("Annotated images"))
        form = QFormLayout()
        form.setContentsMargins(0, 0, 0, 0)
        form.setSpacing(6)
        form.setFieldGrowthPolicy(QFormLayout.FieldGrowthPolicy.AllNonFixedFieldsGrow)
        column.addLayout(form)
        self.image = ImageChooser(self._viewer, form, self._update)
        self._labels = narrow(QComboBox())
        self._labels.setToolTip(
            "The Labels layer in which this image is annotated: one number for each "
            "object.\nTake one of yours, or make one with the button below."
        )
        self._labels.activated.connect(lambda _: self._choose_labels())
        form.addRow("Painted in", self._labels)
        self._regions = narrow(QComboBox())
        self._regions.setToolTip(
            "The Shapes layer whose boxes and polygons say: in here everything is "
            "right, background included.\nOutside nothing is learnt."
        )
        self._regions.activated.connect(lambda _: self._choose_regions())
        form.addRow("Regions", self._regions)
        column.addLayout(self._buttons())
        self.listed = TextLabel(lines=2)
        column.addWidget(self.listed)
        column.addLayout(self._unpainted_row(unpainted))

    def _buttons(self) -> QHBoxLayout:
        self.start = QPushButton("Start from segmentation")
        self.start.clicked.connect(lambda: self._start())
        self.add = QPushButton("Add region")
        self.add.clicked.connect(lambda: self._add_region())
        row = QHBoxLayout()
        row.addWidget(self.start, stretch=3)
        row.addWidget(self.add, stretch=2)
        return row

    def _unpainted_row(self, wanted: str) -> QFormLayout:
        self._unpainted = QButtonGroup(self)
        row = QHBoxLayout()
        for name, tip in UNPAINTED.items():
            button = QRadioButton(name)
            button.setObjectName(name)
            button.setToolTip(tip)
            button.setChecked(name == (wanted if wanted in UNPAINTED else "background"))
            button.toggled.connect(lambda on: self._on_edit() if on else None)
            self._unpainted.addButton(button)
            row.addWidget(button)
        row.addStretch(1)
        form = QFormLayout()
        form.addRow("Unpainted", row)
        return form

    # --- what is there ------------------------------------------------------------

    @property
    def unpainted(self) -> Literal["background", "unknown"]:
        """What the pixels of label 0 are, outside of regions."""
        button = self._unpainted.checkedButton()
        named = button is not None and button.objectName() == "unknown"
        return "unknown" if named else "background"

    def choose_unpainted(self, name: str) -> None:
        """Choose as the user does."""
        for button in self._unpainted.buttons():
            if button.objectName() == name:
                button.setChecked(True)

    def current(self) -> _pairs.Pair | None:
        """Return the annotation of the chosen image."""
        image = self.image.layer
        return next((p for p in self.pairs.all() if p.image is image), None)

    def read(self, pair: _pairs.Pair, meaning: _pairs.Meaning) -> Annotation:
        """Read the layers of a pair."""
        return _pairs.read_pair(pair, self.image.axes_of(pair.image), meaning)

    def read_for(
        self, pair: _pairs.Pair, meaning: _pairs.Meaning, model: Model | None
    ) -> Annotation:
        """Read a pair with the channels that were chosen for a model."""
        pixels, axes = self.image.input_of(pair.image, model)
        return replace(self.read(pair, meaning), image=pixels, axes=axes)

    def show_annotations(self, annotations: Sequence[Annotation]) -> list[Image]:
        """Add the layers of annotations, paired; return those of the images."""
        shown = []
        for annotation in annotations:
            pair = _pairs.show_pair(self._viewer, annotation)
            self.pairs.set_labels(pair.image, pair.labels)
            self.pairs.set_regions(pair.image, pair.regions)
            shown.append(pair.image)
        self._update()
        return shown

    # --- what happens -------------------------------------------------------------

    @while_alive
    def _on_layers(self, event: Any = None) -> None:
        self._update()

    @while_alive
    def _on_edit(self, event: Any = None) -> None:
        self._edited()
        self._on_change()

    @while_alive
    def _on_renamed(self, event: Any = None) -> None:
        self._update()

    @while_alive
    def _follow_active(self, event: Any = None) -> None:
        """Show the image whose annotation is being edited."""
        active = self._viewer.layers.selection.active
        for pair in self.pairs.all():
            if active is not None and active in (pair.labels, pair.regions):
                self.image.choose(pair.image)

    def _update(self) -> None:
        """Offer the layers that fit the chosen image."""
        if not self._ready:
            return
        image = self.image.layer
        fitting = self._fitting(Labels) if image is not None else []
        shapes = self._fitting(Shapes) if image is not None else []
        _offer(self._labels, fitting, self.pairs.labels_of(image))
        _offer(self._regions, shapes, self.pairs.regions_of(image))
        for layer in [*fitting, *shapes]:
            # napari keeps one callback, however often it is connected.
            layer.events.name.connect(self._on_renamed)
        annotated = self.pairs.labels_of(image) is not None
        pending = self.image.pending  # else layers would get the shape of a guess
        self._labels.setEnabled(not pending)
        self._regions.setEnabled(annotated and not pending)
        self.start.setEnabled(image is not None and not annotated and not pending)
        self.start.setToolTip(pending or (ANNOTATED_TIP if annotated else START_TIP))
        self.add.setEnabled(image is not None and not pending)
        self.add.setToolTip(pending or ADD_TIP)
        for pair in self.pairs.all():
            self._listen(pair)
        self._on_change()

    def _listen(self, pair: _pairs.Pair) -> None:
        for name in ("paint", "labels_update", "data"):
            getattr(pair.labels.events, name).connect(self._on_edit)
        if pair.regions is not None:
            pair.regions.events.data.connect(self._on_edit)

    def _fitting(self, kind: type[Layer]) -> list[Any]:
        image = self.image.layer
        assert image is not None
        letters = self.image.axes.replace("S", "")
        pixels = _layers.image_array(image).shape
        shape = [n for n, axis in zip(pixels, letters, strict=False) if axis != "C"]
        return [
            layer
            for layer in reversed(self._viewer.layers)
            if type(layer) is kind
            and not _layers.COMPUTED & layer.metadata.keys()
            and (kind is Shapes or list(layer.data.shape) == shape)
        ]

    def _choose_labels(self) -> None:
        image = self.image.layer
        if image is not None:
            self.pairs.set_labels(image, self._labels.currentData())
            self._update()
            self._edited()

    def _choose_regions(self) -> None:
        image = self.image.layer
        if image is not None:
            self.pairs.set_regions(image, self._regions.currentData())
            self._update()
            self._edited()

    def _start(self) -> Image | None:
        image = self.image.layer
        if image is None:
            return None
        if self.pairs.labels_of(image) is None:
            labels, words = _pairs.make_annotation(
                self._viewer, image, self.image.axes_of(image)
            )
            self.pairs.set_labels(image, labels)
            self._update()
            self._edited()
            self._on_words(words)
        return image

    def _add_region(self) -> None:
        image = self._start()
        if image is None:
            return
        regions = self.pairs.regions_of(image)
        if regions is None:
            space = _layers.label_space(image, self.image.axes_of(image))
            regions = _pairs.make_regions(self._viewer, image.name, space)
            self.pairs.set_regions(image, regions)
            self._update()
        _pairs.draw_rectangles(self._viewer, regions)
        self._on_words("Drag a box on the image around what is completely right.")


def _offer(box: QComboBox, layers: list[Any], chosen: Any) -> None:
    """List layers, and none, without telling anyone."""
    with signals_blocked(box):
        box.clear()
        box.addItem("–", None)
        for layer in layers:
            box.addItem(layer.name, layer)
        box.setCurrentIndex(layers.index(chosen) + 1 if chosen in layers else 0)
