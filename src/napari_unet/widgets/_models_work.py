"""What a dock is doing, how far it is, and how to stop it or take it back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qtpy.QtCore import Qt
from qtpy.QtWidgets import (
    QGridLayout,
    QProgressBar,
    QPushButton,
    QWidget,
)

from napari_unet.widgets._dock import TextLabel, while_alive
from napari_unet.widgets._worker import start_worker

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from napari.qt.threading import GeneratorWorker

    from napari_unet.steps import Progress


class WorkRow(QWidget):
    """A bar, a status in words, and one button: Cancel meanwhile, Undo afterwards.

    Parameters
    ----------
    on_change : callable
        Called when something begins or has ended.
    on_cancelled : callable
        Called before that if it was cancelled, though it may just have been done.
    """

    def __init__(self, on_change: Callable[[], None], on_cancelled: Callable[[], None]):
        super().__init__()
        self._on_change = on_change
        self._on_cancelled = on_cancelled
        self._worker: GeneratorWorker | None = None
        self._undo: Callable[[], None] | None = None
        self._stops = False  # whether what is being done can be cancelled
        self.busy = ""  # what is being done
        self.status = TextLabel(lines=2)
        self.bar = QProgressBar()
        self.bar.setTextVisible(False)
        self.bar.setFixedHeight(8)
        self.button = QPushButton("Undo")
        policy = self.button.sizePolicy()
        policy.setRetainSizeWhenHidden(True)
        self.button.setSizePolicy(policy)
        self.button.setMinimumWidth(
            self.button.fontMetrics().horizontalAdvance("Cancel") + 24
        )
        self.button.clicked.connect(lambda: self._on_button())
        grid = QGridLayout(self)
        grid.setContentsMargins(0, 0, 0, 0)
        grid.setSpacing(4)
        grid.setColumnStretch(0, 1)
        grid.addWidget(self.bar, 0, 0, 1, 2)
        grid.addWidget(self.status, 1, 0)
        grid.addWidget(self.button, 1, 1, alignment=Qt.AlignmentFlag.AlignTop)
        self._end_bar()

    def say(self, words: str, undo: Callable[[], None] | None = None) -> None:
        """Show a sentence, with a way back if there is one."""
        self.status.setText(words)
        self._undo = undo
        self._refresh_button()

    def run(
        self,
        title: str,
        steps: Generator[Progress, None, Any],
        on_result: Callable[[Any], None],
        *,
        stops: bool = False,
    ) -> None:
        """Do something in a thread, unless something is being done.

        Parameters
        ----------
        title : str
            What is done, in words.
        steps : generator
            Does it.
        on_result : callable
            Gets the result when all has ended; may begin something else.
        stops : bool
            Whether it can be cancelled on the way.
        """
        if self.busy:
            steps.close()
            return
        self.busy, self._stops = f"{title} …", stops
        self.bar.setRange(0, 0)  # moves until it is known how much there is
        self.say(self.busy)
        self._on_change()
        results: list[Any] = []
        self._worker = start_worker(
            steps,
            title=title,
            on_progress=self._on_progress,
            on_result=results.append,
            on_error=self._on_error,
            on_finished=lambda: self._end(results, on_result),
        )

    @while_alive
    def _on_progress(self, step: Progress) -> None:
        if self._worker is None or self._worker.abort_requested:
            return
        if step.total > 1:
            self.bar.setRange(0, step.total)
            self.bar.setValue(step.done)
        if step.message:
            self.status.setText(f"{step.message[0].upper()}{step.message[1:]} …")

    @while_alive
    def _on_error(self, message: str) -> None:
        self.say(message)

    @while_alive
    def _end(self, results: list[Any], on_result: Callable[[Any], None]) -> None:
        is_cancelled = self._worker is not None and self._worker.abort_requested
        self.busy, self._worker = "", None
        self._end_bar()
        if is_cancelled:
            self._on_cancelled()
        for result in results:
            on_result(result)
        self._on_change()

    def _end_bar(self) -> None:
        self.bar.setRange(0, 1)
        self.bar.setValue(0)
        self._refresh_button()

    def _on_button(self) -> None:
        if self.busy and self._worker is not None:
            self._worker.quit()
            self.button.setEnabled(False)
            self.status.setText("Cancelled. All is as it was.")
        elif self._undo is not None:
            self._undo()

    def _refresh_button(self) -> None:
        """Offer to stop what is being done, or to take back what was done."""
        self.button.setEnabled(True)
        if self.busy:
            self.button.setText("Cancel")
            self.button.setToolTip("Stop. The library stays as it is.")
            self.button.setVisible(self._stops)
        else:
            self.button.setText("Undo")
            self.button.setToolTip("Take back what was done last.")
            self.button.setVisible(self._undo is not None)
