from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from napari.layers import Labels, Shapes
from napari.utils.notifications import notification_manager
from qtpy.QtCore import QTimer
from scipy import ndimage

from napari_unet.models.checkpoint import save_model
from napari_unet.models.library import library_dir, list_models, load_model
from napari_unet.models.model import Model, default_passport
from napari_unet.network.unet import UNet
from napari_unet.training.scores import score_images
from napari_unet.training.weight_map import border_weight_map, cut_gaps
from napari_unet.widgets._session import Session, recall
from napari_unet.widgets.fine_tune import FineTuneWidget
from napari_unet.widgets.segment import SegmentWidget


def weak_model() -> Model:
    """Small and untrained: it knows nothing yet."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = UNet(1, 2, depth=2, base_channels=8).eval()
    passport = default_passport(network).model_copy(update={"name": "weak"})
    return Model(network, passport)


def cells(side: int = 160) -> tuple[np.ndarray, np.ndarray]:
    """Noisy discs on a dark ground, and their labels."""
    random = np.random.default_rng(3)
    places = np.argwhere(np.ones((side // 20, side // 20))) * 20 + 10
    places = places + random.integers(-3, 4, places.shape)
    truth = np.zeros((side, side), np.int32)
    rows, columns = np.indices(truth.shape)
    for number, (row, column) in enumerate(places, start=1):
        radius = random.uniform(4, 7)
        truth[(rows - row) ** 2 + (columns - column) ** 2 < radius**2] = number
    image = ndimage.gaussian_filter((truth > 0) * 100.0, 1) + 20
    return (image + random.normal(0, 8, image.shape)).astype(np.float32), truth


class TuneDesk:
    """A viewer with the docks Segment and Fine-tune."""

    def __init__(self, viewer, qtbot, session: Session):
        self.viewer, self.qtbot, self.session = viewer, qtbot, session
        self.segment = SegmentWidget(viewer, session)
        self.dock = FineTuneWidget(viewer, session)
        viewer.window.add_dock_widget(self.segment, name="Segment")
        viewer.window.add_dock_widget(self.dock, name="Fine-tune", tabify=True)
        self.job = self.dock._learning.job
        options = self.dock._options
        options.device.value = "cpu"
        options.steps.value, options.every.value = 40, 20
        options.rate.value = 0.01

    def wait_until(self, holds, seconds: float = 90) -> None:
        self.qtbot.waitUntil(holds, timeout=int(1000 * seconds))

    def survey(self) -> None:
        self.wait_until(lambda: not self.dock._survey.later.is_busy)

    def add_cells(self, name: str = "cells"):
        image, self.truth = cells()
        return self.viewer.add_image(image, name=name)

    def annotate(self) -> Labels:
        """Paint the truth with the Labels API in a layer that the dock made."""
        image = self.viewer.layers["cells"]
        self.viewer.layers.selection.active = image
        self.dock._annotations.start.click()
        labels = self.viewer.layers["cells annotations"]
        labels.data_setitem(np.nonzero(labels.data), 0)
        for number in range(1, int(self.truth.max()) + 1):
            labels.data_setitem(np.nonzero(self.truth == number), number)
        self.survey()
        return labels

    def train(self) -> None:
        self.wait_until(self.job.start.isEnabled)
        self.job.start.click()
        assert self.job.cancel.isEnabled()

    def wait_for_step(self, number: int = 1) -> None:
        self.wait_until(lambda: len(self.dock._learning.outcome.plot.losses) >= number)

    def wait_for_end(self, seconds: float = 90) -> None:
        self.wait_until(lambda: not self.job.cancel.isEnabled(), seconds)

    def click_segment(self) -> Labels:
        self.wait_until(self.segment._job.start.isEnabled)
        before = set(self.viewer.layers)
        self.segment._job.start.click()
        self.wait_until(self.segment._job.start.isEnabled)
        names = {layer.name for layer in set(self.viewer.layers) - before}
        name = next(iter(names), "cells objects")
        return self.viewer.layers[name]

    @property
    def status(self) -> str:
        return self.job.status.text()

    @property
    def problem(self) -> str:
        return self.dock._problems.text()


@pytest.fixture
def desk(make_napari_viewer, qtbot):
    def open_desk() -> TuneDesk:
        library_dir().mkdir(parents=True)
        save_model(weak_model(), library_dir() / "weak")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of napari's own start
            viewer = make_napari_viewer()
        return TuneDesk(viewer, qtbot, Session(load_model("weak"), "weak"))

    return open_desk


def children() -> list[psutil.Process]:
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if any("napari_unet.child" in part for part in _command(process))
    ]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def library_files() -> list[str]:
    folder = library_dir()
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def messages() -> list[str]:
    return [str(note.message) for note in notification_manager.records]


class Gaps:
    """How long the event loop did not come round."""

    def __init__(self, parent):
        self.longest = 0.0
        self.last = time.perf_counter()
        self.timer = QTimer(parent)
        self.timer.setInterval(5)
        self.timer.timeout.connect(self._tick)
        self.timer.start()

    def _tick(self) -> None:
        now = time.perf_counter()
        self.longest = max(self.longest, now - self.last)
        self.last = now


def ap50(labels, truth) -> float:
    return score_images([(truth, labels)]).at(0.5).average_precision


def test_paint_box_train_use_segment(desk):
    """The whole story, with the event loop watched while it trains."""
    on = desk()
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
    assert "cells ← cells annotations · 1 region · " in listed
    assert on.dock._name.text() == "weak-mine"
    base = on.session.model
    gc.collect()  # what the viewer's start has left is not the training's
    on.train()
    gaps = Gaps(on.dock)
    on.wait_for_end()
    gaps.timer.stop()
    assert gaps.longest < 0.2
    assert "'weak-mine' is in the library" in on.status
    assert on.session.model is base
    assert len(on.dock._learning.outcome.plot.losses) == 40
    assert [step for step, *_ in on.dock._learning.outcome.plot.scores] == [0, 20, 40]
    preview = on.viewer.layers["cells preview"]
    assert preview.data.max() > 0
    assert "→" in on.dock._learning.outcome.held_out.text()
    on.dock._learning.outcome.use.click()
    assert on.session.model is not base
    assert on.session.source == "weak-mine"
    assert on.segment._chooser.chosen == "weak-mine"
    assert "cells preview" not in on.viewer.layers
    after = ap50(on.click_segment().data, on.truth)
    assert after > max(before, 0.6)
    assert on.dock._name.text() == "weak-mine-2"
    assert library_files() == ["weak-mine.safetensors", "weak.safetensors"]
    assert not children()
    assert image in on.viewer.layers


def test_problems_are_words(desk):
    on = desk()
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


def test_start_from_segmentation_copies_the_objects(desk):
    on = desk()
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


def test_own_layers_can_be_chosen(desk):
    on = desk()
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


def test_regions_in_other_places_and_shapes(desk):
    on = desk()
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


def test_cancel_leaves_nothing(desk):
    on = desk()
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


@pytest.mark.parametrize("pause", [False, True])
def test_cancel_while_it_starts_or_is_paused(desk, pause):
    on = desk()
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


def test_killed_child_is_a_sentence(desk):
    on = desk()
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


def test_painting_during_the_training_changes_nothing(desk):
    digests = []
    on = desk()
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


@pytest.mark.parametrize("change", ["delete", "rename", "clear", "close dock"])
def test_layers_may_change_meanwhile(desk, change):
    on = desk()
    image = on.add_cells()
    labels = on.annotate()
    on.dock._options.steps.value, on.dock._options.every.value = 6, 3
    on.train()
    on.wait_for_step(1)
    if change == "delete":
        on.viewer.layers.remove(image)
        on.viewer.layers.remove(labels)
    elif change == "rename":
        image.name, labels.name = "new name", "other"
    elif change == "clear":
        on.viewer.layers.clear()
    else:
        on.viewer.window.remove_dock_widget(on.dock)
    on.wait_for_end()
    assert "in the library" in on.status
    assert not children()


def test_keep_old_leaves_the_model(desk):
    on = desk()
    on.add_cells()
    on.annotate()
    on.dock._options.steps.value = 2
    base = on.session.model
    on.train()
    on.wait_for_end()
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


def test_new_network(desk):
    on = desk()
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


def test_preview_follows_the_sliders(desk):
    on = desk()
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


def test_weight_map_follows_painting(desk):
    on = desk()
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
    assert "cells weight map" not in on.viewer.layers


def test_settings_are_remembered(desk):
    on = desk()
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


def test_closed_dock_leaves_the_viewer_alone(desk):
    on = desk()
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
from test_fine_tune_dock import cells, children

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
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        started = time.monotonic()
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert out == "closed\n"
    assert "Traceback" not in err
    assert time.monotonic() - started < 10
    assert not psutil.pid_exists(int(line))
    assert library_files() == ["weak.safetensors"]
