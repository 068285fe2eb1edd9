"""What most people never touch: loss and weights, augmentation, schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from magicgui.widgets import CheckBox, ComboBox, FloatSpinBox, SpinBox
from qtpy.QtCore import Qt
from qtpy.QtWidgets import QFormLayout, QLabel, QPushButton, QVBoxLayout, QWidget

from napari_unet.models.model import BorderWeights
from napari_unet.training.settings import (
    W0_SIGMA,
    AugmentationSettings,
    TrainingSettings,
)
from napari_unet.widgets._dock import Fold
from napari_unet.widgets._running import choose_device

if TYPE_CHECKING:
    from collections.abc import Callable

_GRAY = {"gain": 1.0, "offset": 0.0, "gamma": 1.0, "noise": 0.0, "blur": 0.0}


class TrainingOptions(QWidget):
    """Three closed folds.

    Parameters
    ----------
    remembered : dict
        From `values`.
    on_change : callable
        Called when the meaning of labels or the weights change.
    """

    def __init__(self, remembered: dict[str, Any], on_change: Callable[[], None]):
        super().__init__()
        self._on_change = on_change
        self.show_weights = QPushButton("Show weight map")
        self.show_weights.setCheckable(True)
        self.show_weights.setToolTip(
            "Show as a layer how much each pixel counts; it follows your painting.\n"
            "Bright seams between neighbours are what the network learns to keep open; "
            "black is unknown."
        )
        column = QVBoxLayout(self)
        column.setContentsMargins(0, 0, 0, 0)
        column.setSpacing(2)
        folds = {
            "Loss and weights": self._loss_widgets(),
            "Augmentation": self._augmentation_widgets(),
            "Schedule": self._schedule_widgets(),
        }
        for title, widgets in folds.items():
            fold = Fold(title)
            fold.addWidget(_rows(widgets))
            if title == "Loss and weights":
                fold.addWidget(self.show_weights)
            column.addWidget(fold)
        self._restore(remembered)
        self.preset.changed.connect(self._on_preset)
        for widget in (self.preset, self.w0, self.sigma, self.labels_are):
            widget.changed.connect(lambda _: self._on_change())
        self._enable()

    def _loss_widgets(self) -> list[Any]:
        self.labels_are = ComboBox(
            choices=["objects", "classes"],
            label="Labels are",
            tooltip="objects: every number is one object, all of one kind.\nclasses: "
            "every number is one kind of object or tissue.",
        )
        self.preset = ComboBox(
            choices=[
                ("paper (2015)", "paper"),
                ("Falk (2019)", "falk"),
                ("all pixels alike", "none"),
            ],
            label="Weights",
            tooltip="How much more the seams between neighbouring objects count.\n"
            "Try Falk if objects still merge; all alike for classes or single objects.",
        )
        self.w0 = FloatSpinBox(
            value=10,
            min=0,
            max=1000,
            label="w0",
            tooltip="Weight of a seam; an ordinary pixel has about 1. Higher separates "
            "more, and may cut objects in two.",
        )
        self.sigma = FloatSpinBox(
            value=5,
            min=0.5,
            max=100,
            step=0.5,
            label="sigma",
            tooltip="How wide a gap still counts as a seam, in pixels. Raise it for "
            "large objects that lie further apart.",
        )
        self.loss = ComboBox(
            choices=[
                ("cross-entropy", "cross_entropy"),
                ("cross-entropy + Dice", "cross_entropy+dice"),
            ],
            label="Loss",
            tooltip="Add Dice if objects are few and small in much background.",
        )
        return [self.labels_are, self.preset, self.w0, self.sigma, self.loss]

    def _augmentation_widgets(self) -> list[Any]:
        usual = AugmentationSettings()
        self.flips = CheckBox(
            value=usual.flips,
            text="Flips and quarter turns",
            tooltip="Off if up and down matter, as in tissue with a fixed orientation.",
        )
        self.rotation = FloatSpinBox(
            value=usual.rotation,
            max=180,
            label="Rotation (°)",
            tooltip="Largest turn either way. 0 if the direction matters.",
        )
        self.scale = FloatSpinBox(
            value=usual.scale,
            min=1,
            max=4,
            step=0.05,
            label="Scale (×)",
            tooltip="Largest enlargement, and its inverse. Raise it if objects of "
            "other images are larger or smaller; 1 is off.",
        )
        self.elastic = FloatSpinBox(
            value=usual.elastic_sigma,
            max=100,
            label="Elastic (pixels)",
            tooltip="How far patches are bent, as in the U-Net paper. Less for stiff "
            "shapes; 0 is off.",
        )
        self.gray = CheckBox(
            value=True,
            text="Brightness, contrast, noise, blur",
            tooltip="Makes the model bear other exposures. Off if grey values are "
            "calibrated and carry meaning.",
        )
        return [self.flips, self.rotation, self.scale, self.elastic, self.gray]

    def _schedule_widgets(self) -> list[Any]:
        self.steps = SpinBox(
            value=500,
            min=1,
            max=1_000_000,
            step=100,
            label="Steps",
            tooltip="It stops earlier if the scores rise no more. 200 to 500 correct a "
            "model, a new network needs thousands.",
        )
        self.every = SpinBox(
            value=50,
            min=1,
            max=100_000,
            step=10,
            label="Look every",
            tooltip="Steps between two scores on the held-out part and two previews. "
            "Looking often shows more and takes longer.",
        )
        self.rate = FloatSpinBox(
            value=0,
            min=0,
            max=1,
            step=0.0001,
            label="Learning rate",
            tooltip="0 chooses. Lower it if the loss jumps or the training is stopped; "
            "raise it if nothing changes.",
        )
        self.rate.native.setDecimals(6)
        self.method = ComboBox(
            choices=[("AdamW", "default"), ("SGD, as the paper", "paper")],
            label="Optimiser",
            tooltip="SGD with large patches repeats the 2015 paper; it is slower.",
        )
        self.freeze = CheckBox(
            text="Keep the encoder",
            tooltip="Train only the second half of the network: faster, and safer with "
            "very few annotations. Not for a new network.",
        )
        self.device = choose_device()
        return [
            self.steps,
            self.every,
            self.rate,
            self.method,
            self.freeze,
            self.device,
        ]

    # --- values -----------------------------------------------------------------

    def values(self) -> dict[str, Any]:
        """Return what is chosen, JSON-able."""
        return {name: widget.value for name, widget in self._named().items()}

    def border_weights(self) -> BorderWeights | None:
        """Return the parameters of the weight map; None if all pixels count alike."""
        preset: Literal["paper", "falk", "none"] = self.preset.value
        if preset == "none":
            return None
        return BorderWeights(preset=preset, w0=self.w0.value, sigma=self.sigma.value)

    def settings(self) -> TrainingSettings:
        """Return what a training is told."""
        return TrainingSettings(
            steps=self.steps.value,
            validate_every=min(self.every.value, self.steps.value),
            learning_rate=self.rate.value or None,
            preset=self.method.value,
            loss=self.loss.value,
            border_weights=self.border_weights(),
            augmentation=AugmentationSettings(
                flips=self.flips.value,
                rotation=self.rotation.value,
                scale=self.scale.value,
                elastic_sigma=self.elastic.value,
                **({} if self.gray.value else _GRAY),
            ),
            freeze_encoder=self.freeze.value,
            device=self.device.value,
        )

    def show_settings(self, settings: TrainingSettings) -> None:
        """Choose what a training was told, as far as it can be chosen here."""
        border, vary = settings.border_weights, settings.augmentation
        shown = {
            "preset": "none" if border is None else border.preset,
            "loss": settings.loss,
            "flips": vary.flips,
            "rotation": vary.rotation,
            "scale": vary.scale,
            "elastic": vary.elastic_sigma,
            "gray": any(getattr(vary, name) != off for name, off in _GRAY.items()),
            "steps": settings.steps,
            "every": settings.validate_every,
            "rate": settings.learning_rate or 0,
            "method": settings.preset,
            "freeze": settings.freeze_encoder,
            "device": settings.device,
        }
        self._restore(shown)
        if border is not None:  # after the preset, which has its own
            self._restore({"w0": border.w0, "sigma": border.sigma})

    def _named(self) -> dict[str, Any]:
        names = (
            "labels_are preset w0 sigma loss flips rotation scale elastic gray steps "
            "every rate method freeze device"
        )
        return {name: getattr(self, name) for name in names.split()}

    def _restore(self, remembered: dict[str, Any]) -> None:
        for name, widget in self._named().items():
            if name not in remembered:
                continue
            try:
                widget.value = remembered[name]
            except (ValueError, TypeError):
                continue  # of another version, or edited by hand

    def _on_preset(self, preset: str) -> None:
        if preset in W0_SIGMA:
            self.w0.value, self.sigma.value = W0_SIGMA[preset]
        self._enable()

    def _enable(self) -> None:
        for widget in (self.w0, self.sigma):
            widget.enabled = self.preset.value != "none"


def _rows(widgets: list[Any]) -> QWidget:
    """Lay widgets out with their labels on the left, all fields of one width."""
    page = QWidget()
    form = QFormLayout(page)
    form.setContentsMargins(0, 0, 0, 0)
    form.setSpacing(6)
    form.setFieldGrowthPolicy(QFormLayout.FieldGrowthPolicy.AllNonFixedFieldsGrow)
    form.setLabelAlignment(Qt.AlignmentFlag.AlignLeft | Qt.AlignmentFlag.AlignVCenter)
    for widget in widgets:
        if isinstance(widget, CheckBox):
            form.addRow(widget.native)
        else:
            label = QLabel(widget.label)
            label.setToolTip(widget.tooltip)
            form.addRow(label, widget.native)
    return page
