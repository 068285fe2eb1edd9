"""What a training achieves: its curves, and the choice at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qtpy.QtWidgets import QHBoxLayout, QPushButton, QVBoxLayout, QWidget

from napari_unet.widgets._dock import TextLabel
from napari_unet.widgets._plot import TrainingPlot

if TYPE_CHECKING:
    from collections.abc import Callable

    from napari.viewer import Viewer

    from napari_unet.models.model import Model
    from napari_unet.training.settings import TrainingStep


class Outcome(QWidget):
    """The live plot, the scores of the old and the new model, and two buttons.

    Parameters
    ----------
    viewer : Viewer
        Its theme is followed.
    on_use, on_keep : callable
    """

    def __init__(
        self,
        viewer: Viewer,
        on_use: Callable[[], None],
        on_keep: Callable[[], None],
    ):
        super().__init__()
        self.plot = TrainingPlot(viewer)
        self.held_out = TextLabel()
        self.held_out.setToolTip(
            "Scores on the part of your annotations that is kept from training: 1 is "
            "perfect.\nF1 counts objects that are found and agree by half, IoU "
            "compares pixels."
        )
        self.use = QPushButton("Use new model")
        self.keep = QPushButton("Keep old")
        self.use.clicked.connect(lambda: on_use())
        self.keep.clicked.connect(lambda: on_keep())
        self._old: dict[str, float] | None = None
        self._new: dict[str, float] | None = None
        row = QHBoxLayout()
        row.addWidget(self.use, stretch=1)
        row.addWidget(self.keep, stretch=1)
        column = QVBoxLayout(self)
        column.setContentsMargins(0, 0, 0, 0)
        column.setSpacing(6)
        column.addWidget(self.plot)
        column.addWidget(self.held_out)
        column.addLayout(row)
        self._show()
        self.offer(None)

    def clear(self, steps: int) -> None:
        """Begin a training of so many steps."""
        self.plot.clear(steps)
        self._old = self._new = None
        self._show()

    def add(self, step: TrainingStep) -> None:
        """Take what a step says."""
        self.plot.add(step)
        if step.scores is not None:
            if step.done == 0:
                self._old = step.scores
            elif step.best:
                self._new = step.scores
            self._show()

    def offer(self, model: Model | None) -> None:
        """Let the user choose between the new model and the old one."""
        if model is not None:
            scores = model.passport.history[-1].scores
            # Not what was shown on the way: now all ways to make objects were tried.
            self._old = {name: scores[f"old {name}"] for name in ("F1@0.5", "IoU")}
            self._new = scores
            self._show()
        for button, tip in (
            (self.use, "Segment and the next training go on with the new model."),
            (
                self.keep,
                "Everything stays as it was. The new model remains in the library.",
            ),
        ):
            button.setEnabled(model is not None)
            button.setToolTip(tip if model else "There is no new model: click Train.")

    def _show(self) -> None:
        old, new = self._old, self._new
        text = "Held-out scores appear here."
        if old is not None:
            text = f"Held-out F1: old {old['F1@0.5']:.2f}"
            if new is not None:
                text += f" → new {new['F1@0.5']:.2f}"
                text += f" · IoU: {old['IoU']:.2f} → {new['IoU']:.2f}"
        self.held_out.setText(text)
