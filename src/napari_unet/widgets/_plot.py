"""Loss and scores while a network learns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyqtgraph as pg
from napari.utils.theme import get_theme
from qtpy.QtCore import QTimer
from qtpy.QtWidgets import QHBoxLayout, QLabel, QSizePolicy, QVBoxLayout, QWidget

from napari_unet.widgets._dock import while_alive

if TYPE_CHECKING:
    from napari.viewer import Viewer

    from napari_unet.training.settings import TrainingStep

# At exit napari and Qt tidy up themselves; a second hand touches what is gone.
pg.setConfigOptions(exitCleanup=False)

_HEIGHT = 110
_REDRAW = 250  # ms: many steps are drawn at once
_SMOOTH = 0.9  # weight of the past in the smoothed loss
_BLUE, _ORANGE, _GREEN = "#4c9be8", "#e8913a", "#3fae6b"


class TrainingPlot(QWidget):
    """Two small plots side by side: the loss, and the scores on the held-out part.

    Parameters
    ----------
    viewer : Viewer
        Its theme is followed.
    """

    def __init__(self, viewer: Viewer):
        super().__init__()
        self._viewer = viewer
        loss = _Axes("Loss", self)
        scores = _Axes("Held-out scores", self)
        self._plots = (loss, scores)
        self._raw = loss.add(_BLUE, faint=True)
        self._smooth = loss.add(_BLUE)
        self._f1 = scores.add(_GREEN, dots=True)
        self._iou = scores.add(_ORANGE, dots=True)
        scores.view.setYRange(0, 1, padding=0.05)
        loss.caption.setText("Loss")
        loss.caption.setToolTip(
            "How wrong the network is on the patches it learns from: it should fall, "
            "with much noise.\nThe thick line is smoothed."
        )
        scores.caption.setText(
            f"Held-out <font color='{_GREEN}'>F1</font> "
            f"<font color='{_ORANGE}'>IoU</font>"
        )
        scores.caption.setToolTip(
            "On annotations that are kept from training. F1: how many objects are "
            "found, and how few are made up.\nIoU: how well the pixels agree. Both "
            "should rise; when they fall for long, stop."
        )
        row = QHBoxLayout(self)
        row.setContentsMargins(0, 0, 0, 0)
        row.setSpacing(4)
        row.addWidget(loss, stretch=1)
        row.addWidget(scores, stretch=1)
        self._timer = QTimer(self)
        self._timer.setSingleShot(True)
        self._timer.setInterval(_REDRAW)
        self._timer.timeout.connect(self._draw)
        viewer.events.theme.connect(self._follow_theme)
        self.clear()
        self._follow_theme()

    def clear(self, steps: int = 100) -> None:
        """Forget the last training; the next has at most so many steps."""
        for plot in self._plots:
            plot.view.setXRange(0, steps, padding=0.02)
        self.losses: list[tuple[int, float, float]] = []  # step, loss, smoothed
        self.scores: list[tuple[int, float, float]] = []  # step, F1, IoU
        self._draw()

    def add(self, step: TrainingStep) -> None:
        """Take what a step says; it is drawn soon."""
        if step.loss is not None:
            smooth = self.losses[-1][2] if self.losses else step.loss
            smooth = _SMOOTH * smooth + (1 - _SMOOTH) * step.loss
            self.losses.append((step.done, step.loss, smooth))
        if step.scores is not None:
            scores = step.scores
            self.scores.append((step.done, scores["F1@0.5"], scores["IoU"]))
        if (step.loss or step.scores) and not self._timer.isActive():
            self._timer.start()

    def _draw(self) -> None:
        for curves, values in (
            ((self._raw, self._smooth), self.losses),
            ((self._f1, self._iou), self.scores),
        ):
            columns = [list(column) for column in zip(*values, strict=True)]
            for number, curve in enumerate(curves, start=1):
                if columns:
                    curve.setData(columns[0], columns[number])
                else:
                    curve.setData([], [])

    @while_alive
    def _follow_theme(self, event: object = None) -> None:
        theme = get_theme(self._viewer.theme)
        for plot in self._plots:
            plot.set_colors(theme.foreground.as_hex(), theme.text.as_hex())


class _Axes(QWidget):
    """A caption over a plot of fixed height that cannot be dragged."""

    def __init__(self, name: str, parent: QWidget):
        super().__init__(parent)
        self.caption = QLabel(name)
        self._canvas = pg.GraphicsLayoutWidget()
        self._canvas.setFixedHeight(_HEIGHT)
        self._canvas.setMinimumWidth(60)
        # Else it wants to be wider than a dock should be.
        self._canvas.setSizePolicy(QSizePolicy.Policy.Ignored, QSizePolicy.Policy.Fixed)
        self._canvas.ci.setContentsMargins(0, 8, 4, 0)
        self._canvas.ci.setSpacing(0)
        # Not a PlotItem: its menus would be windows that nobody closes.
        self.view = self._canvas.ci.addViewBox(
            row=0, col=1, enableMenu=False, enableMouse=False
        )
        self._axes = [pg.AxisItem("left"), pg.AxisItem("bottom")]
        for axis, place in zip(self._axes, ((0, 0), (1, 1)), strict=True):
            axis.linkToView(self.view)
            axis.setStyle(tickLength=4, maxTickLevel=0)
            self._canvas.ci.addItem(axis, *place)
        self._axes[0].setWidth(30)
        self._axes[1].setHeight(24)
        column = QVBoxLayout(self)
        column.setContentsMargins(0, 0, 0, 0)
        column.setSpacing(0)
        column.addWidget(self.caption)
        column.addWidget(self._canvas)

    def add(
        self, color: str, *, faint: bool = False, dots: bool = False
    ) -> pg.PlotDataItem:
        """Add an empty curve."""
        pen = pg.mkPen(color + ("60" if faint else ""), width=1 if faint else 2)
        more: dict[str, Any] = {}
        if dots:
            more = {"symbol": "o", "symbolSize": 5, "symbolBrush": color}
            more["symbolPen"] = None
        curve = pg.PlotDataItem(pen=pen, **more)
        self.view.addItem(curve)
        return curve

    def set_colors(self, background: str, text: str) -> None:
        """Fit into the theme."""
        self._canvas.setBackground(background)
        for axis in self._axes:
            axis.setPen(pg.mkPen(text))
            axis.setTextPen(pg.mkPen(text))
