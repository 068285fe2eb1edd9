"""Threshold, size and splitting: what can be changed without the network."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from qtpy.QtWidgets import QCheckBox, QFormLayout, QLabel, QVBoxLayout, QWidget
from superqt import QLabeledDoubleSlider, QLabeledSlider
from superqt.utils import signals_blocked

from napari_unet.widgets._dock import TextLabel, heading

if TYPE_CHECKING:
    from collections.abc import Callable

    from napari_unet.inference.settings import ObjectSettings

LARGEST = 2000  # pixels that the slider reaches, if nobody wants more


class ObjectsPanel(QWidget):
    """How objects are made of probabilities, and how many there are.

    Parameters
    ----------
    on_change : callable
        Called when the user moves something.
    """

    def __init__(self, on_change: Callable[[], None]):
        super().__init__()
        self._threshold = QLabeledDoubleSlider()
        self._threshold.setRange(0.01, 0.99)
        self._threshold.setSingleStep(0.01)  # type: ignore[arg-type]
        self._threshold.setDecimals(2)
        self._threshold.setToolTip(
            "How sure the network must be that a pixel belongs to an object.\nHigher "
            "makes objects smaller and separates them."
        )
        self._smallest = QLabeledSlider()
        self._smallest.setRange(0, LARGEST)
        self._smallest.setToolTip(
            "Smaller objects are left out; in pixels, or voxels in 3D."
        )
        self._smallest_text = QLabel()
        self._split = QCheckBox("Split touching")
        self._split.setToolTip(
            "Cut objects that hang together at a neck. Good for round objects; leave "
            "it off for branched or long ones."
        )
        self.count = TextLabel()
        form = QFormLayout()
        form.setContentsMargins(0, 0, 0, 0)
        form.setFieldGrowthPolicy(QFormLayout.FieldGrowthPolicy.AllNonFixedFieldsGrow)
        form.addRow("Threshold", self._threshold)
        form.addRow("Smallest", self._smallest)
        form.addRow("", self._smallest_text)
        form.addRow("", self._split)
        column = QVBoxLayout(self)
        column.setContentsMargins(0, 0, 0, 0)
        column.addWidget(heading("Objects"))
        column.addLayout(form)
        column.addWidget(self.count)
        self._sliders = (self._threshold, self._smallest, self._split)
        self._sizes: dict[str, float] = {}
        self.setEnabled(False)
        for signal in (
            self._threshold.valueChanged,
            self._smallest.valueChanged,
            self._split.toggled,
        ):
            signal.connect(lambda _: self._describe_smallest())
            signal.connect(lambda _: on_change())

    def values(self) -> dict[str, Any]:
        """Return the keywords of `ObjectSettings` that can be changed here."""
        return {
            "threshold": round(float(self._threshold.value()), 3),
            "minimal_size": int(self._smallest.value()),
            "split_touching": self._split.isChecked(),
        }

    def set_values(
        self, settings: ObjectSettings, mine: dict[str, Any], *, is_loaded: bool = True
    ) -> None:
        """Show what a model recommends, or what the user last chose for it.

        They can be changed once the model is loaded.
        """
        try:
            threshold = float(mine.get("threshold", settings.threshold))
            smallest = int(mine.get("minimal_size", settings.minimal_size))
        except (TypeError, ValueError):  # settings edited by hand
            threshold, smallest = settings.threshold, settings.minimal_size
        with (
            signals_blocked(self._threshold),
            signals_blocked(self._smallest),
            signals_blocked(self._split),
        ):
            self._threshold.setValue(threshold)
            self._smallest.setMaximum(max(LARGEST, smallest))
            self._smallest.setValue(smallest)
            self._split.setChecked(
                bool(mine.get("split_touching", settings.split_touching))
            )
        self._describe_smallest()
        self.setEnabled(is_loaded)

    def set_pixel_size(self, sizes: dict[str, float], ndim: int) -> None:
        """Say also in µm² or µm³ how small the smallest object is."""
        spatial = "ZYX"[-ndim:]
        known = all(axis in sizes for axis in spatial)
        self._sizes = {axis: sizes[axis] for axis in spatial} if known else {}
        self._describe_smallest()

    def _describe_smallest(self) -> None:
        size = self._smallest.value()
        text = f"{size} pixels"
        if self._sizes:
            unit = "µm²" if len(self._sizes) == 2 else "µm³"
            text += f" = {size * math.prod(self._sizes.values()):.3g} {unit}"
        self._smallest_text.setText(text)
