from __future__ import annotations

import gc
import signal
import threading
import time

import numpy as np
import psutil
import pytest
from desk import close_napari
from napari.layers import Shapes
from tune_desk import (
    Gaps,
    ap50,
    cells,
    children,
    library_files,
    messages,
    weak_model,
)

from napari_unet.models.checkpoint import save_model
from napari_unet.models.library import (
    data_dir,
    library_dir,
    list_models,
    load_model,
)
from napari_unet.training.project import load_project
from napari_unet.training.weight_map import border_weight_map, cut_gaps
from napari_unet.widgets import _learning, _project
from napari_unet.widgets._session import Session, recall
from napari_unet.widgets._training import LiveStep, NewModel
from napari_unet.widgets.fine_tune import FineTuneWidget
from napari_unet.widgets.models import ModelsWidget


def test_paint_box_train_use_segment(tune_desk, monkeypatch):
    """The whole story, with the event loop watched from Train to the new model."""
    monkeypatch.setattr(_project, "DELAY", 500)
    on = tune_desk()
    image = on.add_cells()
    on.wait_until(lambda: "Nothing is annotated" in on.problem)
    before = ap50(on.click_segment().data, on.truth)
    assert before < 0.3
    labels = on.annotate()
    assert labels.data.dtype == np.int32
    on.dock._annotations.add.click()
    regions = on.viewer.layers["cells regions"]
    assert isinstance(regions, Shapes)
    assert on.viewer.layers.selection.active is regions
    assert regions.mode == "add_rectangle"
    regions.add_rectangles([[[0, 0], [0, 110], [159, 110], [159, 0]]])
    on.survey()
    listed = on.dock._annotations.listed.text()
    assert "cells ← annotations · 1 region · " in listed
    assert on.dock._name.text() == "weak-mine"
    base = on.session.model
    gc.collect()  # what the viewer's start has left is not the training's
    saved = on.project._autosave.saved
    gaps = Gaps(on.dock)
    on.train()
    on.wait_for_step(1)
    labels.paint((150, 155), 65)
    on.wait_for_end()
    on.wait_until(lambda: on.project._autosave.saved != saved)
    assert "'weak-mine' is in the library" in on.status
    assert on.session.model is base
    assert len(on.dock._learning.outcome.plot.losses) == 40
    assert [step for step, *_ in on.dock._learning.outcome.plot.scores] == [0, 20, 40]
    preview = on.viewer.layers["cells preview"]
    assert preview.data.max() > 0
    assert "→" in on.dock._learning.outcome.held_out.text()
    on.dock._learning.outcome.use.click()
    on.qtbot.wait(100)
    gaps.timer.stop()
    assert gaps.longest < 0.2
    assert on.session.model is not base
    assert on.session.source == "weak-mine"
    assert on.segment._chooser.chosen == "weak-mine"
    assert not preview.visible
    after = ap50(on.click_segment().data, on.truth)
    assert after > max(before, 0.6)
    assert on.dock._name.text() == "weak-mine-2"
    assert library_files() == ["weak-mine.safetensors", "weak.safetensors"]
    assert not children()
    assert image in on.viewer.layers


def test_problems_are_words(tune_desk):
    on = tune_desk()
    assert "no image layer" in on.problem
    on.add_cells()
    assert "Nothing is annotated" in on.problem
    assert not on.job.start.isEnabled()
    on.dock._annotations.start.click()
    assert "layer is empty" in on.status
    on.survey()
    assert "no object is painted" in on.problem
    labels = on.viewer.layers["cells annotations"]
    labels.paint((50, 50), 1)
    on.survey()
    assert on.problem == ""
    on.dock._annotations.choose_unpainted("unknown")
    on.survey()
    assert "Label 1 is background" in on.problem
    labels.paint((90, 90), 2)
    on.survey()
    assert on.job.start.isEnabled()
    on.dock._name.setText("weak")
    on.dock._refresh()
    assert "choose another name" in on.problem
    assert "choose another name" in on.job.start.toolTip()


def test_start_from_segmentation_copies_the_objects(tune_desk):
    on = tune_desk()
    image = on.add_cells()
    image.scale = (2, 3)
    found = on.click_segment()
    found.name = "renamed"
    on.viewer.layers.selection.active = image
    on.dock._annotations.start.click()
    labels = on.viewer.layers["cells annotations"]
    np.testing.assert_array_equal(labels.data, found.data)
    assert labels.data is not found.data
    assert labels.data.dtype == np.int32
    np.testing.assert_array_equal(labels.scale, (2, 3))
    assert "was copied" in on.status
    assert not on.dock._annotations.start.isEnabled()
    assert "already" in on.dock._annotations.start.toolTip()


def test_own_layers_can_be_chosen(tune_desk):
    on = tune_desk()
    on.add_cells()
    on.viewer.add_labels(on.truth, name="mine")
    on.viewer.add_labels(np.zeros((5, 5), int), name="of another size")
    panel = on.dock._annotations
    offered = [panel._labels.itemText(i) for i in range(panel._labels.count())]
    assert offered == ["–", "mine"]
    panel._labels.setCurrentIndex(1)
    panel._labels.activated.emit(1)
    on.survey()
    assert panel.listed.text() == "cells ← mine · 64 objects"
    on.viewer.layers["mine"].name = "yours"
    on.survey()
    assert panel.listed.text() == "cells ← yours · 64 objects"
    on.viewer.layers.remove("yours")
    assert "Nothing is annotated" in on.problem


def test_regions_in_other_places_and_shapes(tune_desk):
    on = tune_desk()
    image = on.add_cells()
    image.scale = (0.5, 0.5)
    on.annotate()
    shapes = on.viewer.add_shapes(
        [[[0, 0], [0, 40], [40, 40], [40, 0]]], shape_type="ellipse", name="mine"
    )
    on.viewer.layers.selection.active = image
    panel = on.dock._annotations
    panel._regions.setCurrentIndex(panel._regions.findText("mine"))
    panel._regions.activated.emit(1)
    pair = panel.current()
    assert pair.regions is shapes
    annotation = panel.read(pair, on.dock._meaning())
    corners = np.asarray(annotation.regions[0])
    np.testing.assert_allclose(corners.min(0), 0, atol=1e-5)
    np.testing.assert_allclose(corners.max(0), 80, atol=1e-5)


def test_cancel_leaves_nothing(tune_desk):
    on = tune_desk()
    on.add_cells()
    on.annotate()
    on.dock._options.steps.value = 100_000
    on.train()
    on.wait_for_step(3)
    assert len(children()) == 1
    base = on.session.model
    started = time.monotonic()
    on.job.cancel.click()
    assert "Cancelled" in on.status
    seen = len(on.dock._learning.outcome.plot.losses)
    on.wait_for_end()
    assert time.monotonic() - started < 1
    # A busy computer takes its time to end a process that has loaded torch.
    on.wait_until(lambda: not children() and on.job.start.isEnabled(), 10)
    assert len(on.dock._learning.outcome.plot.losses) == seen
    assert library_files() == ["weak.safetensors"]
    assert on.session.model is base
    assert not on.dock._learning.outcome.use.isEnabled()
    on.dock._options.steps.value = 2  # the second click works
    on.train()
    on.wait_for_end()
    assert "weak-mine.safetensors" in library_files()


def test_who_cancels_at_the_very_end_finds_the_new_model(tune_desk, monkeypatch):
    on = tune_desk()
    on.add_cells()
    on.annotate()
    saved = threading.Event()

    def train_steps(name, begin, view):
        yield LiveStep(0, 1, "preparing")
        save_model(weak_model(), library_dir() / name)
        saved.set()
        return NewModel(name, weak_model())

    def cancel_late(step):
        saved.wait(30)
        time.sleep(0.2)  # until the result waits for this thread
        on.job.cancel.click()

    monkeypatch.setattr(_learning, "LiveTraining", train_steps)
    monkeypatch.setattr(on.job, "show_progress", cancel_late)
    on.train()
    on.wait_until(lambda: not on.dock._learning.is_running)
    assert on.status == "It was done before Cancel: 'weak-mine' is in the library."
    for dock in on.dock, on.segment:
        assert dock._chooser._list.findText("weak-mine") >= 0


@pytest.mark.parametrize("pause", [False, True])
def test_cancel_while_it_starts_or_is_paused(tune_desk, pause):
    on = tune_desk()
    on.add_cells()
    on.annotate()
    on.dock._options.steps.value = 100_000
    on.train()
    if pause:
        on.wait_for_step(3)
        on.job.pause.click()
        on.wait_until(lambda: on.job.pause.text() == "Resume")
        on.qtbot.wait(300)
        count = len(on.dock._learning.outcome.plot.losses)
        on.qtbot.wait(500)
        assert len(on.dock._learning.outcome.plot.losses) == count
        assert "Paused" in on.status
        on.job.pause.click()
        on.wait_for_step(count + 2)
        on.job.pause.click()
        on.wait_until(lambda: on.job.pause.text() == "Resume")
    started = time.monotonic()
    on.job.cancel.click()
    on.wait_for_end()
    assert time.monotonic() - started < 1
    on.wait_until(lambda: not children() and on.job.start.isEnabled(), 10)
    assert on.job.pause.text() == "Pause"
    assert library_files() == ["weak.safetensors"]


def test_killed_child_is_a_sentence(tune_desk):
    on = tune_desk()
    on.add_cells()
    on.annotate()
    on.dock._options.steps.value = 100_000
    on.train()
    on.wait_for_step(2)
    (child,) = children()
    child.send_signal(signal.SIGKILL)
    on.wait_for_end()
    assert "ended unexpectedly" in on.status
    assert any("ended unexpectedly" in text for text in messages())
    assert library_files() == ["weak.safetensors"]
    on.dock._options.steps.value = 2
    on.train()
    on.wait_for_end()
    assert "weak-mine.safetensors" in library_files()


def test_painting_during_the_training_changes_nothing(tune_desk):
    digests = []
    on = tune_desk()
    on.add_cells()
    labels = on.annotate()
    on.dock._options.steps.value = 4
    for paint in (False, True):
        on.dock._name.setText("weak-mine")
        on.dock._refresh()
        on.train()
        if paint:
            labels.paint((80, 80), 70)
            labels.data[:40] = 0
        on.wait_for_end()
        on.dock._learning.outcome.keep.click()
        digests.append(load_model("weak-mine").passport.history[-1].data_sha256)
        (library_dir() / "weak-mine.safetensors").unlink()
    assert digests[0] == digests[1] != ""


@pytest.mark.parametrize("change", ["rename and delete", "clear", "close dock"])
def test_layers_may_change_meanwhile(tune_desk, change):
    on = tune_desk()
    image = on.add_cells()
    labels = on.annotate()
    on.dock._options.steps.value, on.dock._options.every.value = 6, 3
    on.train()
    on.wait_for_step(1)
    if change == "rename and delete":
        image.name, labels.name = "new name", "other"
        on.wait_for_step(3)
        on.viewer.layers.remove(image)
        on.viewer.layers.remove(labels)
    elif change == "clear":
        on.viewer.layers.clear()
    else:
        on.viewer.window.remove_dock_widget(on.dock)
    on.wait_for_end()
    assert "in the library" in on.status
    assert not children()


def test_keep_old_leaves_the_model(tune_desk):
    on = tune_desk()
    models = ModelsWidget(on.viewer, on.session)
    on.viewer.window.add_dock_widget(models, name="Models")
    on.add_cells()
    on.annotate()
    on.dock._options.steps.value = 2
    base = on.session.model
    on.train()
    on.wait_for_end()
    row = models._tree._find(("model", "weak-mine"))
    assert row.parent().text(0) == "weak"
    assert on.dock._learning.outcome.keep.isEnabled()
    on.dock._learning.outcome.keep.click()
    assert on.session.model is base
    assert "The old model stays" in on.status
    assert not on.dock._learning.outcome.use.isEnabled()
    assert "weak-mine" in list_models()
    assert on.dock._name.text() == "weak-mine-2"
    # At once in the other dock's list, which is read when it is opened.
    on.segment._chooser._refill()
    assert on.segment._chooser._list.findData("weak-mine") >= 0
    assert on.segment._chooser.chosen == "weak"


def test_new_network(tune_desk):
    on = tune_desk()
    on.add_cells()
    on.annotate()
    chooser = on.dock._chooser
    chooser._list.setCurrentText("new network, 2D")
    chooser._list.activated.emit(chooser._list.currentIndex())
    assert chooser.new_ndim == 2
    assert on.dock._name.text() == "new-mine"
    on.dock._options.steps.value = 1
    on.train()
    on.wait_for_end(180)
    assert "new-mine" in list_models()


def test_preview_follows_the_sliders(tune_desk):
    on = tune_desk()
    image, truth = cells(96)
    layer = on.viewer.add_image(np.stack([image] * 3), name="movie")
    panel = on.dock._annotations
    panel.image._axes.setText("TYX")
    panel.image._axes.textEdited.emit("TYX")
    on.viewer.dims.set_point(0, 0)
    panel.start.click()
    labels = on.viewer.layers["movie annotations"]
    labels.data[:] = truth
    labels.refresh()
    on.survey()
    on.dock._options.steps.value, on.dock._options.every.value = 100_000, 15
    on.train()

    def found(plane: int) -> bool:
        if "movie preview" not in on.viewer.layers:
            return False
        return bool(on.viewer.layers["movie preview"].data[plane].any())

    on.wait_until(lambda: found(0))
    assert not found(1)
    on.viewer.dims.set_point(0, 2)
    on.wait_until(lambda: found(2))
    assert not found(1)
    preview = on.viewer.layers["movie preview"]
    assert preview.data.shape == layer.data.shape
    assert on.viewer.layers.selection.active is not preview
    on.job.cancel.click()
    on.wait_until(lambda: not children(), 10)


def test_weight_map_follows_painting(tune_desk):
    on = tune_desk()
    on.add_cells()
    labels = on.annotate()
    on.dock._options.show_weights.click()
    on.wait_until(lambda: "cells weight map" in on.viewer.layers)
    layer = on.viewer.layers["cells weight map"]
    before = layer.data.copy()
    expected = border_weight_map(cut_gaps(on.truth), 10, 5)
    np.testing.assert_allclose(before, expected, atol=1e-4)
    labels.data_setitem(np.nonzero(on.truth == 5), 0)
    on.wait_until(lambda: not np.array_equal(layer.data, before), 5)
    on.dock._options.preset.value = "none"
    on.wait_until(lambda: layer.data.max() == 1, 5)
    chooser = on.dock._annotations.image._list
    assert [chooser.itemText(i) for i in range(chooser.count())] == ["cells"]
    on.dock._options.show_weights.click()
    assert not layer.visible
    on.dock._options.show_weights.click()
    on.wait_until(lambda: layer.visible, 5)


def test_settings_are_remembered(tune_desk):
    on = tune_desk()
    on.add_cells()
    on.annotate()
    on.dock._options.steps.value = 1
    on.dock._options.preset.value = "falk"
    on.dock._options.w0.value = 33
    on.train()
    on.wait_for_end()
    assert recall("Fine-tune")["options"]["w0"] == 33
    again = FineTuneWidget(on.viewer, Session(load_model("weak"), "weak"))
    assert again._options.border_weights().preset == "falk"
    assert again._options.border_weights().w0 == 33
    assert again._options.steps.value == 1
    again.deleteLater()


def test_closed_dock_leaves_the_viewer_alone(tune_desk):
    on = tune_desk()
    on.add_cells()
    on.annotate()
    on.dock._options.steps.value = 100_000
    on.train()
    on.wait_for_step(1)
    on.viewer.window.remove_dock_widget(on.dock)
    on.dock.deleteLater()
    on.wait_until(lambda: not children(), 10)
    on.viewer.add_image(on.truth, name="later")
    on.viewer.layers[0].name = "renamed"
    on.viewer.layers["cells annotations"].paint((3, 3), 1)
    on.viewer.theme = "light"
    on.qtbot.wait(600)
    on.session.model = weak_model()


PROGRAM = """
import sys
import napari
from qtpy.QtCore import QTimer
from napari_unet.models.library import load_model
from napari_unet.widgets._session import Session
from napari_unet.widgets.fine_tune import FineTuneWidget
from tune_desk import cells, children

viewer = napari.Viewer()
dock = FineTuneWidget(viewer, Session(load_model("weak"), "weak"))
viewer.window.add_dock_widget(dock)
image, truth = cells()
viewer.add_image(image, name="cells")
dock._annotations.start.click()
viewer.layers["cells annotations"].data[:] = truth
dock._options.steps.value = 100_000
dock._options.device.value = "cpu"

def go():
    if not dock._learning.is_running:
        dock._learning.job.start.click()
    elif len(dock._learning.outcome.plot.losses) >= 3:
        timer.stop()
        print(children()[0].pid, flush=True)
        viewer.close()

timer = QTimer()
timer.timeout.connect(go)
timer.start(100)
napari.run()
print("closed", flush=True)
"""


def test_closing_napari_ends_the_training(home):
    library_dir().mkdir(parents=True)
    save_model(weak_model(), library_dir() / "weak")
    line, seconds = close_napari(PROGRAM, flags=("-W", "ignore"))
    assert seconds < 10
    assert not psutil.pid_exists(int(line))
    assert library_files() == ["weak.safetensors"]
    (kept,) = load_project(data_dir() / "autosave" / "1").annotations
    np.testing.assert_array_equal(kept.labels, cells()[1])
