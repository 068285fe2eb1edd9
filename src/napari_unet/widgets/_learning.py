"""The training: its buttons, what it shows, and the choice at its end."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from napari.utils.notifications import show_info
from qtpy.QtCore import QTimer
from qtpy.QtWidgets import QVBoxLayout, QWidget

from napari_unet.models.library import list_models
from napari_unet.steps import describe_seconds
from napari_unet.widgets._dock import JobRow, while_alive
from napari_unet.widgets._live import Previews
from napari_unet.widgets._outcome import Outcome
from napari_unet.widgets._stopped import StoppedTraining
from napari_unet.widgets._training import LiveTraining
from napari_unet.widgets._worker import start_worker

if TYPE_CHECKING:
    from collections.abc import Callable

    import napari.viewer
    from napari.layers import Image
    from napari.qt.threading import GeneratorWorker

    from napari_unet.models.model import Model
    from napari_unet.training.settings import View
    from napari_unet.widgets._image_chooser import ImageChooser
    from napari_unet.widgets._session import Session
    from napari_unet.widgets._training import Begin, LiveStep, NewModel, Stopped

LOOK_INTERVAL = 300  # ms between two looks at what the user looks at


@dataclass(frozen=True, eq=False)
class Plan:
    """What the user wants to train.

    Parameters
    ----------
    name : str
        Of the new model.
    begin : Begin
        What it starts from.
    images : list of Image
        The layers of the annotations.
    ndim : int
        Axes that the network sees.
    """

    name: str
    begin: Begin
    images: list[Image]
    ndim: int


class Learning(QWidget):
    """Train, Pause, Cancel, Resume; curves and previews; new model or old.

    Parameters
    ----------
    viewer : napari.viewer.Viewer
        Gets the previews.
    session : Session
        Gets the new model, if the user wants it.
    chooser : ImageChooser
        Says which image is looked at.
    plan : callable
        Says at a click on Train what is wanted; None if nothing can be done.
    on_change : callable
        Called when something begins, ends or is chosen.
    on_settled : callable
        Called when the user has chosen between the new model and the old one.
    """

    def __init__(
        self,
        viewer: napari.viewer.Viewer,
        session: Session,
        chooser: ImageChooser,
        plan: Callable[[], Plan | None],
        on_change: Callable[[], None],
        on_settled: Callable[[], None],
    ):
        super().__init__()
        self._session = session
        self._plan = plan
        self._on_change = on_change
        self._on_settled = on_settled
        self._worker: GeneratorWorker | None = None
        self._name = ""  # of the model that is made, or was last
        self._new: Model | None = None
        self._notes: list[str] = []
        self._previews = Previews(viewer, chooser)
        self.job = JobRow("Train", self._train, self._cancel, self._toggle_pause)
        self.stopped = StoppedTraining(self._resume, on_change)
        self.outcome = Outcome(viewer, self._use_new, self._keep_old)
        column = QVBoxLayout(self)
        column.setContentsMargins(0, 0, 0, 0)
        column.setSpacing(6)
        for part in (self.job, self.stopped, self.outcome):
            column.addWidget(part)
        self._look_timer = QTimer(self)
        self._look_timer.setInterval(LOOK_INTERVAL)
        self._look_timer.timeout.connect(self._look)
        # A viewer in a program that goes on does not end the workers itself.
        self._running: list[GeneratorWorker] = []
        self.destroyed.connect(partial(_quit_all, self._running))

    @property
    def is_running(self) -> bool:
        """Whether a training is under way, or just ending."""
        return self._worker is not None

    @property
    def has_result(self) -> bool:
        """Whether the user has still to choose between the new and the old model."""
        return self._new is not None

    def say(self, words: str) -> None:
        """Show a sentence as the status."""
        self.job.status.setText(words)

    # --- begin and end ------------------------------------------------------------

    def _train(self) -> None:
        if self._worker is not None:
            return
        self._keep_old()
        plan = self._plan()
        if plan is not None:
            view = self._previews.begin(plan.images, plan.ndim)
            self._start(plan.name, plan.begin, view, plan.begin.settings.steps)

    def _resume(self, stopped: Stopped) -> None:
        if self._worker is not None:
            return
        self._keep_old()
        if stopped.name != self._name:  # of another session: its layers are not known
            self._previews.begin([], 2)
        view = self._previews.begin_again()
        self._start(stopped.name, None, view, stopped.steps)

    def _start(
        self, name: str, begin: Begin | None, view: View | None, steps: int
    ) -> None:
        self._name = name
        self._notes = []
        self.stopped.offer(None)
        self.outcome.clear(steps)
        self.job.set_running(True)
        self.say("Copying the annotations …" if begin else "Resuming …")
        self._worker = start_worker(
            LiveTraining(name, begin, view),
            title="Training",
            on_progress=self._on_step,
            on_result=self._on_result,
            on_error=self._on_error,
            on_finished=self._on_finished,
        )
        self._running.append(self._worker)
        self._worker.paused.connect(self._on_paused)
        self._look_timer.start()
        self._on_change()

    def _cancel(self) -> None:
        if self._worker is not None:
            self._worker.quit()
            # The child's end may take a second or two; Train waits for it.
            self.job.set_running(False)
            self.say("Cancelled. The model is as it was.")

    @while_alive
    def _on_result(self, new: NewModel) -> None:
        wanted, self._name, self._new = self._name, new.name, new.model
        self.outcome.offer(new.model)
        self._session.library_changed.emit("", self._name)
        took = describe_seconds(self.job.seconds)
        words = [f"Done in {took}. {self._name!r} is in the library."]
        if wanted != self._name:
            words.append(f"Another {wanted!r} has come there meanwhile, and stays.")
        self.say(" ".join([*words, *self._notes]))

    @while_alive
    def _on_error(self, message: str) -> None:
        self.say(message)

    @while_alive
    def _on_finished(self) -> None:
        worker, self._worker = self._worker, None
        is_cancelled = worker is not None and worker.abort_requested
        if is_cancelled and self._name in list_models():
            self.say(f"It was done before Cancel: {self._name!r} is in the library.")
            self._session.library_changed.emit("", self._name)
        self._running.clear()
        self._look_timer.stop()
        self.job.set_running(False)
        self.stopped.look()
        self._on_change()

    # --- while it runs ------------------------------------------------------------

    @while_alive
    def _on_step(self, step: LiveStep) -> None:
        worker = self._worker
        if worker is None or worker.abort_requested:
            return
        if step.note:
            self._notes.append(step.note)
            show_info(step.note)
        self.outcome.add(step)
        if step.scores is not None and step.done == 0:
            self.job.restart_clock()  # it took long, and comes but once
        if step.preview is not None and step.view is not None:
            self._previews.show(step.view, step.preview)
        if not worker.is_paused:
            self.job.show_progress(step)

    def _toggle_pause(self) -> None:
        if self._worker is None:
            return
        if self._worker.is_paused:
            self._worker.resume()
            self.job.set_paused(False)
        else:
            self._worker.pause()
            self.job.pause.setEnabled(False)  # until it has paused

    @while_alive
    def _on_paused(self) -> None:
        if self._worker is not None and not self._worker.abort_requested:
            self.job.set_paused(True)
            self.job.pause.setEnabled(True)
            self.say("Paused. The memory stays in use.")

    def _look(self) -> None:
        """Follow the sliders and the chosen image."""
        view = self._previews.next_view()
        if self._worker is not None and view is not None:
            self._worker.send(view)

    # --- new model or old ---------------------------------------------------------

    def _use_new(self) -> None:
        model = self._new
        if model is not None:
            self._settle(f"{self._name!r} is used now, also in Segment.")
            self._session.source = self._name
            self._session.model = model

    def _keep_old(self) -> None:
        if self._new is not None:
            self._settle(
                f"The old model stays. {self._name!r} is in the library if you need it."
            )

    def _settle(self, words: str) -> None:
        self._new = None
        self.outcome.offer(None)
        self._previews.hide()
        self.say(words)
        self._on_settled()


def _quit_all(workers: list[GeneratorWorker]) -> None:
    for worker in workers:
        worker.quit()
