"""The Models dock in a real viewer: look, use, import, correct, rename, remove."""

from __future__ import annotations

import base64
import io
import shutil

import numpy as np
from desk import intensity_model, spots
from PIL import Image
from qtpy.QtCore import Qt
from qtpy.QtGui import QGuiApplication, QTextDocument
from qtpy.QtTest import QTest
from qtpy.QtWidgets import QFileDialog, QMenu
from tune_desk import weak_model

from napari_unet.models.checkpoint import read_header, save_model
from napari_unet.models.library import (
    find_model,
    library_dir,
    list_models,
)
from napari_unet.models.trash import remove_model
from napari_unet.sample import nuclei
from napari_unet.widgets import _session
from napari_unet.widgets._models_passport import decode_picture


def test_the_tree_and_the_passport(models_desk):
    desk = models_desk()
    assert desk.names == {"bright": {"mine": {}}, "nuclei": {}}
    assert desk.tree.chosen == "bright"
    assert desk.tree.currentItem().text(1) == "in use"
    assert desk.button("Use").toolTip() == "It is in use."
    desk.choose("mine")
    assert "spot (objects)" in desk.passport
    assert "F1 0.61 → 0.78" in desk.passport
    assert "grey values 0 to 100" in desk.passport
    desk.choose("nuclei")
    assert "Caicedo" in desk.passport
    assert desk.dock._passport.picture.pixmap().width() > 0


def test_use_hands_a_model_to_the_other_docks(models_desk):
    desk = models_desk()
    desk.choose("mine")
    desk.click("Use")
    assert not desk.button("Use").isEnabled()
    desk.work()
    assert desk.session.source == "mine"
    assert desk.session.model.passport.name == "mine"
    assert desk.chosen == "mine"
    assert desk.status == "'mine' is used now, also in the other docks."


def test_what_came_with_the_program_cannot_be_changed_and_says_so(models_desk):
    desk = models_desk()
    desk.choose("nuclei")
    for text in ("Rename", "Remove", "Save facts"):
        assert not desk.button(text).isEnabled()
        assert desk.button(text).toolTip().startswith("It came with napari-unet")
    assert not desk.tree.currentItem().flags() & Qt.ItemFlag.ItemIsEditable
    assert desk.button("Export…").isEnabled()


def test_rename_is_followed_by_the_docks_and_their_memory(models_desk):
    desk = models_desk(show=True)
    _session.remember("Segment", {"model": "bright", "objects": {"bright": {}}})
    _session.remember("Batch", {"model": "mine"})
    desk.session.objects = {"bright": {"threshold": 0.3}}
    model = desk.session.model
    desk.type_name("spots")
    assert sorted(list_models()) == ["mine", "nuclei", "spots"]
    assert desk.names == {"nuclei": {}, "spots": {"mine": {}}}
    assert desk.tree.chosen == desk.chosen == desk.session.source == "spots"
    assert desk.session.model is model
    assert desk.session.objects == {"spots": {"threshold": 0.3}}
    assert desk.offered == ["mine", "nuclei", "spots"]
    assert _session.recall("Segment") == {"model": "spots", "objects": {"spots": {}}}
    assert _session.recall("Batch") == {"model": "mine"}
    desk.click("Undo")
    assert sorted(list_models()) == ["bright", "mine", "nuclei"]
    assert desk.chosen == "bright"


def test_a_name_that_cannot_be_is_refused_in_words(models_desk):
    desk = models_desk(show=True)
    for name, words in (("nuclei", "There is a model 'nuclei'"), ("a/b", "The name")):
        desk.choose("mine")
        desk.type_name(name)
        assert desk.status.startswith(words)
        assert desk.names == {"bright": {"mine": {}}, "nuclei": {}}
        assert desk.tree.chosen == "mine"


def test_remove_and_undo(models_desk):
    desk = models_desk()
    model = desk.session.model
    desk.choose("bright")
    desk.click("Remove")
    assert desk.names == {"mine": {}, "nuclei": {}, "Removed": {"bright": {}}}
    assert "the docks still have it" in desk.status
    assert desk.session.model is model
    assert desk.offered == ["mine", "nuclei"]
    assert desk.chosen == desk.session.source == ""
    desk.click("Undo")
    assert desk.names == {"bright": {"mine": {}}, "nuclei": {}}
    assert desk.chosen == desk.session.source == desk.tree.chosen == "bright"
    assert desk.session.model is model
    assert not desk.dock._work.button.isVisible()


def test_a_removed_model_is_restored_from_the_list(models_desk):
    desk = models_desk()
    remove_model("mine")
    desk.dock.refresh()
    desk.choose("mine", "removed")
    assert "spot (objects)" in desk.passport
    assert not desk.button("Use").isEnabled()
    desk.click("Restore")
    assert desk.names == {"bright": {"mine": {}}, "nuclei": {}}
    assert "mine" in desk.offered


def test_import_and_export_through_the_dialogs(models_desk, tmp_path, monkeypatch):
    desk = models_desk()
    file = save_model(weak_model(), tmp_path / "from others.safetensors")
    before = file.read_bytes()
    monkeypatch.setattr(QFileDialog, "getOpenFileName", lambda *_: (str(file), ""))
    desk.import_by("File…")
    desk.work()
    assert desk.tree.chosen == "from others"
    assert "from others" in desk.offered
    assert "Check its facts below" in desk.status
    assert desk.dock._fold.isExpanded()
    assert file.read_bytes() == before
    out = tmp_path / "out"
    monkeypatch.setattr(QFileDialog, "getSaveFileName", lambda *_: (str(out), ""))
    desk.click("Export…")
    desk.work()
    written = tmp_path / "out.safetensors"
    assert written.read_bytes() == find_model("from others").read_bytes()


def test_a_file_that_cannot_be_imported_says_why(models_desk, tmp_path):
    desk = models_desk()
    (tmp_path / "notes.pt").write_text("no model")
    desk.dock.import_file(str(tmp_path / "notes.pt"))
    desk.work()
    assert desk.status.startswith("notes.pt ")
    assert sorted(list_models()) == ["bright", "mine", "nuclei"]
    assert desk.button("Import…").isEnabled()


def test_facts_are_saved_and_used_at_once(models_desk):
    desk = models_desk()
    desk.viewer.add_image(spots(64, 64))
    assert desk.button("Save facts").toolTip() == "Nothing was changed."
    form = desk.form
    form._classes[0][0].setText("vesicle")
    form._size.setValue(0.5)
    form._method.setCurrentIndex(form._method.findData("percentile"))
    assert (form._low.value(), form._high.value()) == (1, 99.8)
    form._citation.setText("Me <me@example.org>, CC0")
    desk.click("Save facts")
    desk.work()
    passport = read_header(find_model("bright")).passport
    assert passport.classes[1].name == "vesicle"
    assert passport.pixel_size == (0.5, 0.5)
    assert passport.normalization.method == "percentile"
    assert passport.citation == "Me <me@example.org>, CC0"
    assert "Me &lt;me@example.org&gt;" in desk.passport
    assert desk.session.model.passport == passport
    assert desk.names["bright"] == {"mine": {}}
    assert not desk.button("Save facts").isEnabled()


def test_facts_that_cannot_be_are_not_saved(models_desk):
    desk = models_desk()
    form = desk.form
    form._low.setValue(300)
    assert "second must be the larger" in form.save.toolTip()
    form._method.setCurrentIndex(form._method.findData("percentile"))
    form._high.setValue(101)
    assert form.save.toolTip() == "Percentiles lie between 0 and 100."
    assert not form.save.isEnabled()


def test_facts_of_volumes(models_desk):
    desk = models_desk()
    save_model(intensity_model(2, ndim=3), library_dir() / "volumes")
    desk.dock.refresh("volumes")
    form = desk.form
    form._size.setValue(0.25)
    assert form.save.toolTip().startswith("Give both the plane distance")
    form._depth.setValue(2)
    form._channels[1].setText("DAPI")
    desk.click("Save facts")
    desk.work()
    passport = read_header(find_model("volumes")).passport
    assert passport.pixel_size == (2, 0.25, 0.25)
    assert passport.channels == ("dye 1", "DAPI")


def test_a_broken_file_is_shown_with_its_reason(models_desk):
    desk = models_desk()
    (library_dir() / "broken.safetensors").write_bytes(b"nothing")
    desk.dock.refresh("broken")
    assert desk.tree.currentItem().text(1) == "cannot be used"
    assert desk.passport.startswith("⚠ broken.safetensors is not")
    assert not desk.button("Use").isEnabled()
    desk.click("Remove")
    assert "broken" in desk.names["Removed"]


def test_a_model_that_vanishes_is_no_trouble(models_desk):
    desk = models_desk()
    desk.choose("mine")
    find_model("mine").unlink()
    desk.click("Use")
    desk.work()
    assert desk.status.startswith("There is no model 'mine'")
    assert desk.session.source == "bright"
    desk.dock.refresh()
    assert desk.tree.chosen == "bright"


def test_a_library_without_any_model(models_desk, monkeypatch, tmp_path):
    desk = models_desk()
    shutil.rmtree(library_dir())
    monkeypatch.setattr("napari_unet.models.library.BUNDLED", tmp_path)
    desk.dock.refresh()
    assert desk.names == {}
    assert not desk.button("Use").isEnabled()
    assert desk.button("Import…").isEnabled()


def test_import_then_segment(models_desk, tmp_path):
    """From a file of others to objects in the viewer."""
    desk = models_desk()
    desk.viewer.add_image(spots(64, 64), name="cells")
    desk.dock.import_file(str(save_model(intensity_model(), tmp_path / "given")))
    desk.work()
    desk.form._classes[0][0].setText("vesicle")
    desk.click("Save facts")
    desk.work()
    labels = desk.use_and_segment("cells")
    assert len(np.unique(labels)) == 17


def test_a_real_checkpoint_of_others_finds_nuclei(models_desk, shared_data):
    """It is imported, the form is answered, Segment works."""
    desk = models_desk()
    image, kwargs, _ = nuclei()[0]
    desk.viewer.add_image(image, **kwargs)
    desk.dock.import_file(str(shared_data / "checkpoints" / "segmentify_Nuclei.pth"))
    desk.work()
    assert "Check its facts below" in desk.status
    assert "Not known" in desk.passport
    desk.see()
    layer, form = desk.viewer.layers["nuclei preview"], desk.form
    right, method = layer.data.copy(), form._method.currentIndex()
    form._method.setCurrentIndex(form._method.findData("mean_std"))
    desk.see()
    assert np.mean((layer.data > 0) != (right > 0)) > 0.2  # as wrong as can be
    form._method.setCurrentIndex(method)
    form._low.setValue(0)
    form._high.setValue(100)
    desk.see()
    assert np.array_equal(layer.data, right)
    desk.form._classes[0][0].setText("nucleus")
    desk.form._channels[0].setText("DAPI")
    desk.form._diameter.setValue(20)
    desk.click("Save facts")
    desk.work()
    assert "nucleus (objects)" in desk.passport
    labels = desk.use_and_segment("nuclei", timeout=60_000)
    assert 40 < len(np.unique(labels)) < 100


def test_removing_the_base_of_a_new_network_changes_nothing(tune_desk):
    desk = tune_desk()
    chooser = desk.dock._chooser
    chooser.choose("", 3)
    desk.session.library_changed.emit("weak", "")
    assert chooser.new_ndim == 3


def test_long_words_of_a_passport_go_on_in_the_next_line(models_desk):
    desk = models_desk()
    address = "https://doi.org/10.1007/978-3-319-24574-4_28/" + "x" * 60
    desk.form._citation.setText(address)
    desk.click("Save facts")
    desk.work()
    assert address in desk.passport.replace("\u200b", "")
    label = desk.dock._passport.text
    label.resize(300, 1000)
    text = QTextDocument()
    text.setDefaultFont(label.font())
    text.setHtml(label.text())
    text.setTextWidth(300)
    assert text.idealWidth() <= 300


def test_what_is_copied_has_no_breaks_in_it(models_desk):
    desk = models_desk()
    address = "https://doi.org/10.1007/978-3-319-24574-4_28"
    desk.form._citation.setText(address)
    desk.click("Save facts")
    desk.work()
    label = desk.dock._passport.text
    label.setFocus()
    QTest.keyClick(label, Qt.Key.Key_A, Qt.KeyboardModifier.ControlModifier)
    assert "\u200b" in label.selectedText()
    (menu_copy,) = label.findChild(QMenu).actions()
    clipboard = QGuiApplication.clipboard()
    for copy in (
        menu_copy.trigger,
        lambda: QTest.keyClick(
            label, Qt.Key.Key_C, Qt.KeyboardModifier.ControlModifier
        ),
    ):
        clipboard.setText("before")
        copy()
        lines = clipboard.text().splitlines()
        assert address in lines
        assert "\u200b" not in clipboard.text()


def test_pictures_of_others_are_no_danger():
    def png(side):
        content = io.BytesIO()
        Image.new("L", (side, side)).save(content, "png")
        return base64.b64encode(content.getvalue()).decode()

    assert decode_picture(png(96)).width() == 64
    assert decode_picture(png(5000)) is None
    for text in ("", "nonsense", "é", png(96)[:60]):
        assert decode_picture(text) is None
