"""A viewer with the docks Segment and Fine-tune, and what is painted in it."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
import torch
from napari.utils.notifications import notification_manager
from qtpy.QtCore import QTimer
from scipy import ndimage

from napari_unet.models.library import library_dir
from napari_unet.models.model import Model, default_passport
from napari_unet.network.unet import UNet
from napari_unet.training.scores import score_images
from napari_unet.widgets.fine_tune import FineTuneWidget
from napari_unet.widgets.segment import SegmentWidget

if TYPE_CHECKING:
    from napari.layers import Labels, Shapes

    from napari_unet.widgets._session import Session


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
        self.project = self.dock._project
        self.stopped = self.dock._learning.stopped
        options = self.dock._options
        options.device.value = "cpu"
        options.steps.value, options.every.value = 40, 20
        options.rate.value = 0.01

    def wait_until(self, holds, seconds: float = 90) -> None:
        self.qtbot.waitUntil(holds, timeout=int(1000 * seconds))

    def survey(self) -> None:
        self.wait_until(lambda: not self.dock._survey.later.is_busy)

    def add_region(self, *corners: tuple[float, ...]) -> Shapes:
        """Box a part of the image, given its first and last corner."""
        self.viewer.layers.selection.active = self.viewer.layers["cells"]
        self.dock._annotations.add.click()
        regions = self.viewer.layers["cells regions"]
        (top, left), (bottom, right) = corners
        box = [[top, left], [top, right], [bottom, right], [bottom, left]]
        regions.add_rectangles([box])
        return regions

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
    """How long the event loop did not come round, though the computer let it."""

    def __init__(self, parent):
        self.longest = 0.0
        self.last = self.now()
        self.timer = QTimer(parent)
        self.timer.setInterval(5)
        self.timer.timeout.connect(self._tick)
        self.timer.start()

    @staticmethod
    def now() -> float:
        """Seconds, without those in which others had the processor."""
        file = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
        waited = int(file.read_text().split()[1]) / 1e9 if file.exists() else 0
        return time.perf_counter() - waited

    def _tick(self) -> None:
        now = self.now()
        self.longest = max(self.longest, now - self.last)
        self.last = now


def ap50(labels, truth) -> float:
    return score_images([(truth, labels)]).at(0.5).average_precision
