"""The Fine-tune dock: paint, box what is right, click Train."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from napari.utils.notifications import show_error
from qtpy.QtWidgets import QLineEdit

from napari_unet.errors import UnetError
from napari_unet.models.library import name_problem
from napari_unet.widgets import _pairs, _session
from napari_unet.widgets._annotations import AnnotationPanel
from napari_unet.widgets._autosave import Choices, Contents
from napari_unet.widgets._dock import Dock, TextLabel, while_alive
from napari_unet.widgets._engine import load_engine
from napari_unet.widgets._learning import Learning, Plan
from napari_unet.widgets._model_chooser import ModelChooser
from napari_unet.widgets._options import TrainingOptions
from napari_unet.widgets._project import ProjectPanel
from napari_unet.widgets._survey import Surveyor
from napari_unet.widgets._training import (
    Begin,
    free_name,
    taken_names,
)
from napari_unet.widgets._weights import WeightMap

if TYPE_CHECKING:
    import napari.viewer
    from napari.layers import Image

    from napari_unet.models.model import Model
    from napari_unet.training.annotations import Annotation
    from napari_unet.training.project import Project

NAME = "Fine-tune"
_COPIED_AT_ONCE = 1 << 26  # bytes of labels, in some milliseconds


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
        self._choices: tuple[Choices, _pairs.Meaning] | None = None
        self._built = False
        self._build(_session.recall(NAME))
        self._built = True
        session.events.model.connect(self._on_model)
        self._propose_name()
        self.reset_choices()
        self._learning.stopped.look()
        self._chooser.begin()

    # --- building ---------------------------------------------------------

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
            lambda: self._project.changed(),
            self._say,
        )
        self.column.addWidget(self._annotations)
        self._survey = Surveyor(
            self._annotations, self._meaning, lambda: self._base_ndim, self._refresh
        )
        self._project = ProjectPanel(
            self._viewer,
            self._annotations.pairs,
            self._contents,
            self._show_project,
            self._say,
        )
        self.column.addWidget(self._project)
        self._problems = TextLabel(lines=3)
        self.column.addWidget(self._problems)
        self._learning = Learning(
            self._viewer,
            self._session,
            self._annotations.image,
            self._plan,
            self._refresh,
            self._on_settled,
        )
        self.column.addWidget(self._learning)
        self._options = TrainingOptions(
            dict(remembered.get("options", {})), self._on_options
        )
        self._weights = WeightMap(
            self._viewer,
            self._annotations,
            self._options,
            lambda: self._base_ndim,
            lambda message: self._problems.setText(f"⚠ {message}"),
        )
        self.column.addWidget(self._options)
        self.column.addStretch(1)

    # --- what fits ----------------------------------------------------------------

    def reset_choices(self, event: object = None) -> None:
        """List the image layers again; napari calls it too."""
        self._annotations.image.reset()

    @property
    def _base_ndim(self) -> Literal[2, 3]:
        model = self._session.model
        ndim = self._chooser.new_ndim or (model.ndim if model is not None else 2)
        return 3 if ndim == 3 else 2

    @property
    def _base(self) -> Model | None:
        """The model to start from, None for a new network."""
        return None if self._chooser.new_ndim else self._session.model

    def _meaning(self) -> _pairs.Meaning:
        return _pairs.Meaning(
            self._annotations.unpainted, self._options.labels_are.value
        )

    def _on_base(self) -> None:
        if self._built:
            self._propose_name()
            self._on_change()

    @while_alive
    def _on_model(self, model: Model) -> None:
        load_engine(self, "training.project", "training.fine_tune")
        self._on_base()

    def _propose_name(self) -> None:
        if self._name.isModified():
            return
        model, source = self._session.model, self._session.source
        if model is None:
            source = self._chooser.chosen  # which is being loaded
        base = Path(source).stem or (model.passport.name if model is not None else "")
        self._name.setText(free_name("new" if self._chooser.new_ndim else base))

    def _on_options(self) -> None:
        if self._built:
            self._project.changed()
            self._on_change()

    def _on_change(self) -> None:
        """Something was painted, drawn or chosen."""
        if self._built:
            self._survey.later.request()
            self._weights.request()
            self._refresh()

    def _say(self, words: str) -> None:
        self._learning.say(words)

    def _problem(self) -> str:
        """Say why Train cannot be clicked now, "" if it can."""
        if self._annotations.image.layer is None:
            return "There is no image layer. Open an image, or File › Open Sample."
        if self._annotations.image.pending:
            return self._annotations.image.pending
        if self._chooser.loading:
            return "The model is being loaded."
        if self._session.model is None and not self._chooser.new_ndim:
            return "No model is loaded. Choose one."
        if self._base is not None and self._base.untrainable_reason:
            return self._base.untrainable_reason
        if not self._annotations.pairs.all():
            return (
                "Nothing is annotated: start from the segmentation, or choose a layer "
                "that you have painted."
            )
        if self._survey.problem:
            return self._survey.problem
        if not self._learning.has_result and not self._learning.is_running:
            return name_problem(self._name.text().strip())
        return ""

    def _refresh(self) -> None:
        """Show what can be done."""
        self._annotations.image.offer_channels(self._base)
        self._note_choices()
        self._project.refresh()
        problem, running = self._problem(), self._learning.is_running
        start, stopped = self._learning.job.start, self._learning.stopped
        doubt = "" if running else problem or self._survey.doubt
        is_short = self._annotations.image.pending or self._chooser.loading
        self._problems.setText(doubt if is_short or not doubt else f"⚠ {doubt}")
        start.setEnabled(not running and not problem)
        tip = problem or "Learn from everything that is annotated above."
        if not problem and stopped.name == self._name.text().strip():
            tip += "\nThe training of this name that was stopped is discarded."
        start.setToolTip("A training is under way, or just ending." if running else tip)

    # --- what is saved --------------------------------------------------------------

    def _note_choices(self) -> None:
        """Remember what is chosen: what is saved at the end is read without Qt."""
        try:
            settings = self._options.settings()
        except ValueError:
            return  # as before
        base, name = self._chooser.chosen, self._name.text().strip()
        choices = Choices(settings, base, self._base_ndim, name)
        self._choices = choices, self._meaning()

    def _contents(self) -> Contents | None:
        pairs = self._annotations.pairs.all()
        if not pairs or self._choices is None:
            return None
        choices, meaning = self._choices
        annotations = [self._annotations.read(pair, meaning) for pair in pairs]
        return Contents([pair.image for pair in pairs], annotations, choices)

    def _show_project(self, project: Project) -> list[Image]:
        """Put a project into the viewer and its choices into the dock."""
        images = self._annotations.show_annotations(project.annotations)
        for annotation in project.annotations[:1]:
            self._annotations.choose_unpainted(annotation.unpainted)
            self._options.labels_are.value = annotation.labels_are
        self._options.show_settings(project.settings)
        self._chooser.choose(project.base, project.ndim)
        if project.name and project.name.casefold() not in taken_names():
            self._name.setText(project.name)
        self._refresh()
        return images

    # --- training -----------------------------------------------------------------

    def _plan(self) -> Plan | None:
        """Read everything at a click on Train."""
        name = self._name.text().strip()
        if problem := self._problem() or name_problem(name):
            show_error(problem)
            return None
        meaning, panel = self._meaning(), self._annotations
        pairs = panel.pairs.all()
        try:
            annotations = [panel.read_for(pair, meaning, self._base) for pair in pairs]
            settings = self._options.settings()
        except (UnetError, ValueError) as error:
            show_error(str(error))
            return None
        self._remember()
        ndim = self._base_ndim
        begin = Begin(self._base, ndim, list(map(_frozen, annotations)), settings)
        return Plan(name, begin, [pair.image for pair in pairs], ndim)

    def _on_settled(self) -> None:
        if name_problem(self._name.text().strip()):  # else typed for the next one
            self._name.setModified(False)
        self._propose_name()
        self._refresh()

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


def _frozen(annotation: Annotation) -> Annotation:
    """Copy the labels, so that what counts is what was there at the click.

    Copying huge ones would block the viewer; it is done in the worker, a moment later.
    """
    labels = annotation.labels
    if not isinstance(labels, np.ndarray) or labels.nbytes > _COPIED_AT_ONCE:
        return annotation
    return replace(annotation, labels=labels.copy())
