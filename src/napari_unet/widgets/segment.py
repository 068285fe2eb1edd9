"""The Segment dock: pick a model, click Segment."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from magicgui.widgets import CheckBox
from napari.utils.notifications import show_error, show_info
from qtpy.QtCore import QTimer
from qtpy.QtWidgets import QButtonGroup, QHBoxLayout, QRadioButton

from napari_unet.errors import UnetError
from napari_unet.inference.settings import DEVICES, ObjectSettings
from napari_unet.steps import describe_seconds
from napari_unet.widgets import _layers, _session
from napari_unet.widgets._dock import (
    Dock,
    Fold,
    JobRow,
    TextLabel,
    make_fold,
    while_alive,
)
from napari_unet.widgets._engine import load_engine
from napari_unet.widgets._image_chooser import ImageChooser
from napari_unet.widgets._model_chooser import ModelChooser
from napari_unet.widgets._objects import ObjectsPanel
from napari_unet.widgets._running import (
    choose_averaging,
    choose_device,
    choose_memory_limit,
    choose_tile,
)
from napari_unet.widgets._segmented import Run, Segmented
from napari_unet.widgets._worker import start_worker

if TYPE_CHECKING:
    from collections.abc import Generator

    import napari.viewer
    from napari.layers import Image
    from napari.qt.threading import GeneratorWorker

    from napari_unet.models.model import Model, Passport
    from napari_unet.steps import Progress
    from napari_unet.widgets._segmented import Result

NAME = "Segment"
SCOPES = {
    "slice": ("slice", "Only the plane (or volume) that the sliders stand on."),
    "view": ("view", "Only what the canvas shows now."),
    "all": ("everything", "The whole image with all its planes and times."),
}
RELABEL_DELAY = 60  # ms after the last move of a slider


class SegmentWidget(Dock):
    """Turn the current image layer into a Labels layer.

    Parameters
    ----------
    viewer : napari.viewer.Viewer
        Its image layers can be chosen.
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
        self._pending: Run | None = None  # that is computed
        self._segmented = Segmented(viewer)
        self._again = False
        self._notes: list[str] = []
        self._relabel_timer = QTimer(self)
        self._relabel_timer.setSingleShot(True)
        self._relabel_timer.setInterval(RELABEL_DELAY)
        self._relabel_timer.timeout.connect(self._relabel)
        self._build(_session.recall(NAME))
        session.events.model.connect(self._on_model)
        session.events.is_segmenting.connect(self._on_busy)
        self.reset_choices()
        if session.model is not None:
            self._on_model(session.model)
        elif (passport := self._chooser.passport) is not None:
            self._show_objects(passport)
        self._chooser.begin()

    # --- building ---------------------------------------------------------

    def _build(self, remembered: dict[str, Any]) -> None:
        form = self.add_form()
        self._image = ImageChooser(self._viewer, form, self._refresh)
        wanted = str(remembered.get("model", "nuclei"))
        self._chooser = ModelChooser(self._session, wanted, self._refresh)
        form.addRow("Model", self._chooser)
        self._about = TextLabel(lines=4)
        form.addRow(self._about)
        form.addRow("What", self._scope_row(str(remembered.get("scope", "all"))))
        self._job = JobRow(NAME, self._segment, self._cancel)
        self.column.addWidget(self._job)
        self._objects = ObjectsPanel(self._on_objects)
        self.column.addWidget(self._objects)
        self.column.addWidget(self._more(remembered))
        self.column.addStretch(1)

    def _scope_row(self, wanted: str) -> QHBoxLayout:
        self._scope = QButtonGroup(self)
        row = QHBoxLayout()
        for name, (text, tip) in SCOPES.items():
            button = QRadioButton(text)
            button.setToolTip(tip)
            button.setObjectName(name)
            button.setChecked(name == (wanted if wanted in SCOPES else "all"))
            self._scope.addButton(button)
            row.addWidget(button)
        row.addStretch(1)
        return row

    def _more(self, remembered: dict[str, Any]) -> Fold:
        self._device = choose_device()
        if (device := remembered.get("device")) in DEVICES:
            self._device.value = device
        self._tile = choose_tile()
        self._memory_limit = choose_memory_limit()
        limit = remembered.get("memory_limit")
        if isinstance(limit, float) and 0 <= limit <= self._memory_limit.max:
            self._memory_limit.value = limit
        self._augment = choose_averaging()
        self._augment.value = bool(remembered.get("augment", False))
        self._show_probabilities = CheckBox(
            text="Probabilities as a layer",
            tooltip="Also show how sure the network is of each pixel.",
        )
        self._new_layer = CheckBox(
            text="New layer for each run",
            tooltip="Keep earlier results instead of updating them in place.",
        )
        return make_fold(
            [
                *(self._device, self._tile, self._memory_limit, self._augment),
                *(self._show_probabilities, self._new_layer),
            ]
        )

    # --- what fits ----------------------------------------------------------------

    def reset_choices(self, event: object = None) -> None:
        """List the image layers again; napari calls it too."""
        self._image.reset()

    @while_alive
    def _on_model(self, model: Model) -> None:
        load_engine(self, "inference.store")
        self._show_objects(model.passport)
        self._refresh()

    def _show_objects(self, passport: Passport) -> None:
        mine = _session.recall(NAME).get("objects", {}).get(self._chooser.chosen, {})
        self._objects.set_values(
            ObjectSettings.recommended(passport),
            mine,
            is_loaded=self._session.model is not None,
        )

    def _problem(self) -> str:
        """Say why Segment cannot be clicked now, "" if it can."""
        layer, model = self._image.layer, self._session.model
        if layer is None:
            return "There is no image layer. Open an image, or File › Open Sample."
        if self._image.pending:
            return self._image.pending
        if self._chooser.loading:
            return "The model is being loaded."
        if model is None:
            return "No model is loaded. Choose one."
        try:
            self._image.check(model)
            model.rescaling(_layers.pixel_size(layer, self._image.axes))
        except UnetError as error:
            return str(error)
        return ""

    def _refresh(self) -> None:
        """Show what the model is, whether it fits, and what can be done."""
        layer, model = self._image.layer, self._session.model
        self._image.offer_channels(model)
        problem = self._problem()
        lines = [] if model is None else [model.describe()]
        if problem:
            is_short = self._image.pending or self._chooser.loading
            lines.append(problem if is_short else f"⚠ {problem}")
        elif layer is not None and model is not None:
            sizes = _layers.pixel_size(layer, self._image.axes)
            fit = model.describe_fit(sizes)
            lines += [f"⚠ {fit}"] if fit else []
            self._objects.set_pixel_size(sizes, model.ndim)
        self._about.setText("\n".join(lines))
        running = self._session.is_segmenting
        self._job.start.setEnabled(not running and not problem)
        self._job.start.setToolTip(
            "A run is under way." if running else problem or "Find the objects."
        )

    # --- running ------------------------------------------------------------------

    @property
    def _chosen_scope(self) -> str:
        button = self._scope.checkedButton()
        return button.objectName() if button is not None else "all"

    def _object_settings(self, model: Model) -> ObjectSettings:
        recommended = ObjectSettings.recommended(model.passport)
        return replace(recommended, **self._objects.values())

    def _input_state(self, layer: Image, model: Model) -> dict[str, Any]:
        """Read the widgets into the keywords of `segment_stored_steps`."""
        image, axes, channels = self._image.engine_input()
        tile = int(self._tile.value)
        return {
            "image": image,
            "axes": axes,
            "channels": channels,
            "region": self._region(layer, model),
            "device": self._device.value,
            "tile_shape": (tile,) * model.ndim if tile else None,
            "memory_limit": self._memory_limit.value or None,
            "test_time_augmentation": self._augment.value,
            "pixel_size": _layers.pixel_size(layer, self._image.axes),
        }

    def _region(self, layer: Image, model: Model) -> dict[str, slice]:
        """Read off the sliders and the canvas what is to be segmented."""
        scope = self._chosen_scope
        if scope == "all":
            return {}
        largest = 1 if scope == "view" else 0
        return _layers.looked_at(
            self._viewer, layer, self._image.axes, model.ndim, largest
        )

    def _segment(self) -> None:
        layer, model = self._image.layer, self._session.model
        if layer is None or model is None or self._session.is_segmenting:
            return
        axes = self._image.axes
        try:
            state = self._input_state(layer, model)
            run = Run(
                weakref.ref(layer),
                layer.name,
                axes,
                self._image.channels,
                _layers.label_space(layer, axes),
                _layers.pixel_size(layer, axes),
                model,
                self._augment.value,
                None if self._new_layer.value else self._segmented.last_labels(layer),
            )
        except UnetError as error:
            show_error(str(error))
            return
        self._remember()
        adds = run.extends(self._segmented.run) and not self._new_layer.value
        store = self._segmented.store if adds else None
        self._pending = run
        layer.events.data.connect(run.note_change)
        self._relabel_timer.stop()
        image = state.pop("image")
        settings = self._object_settings(model)
        steps = _segment_steps(store, image, model, settings, **state)
        self._start(steps, "Segmenting")

    def _on_objects(self) -> None:
        mine = {self._chooser.chosen: self._objects.values()}
        self._session.objects = {**self._session.objects, **mine}
        # Not restarted by every move: the labels follow while a slider is dragged.
        if not self._relabel_timer.isActive():
            self._relabel_timer.start()

    def _relabel(self) -> None:
        """Make objects again with other settings, without the network."""
        run, store = self._segmented.run, self._segmented.store
        if run is None or store is None:
            return
        if self._session.is_segmenting:
            self._again = True
            if self._worker is not None and self._pending is None:
                self._worker.quit()  # its settings are outdated
            return
        settings = self._object_settings(run.model)
        steps = store.label_steps(run.model, settings, self._segmented.place_seen())
        self._start(steps, "Making objects")

    def _start(self, steps: Generator[Progress, None, Any], title: str) -> None:
        self._notes = []
        self._job.set_running(True)
        self._job.status.setText(f"{title} …")
        self._session.is_segmenting = True
        self._worker = start_worker(
            steps,
            title=title,
            on_progress=self._on_progress,
            on_result=self._show,
            on_error=self._on_error,
            on_finished=self._release,
        )

    def _cancel(self) -> None:
        if self._worker is not None:
            self._worker.quit()
            self._segmented.take_part_back()
            is_first = self._segmented.run is None
            there = "" if is_first else " The labels are as they were."
            self._job.status.setText(f"Cancelled.{there}")

    @while_alive
    def _on_progress(self, step: Progress) -> None:
        if step.note:
            self._notes.append(step.note)
            show_info(step.note)
        if self._worker is not None and not self._worker.abort_requested:
            self._job.show_progress(step)
            from napari_unet.inference.part import LabelledPart  # is there by now

            if isinstance(step, LabelledPart):
                self._segmented.show_part(step)

    @while_alive
    def _on_error(self, message: str) -> None:
        self._segmented.take_part_back()
        self._job.status.setText(message)

    def _release(self) -> None:
        self._worker = self._pending = None  # also if the dock has been closed
        self._session.is_segmenting = False

    @while_alive
    def _on_busy(self, is_segmenting: bool) -> None:
        if not is_segmenting:
            self._job.set_running(False)
        self._refresh()
        if self._again and not is_segmenting:
            self._again = False
            self._relabel()

    @while_alive
    def _show(self, result: Result) -> None:
        """Put the objects into the viewer."""
        run = self._pending or self._segmented.run
        assert run is not None
        words = self._segmented.show(
            run, result, with_probabilities=self._show_probabilities.value
        )
        store, _, table = result
        count, planes = len(table), store.n_units
        parts = "" if planes == 1 else f" in {planes} planes"
        self._objects.count.setText(f"{count} object{'s' * (count != 1)}{parts}")
        took = f"Done in {describe_seconds(self._job.seconds)} ({store.computed_by})."
        self._job.status.setText(" ".join([took, *self._notes, *words]))

    def _remember(self) -> None:
        objects = _session.recall(NAME).get("objects", {})
        objects[self._chooser.chosen] = self._objects.values()
        _session.remember(
            NAME,
            {
                "model": self._chooser.chosen,
                "scope": self._chosen_scope,
                "device": self._device.value,
                "memory_limit": self._memory_limit.value,
                "augment": self._augment.value,
                "objects": objects,
            },
        )


def _segment_steps(*given: Any, **options: Any) -> Generator[Progress, None, Result]:
    """Do what `segment_stored_steps` does; imported in the thread, it takes a while."""
    from napari_unet.inference.store import segment_stored_steps

    return (yield from segment_stored_steps(*given, **options))
