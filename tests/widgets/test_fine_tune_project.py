"""What is annotated survives: projects, autosave, trainings that were stopped."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from qtpy.QtWidgets import QFileDialog
from tune_desk import cells, children, library_files, messages, weak_model

from napari_unet.models.checkpoint import save_model
from napari_unet.models.library import data_dir, library_dir, load_model
from napari_unet.training.annotations import Annotation
from napari_unet.training.project import load_project, save_project
from napari_unet.training.project_file import is_project
from napari_unet.training.settings import TrainingSettings
from napari_unet.widgets import _project
from napari_unet.widgets._session import Session
from napari_unet.widgets._slots import find_left
from napari_unet.widgets._training import outlines
from napari_unet.widgets.fine_tune import FineTuneWidget


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(_project, "DELAY", 100)


@pytest.fixture
def choose(monkeypatch):
    """Answer the dialogs for files."""

    def answer(path: Path) -> None:
        for name, value in (
            ("getSaveFileName", (str(path), "")),
            ("getExistingDirectory", str(path)),
        ):
            monkeypatch.setattr(
                QFileDialog, name, staticmethod(lambda *_, value=value: value)
            )

    return answer


def is_saved(on) -> bool:
    return not on.project.is_busy and not on.project._autosave.is_needed


def left() -> list[Path]:
    return [p.parent for p in data_dir().glob("autosave/*/project.json")]


def offers(panel) -> bool:
    return not panel.offer.isHidden()


def close(on) -> None:
    """Close the dock as napari does when its window is closed."""
    on.viewer.window.remove_dock_widget(on.dock)
    on.dock.deleteLater()
    on.qtbot.wait(50)


def second_dock(on) -> FineTuneWidget:
    """A dock as after a restart, in the same viewer."""
    dock = FineTuneWidget(on.viewer, Session(load_model("weak"), "weak"))
    on.viewer.window.add_dock_widget(dock, name="Again")
    on.dock = dock
    on.job, on.project = dock._learning.job, dock._project
    on.stopped = dock._learning.stopped
    return dock


def test_save_change_and_open_again(tune_desk, choose, tmp_path):
    on = tune_desk()
    assert not on.project.save.isEnabled()
    assert "Nothing is annotated" in on.project.save.toolTip()
    image = on.add_cells()
    image.scale = (0.5, 0.25)
    labels = on.annotate()
    on.add_region((0, 0), (40, 20.5))
    on.dock._options.preset.value = "falk"
    on.dock._options.w0.value = 33
    folder = tmp_path / "my.project"
    choose(folder)
    on.project.save.click()
    on.wait_until(lambda: is_saved(on))
    assert "my.project is saved at" in on.project.line.text()
    assert str(folder) in on.project.save.toolTip()
    assert on.project.save.text() == "Save project"
    assert not left()
    labels.paint((5, 5), 99)  # saved there by itself
    on.wait_until(lambda: not on.project._autosave.is_needed)
    assert 99 in load_project(folder).annotations[0].labels
    regions = [np.array(r) for r in on.viewer.layers["cells regions"].data]
    pixels, painted = image.data.copy(), labels.data.copy()
    close(on)
    assert not left()
    on.viewer.layers.clear()
    on.viewer.add_image(np.zeros((9, 9)), name="mine")

    dock = second_dock(on)
    on.project.open.click()
    on.wait_until(lambda: "is open" in on.status)
    again = on.viewer.layers["cells"]
    np.testing.assert_array_equal(again.data, pixels)
    np.testing.assert_allclose(again.scale, (0.5, 0.25))
    np.testing.assert_array_equal(on.viewer.layers["cells annotations"].data, painted)
    shapes = on.viewer.layers["cells regions"]
    assert shapes.shape_type == ["rectangle"]
    np.testing.assert_allclose(shapes.data, regions, atol=1e-5)
    on.survey()
    assert "cells ← annotations · 1 region" in dock._annotations.listed.text()
    assert dock._options.border_weights().w0 == 33
    assert dock._chooser.chosen == "weak"
    assert "mine" in on.viewer.layers
    before = load_project(folder).saved
    assert not on.project._autosave.is_needed
    on.viewer.layers["cells annotations"].paint((9, 9), 77)
    on.wait_until(lambda: is_saved(on))
    assert load_project(folder).saved > before
    assert 77 in load_project(folder).annotations[0].labels
    on.project.open.click()
    assert "open already" in on.status
    other = FineTuneWidget(on.viewer, Session(load_model("weak"), "weak"))
    other._project.open.click()
    on.wait_until(lambda: "Another window" in other._learning.job.status.text())
    assert other._project.save.text() == "Save project…"
    other.deleteLater()


def test_removed_layers_stay_in_the_project(tune_desk, choose, tmp_path):
    on = tune_desk()
    on.add_cells()
    labels = on.annotate()
    choose(tmp_path / "one")
    on.project.save.click()
    on.wait_until(lambda: is_saved(on))
    other = on.viewer.add_image(on.truth.astype(np.uint8), name="other")
    on.dock._annotations.start.click()
    on.wait_until(lambda: is_saved(on))
    assert [a.name for a in load_project(tmp_path / "one").annotations] == [
        "cells",
        "other",
    ]
    labels.paint((3, 3), 98)
    on.viewer.layers.remove(other)  # before the last stroke was saved
    on.wait_until(lambda: is_saved(on))
    assert len(load_project(tmp_path / "one").annotations) == 2
    assert 98 in load_project(tmp_path / "one").annotations[0].labels
    labels.paint((6, 6), 97)  # kept, but not there
    on.wait_until(lambda: is_saved(on))
    assert 97 not in load_project(tmp_path / "one").annotations[0].labels
    assert on.project.line.text() == "1 image of one removed: Save project to agree."
    assert len(left()) == 1
    on.project.save.click()
    on.wait_until(lambda: is_saved(on))
    (only,) = load_project(tmp_path / "one").annotations
    assert only.name == "cells"
    assert 97 in only.labels
    assert not left()
    on.viewer.layers.clear()  # closes the project: another one does not replace it
    on.add_cells("new")
    on.dock._annotations.start.click()
    assert on.project.save.text() == "Save project…"
    on.wait_until(lambda: is_saved(on))
    assert [a.name for a in load_project(tmp_path / "one").annotations] == ["cells"]
    on.project.open.click()
    on.wait_until(lambda: "other annotations" in on.status)


def test_other_folders_are_left_alone(tune_desk, choose, tmp_path):
    on = tune_desk()
    on.add_cells()
    on.annotate()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.tif").write_bytes(b"meow")
    choose(tmp_path / "photos")
    on.project.save.click()
    on.wait_until(lambda: not on.project.is_busy)
    assert any("photos" in text for text in messages())
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.tif"]
    note = Annotation(np.zeros((9, 9), np.uint8), np.eye(9, dtype=int))
    save_project(tmp_path / "theirs", [note], TrainingSettings())
    choose(tmp_path / "theirs")
    on.project.save.click()
    on.wait_until(lambda: not on.project.is_busy)
    assert any("another project" in text for text in messages())
    assert load_project(tmp_path / "theirs").annotations[0].labels.shape == (9, 9)
    document = tmp_path / "theirs" / "project.json"
    document.write_text(document.read_text()[:-50])
    on.project.open.click()
    on.wait_until(lambda: not on.project.is_busy)
    assert any("damaged" in text for text in messages())
    assert len(on.viewer.layers) == 2


def test_unsaved_annotations_are_kept_and_offered(tune_desk):
    on = tune_desk()
    on.add_cells()
    on.annotate()
    on.project._timer.setInterval(100_000)
    on.viewer.layers["cells annotations"].paint((3, 3), 98)
    close(on)  # nobody has saved
    assert len(left()) == 1
    assert 98 in load_project(left()[0]).annotations[0].labels
    on.viewer.layers.clear()
    dock = second_dock(on)
    on.wait_until(lambda: offers(on.project))
    assert f"{datetime.now():%B}" in on.project.offer.text.text()
    assert not on.viewer.layers  # nothing comes by itself
    on.project.offer.accept.click()
    on.wait_until(lambda: is_saved(on) and bool(on.viewer.layers))
    assert 98 in on.viewer.layers["cells annotations"].data
    assert not offers(on.project)
    assert len(left()) == 1  # now of this session
    other = FineTuneWidget(on.viewer, Session(load_model("weak"), "weak"))
    on.qtbot.wait(300)
    assert not offers(other._project)  # it is at work
    other.deleteLater()
    del dock
    close(on)
    second_dock(on)
    on.wait_until(lambda: offers(on.project))
    on.project.offer.discard.click()
    assert len(left()) == 1
    assert on.project.offer.discard.text() == "Really discard?"
    on.project.offer.discard.click()
    assert not left()
    assert not offers(on.project)


def test_full_disk_is_said_and_tried_again(tune_desk):
    on = tune_desk()
    on.add_cells()
    data_dir().mkdir(exist_ok=True)
    (data_dir() / "autosave").write_text("a file in the way")
    on.annotate()
    on.wait_until(lambda: "⚠" in on.project.line.text())
    assert on.project._autosave.is_needed
    (data_dir() / "autosave").unlink()
    on.wait_until(lambda: is_saved(on))
    assert "Kept safe" in on.project.line.text()


PROGRAM = """
import napari
from qtpy.QtCore import QTimer
from napari_unet.models.library import load_model
from napari_unet.widgets import _project
from napari_unet.widgets._session import Session
from napari_unet.widgets.fine_tune import FineTuneWidget
from tune_desk import cells

_project.DELAY = 300
viewer = napari.Viewer()
dock = FineTuneWidget(viewer, Session(load_model("weak"), "weak"))
viewer.window.add_dock_widget(dock)
image, truth = cells()
viewer.add_image(image, name="cells")
dock._annotations.add.click()
labels = viewer.layers["cells annotations"]
labels.data = truth
viewer.layers["cells regions"].add_polygons([[[0, 0], [0, 150], [140, 155.5]]])
labels.paint((70, 70), 98)
options = dock._options
options.steps.value, options.every.value = 100_000, 5
options.device.value = "cpu"

def go():
    learning = dock._learning
    if dock._project._autosave.is_needed or dock._survey.later.is_busy:
        return
    if not learning.is_running:
        learning.job.start.click()
    elif len(learning.outcome.plot.scores) > 1:
        timer.stop()
        print("now", flush=True)

timer = QTimer()
timer.timeout.connect(go)
timer.start(100)
napari.run()
"""


def test_killed_napari_loses_nothing(tune_desk, home):
    """Neither what is painted nor the training; both are offered."""
    library_dir().mkdir(parents=True)
    save_model(weak_model(), library_dir() / "weak")
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    on = tune_desk()
    assert not on.viewer.layers
    on.wait_until(lambda: offers(on.project) and not on.stopped.isHidden())
    image, truth = cells()
    on.project.offer.accept.click()
    on.wait_until(lambda: "cells regions" in on.viewer.layers)
    np.testing.assert_array_equal(on.viewer.layers["cells"].data, image)
    labels = on.viewer.layers["cells annotations"].data
    np.testing.assert_array_equal(labels[labels != 98], truth[labels != 98])
    assert labels[70, 70] == 98
    (outline,) = on.viewer.layers["cells regions"].data
    np.testing.assert_allclose(outline, [[0, 0], [0, 150], [140, 155.5]])

    assert on.stopped.text.text().startswith("The training of 'weak-mine' was stopped.")
    assert on.stopped.text.text().endswith("of 100000.")
    assert on.dock._name.text() == "weak-mine-2"
    step = on.stopped.stopped.step
    assert step % 5 == 0 < step
    on.wait_until(on.stopped.accept.isEnabled)
    on.stopped.accept.click()
    assert on.stopped.isHidden()
    on.wait_until(lambda: len(on.dock._learning.outcome.plot.losses) >= 2)
    shown = [number for number, *_ in on.dock._learning.outcome.plot.scores]
    assert shown[: step // 5 + 1] == list(range(0, step + 1, 5))
    on.job.cancel.click()
    on.wait_until(lambda: not on.stopped.isHidden())
    on.stopped.discard.click()
    on.stopped.discard.click()
    assert not list((home / "trainings").glob("*/"))
    assert library_files() == ["weak.safetensors"]
    assert not children()


def test_killed_child_can_be_resumed(tune_desk, home):
    on = tune_desk()
    on.add_cells()
    labels = on.annotate()
    options = on.dock._options
    options.steps.value, options.every.value = 16, 4
    on.train()
    on.wait_until(lambda: len(on.dock._learning.outcome.plot.scores) >= 2)
    (child,) = children()
    child.send_signal(signal.SIGKILL)
    on.wait_until(lambda: not on.stopped.isHidden())
    assert on.stopped.stopped.step in (4, 8, 12)
    assert is_project(home / "trainings" / "weak-mine")
    assert library_files() == ["weak.safetensors"]
    assert on.dock._name.text() == "weak-mine"
    assert "is discarded" in on.job.start.toolTip()
    options.steps.value = 7  # neither this nor painting matters
    labels.data[:] = 0
    on.stopped.accept.click()
    assert not on.job.start.isEnabled()
    on.wait_until(lambda: on.dock._learning.has_result)
    on.wait_until(lambda: not on.dock._learning.is_running)
    assert library_files() == ["weak-mine.safetensors", "weak.safetensors"]
    assert load_model("weak-mine").passport.history[-1].settings["steps"] == 16
    assert on.viewer.layers["cells preview"].data.any()
    assert on.stopped.isHidden()
    assert not list((home / "trainings").glob("*/"))


def test_nothing_to_resume_is_tidied_up(tune_desk, home):
    on = tune_desk()
    for name in ("empty", "halfway"):
        (home / "trainings" / name).mkdir(parents=True)
    (home / "trainings" / "halfway" / "training.snapshot").write_bytes(b"half")
    on.stopped.look()
    on.wait_until(lambda: not list((home / "trainings").glob("*/")))
    assert on.stopped.isHidden()


def test_channels_are_chosen_as_in_segment(tune_desk):
    on = tune_desk()
    image, on.truth = cells()
    channels = np.stack([image * 0, image, image * 0])
    layer = on.viewer.add_image(channels, name="cells", axis_labels=("c", "y", "x"))
    boxes = on.dock._annotations.image._channels._boxes
    assert [box.count() for box in boxes] == [3]
    boxes[0].setCurrentIndex(1)
    on.annotate()
    on.viewer.add_image(channels[:, :80, :80], axis_labels=("c", "y", "x"), name="b")
    panel = on.dock._annotations
    panel.start.click()
    base = on.session.model
    for pair in panel.pairs.all():  # also of the image that is not shown
        read = panel.read_for(pair, on.dock._meaning(), base)
        assert read.axes == "YX"
        whole = np.asarray(pair.image.data)
        np.testing.assert_array_equal(read.image, whole[1])
        assert panel.read_for(pair, on.dock._meaning(), None).axes == "CYX"
    assert on.dock._contents().annotations[0].image is layer.data
    on.dock._options.steps.value = 2
    on.train()
    on.wait_until(lambda: on.dock._learning.has_result)
    assert load_model("weak-mine").network.config.in_channels == 1


def test_empty_planes_are_pointed_out(tune_desk):
    on = tune_desk()
    on.viewer.add_image(np.zeros((20, 40, 40), np.uint8), name="stack")
    panel = on.dock._annotations
    panel.start.click()
    labels = on.viewer.layers["stack annotations"]
    labels.data[:8, 5:9, 5:9] = 1
    labels.refresh()
    panel._on_edit()
    on.survey()
    assert "12 of 20 planes are empty: they count as background" in on.problem
    assert on.job.start.isEnabled()
    labels.data[8:16, 5:9, 5:9] = 1
    panel._on_edit()
    on.survey()
    assert on.problem == ""


def test_a_project_made_by_others_opens(tune_desk, choose, tmp_path):
    """Colours, a stack with regions for all planes, and names that are equal."""
    on = tune_desk()
    colours = np.random.default_rng(0).integers(0, 255, (3, 30, 40), np.uint8)
    stack = np.zeros((4, 30, 40), np.uint16)
    painted = np.zeros(stack.shape, np.uint32)
    painted[1, 3:6, 3:6] = 2**32 - 1
    box = [[2, 2], [2, 9], [8, 9], [8, 2]]
    plane = [[1, *corner] for corner in [[10, 10], [10, 20], [20, 15]]]
    given = [
        Annotation(colours, painted[0], axes="SYX", name="same"),
        Annotation(stack, painted, [box, plane], name="same", pixel_size={"Z": 2.0}),
    ]
    settings = TrainingSettings(steps=77, border_weights=None)
    save_project(tmp_path / "p", given, settings, base="", ndim=3, name="later")
    choose(tmp_path / "p")
    on.project.open.click()
    on.wait_until(lambda: "is open" in on.status)
    assert on.dock._options.settings().steps == 77
    assert on.dock._options.border_weights() is None
    assert on.dock._chooser.new_ndim == 3
    assert on.dock._name.text() == "later"
    first, second = on.dock._annotations.pairs.all()
    assert first.image.rgb
    np.testing.assert_array_equal(first.image.data, np.moveaxis(colours, 0, -1))
    np.testing.assert_array_equal(second.labels.data, painted)
    assert second.image.scale[0] == 2
    assert [len(shape) for shape in second.regions.data] == [4] * 4 + [3]
    read = on.dock._contents().annotations
    assert [one.image_axes for one in read] == ["YXS", "ZYX"]


def test_outlines_keep_neighbours_apart():
    objects = np.zeros((1, 8, 9), np.int32)
    objects[0, 1:6, 1:5], objects[0, 1:6, 5:8] = 1, 256
    drawn = outlines(objects)
    assert drawn.dtype == np.uint8
    assert (drawn[0, 1:6, 4] > 0).all()
    assert (drawn[0, 1:6, 5] > 0).all()
    assert drawn[0, 3, 3] == 0
    assert (drawn[objects == 0] == 0).all()


def test_find_left_takes_each_folder_once(home):
    note = Annotation(np.zeros((9, 9), np.uint8), np.eye(9, dtype=int))
    save_project(home / "1", [note], TrainingSettings())
    first = find_left(home)
    assert first is not None
    assert find_left(home) is None
    first.lock.release()
    again = find_left(home)
    assert again is not None
    assert json.loads((again.folder / "project.json").read_text())["images"]
    again.empty()
    assert not again.folder.exists()
    again.lock.release()
    assert find_left(home) is None
