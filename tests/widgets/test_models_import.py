"""Bringing models into the library by the Models dock, programs with consent only."""

from __future__ import annotations

import os
import threading
import time
import warnings
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from desk import intensity_model
from models_desk import bright_milesial
from onnx_files import node, onnx_file, tensor, value_info
from qtpy.QtCore import QMimeData, QPointF, Qt, QTimer, QUrl
from qtpy.QtGui import QDragEnterEvent, QDropEvent
from qtpy.QtWidgets import QApplication, QFileDialog, QMessageBox
from tune_desk import weak_model

from napari_unet.models.checkpoint import save_model
from napari_unet.models.library import (
    find_model,
    import_model,
    library_dir,
    list_models,
    load_model,
)
from napari_unet.sample import nuclei
from napari_unet.steps import Progress
from napari_unet.widgets import _models_import
from napari_unet.widgets._models_import import is_address

BEFORE = ["bright", "mine", "nuclei"]


@pytest.fixture
def script(tmp_path):
    """Save a TorchScript file of a network that finds bright pixels."""
    file = tmp_path / "script.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is on its way out
        traced = torch.jit.trace(bright_milesial(), torch.zeros(1, 1, 32, 32))
        torch.jit.save(traced, file)
    return file


class Answer:
    """Answers the next dialog by one of its buttons."""

    def __init__(self, text: str):
        self._text = text
        self.words = self.default = ""
        self._timer = QTimer()
        self._timer.setInterval(20)
        self._timer.timeout.connect(self._look)
        self._timer.start()

    def _look(self) -> None:
        box = QApplication.activeModalWidget()
        if not isinstance(box, QMessageBox):
            return
        self._timer.stop()
        self.words = f"{box.text()}\n{box.informativeText()}"
        self.default = box.defaultButton().text().replace("&", "")
        buttons = {b.text().replace("&", ""): b for b in box.buttons()}
        buttons[self._text].click()


def files() -> list[str]:
    return sorted(os.listdir(library_dir()))


def test_a_program_is_converted_with_consent_only(models_desk, script):
    desk = models_desk()
    before, shown = files(), desk.names
    answer = Answer("Cancel")
    desk.dock.import_file(str(script))
    desk.qtbot.waitUntil(lambda: bool(answer.words), timeout=30_000)
    desk.work()
    assert answer.default == "Cancel"
    assert answer.words.startswith("script.pt: ")
    assert "can do what you can do" in answer.words
    assert desk.status == "script.pt was not imported."
    assert files() == before
    assert desk.names == shown
    assert desk.tree.chosen == "bright"
    assert not desk.dock._fold.isExpanded()
    # With consent it can still be stopped.
    answer = Answer("Convert anyway")
    desk.dock.import_file(str(script))
    button = desk.dock._work.button
    desk.qtbot.waitUntil(
        lambda: "Taking the weights out of script.pt" in desk.status, timeout=30_000
    )
    assert not button.isHidden()
    assert button.text() == "Cancel"
    button.click()
    desk.work()
    assert desk.status == "Cancelled. All is as it was."
    assert files() == before
    answer = Answer("Convert anyway")
    desk.dock.import_file(str(script))
    desk.qtbot.waitUntil(lambda: bool(answer.words), timeout=30_000)
    desk.work()
    assert desk.tree.chosen == "script"
    assert "milesial" in desk.passport
    assert "Check its facts below" in desk.status
    assert sorted(list_models()) == sorted([*BEFORE, "script"])


def drop(desk, mime: QMimeData) -> bool:
    """Drag something onto the dock, and let it go there; tell whether it is taken."""
    where, copy = QPointF(50, 50), Qt.DropAction.CopyAction
    button, none = Qt.MouseButton.LeftButton, Qt.KeyboardModifier.NoModifier
    viewport = desk.dock.viewport()
    enter = QDragEnterEvent(where.toPoint(), copy, mime, button, none)
    enter.setAccepted(False)
    QApplication.sendEvent(viewport, enter)
    if enter.isAccepted():
        QApplication.sendEvent(viewport, QDropEvent(where, copy, mime, button, none))
    return enter.isAccepted()


def test_what_is_dropped_is_imported_one_after_the_other(
    models_desk, tmp_path, monkeypatch
):
    desk = models_desk()
    paths = [save_model(weak_model(), tmp_path / name) for name in ("one", "two")]
    mime = QMimeData()
    mime.setUrls([QUrl.fromLocalFile(str(path)) for path in paths])
    assert drop(desk, mime)
    desk.qtbot.waitUntil(lambda: len(list_models()) == 5, timeout=30_000)
    desk.work()
    assert sorted(list_models()) == sorted([*BEFORE, "one", "two"])
    words = QMimeData()
    words.setText("just words")
    assert not drop(desk, words)
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.setattr(QFileDialog, "getExistingDirectory", lambda *_: str(folder))
    desk.import_by("Folder…")
    desk.work()
    assert "empty" in desk.status
    assert len(list_models()) == 5


def test_who_cancels_at_the_very_end_finds_the_model(models_desk, monkeypatch):
    desk = models_desk()
    saved = threading.Event()

    def import_steps(source):
        yield Progress(0, 1)
        save_model(intensity_model(), library_dir() / "late")
        saved.set()
        return "late"

    def cancel_late(step):
        saved.wait(30)
        time.sleep(0.2)  # until the result waits for this thread
        desk.click("Cancel")

    monkeypatch.setattr(_models_import, "ask_first_steps", import_steps)
    monkeypatch.setattr(desk.dock._work, "_on_progress", cancel_late)
    desk.dock.import_file("late")
    desk.work()
    assert "late" in desk.names
    assert desk.segment._chooser._list.findText("late") >= 0


def test_addresses():
    assert is_address("https://example.org/model.zip")
    assert is_address(" http://example.org/rdf.yaml\n")
    for text in ("", "example.org", "file:///etc/passwd", "https://a b", "ftp://x"):
        assert not is_address(text)


def test_an_address_is_fetched_when_the_user_says_so(models_desk, shared_data, qtbot):
    """A package of the web, here of this computer, becomes a model."""
    pytest.importorskip("bioimageio.spec")
    folder = shared_data / "checkpoints" / "bioimageio_unet2d_fixed_shape"
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            asked.append(self.path)

    serve = partial(Handler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            desk = models_desk(show=True)
            row = desk.dock._address
            assert not row.isVisible()
            desk.import_by("Address…")
            assert row.isVisible()
            assert not row.get.isEnabled()
            address = f"http://127.0.0.1:{server.server_port}/v0_4.bioimageio.yaml"
            qtbot.keyClicks(row.line, address)
            assert not asked
            row.get.click()
            desk.work()
        finally:
            server.shutdown()
            thread.join()
    assert asked
    (new,) = set(list_models()) - set(BEFORE)
    assert desk.tree.chosen == new
    assert "Check its facts below" in desk.status


def test_a_package_that_runs_as_it_is(models_desk, shared_data, monkeypatch):
    """An ONNX network of bioimage.io: imported, corrected, used, segmented."""
    for library in ("bioimageio.spec", "onnxruntime"):
        pytest.importorskip(library)
    folder = shared_data / "checkpoints" / "bioimageio_unet2d_nuclei_broad"
    desk = models_desk()
    image, kwargs, _ = nuclei()[0]
    desk.viewer.add_image(image, **kwargs)
    monkeypatch.setattr(QFileDialog, "getExistingDirectory", lambda *_: str(folder))
    desk.import_by("Folder…")
    desk.work()
    assert desk.tree.chosen == "UNet 2D Nuclei Broad"
    desk.see()
    assert " objects " in desk.dock._preview.status.text()
    desk.form._threshold.setValue(0.6)
    desk.click("Save facts")
    desk.work()
    assert "threshold 0.6" in desk.passport
    labels = desk.use_and_segment("nuclei", timeout=60_000)
    assert 30 < len(np.unique(labels)) < 100
    # The other docks open it from where it is, too.
    desk.segment._chooser.open_checkpoint(str(folder))
    desk.work()
    assert desk.chosen == desk.session.source == str(folder)


def test_a_package_is_exported_by_the_dialog(models_desk, tmp_path, monkeypatch):
    pytest.importorskip("bioimageio.spec")
    desk = models_desk()
    asked = tmp_path / "out.safetensors", "bioimage.io package (*.zip)"
    answer = (str(asked[0]), asked[1])
    monkeypatch.setattr(QFileDialog, "getSaveFileName", lambda *_: answer)
    written = tmp_path / "out.zip"
    written.write_bytes(b"somebody else's")
    desk.click("Export…")
    desk.work()
    assert "exists already" in desk.status  # the dialog has not asked about that
    assert written.read_bytes() == b"somebody else's"
    written.unlink()
    desk.click("Export…")
    desk.work()
    assert desk.status == f"'bright' was saved as {written}."
    desk.dock.import_file(str(written))
    desk.work()
    again, before = load_model(desk.tree.chosen), load_model("bright")
    assert again.network.config == before.network.config
    assert again.passport.classes == before.passport.classes


def test_no_package_is_offered_of_a_network_that_runs_as_it_is(
    models_desk, tmp_path, monkeypatch
):
    pytest.importorskip("onnxruntime")
    desk = models_desk()
    asked = []
    monkeypatch.setattr(
        QFileDialog, "getSaveFileName", lambda *said: asked.append(said[-1]) or ("", "")
    )
    scale = tensor("w", np.ones((1, 1, 1, 1), np.float32))
    image, result = ([value_info(name, [1, 1, None, None])] for name in "xy")
    graph = onnx_file([node("Conv", ["x", "w"], ["y"])], [scale], image, result)
    (tmp_path / "theirs.onnx").write_bytes(graph)
    desk.dock.import_file(str(tmp_path / "theirs.onnx"))
    desk.work()
    assert desk.tree.chosen == "theirs", desk.status
    assert "cannot be made of a network that runs as it is" in (
        desk.button("Export…").toolTip()
    )
    desk.click("Export…")
    desk.choose("bright")
    desk.click("Export…")
    assert ["*.zip" in filters for filters in asked] == [False, True]


def test_a_training_does_not_replace_what_was_imported_meanwhile(tune_desk, tmp_path):
    on = tune_desk()
    on.add_cells()
    on.annotate()
    on.dock._options.steps.value, on.dock._options.every.value = 6, 3
    file = save_model(weak_model(), tmp_path / "given")
    on.train()
    on.wait_for_step()
    import_model(file, "weak-mine")
    before = find_model("weak-mine").read_bytes()
    on.wait_until(lambda: on.dock._learning.has_result)
    on.wait_until(lambda: not on.dock._learning.is_running)
    assert find_model("weak-mine").read_bytes() == before
    assert "'weak-mine-2' is in the library" in on.status
    assert "Another 'weak-mine' has come there" in on.status
    on.dock._learning.outcome.use.click()
    assert on.session.source == "weak-mine-2"
    assert on.session.model.passport.name == "weak-mine-2"
    assert on.stopped.isHidden()
