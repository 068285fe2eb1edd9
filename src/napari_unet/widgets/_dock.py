"""The look that all docks share."""

from __future__ import annotations

import time
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

from magicgui.widgets import CheckBox
from qtpy.compat import isalive
from qtpy.QtCore import QObject, Qt
from qtpy.QtWidgets import (
    QComboBox,
    QFormLayout,
    QFrame,
    QHBoxLayout,
    QLabel,
    QProgressBar,
    QPushButton,
    QScrollArea,
    QSizePolicy,
    QVBoxLayout,
    QWidget,
)
from superqt import QCollapsible

from napari_unet.steps import Progress  # noqa: TC001 (Qt slots)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Method = TypeVar("Method", bound=Callable[..., Any])


class Dock(QScrollArea):
    """A scrollable column of rows with labels on the left."""

    def __init__(self) -> None:
        super().__init__()
        self.setWidgetResizable(True)
        self.setFrameShape(QFrame.Shape.NoFrame)
        self.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.setMinimumWidth(320)
        body = QWidget()
        self.column = QVBoxLayout(body)
        self.column.setContentsMargins(8, 8, 8, 8)
        self.column.setSpacing(6)
        self.setWidget(body)

    def add_form(self) -> QFormLayout:
        """Append rows with labels on the left, fields filling the width."""
        form = form_rows()
        self.column.addLayout(form)
        return form


def form_rows() -> QFormLayout:
    """Make rows with labels on the left, fields filling the width."""
    form = QFormLayout()
    form.setContentsMargins(0, 0, 0, 0)
    form.setSpacing(6)
    form.setFieldGrowthPolicy(QFormLayout.FieldGrowthPolicy.AllNonFixedFieldsGrow)
    form.setLabelAlignment(Qt.AlignmentFlag.AlignLeft | Qt.AlignmentFlag.AlignVCenter)
    return form


def while_alive(method: Method) -> Method:
    """Make a method of a `QObject` do nothing once Qt has deleted the object.

    For callbacks of the viewer and the session, which outlive the docks.
    """

    @wraps(method)
    def guarded(self: QObject, *args: Any) -> Any:
        return method(self, *args) if isalive(self) else None

    return guarded  # type: ignore[return-value]


def narrow(chooser: QComboBox) -> QComboBox:
    """Let a list be narrower than its entries; long names show as tooltips."""
    chooser.setSizeAdjustPolicy(
        QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon
    )
    chooser.setMinimumContentsLength(8)
    chooser.setSizePolicy(QSizePolicy.Policy.Ignored, QSizePolicy.Policy.Fixed)
    chooser.currentTextChanged.connect(chooser.setToolTip)
    return chooser


def text_label(lines: int = 1) -> QLabel:
    """Make a label that keeps the height of some lines, so that nothing jumps."""
    label = QLabel()
    label.setWordWrap(True)
    label.setAlignment(Qt.AlignmentFlag.AlignTop | Qt.AlignmentFlag.AlignLeft)
    label.setMinimumHeight(lines * label.fontMetrics().lineSpacing() + 2)
    label.setSizePolicy(QSizePolicy.Policy.Ignored, QSizePolicy.Policy.Minimum)
    label.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)
    return label


def make_fold(fields: Iterable[Any]) -> QCollapsible:
    """Put options that most people never touch under a closed fold.

    Parameters
    ----------
    fields : iterable of magicgui widgets
        In rows; check boxes, which say themselves what they are, without a label.
    """
    page = QWidget()
    page.setLayout(form := form_rows())
    for field in fields:
        if isinstance(field, CheckBox):
            form.addRow(field.native)
        else:
            form.addRow(field.label, field.native)
    fold = QCollapsible("More")
    fold.addWidget(page)
    return fold


def heading(text: str) -> QWidget:
    """Make a caption with a line beside it."""
    row = QWidget()
    layout = QHBoxLayout(row)
    layout.setContentsMargins(0, 8, 0, 0)
    caption = QLabel(text)
    line = QFrame()
    line.setFrameShape(QFrame.Shape.HLine)
    line.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
    layout.addWidget(caption)
    layout.addWidget(line)
    return row


class JobRow(QWidget):
    """The one thing to do next, its Cancel, its progress and its status.

    Parameters
    ----------
    text : str
        On the button.
    on_start, on_cancel : callable
    on_pause : callable, optional
        Makes a button between the two.
    """

    def __init__(
        self,
        text: str,
        on_start: Callable[[], None],
        on_cancel: Callable[[], None],
        on_pause: Callable[[], None] | None = None,
    ):
        super().__init__()
        self.start = QPushButton(text)
        self.start.setMinimumHeight(36)
        font = self.start.font()
        font.setBold(True)
        self.start.setFont(font)
        self.cancel = QPushButton("Cancel")
        self.cancel.setMinimumHeight(36)
        self.pause = QPushButton("Pause")
        self.pause.setMinimumHeight(36)
        self.bar = QProgressBar()
        self.bar.setTextVisible(False)
        self.bar.setFixedHeight(8)
        self.status = text_label(lines=2)
        buttons = QHBoxLayout()
        buttons.addWidget(self.start, stretch=3)
        if on_pause is not None:
            # Wide enough for its other text, too.
            width = self.pause.fontMetrics().horizontalAdvance("Resume") + 24
            self.pause.setMinimumWidth(width)
            self.pause.clicked.connect(lambda: on_pause())
            buttons.addWidget(self.pause, stretch=1)
        else:
            self.pause.setParent(self)
            self.pause.hide()
        buttons.addWidget(self.cancel, stretch=1)
        column = QVBoxLayout(self)
        column.setContentsMargins(0, 4, 0, 0)
        column.setSpacing(4)
        column.addLayout(buttons)
        column.addWidget(self.bar)
        column.addWidget(self.status)
        self.start.clicked.connect(lambda: on_start())
        self.cancel.clicked.connect(lambda: on_cancel())
        self._started = 0.0
        self._held = 0.0  # when the clock was stopped
        self.set_running(False)

    def set_running(self, running: bool) -> None:
        """Switch the Cancel button and the bar; the caller the start button."""
        self.cancel.setEnabled(running)
        self.cancel.setToolTip(
            "Stop. What was there before stays." if running else "Nothing is running."
        )
        self.set_paused(False)
        self.pause.setEnabled(running)
        if running:
            self.restart_clock()
        else:
            self.pause.setToolTip("Nothing is running.")
            self.bar.setRange(0, 1)
            self.bar.setValue(0)

    def set_paused(self, paused: bool) -> None:
        """Stop the clock, or let it go on."""
        if self._held and not paused:
            self._started += time.monotonic() - self._held
        self._held = time.monotonic() if paused else 0.0
        self.pause.setText("Resume" if paused else "Pause")
        self.pause.setToolTip(
            "Go on where it stopped."
            if paused
            else "Let the computer rest for a while."
        )

    def restart_clock(self) -> None:
        """Measure the time left from now on."""
        self._started = time.monotonic()

    def show_progress(self, step: Progress) -> None:
        """Move the bar and say how long it will take."""
        self.bar.setRange(0, max(step.total, 1))
        self.bar.setValue(step.done)
        left = ""
        if 0 < step.done < step.total:
            seconds = self.seconds / step.done * (step.total - step.done)
            left = f" · {int(seconds) // 60}:{int(seconds) % 60:02d} left"
        self.status.setText(f"{step.message}{left}")

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started
