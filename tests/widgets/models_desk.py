"""A viewer with the docks Segment and Models, and checkpoints of others."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from qtpy.QtCore import Qt
from qtpy.QtWidgets import QLineEdit, QPushButton

from napari_unet.models.checkpoint import model_sha256, save_model
from napari_unet.models.library import library_dir, load_model
from napari_unet.models.model import Model, TrainingRecord
from napari_unet.widgets.models import ModelsWidget
from napari_unet.widgets.segment import SegmentWidget

if TYPE_CHECKING:
    import numpy as np

    from napari_unet.widgets._session import Session


class ModelsDesk:
    """A viewer with the docks Segment and Models, used as a person would."""

    def __init__(self, viewer, qtbot, session: Session):
        self.viewer, self.qtbot, self.session = viewer, qtbot, session
        self.segment = SegmentWidget(viewer, session)
        self.dock = ModelsWidget(viewer, session)
        viewer.window.add_dock_widget(self.segment, name="Segment")
        viewer.window.add_dock_widget(self.dock, name="Models")
        self.tree = self.dock._tree
        self.form = self.dock._form
        self.dock._preview.later._timer.setInterval(20)  # of tests there are many

    def button(self, text: str) -> QPushButton:
        return next(b for b in self.dock.findChildren(QPushButton) if b.text() == text)

    def click(self, text: str) -> None:
        assert self.button(text).isEnabled(), self.button(text).toolTip()
        self.button(text).click()

    def choose(self, name: str, kind: str = "model") -> None:
        self.tree.setCurrentItem(self.tree._find((kind, name)))

    def import_by(self, text: str) -> None:
        """Choose an entry of the menu of Import…"""
        assert self.button("Import…").isEnabled()
        menu = self.button("Import…").menu()
        next(action for action in menu.actions() if action.text() == text).trigger()

    def work(self) -> None:
        """Wait until nothing is being done."""
        self.qtbot.waitUntil(lambda: not self.dock._work.busy, timeout=30_000)
        loading = self.segment._chooser
        self.qtbot.waitUntil(lambda: not loading.loading, timeout=30_000)

    def see(self) -> None:
        """Wait until the preview shows what is found now."""
        preview = self.dock._preview
        preview.request()
        self.qtbot.waitUntil(lambda: not preview.later.is_busy, timeout=30_000)
        self.qtbot.wait(20)

    def type_name(self, new: str) -> None:
        self.click("Rename")
        (editor,) = self.tree.findChildren(QLineEdit)
        editor.selectAll()
        self.qtbot.keyClicks(editor, new)
        before = self.status
        self.qtbot.keyClick(editor, Qt.Key.Key_Return)
        self.qtbot.waitUntil(lambda: self.status != before)

    def use_and_segment(self, image: str, timeout: int = 30_000) -> np.ndarray:
        """Use the model that is chosen, click Segment; return the labels."""
        self.click("Use")
        self.work()
        job, name = self.segment._job, f"{image} objects"
        self.qtbot.waitUntil(job.start.isEnabled)
        job.start.click()
        self.qtbot.waitUntil(lambda: name in self.viewer.layers, timeout=timeout)
        return self.viewer.layers[name].data

    @property
    def names(self) -> dict:
        """All rows with those below them."""

        def below(item):
            rows = [item.child(i) for i in range(item.childCount())]
            return {row.text(0): below(row) for row in rows}

        return below(self.tree.invisibleRootItem())

    @property
    def status(self) -> str:
        return self.dock._work.status.text()

    @property
    def passport(self) -> str:
        return self.dock._passport.text.text()

    @property
    def offered(self) -> list[str]:
        """Models in the list of Segment."""
        models = self.segment._chooser._list
        return [models.itemText(i) for i in range(models.count())]

    @property
    def chosen(self) -> str:
        return self.segment._chooser.chosen


def fine_tune(parent: str, name: str) -> None:
    """Save a child as fine-tuning does, with its record."""
    model = load_model(parent)
    record = TrainingRecord(
        date="2026-11-20",
        data="3 annotated images",
        steps=40,
        scores={"F1@0.5": 0.78, "old F1@0.5": 0.61},
        parent_sha256=model_sha256(model),
    )
    update = {"name": name, "history": (*model.passport.history, record)}
    child = Model(model.network, model.passport.model_copy(update=update))
    save_model(child, library_dir() / name)


def bright_milesial() -> torch.nn.Module:
    """A network of milesial's structure, made by hand: bright pixels are objects.

    It expects grey values divided by 255, as that program does.
    """
    path = Path(__file__).parents[1] / "models" / "originals.py"
    spec = importlib.util.spec_from_file_location("originals", path)
    assert spec is not None
    assert spec.loader is not None
    originals = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(originals)
    network = originals.Milesial(1, 2).eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
                module.weight.zero_()
        for block in (network.inc, network.up4.conv):
            for index in (0, 3):
                block.double_conv[index].weight[0, 0, 1, 1] = 1
        network.outc.conv.weight[1, 0] = 20
        network.outc.conv.bias.copy_(torch.tensor([0.0, -10.0]))
    return network
