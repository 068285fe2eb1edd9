"""A viewer with a Segment dock, and models made by hand."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from qtpy.QtWidgets import QComboBox, QPushButton

from napari_unet.models.model import ClassInfo, Model, Passport
from napari_unet.models.normalize import Normalization
from napari_unet.network.unet import UNet
from napari_unet.widgets.segment import SegmentWidget

if TYPE_CHECKING:
    from collections.abc import Callable

    from napari_unet.widgets._session import Session


def intensity_model(channels: int = 1, threshold: float = 0.5, **options) -> Model:
    """A network made by hand: bright pixels (in the last channel) are objects."""
    network = UNet(
        channels, 1, depth=1, base_channels=1, convs_per_level=1, norm=None, **options
    )
    centre = (1,) * network.config.ndim
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network.encoder[0][0].weight[(0, channels - 1, *centre)] = 1
        network.decoder[0][0].weight[(0, 0, *centre)] = 1  # the skip connection
        network.head.weight.fill_(20)
        network.head.bias.fill_(-20 * threshold)
    passport = Passport(
        name="bright",
        classes=(
            ClassInfo(name="background", kind="background"),
            ClassInfo(name="spot", kind="objects"),
        ),
        channels=tuple(f"dye {i + 1}" for i in range(channels)),
        normalization=Normalization(method="fixed", lower=0, upper=100),
    )
    return Model(network.eval(), passport)


def slow_model() -> Model:
    """Seconds for each tile of an image of 1024² on any CPU."""
    return Model(UNet(1, 2, base_channels=32, depth=3))


def spots(*shape: int) -> np.ndarray:
    """Bright squares of 6 pixels, 10 apart, one for each 16 x 16 pixels."""
    image = np.zeros(shape, np.uint8)
    inside = [np.arange(n) % 16 // 3 // 2 == 1 for n in shape[-2:]]
    image[..., inside[0][:, None] & inside[1][None]] = 100
    return image


class Desk:
    """A viewer with a Segment dock, used as a person would."""

    def __init__(self, viewer, qtbot, session: Session):
        self.viewer = viewer
        self.qtbot = qtbot
        self.session = session
        self.dock = SegmentWidget(viewer, session)
        viewer.window.add_dock_widget(self.dock, name="Segment")

    def button(self, text: str) -> QPushButton:
        return next(b for b in self.dock.findChildren(QPushButton) if b.text() == text)

    @property
    def status(self) -> str:
        return self.dock._job.status.text()

    def image_names(self) -> list[str]:
        chooser = self.dock.findChildren(QComboBox)[0]
        return [chooser.itemText(i) for i in range(chooser.count())]

    def wait_until(self, holds: Callable[[], bool], seconds: float = 60) -> None:
        self.qtbot.waitUntil(holds, timeout=int(1000 * seconds))

    def click_segment(self) -> None:
        self.wait_until(self.button("Segment").isEnabled)
        self.button("Segment").click()

    def wait_for_end(self) -> None:
        self.wait_until(lambda: not self.button("Cancel").isEnabled())

    def segment(self) -> None:
        self.click_segment()
        self.wait_until(self.button("Cancel").isEnabled)
        self.wait_for_end()

    def choose_scope(self, name: str) -> None:
        for button in self.dock._scope.buttons():
            button.setChecked(button.objectName() == name)

    @property
    def labels(self):
        return next(
            layer for layer in self.viewer.layers if layer.name.endswith("objects")
        )


def close_napari(program: str, *arguments: object, flags: tuple[str, ...] = ()):
    """Run a program that says one line, closes napari and then says "closed".

    Returns that line, and the seconds from then to the end of the process.
    """
    process = subprocess.Popen(
        [sys.executable, *flags, "-c", program, *map(str, arguments)],
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
    seconds = time.monotonic() - started
    assert process.returncode == 0, err
    assert out == "closed\n"
    assert "Traceback" not in err
    return line, seconds
