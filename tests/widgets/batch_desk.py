"""A viewer with a Batch dock, and a folder of images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import tifffile
from desk import intensity_model, spots
from qtpy.QtWidgets import QPushButton

from napari_unet.models.checkpoint import save_model
from napari_unet.models.library import library_dir, load_model
from napari_unet.widgets._session import Session
from napari_unet.widgets.batch import BatchWidget

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from napari_unet.widgets._batch_table import Row


def keep_model(name: str = "bright", **options) -> str:
    """Put a model of bright pixels into the library."""
    library_dir().mkdir(parents=True, exist_ok=True)
    save_model(intensity_model(**options), library_dir() / name)
    return name


def write_images(folder: Path, count: int, *bad: int, side: int = 64) -> Path:
    """Write images with a pixel size; those of the bad numbers are damaged."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        image = np.roll(spots(side, side), number, axis=1)
        path = folder / f"cells_{number}.tif"
        tifffile.imwrite(
            path,
            image,
            imagej=True,
            resolution=(2, 2),
            metadata={"axes": "YX", "unit": "um"},
        )
        if number in bad:
            path.write_bytes(path.read_bytes()[:-500])
    return folder


class BatchDesk:
    """A Batch dock, used as a person would."""

    def __init__(self, viewer, qtbot, session: Session | None = None):
        self.viewer = viewer
        self.qtbot = qtbot
        self.session = session or Session(load_model("bright"), "bright")
        self.dock = BatchWidget(viewer, self.session)
        self.added = viewer.window.add_dock_widget(self.dock, name="Batch")

    def button(self, text: str) -> QPushButton:
        return next(b for b in self.dock.findChildren(QPushButton) if b.text() == text)

    @property
    def start(self) -> QPushButton:
        return self.dock._row.start

    @property
    def status(self) -> str:
        return self.dock._row.status.text()

    @property
    def rows(self) -> list[Row]:
        return self.dock._table.rows

    def count(self, *statuses: str) -> int:
        return sum(row.status in statuses for row in self.rows)

    def wait_until(self, holds: Callable[[], bool], seconds: float = 15) -> None:
        self.qtbot.waitUntil(lambda: bool(holds()), timeout=int(1000 * seconds))

    def wait_for_words(self, words: str) -> None:
        self.wait_until(lambda: words in self.status)

    def choose(self, images: Path, results: Path | None = None) -> None:
        """Choose the folders and wait until they were looked at."""
        self.dock._form.input.text.setText(str(images))
        if results is not None:
            self.dock._form.output.text.setText(str(results))
        self.wait_for_look()

    def wait_for_look(self) -> None:
        chooser = self.dock._form.chooser
        self.wait_until(
            lambda: self.dock._survey or (self.dock._problem and not chooser.loading)
        )

    def click_start(self) -> None:
        self.wait_until(self.start.isEnabled)
        self.start.click()

    def wait_for_end(self) -> None:
        self.wait_until(lambda: self.dock._worker is None)
        self.wait_for_look()

    def run(self) -> None:
        self.click_start()
        self.wait_for_end()

    def double_click(self, name: str) -> None:
        table = self.dock._table
        shown = table._rows.shown_at(name)
        table.doubleClicked.emit(table.model().index(shown, 0))
