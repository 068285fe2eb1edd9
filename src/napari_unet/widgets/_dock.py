"""The look that all docks share."""

from __future__ import annotations

import time
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

from magicgui.widgets import CheckBox
from qtpy.compat import isalive
from qtpy.QtCore import QEvent, QObject, Qt, QTimer
from qtpy.QtGui import QIcon, QShowEvent
from qtpy.QtWidgets import (
    QComboBox,
    QDockWidget,
    QFormLayout,
    QFrame,
    QHBoxLayout,
    QLabel,
    QMainWindow,
    QProgressBar,
    QPushButton,
    QScrollArea,
    QSizePolicy,
    QVBoxLayout,
    QWidget,
)
from superqt import QCollapsible

from napari_unet.steps import Progress, describe_seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Method = TypeVar("Method", bound=Callable[..., Any])


def while_alive(method: Method) -> Method:
    """Make a method of a `QObject` do nothing once Qt has deleted the object.

    For callbacks of the viewer and the session, which outlive the docks.
    """

    @wraps(method)
    def guarded(self: QObject, *args: Any) -> Any:
        return method(self, *args) if isalive(self) else None

    return guarded  # type: ignore[return-value]


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
        self._is_placed = False

    def showEvent(self, event: QShowEvent | None) -> None:
        """Become a tab of the dock that is there, when it is opened."""
        super().showEvent(event)
        if not self._is_placed:
            self._is_placed = True
            QTimer.singleShot(0, self._join_others)

    @while_alive
    def _join_others(self) -> None:
        """Lie on our other docks: below them, the button of neither is to be seen."""
        window, mine = self.window(), self.parent()
        if not (isinstance(window, QMainWindow) and isinstance(mine, QDockWidget)):
            return
        area = window.dockWidgetArea(mine)
        for other in window.findChildren(QDockWidget):
            if (
                other is not mine
                and isinstance(other.widget(), Dock)
                and other.isVisible()
                and not other.isFloating()
                and window.dockWidgetArea(other) == area
            ):
                window.tabifyDockWidget(other, mine)
                mine.show()
                mine.raise_()
                return

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


def narrow(chooser: QComboBox) -> QComboBox:
    """Let a list be narrower than its entries; long names show as tooltips."""
    chooser.setSizeAdjustPolicy(
        QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon
    )
    chooser.setMinimumContentsLength(8)
    chooser.setSizePolicy(QSizePolicy.Policy.Ignored, QSizePolicy.Policy.Fixed)
    chooser.currentTextChanged.connect(chooser.setToolTip)
    return chooser


class TextLabel(QLabel):
    """Keeps the height of some lines, so that nothing jumps."""

    def __init__(self, lines: int = 1):
        super().__init__()
        self._lines = lines
        self.setWordWrap(True)
        self.setAlignment(Qt.AlignmentFlag.AlignTop | Qt.AlignmentFlag.AlignLeft)
        self.setSizePolicy(QSizePolicy.Policy.Ignored, QSizePolicy.Policy.Minimum)
        self.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)

    def changeEvent(self, event: QEvent | None) -> None:
        """Make room for the lines in the font of napari's theme."""
        super().changeEvent(event)
        if event is not None and event.type() == QEvent.Type.FontChange:
            text = self.text()
            self.setText("\n".join("x" * self._lines))
            self.setMinimumHeight(self.heightForWidth(self.maximumWidth()))
            self.setText(text)


class Fold(QCollapsible):
    """Closed at first.

    Its arrow is a letter, which has the colour of the theme; superqt draws a black one.
    """

    def __init__(self, title: str):
        super().__init__(title, expandedIcon=QIcon(), collapsedIcon=QIcon())
        self._title = title
        self.toggled.connect(self._show_arrow)
        self._show_arrow(False)

    def _show_arrow(self, is_open: bool) -> None:
        self.setText(f"{'▾' if is_open else '▸'} {self._title}")


def make_fold(fields: Iterable[Any]) -> Fold:
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
    fold = Fold("More")
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
        self.status = TextLabel(lines=2)
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
            clock = f"0:{int(seconds):02d}"  # without fractions
            left = f" · {describe_seconds(seconds) if seconds >= 60 else clock} left"
        self.status.setText(f"{step.message}{left}")

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started
