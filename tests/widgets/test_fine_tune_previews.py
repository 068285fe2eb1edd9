"""Previews cost little, and whatever goes wrong with one, the training goes on."""

import threading

import numpy as np
import pytest
from qtpy.QtCore import QThreadPool
from tune_desk import cells, library_files, weak_model

from napari_unet.errors import BadInput
from napari_unet.steps import Progress
from napari_unet.training.annotations import Annotation
from napari_unet.training.fine_tune import TrainingSettings, fine_tune_steps
from napari_unet.training.project_file import SNAPSHOT_FILE
from napari_unet.training.settings import TrainingStep, View
from napari_unet.widgets import _training
from napari_unet.widgets._live import LARGEST_PREVIEW, limit_preview
from napari_unet.widgets._training import Begin, LiveTraining
from napari_unet.widgets._worker import start_worker

QUICK = TrainingSettings(
    steps=2, batch_size=1, patch_shape=(32, 32), validate_every=1, device="cpu"
)


def test_an_image_that_is_moved_off_the_canvas_is_not_previewed(tune_desk):
    on = tune_desk()
    image = on.viewer.add_image(np.zeros((1100, 1100), np.uint8))
    previews = on.dock._learning._previews
    image.corner_pixels = np.array([[0, 0], [1099, 1099]])
    assert previews.begin([image], 2) is not None
    image.corner_pixels = np.array([[0, 1099], [1099, 1099]])  # as napari does then
    assert previews.next_view() is None
    assert previews.begin_again() is None


@pytest.mark.parametrize(
    ("region", "plane", "expected"),
    [
        ({}, 0, {}),
        ({"T": (3, 4)}, 0, {"T": (3, 4)}),
        ({"Y": (10, 500), "X": (0, 2000)}, 0, {"Y": (10, 500), "X": (0, 2000)}),
        ({"Y": (0, 4096), "X": (0, 4096)}, 0, {"Y": (1536, 2560), "X": (1536, 2560)}),
        (
            {"Z": (0, 100), "Y": (0, 512), "X": (1000, 1512)},
            97,
            {"Z": (84, 100), "Y": (128, 384), "X": (1128, 1384)},
        ),
        (
            {"Z": (0, 9), "Y": (0, 300), "X": (0, 300)},
            2,
            {"Z": (0, 9), "Y": (0, 300), "X": (0, 300)},
        ),
    ],
)
def test_previews_of_much_show_the_middle(region, plane, expected):
    region = {axis: slice(*ends) for axis, ends in region.items()}
    limited = limit_preview(region, plane)
    assert limited == {axis: slice(*ends) for axis, ends in expected.items()}
    sizes = [part.stop - part.start for part in limited.values()]
    assert np.prod(sizes) <= LARGEST_PREVIEW


def test_a_preview_that_fails_does_not_end_the_training():
    view = View(0, {"Y": slice(0, 0), "X": slice(0, 0)})
    steps = fine_tune_steps(weak_model(), [Annotation(*cells(64))], QUICK, view=view)
    seen = list(steps)
    assert sum(step.loss is not None for step in seen) == 2
    assert all(step.preview is None for step in seen)


@pytest.mark.parametrize("begun", [False, True])
def test_what_was_learnt_outlives_an_error(home, monkeypatch, begun):
    def fail(steps, folder, output, **options):
        (folder / SNAPSHOT_FILE).write_bytes(b"learnt")
        yield TrainingStep(1, 2, loss=0.5 if begun else None)
        raise BadInput("no more")

    monkeypatch.setattr(_training, "in_child", fail)
    begin = Begin(weak_model(), 2, [Annotation(*cells(64))], QUICK)
    with pytest.raises(BadInput, match="no more"):
        list(LiveTraining("mine", begin, None))
    assert (home / "trainings" / "mine" / SNAPSHOT_FILE).exists() == begun


def test_small_work_is_done_while_long_work_holds_threads(qtbot):
    pool = QThreadPool.globalInstance()
    before, go, ended = pool.maxThreadCount(), threading.Event(), []
    pool.setMaxThreadCount(1)

    def wait():
        yield Progress(0, 1)
        go.wait(30)

    def start(steps, name):
        start_worker(
            steps,
            title="",
            on_progress=lambda step: None,
            on_result=lambda result: None,
            on_error=ended.append,
            on_finished=lambda: ended.append(name),
        )

    def work():
        yield Progress(0, 1)

    try:
        start(wait(), "training")
        start(wait(), "batch")
        start(work(), "autosave")
        qtbot.waitUntil(lambda: ended == ["autosave"], timeout=5000)
    finally:
        go.set()
        pool.setMaxThreadCount(before)
    qtbot.waitUntil(lambda: len(ended) == 3, timeout=5000)


def test_a_name_typed_for_the_next_training_is_used(tune_desk):
    on = tune_desk()
    on.add_cells()
    on.annotate()
    on.dock._options.steps.value = 1
    on.train()
    on.wait_for_end()
    on.wait_until(lambda: on.dock._learning.has_result)
    on.dock._name.selectAll()
    on.qtbot.keyClicks(on.dock._name, "typed")
    on.train()
    on.wait_for_end()
    on.wait_until(lambda: "typed.safetensors" in library_files())
    assert "weak-mine-2.safetensors" not in library_files()
    on.wait_until(lambda: on.dock._learning.has_result)
    on.dock._learning.outcome.keep.click()
    assert on.dock._name.text() == "weak-mine-2"
