"""A cancelled training ends at once and leaves nothing half-written."""

import threading
import time

import numpy as np
import psutil
import pytest

from napari_unet import Annotation, Model, TrainingSettings, UNet, save_model
from napari_unet.files.atomic import sweep
from napari_unet.steps import ChildError, in_child
from napari_unet.training.fine_tune import fine_tune_project_steps
from napari_unet.training.project import save_project
from napari_unet.training.project_file import BASE_FILE, PROJECT_FILE, SNAPSHOT_FILE
from napari_unet.training.snapshot import read_snapshot

# Each step takes seconds.
LARGE = TrainingSettings(
    steps=1000, batch_size=4, patch_shape=(512, 512), device="cpu", precision="float32"
)
# Each step writes a snapshot.
SMALL = LARGE.model_copy(
    update={"batch_size": 1, "patch_shape": (16, 16), "validate_every": 1}
)


def squares():
    labels = np.zeros((64, 64), np.int32)
    for number in range(4):
        labels[10 + 24 * (number // 2) :, 10 + 24 * (number % 2) :][:12, :12] = (
            number + 1
        )
    return Annotation(200.0 * (labels > 0), labels)


def start(folder, settings, **options):
    project = save_project(folder / "project", [squares()], settings)
    save_model(Model(UNet(1, 2, **options)), project / BASE_FILE)
    return in_child(fine_tune_project_steps, project, folder / "mine.safetensors")


def files_of(folder):
    """All but the image and the labels."""
    return [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".tif"]


def is_over(pid):
    """Nobody may have waited for it yet."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def child_of_this():
    (child,) = psutil.Process().children()
    return child.pid


@pytest.mark.parametrize("when", ["within a step", "between steps"])
def test_the_child_is_gone_within_a_second(tmp_path, when):
    inside, caught = when == "within a step", []
    settings = LARGE if inside else SMALL
    steps = start(tmp_path, settings, depth=2, base_channels=16)

    def follow():
        try:
            for step in steps:
                if step.message == "before training" and step.scores:
                    learning.set()
                if step.loss is not None and not inside:
                    return
        except ChildError as error:
            caught.append(error)

    learning = threading.Event()
    thread = threading.Thread(target=follow)
    thread.start()
    assert learning.wait(60)
    if inside:
        time.sleep(0.5)
    else:
        thread.join()
    pid, before = child_of_this(), time.perf_counter()
    steps.cancel()
    while not is_over(pid):
        assert time.perf_counter() - before < 1
        time.sleep(0.01)
    thread.join()
    assert len(caught) == inside
    steps.close()
    assert not psutil.pid_exists(pid)
    left = {path.name for path in files_of(tmp_path)}
    assert left <= {BASE_FILE, SNAPSHOT_FILE, PROJECT_FILE}


def test_whenever_it_is_cancelled_its_files_are_complete(tmp_path):
    for delay in (0.0, 0.1):
        steps = start(tmp_path, SMALL, depth=1, base_channels=2)
        started = None
        for step in steps:
            started = started or (step.loss is not None and time.perf_counter())
            if started and time.perf_counter() - started > delay:
                break
        steps.close()
        project = tmp_path / "project"
        sweep(project)
        names = {path.name for path in files_of(tmp_path)}
        assert names == {BASE_FILE, SNAPSHOT_FILE, PROJECT_FILE}
        assert read_snapshot(project / SNAPSHOT_FILE).snapshot.step >= 1
