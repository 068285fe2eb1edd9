"""The live preview of the Facts form: what a model finds, before anything is saved."""

from __future__ import annotations

import numpy as np
import torch
from desk import intensity_model, slow_model, spots
from models_desk import bright_milesial
from napari.layers import Image
from tune_desk import Gaps, messages

from napari_unet.models.checkpoint import read_header, save_model
from napari_unet.models.library import find_model, library_dir, load_model
from napari_unet.widgets._models_overlay import paint, part_space
from napari_unet.widgets._models_preview import PIXELS


def grey_spots(*shape: int) -> np.ndarray:
    """8-bit spots of three brightnesses: 80, 150 and 250 on 10."""
    image = spots(*shape).astype(np.uint8)
    levels = np.array([80, 150, 250], np.uint8)[np.arange(shape[-1]) // 16 % 3]
    return np.where(image > 0, levels, 10).astype(np.uint8)


def found(desk) -> np.ndarray:
    """Where something is found, without the frame."""
    data = desk.viewer.layers["cells preview"].data
    return (data > 0) & (data < 255)


def test_a_checkpoint_of_others_from_file_to_objects(models_desk, tmp_path):
    """Imported, its facts answered by what the preview shows, used, segmented."""
    desk = models_desk()
    image = grey_spots(96, 96)
    desk.viewer.add_image(image, name="cells")
    file = tmp_path / "theirs.pth"
    state = bright_milesial().state_dict()
    torch.save(dict(state) | {"mask_values": [0, 255]}, file)
    desk.dock.import_file(str(file))
    desk.work()
    assert "Check its facts below" in desk.status
    assert desk.dock._fold.isExpanded()
    desk.see()
    form, preview = desk.form, desk.dock._preview
    choose = form._method
    choose.setCurrentIndex(choose.findData("fixed"))
    desk.see()
    assert np.array_equal(found(desk), image > 127)
    assert preview.status.text().startswith("24 objects here")
    form._high.setValue(100)
    desk.see()
    assert np.array_equal(found(desk), image > 50)
    form._high.setValue(5000)
    desk.see()
    assert not found(desk).any()
    assert "Nothing is found here. Try another brightness" in preview.status.text()
    form._high.setValue(255)
    form._classes[0][0].setText("spot")
    desk.click("Save facts")
    desk.work()
    labels = desk.use_and_segment("cells")
    desk.see()
    assert np.array_equal(labels > 0, found(desk))
    assert len(np.unique(labels)) == 25


def names(desk) -> list[str]:
    return [layer.name for layer in desk.viewer.layers]


def test_it_comes_and_goes_and_leaves_all_as_it_was(models_desk):
    desk = models_desk(show=True)
    layers, dock = desk.viewer.layers, desk.dock.parent()
    image = desk.viewer.add_image(spots(64, 64), name="cells")
    desk.viewer.add_points([[1, 1]], name="marks")
    layers.selection = {image}
    fold, wanted = desk.dock._fold, desk.dock._preview.wanted
    for come, go in (
        (lambda: fold.expand(animate=False), lambda: fold.collapse(animate=False)),
        (lambda: fold.expand(animate=False), lambda: wanted.setChecked(False)),
        (lambda: wanted.setChecked(True), dock.hide),
        (dock.show, lambda: desk.viewer.window.remove_dock_widget(desk.dock)),
    ):
        come()
        desk.see()
        assert names(desk) == ["cells", "marks", "cells preview"]
        assert layers.selection == {image}
        go()
        assert names(desk) == ["cells", "marks"]
        assert layers.selection == {image}


def test_who_removes_the_layer_by_hand_wants_no_preview(models_desk):
    desk = models_desk()
    desk.viewer.add_image(spots(64, 64), name="cells")
    desk.dock._fold.expand(animate=False)
    desk.see()
    desk.viewer.layers.remove("cells preview")
    assert not desk.dock._preview.wanted.isChecked()
    desk.form._high.setValue(90)
    desk.see()
    assert names(desk) == ["cells"]


def test_facts_are_followed(models_desk):
    desk = models_desk()
    image = grey_spots(64, 64)
    desk.viewer.add_image(image, name="cells", scale=(0.5, 0.5), units=("um", "um"))
    form, preview = desk.form, desk.dock._preview
    form._high.setValue(150)
    desk.dock._fold.expand(animate=False)
    desk.see()
    assert np.array_equal(found(desk), image > 50)
    # The network is not asked again where it would say the same.
    before = preview._seen.probabilities
    form._threshold.setValue(0.99)
    desk.see()
    assert preview._seen.probabilities is before
    assert np.array_equal(found(desk), image > 80)
    form._threshold.setValue(0.6)
    name, kind = form._classes[0]
    kind.setCurrentIndex(kind.findData("region"))
    name.setText("dot")
    desk.see()
    assert preview._seen.probabilities is before
    assert "% dot here" in preview.status.text()
    layer = desk.viewer.layers["cells preview"]
    assert set(np.unique(layer.data)) == {0, 1, 127}
    colour = load_model("bright").passport.classes[1].color
    assert np.allclose(layer.get_color(1)[:3], [int(colour[1:3], 16) / 255] * 3)
    desk.click("Save facts")
    desk.work()
    desk.see()
    saved = read_header(find_model("bright")).passport
    assert (saved.threshold, saved.classes[1].name) == (0.6, "dot")
    assert np.array_equal(found(desk), image > 50)
    form._high.setValue(300)
    desk.see()
    assert preview._seen.probabilities is not before
    assert np.array_equal(found(desk), image > 180)
    assert "rescaling" not in preview.status.text()
    form._size.setValue(1)
    desk.see()
    assert "rescaling by 0.50" in preview.status.text()
    form._size.setValue(0.0001)
    desk.see()
    assert "One of them is wrong" in preview.status.text()
    assert names(desk) == ["cells"]


def test_of_a_large_image_the_middle_of_the_view_is_seen(models_desk):
    desk = models_desk(show=True)
    image = np.zeros((3, 2, 2048, 2048), np.uint8)
    image[:, 1] = spots(3, 2048, 2048)
    desk.viewer.add_image(image, name="cells", axis_labels=("t", "c", "y", "x"))
    desk.dock._fold.expand(animate=False)
    desk.see()
    layer = desk.viewer.layers["cells preview"]
    assert not found(desk).any()
    (channel,) = desk.dock._preview.image._channels._boxes
    channel.setCurrentIndex(1)
    desk.see()
    assert found(desk).any()
    assert layer.data.size <= PIXELS
    assert layer.data.shape[0] == 1
    assert (layer.data[0, [0, -1]] == 255).all()
    assert "in the frame" in desk.dock._preview.status.text()
    desk.viewer.dims.set_point(0, 2)
    desk.see()
    assert layer.translate[0] == 2
    before = layer.translate[1:].copy()
    camera = getattr(desk.viewer, "scene", desk.viewer).camera  # moved in napari 0.9
    camera.center = (0, 600, 700)
    camera.zoom = 4
    desk.qtbot.waitUntil(lambda: (layer.translate[1:] != before).any(), timeout=20_000)
    desk.see()
    top, left = layer.translate[1:].astype(int)
    height, width = layer.data.shape[1:]
    part = image[2, 1, top : top + height, left : left + width]
    inside = np.s_[1:-1, 1:-1]
    assert np.array_equal(found(desk)[0][inside], (part > 50)[inside])
    status = desk.dock._preview.status
    camera.center = (0, 90_000, 90_000)
    desk.qtbot.wait(100)
    desk.form._high.setValue(90)
    desk.qtbot.waitUntil(lambda: "shows nothing" in status.text(), timeout=20_000)
    assert names(desk) == ["cells"]
    camera.center = (0, 600, 700)
    desk.qtbot.waitUntil(lambda: "cells preview" in names(desk), timeout=20_000)


def test_volumes(models_desk):
    desk = models_desk()
    save_model(intensity_model(ndim=3), library_dir() / "volumes")
    desk.dock.refresh("volumes")
    image = np.zeros((40, 160, 160), np.uint8)
    image[18:24, 70:80, 70:80] = 100
    desk.viewer.add_image(image, name="cells")
    desk.viewer.dims.set_point(0, 20)
    desk.dock._fold.expand(animate=False)
    desk.see()
    layer = desk.viewer.layers["cells preview"]
    assert layer.data.size <= PIXELS
    assert desk.dock._preview.status.text().startswith("1 object in the frame")
    box = tuple(
        slice(int(first), int(first) + n)
        for first, n in zip(layer.translate, layer.data.shape, strict=True)
    )
    assert np.array_equal(found(desk), image[box] > 0)


def test_it_says_in_words_what_is_in_its_way(models_desk):
    desk, before = models_desk(), messages()
    desk.dock._fold.expand(animate=False)
    status = desk.dock._preview.status
    desk.see()
    assert status.text() == "Open an image to see in it what the model finds."
    desk.viewer.add_image(np.zeros((32, 32, 3), np.uint8), name="colours")
    save_model(intensity_model(2), library_dir() / "two")
    save_model(intensity_model(ndim=3), library_dir() / "volumes")
    desk.dock.refresh("two")
    desk.see()
    assert "has 3 channels, but" in status.text()
    assert "expects 2 (dye 1, dye 2)" in status.text()
    desk.dock.refresh("volumes")
    desk.see()
    assert "has no Z" in status.text()
    desk.form._low.setValue(500)
    desk.see()
    assert "second must be the larger" in status.text()
    damaged = bytearray(find_model("two").read_bytes())
    damaged[-2] ^= 1
    find_model("two").write_bytes(damaged)
    desk.dock.refresh("bright")
    desk.dock.refresh("two")
    desk.see()
    assert "two.safetensors" in status.text()
    assert desk.viewer.layers == [desk.viewer.layers["colours"]]
    assert messages() == before  # nothing pops up


def test_the_viewer_stays_free_and_one_computes_at_a_time(models_desk):
    desk = models_desk()
    save_model(slow_model(), library_dir() / "slow")
    desk.dock.refresh("slow")
    desk.viewer.add_image(np.zeros((1024, 1024), np.float32), name="cells")
    preview = desk.dock._preview
    gaps = Gaps(desk.dock)
    desk.dock._fold.expand(animate=False)
    workers = set()
    for value in range(8):
        desk.form._size.setValue(value / 10)
        desk.form._high.setValue(90 + value)
        for _ in range(4):
            desk.qtbot.wait(100)
            workers.add(preview.later._worker)
    running = [worker for worker in workers - {None} if worker.is_running]
    assert len(running) <= 1
    desk.dock._fold.collapse(animate=False)
    desk.qtbot.waitUntil(lambda: not preview.later.is_busy, timeout=5000)
    assert "cells preview" not in desk.viewer.layers
    assert gaps.longest < 0.5


def test_a_part_lies_where_it_lies_in_the_image():
    random = np.random.default_rng(0)
    image = Image(
        np.zeros((2, 30, 40)),
        axis_labels=("c", "y", "x"),
        scale=(1, 0.5, 0.3),
        translate=(0, 7, -3),
        rotate=30,
        affine=np.diag([1, 2, 1.5, 1]),
    )
    region = {"Y": slice(5, 20), "X": slice(11, 31)}
    space = part_space(image, "CYX", region)
    part = Image(np.zeros((15, 20)), **space)
    for row, column in random.integers(0, 15, (5, 2)):
        there = image.data_to_world((0, row + 5, column + 11))
        assert np.allclose(part.data_to_world((row, column)), there[1:])


def test_colours_of_edges_and_insides():
    labels = np.zeros((9, 9), np.uint32)
    labels[1:8, 1:8] = 300
    painted = paint(labels, 0)
    assert painted[1, 1] == painted[7, 4] == (300 - 1) % 126 + 1
    assert painted[4, 4] == painted[1, 1] + 126
    assert not painted[0].any()
    assert set(np.unique(paint(labels // 300, 3))) == {0, 1, 127}
    many = paint(np.arange(1000, dtype=np.uint32).reshape(25, 40), 3)
    assert not np.isin(many.ravel()[4:], (1, 2, 3)).any()
