"""The Fine-tune dock: paint, box what is right, click Train."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from napari.utils.notifications import show_error, show_info
from qtpy.QtCore import QTimer
from qtpy.QtWidgets import QLineEdit

from napari_unet.errors import UnetError
from napari_unet.files.atomic import sweep
from napari_unet.models.library import library_dir
from napari_unet.widgets import _live, _pairs, _session
from napari_unet.widgets._annotations import AnnotationPanel
from napari_unet.widgets._dock import Dock, JobRow, text_label, while_alive
from napari_unet.widgets._model_chooser import ModelChooser
from napari_unet.widgets._options import TrainingOptions
from napari_unet.widgets._outcome import Outcome
from napari_unet.widgets._training import (
    LiveTraining,
    free_name,
    name_problem,
    new_network,
)
from napari_unet.widgets._weights import WeightMap
from napari_unet.widgets._worker import FollowUp, start_worker

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    import napari.viewer
    from napari.qt.threading import GeneratorWorker

    from napari_unet.models.model import Model
    from napari_unet.steps import Progress
    from napari_unet.widgets._training import LiveStep

NAME = "Fine-tune"
SURVEY_DELAY = 400  # ms after the last change
LOOK_INTERVAL = 300  # ms between two looks at what the user looks at


class FineTuneWidget(Dock):
    """Make a model better with what is painted in the viewer.

    Parameters
    ----------
    viewer : napari.viewer.Viewer
        Its layers are learnt from.
    session : Session, optional
        The model shared with the other docks.
    """

    def __init__(
        self,
        viewer: napari.viewer.Viewer,
        session: _session.Session = _session.session,
    ):
        super().__init__()
        self._viewer = viewer
        self._session = session
        self._worker: GeneratorWorker | None = None
        self._training = ""  # name of the model that is made, or was last
        self._new: Model | None = None
        self._notes: list[str] = []
        self._survey: _pairs.Survey | None = None
        self._surveyed: list[_pairs.Pair] = []
        self._built = False
        self._follow_ups()
        self._build(_session.recall(NAME))
        self._built = True
        session.events.model.connect(self._on_model)
        self._propose_name()
        self.reset_choices()
        self._chooser.begin()

    # --- building ---------------------------------------------------------

    def _follow_ups(self) -> None:
        self._survey_later = FollowUp(
            self, SURVEY_DELAY, self._survey_steps, self._on_survey, self._on_doubt
        )
        self._look_timer = QTimer(self)
        self._look_timer.setInterval(LOOK_INTERVAL)
        self._look_timer.timeout.connect(self._look)
        # A viewer in a program that goes on does not end the workers itself.
        running: list[GeneratorWorker] = []
        self._running = running
        self.destroyed.connect(partial(_quit_all, running))

    def _build(self, remembered: dict[str, Any]) -> None:
        form = self.add_form()
        wanted = str(remembered.get("model", "nuclei"))
        self._chooser = ModelChooser(
            self._session, wanted, self._on_base, offer_new=True
        )
        form.addRow("Start from", self._chooser)
        self._name = QLineEdit()
        self._name.setToolTip(
            "Of the new model in the library. The one you start from is never changed."
        )
        self._name.textEdited.connect(lambda _: self._refresh())
        form.addRow("Name", self._name)
        self._annotations = AnnotationPanel(
            self._viewer,
            str(remembered.get("unpainted", "background")),
            self._on_change,
            lambda words: self._job.status.setText(words),
        )
        self._previews = _live.Previews(self._viewer, self._annotations.image)
        self.column.addWidget(self._annotations)
        self._problems = text_label(lines=2)
        self.column.addWidget(self._problems)
        self._job = JobRow("Train", self._train, self._cancel, self._toggle_pause)
        self.column.addWidget(self._job)
        self._outcome = Outcome(self._viewer, self._use_new, self._keep_old)
        self.column.addWidget(self._outcome)
        self._options = TrainingOptions(
            dict(remembered.get("options", {})), self._on_change
        )
        self._weights = WeightMap(
            self._viewer,
            self._annotations,
            self._options,
            lambda: self._base_ndim,
            self._on_doubt,
        )
        self._options.show_weights.toggled.connect(lambda _: self._look_timer_needed())
        self.column.addWidget(self._options)
        self.column.addStretch(1)

    # --- what fits ----------------------------------------------------------------

    def reset_choices(self, event: object = None) -> None:
        """List the image layers again; napari calls it too."""
        self._annotations.image.reset()

    @property
    def _base_ndim(self) -> int:
        model = self._session.model
        return self._chooser.new_ndim or (model.ndim if model is not None else 2)

    def _meaning(self) -> _pairs.Meaning:
        return _pairs.Meaning(
            self._annotations.unpainted, self._options.labels_are.value
        )

    def _on_base(self) -> None:
        if self._built:
            self._propose_name()
            self._refresh()
            self._weights.request()

    @while_alive
    def _on_model(self, model: Model) -> None:
        self._on_base()

    def _propose_name(self) -> None:
        if self._name.isModified():
            return
        model, source = self._session.model, self._session.source
        base = Path(source).stem or (model.passport.name if model is not None else "")
        self._name.setText(free_name("new" if self._chooser.new_ndim else base))

    def _on_change(self) -> None:
        """Something was painted, drawn or chosen."""
        if self._built:
            self._survey_later.request()
            self._weights.request()
            self._refresh()

    def _survey_steps(self) -> Generator[Progress, None, _pairs.Survey]:
        meaning = self._meaning()
        self._surveyed = self._annotations.pairs.all()
        return _pairs.survey_steps(
            [self._annotations.read(p, meaning, copy=False) for p in self._surveyed]
        )

    def _on_survey(self, survey: _pairs.Survey) -> None:
        self._survey = survey
        meaning = self._meaning()
        self._annotations.show_counts(self._surveyed, survey.counts, meaning)
        self._refresh()

    def _on_doubt(self, message: str) -> None:
        self._problems.setText(f"⚠ {message}")

    def _problem(self) -> str:
        """Say why Train cannot be clicked now, "" if it can."""
        if self._annotations.image.layer is None:
            return "There is no image layer. Open an image, or File › Open Sample."
        if self._chooser.loading:
            return "The model is being loaded."
        if self._session.model is None and not self._chooser.new_ndim:
            return "No model is loaded. Choose one."
        if not self._annotations.pairs.all():
            return (
                "Nothing is annotated: start from the segmentation, or choose a layer "
                "that you have painted."
            )
        if self._survey is not None and self._survey.problems:
            return " ".join(self._survey.problems)
        if self._new is None and self._worker is None:
            return name_problem(self._name.text().strip())
        return ""

    def _refresh(self) -> None:
        """Show what can be done."""
        problem, running = self._problem(), self._worker is not None
        self._problems.setText(f"⚠ {problem}" if problem and not running else "")
        self._job.start.setEnabled(not running and not problem)
        self._job.start.setToolTip(
            "A training is under way, or just ending."
            if running
            else problem or "Learn from everything that is annotated above."
        )

    # --- training -----------------------------------------------------------------

    def _train(self) -> None:
        if self._worker is not None or self._problem():
            return
        if self._new is not None:
            self._keep_old()
        name = self._name.text().strip()
        if problem := name_problem(name):
            show_error(problem)
            return
        meaning, panel = self._meaning(), self._annotations
        pairs = panel.pairs.all()
        try:
            annotations = [panel.read(pair, meaning, copy=True) for pair in pairs]
            settings = self._options.settings()
        except (UnetError, ValueError) as error:
            show_error(str(error))
            return
        self._remember()
        self._training = name
        view = self._previews.begin([pair.image for pair in pairs], self._base_ndim)
        self._notes = []
        self._outcome.clear(settings.steps)
        self._job.set_running(True)
        self._job.status.setText("Copying the annotations …")
        steps = LiveTraining(self._make_base(), annotations, settings, name, view)
        self._worker = start_worker(
            steps,
            title="Training",
            on_progress=self._on_step,
            on_result=self._on_result,
            on_error=self._on_error,
            on_finished=self._on_finished,
        )
        self._running.append(self._worker)
        self._worker.paused.connect(self._on_paused)
        self._look_timer.start()
        self._refresh()

    def _make_base(self) -> Callable[[], Model]:
        model, ndim = self._session.model, self._chooser.new_ndim
        if ndim:
            return partial(new_network, ndim)
        assert model is not None
        return lambda: model

    def _toggle_pause(self) -> None:
        if self._worker is None:
            return
        if self._worker.is_paused:
            self._worker.resume()
            self._job.set_paused(False)
        else:
            self._worker.pause()
            self._job.pause.setEnabled(False)  # until it has paused

    @while_alive
    def _on_paused(self) -> None:
        if self._worker is not None and not self._worker.abort_requested:
            self._job.set_paused(True)
            self._job.pause.setEnabled(True)
            self._job.status.setText("Paused. The memory stays in use.")

    def _cancel(self) -> None:
        if self._worker is not None:
            self._worker.quit()
            # The child's end may take a second or two; Train waits for it.
            self._job.set_running(False)
            self._job.status.setText("Cancelled. The model is as it was.")

    @while_alive
    def _on_step(self, step: LiveStep) -> None:
        worker = self._worker
        if worker is None or worker.abort_requested:
            return
        if step.note:
            self._notes.append(step.note)
            show_info(step.note)
        self._outcome.add(step)
        if step.scores is not None and step.done == 0:
            self._job.restart_clock()  # it took long, and comes but once
        if step.preview is not None and step.view is not None:
            self._previews.show(step.view, step.preview)
        if not worker.is_paused:
            self._job.show_progress(step)

    @while_alive
    def _on_result(self, model: Model) -> None:
        self._new = model
        self._outcome.offer(model)
        minutes, seconds = divmod(int(self._job.seconds), 60)
        words = (
            f"Done in {minutes}:{seconds:02d}. {self._training!r} is in the library."
        )
        self._job.status.setText(" ".join([words, *self._notes]))

    @while_alive
    def _on_error(self, message: str) -> None:
        self._job.status.setText(message)

    @while_alive
    def _on_finished(self) -> None:
        self._worker = None
        self._running.clear()
        self._look_timer_needed()
        self._job.set_running(False)
        sweep(library_dir())  # of a child that was killed while it wrote
        self._refresh()

    def _use_new(self) -> None:
        model = self._new
        if model is None:
            return
        self._new = None
        self._outcome.offer(None)
        self._name.setModified(False)
        self._session.source = self._training
        self._session.model = model
        self._previews.clear()
        self._job.status.setText(f"{self._training!r} is used now, also in Segment.")

    def _keep_old(self) -> None:
        if self._new is None:
            return
        self._new = None
        self._outcome.offer(None)
        self._name.setModified(False)
        self._propose_name()
        self._previews.clear()
        self._job.status.setText(
            f"The old model stays. {self._training!r} is in the library if you need it."
        )
        self._refresh()

    # --- what the user looks at -----------------------------------------------------

    def _look_timer_needed(self) -> None:
        if self._worker is not None or self._weights.is_on:
            self._look_timer.start()
        else:
            self._look_timer.stop()

    def _look(self) -> None:
        """Follow the sliders and the chosen image."""
        if self._worker is not None:
            view = self._previews.next_view()
            if view is not None:
                self._worker.send(view)
        self._weights.look()

    # --- memory ---------------------------------------------------------------------

    def _remember(self) -> None:
        _session.remember(
            NAME,
            {
                "model": self._chooser.chosen,
                "unpainted": self._annotations.unpainted,
                "options": self._options.values(),
            },
        )


def _quit_all(workers: list[GeneratorWorker]) -> None:
    for worker in workers:
        worker.quit()
