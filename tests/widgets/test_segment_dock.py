from __future__ import annotations

import threading
import time
import warnings

import numpy as np
import pytest
from desk import intensity_model, slow_model, spots
from napari.utils.notifications import notification_manager

from napari_unet import Model, UNet
from napari_unet.inference.backends import Backend
from napari_unet.models.checkpoint import save_model
from napari_unet.training.scores import score_images
from napari_unet.widgets import segment as segment_module
from napari_unet.widgets._session import Session, recall
from napari_unet.widgets.segment import SegmentWidget


def engine_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("napari-unet")]


def messages() -> list[str]:
    return [str(note.message) for note in notification_manager.records]


def test_open_sample_and_segment(make_napari_viewer, qtbot):
    """The main job, from the menu to the objects, with the bundled model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        viewer = make_napari_viewer()
    viewer.open_sample("napari-unet", "nuclei")
    _, dock = viewer.window.add_plugin_dock_widget("napari-unet", "Segment")
    assert isinstance(dock, SegmentWidget)
    qtbot.waitUntil(dock._job.start.isEnabled, timeout=20_000)
    dock._job.start.click()
    qtbot.waitUntil(lambda: "nuclei objects" in viewer.layers, timeout=60_000)
    qtbot.waitUntil(dock._job.start.isEnabled, timeout=20_000)
    found, true = viewer.layers["nuclei objects"], viewer.layers["nuclei true labels"]
    scores = score_images([(true.data, found.data)])
    assert scores.at(0.5).average_precision >= 0.8
    np.testing.assert_allclose(found.scale, viewer.layers["nuclei"].scale)
    assert found.units == viewer.layers["nuclei"].units
    assert len(found.features) == found.data.max()
    assert list(found.features["index"]) == list(range(1, found.data.max() + 1))
    assert f"{found.data.max()} objects" in dock._objects.count.text()


def test_segment_twice_updates_the_same_layer(desk):
    on = desk()
    on.viewer.add_image(spots(64, 64), name="cells")
    on.segment()
    first = on.labels
    assert first.data.max() == 16
    on.segment()
    assert on.labels is first
    assert len(on.viewer.layers) == 2


def test_a_click_shows_what_was_hidden_and_a_slider_does_not(desk):
    on = desk()
    on.viewer.add_image(spots(64, 64), name="cells")
    on.segment()
    on.labels.visible = False
    on.dock._objects._smallest.setValue(40)
    on.wait_until(lambda: not on.labels.data.any())
    assert not on.labels.visible
    on.segment()
    assert on.labels.visible


def test_rerun_follows_the_image(desk):
    on = desk()
    image = on.viewer.add_image(spots(64, 64), name="cells")
    on.segment()
    first = on.labels
    image.scale = (0.5, 0.25)
    image.translate = (3, 4)
    image.data = spots(48, 80)
    on.segment()
    assert on.labels is first
    assert first.data.shape == (48, 80)
    np.testing.assert_array_equal(first.scale, (0.5, 0.25))
    np.testing.assert_array_equal(first.translate, (3, 4))


def test_each_image_keeps_its_labels_layer(desk):
    on = desk()
    one = on.viewer.add_image(spots(64, 64), name="one")
    on.segment()
    two = on.viewer.add_image(spots(48, 48), name="two")
    on.segment()
    on.viewer.layers.selection.active = one
    on.segment()
    on.viewer.layers.selection.active = two
    on.segment()
    names = [layer.name for layer in on.viewer.layers]
    assert sorted(names) == ["one", "one objects", "two", "two objects"]


def test_long_names_fit_into_the_dock(desk):
    on = desk(intensity_model(channels=2), show=True)
    for number in "12":
        on.viewer.add_image(spots(64, 64), name=30 * "long" + number)
    on.qtbot.wait(100)
    assert on.dock.widget().width() <= on.dock.viewport().width()


def test_labels_follow_while_a_slider_is_dragged(desk):
    on = desk()
    image = spots(64, 64)
    image[:32][image[:32] > 0] = 55
    on.viewer.add_image(image)
    on.segment()
    seen = []
    on.labels.events.data.connect(lambda event: seen.append(event))
    for step in range(30):
        on.dock._objects._threshold.setValue(0.6 + step / 100)
        on.qtbot.wait(30)
    assert len(seen) >= 3
    on.wait_until(lambda: on.labels.data.max() == 8, 5)


def test_sliders_work_after_a_cancelled_run_on_another_image(desk):
    on = desk()
    image = spots(64, 64)
    image[:32][image[:32] > 0] = 55
    on.viewer.add_image(image, name="cells")
    on.segment()
    noise = np.random.default_rng(0).random((2048, 2048), np.float32)
    on.viewer.add_image(noise, name="other")
    on.session.model = slow_model()
    on.click_segment()
    on.wait_until(on.button("Cancel").isEnabled)
    on.button("Cancel").click()
    on.wait_for_end()
    assert "as they were" in on.status
    on.dock._objects._threshold.setValue(0.9)
    on.wait_until(lambda: on.viewer.layers["cells objects"].data.max() == 8, 5)


def test_one_job_for_two_docks(desk):
    on = desk(slow_model())
    second = SegmentWidget(on.viewer, on.session)
    on.viewer.add_image(np.random.default_rng(0).random((600, 600), np.float32))
    on.click_segment()
    assert not second._job.start.isEnabled()
    assert "under way" in second._job.start.toolTip()
    on.wait_for_end()
    assert second._job.start.isEnabled()
    second.deleteLater()


def test_new_layer_on_request(desk):
    on = desk()
    on.viewer.add_image(spots(64, 64))
    on.dock._new_layer.value = True
    on.segment()
    on.segment()
    assert len(on.viewer.layers) == 3


def test_painted_labels_are_kept(desk):
    on = desk()
    on.viewer.add_image(spots(64, 64), name="cells")
    on.segment()
    mine = on.labels
    mine.selected_label = 99
    mine.paint((40, 40), 99)
    painted = mine.data.copy()
    on.segment()
    np.testing.assert_array_equal(mine.data, painted)
    assert len(on.viewer.layers) == 3
    assert "kept" in on.status


def test_it_is_said_what_computed(desk):
    on = desk()
    on.viewer.add_image(spots(64, 64))
    on.dock._device.value = "cpu"
    on.segment()
    assert "s (cpu, OpenVINO, " in on.status


def test_memory_is_limited_on_request(desk, monkeypatch):
    run, tiles = Backend.run, []

    def spy(self, image, keep, **options):
        tiles.append(image.shape)
        return run(self, image, keep, **options)

    monkeypatch.setattr(Backend, "run", spy)
    on = desk(Model(UNet(1, 2, base_channels=8, depth=2)))
    on.viewer.add_image(spots(1200, 1200))
    on.segment()
    assert len(tiles) == 1
    on.dock._memory_limit.value = 0.1
    on.segment()
    assert len(tiles) > 2
    assert desk().dock._memory_limit.value == 0.1  # it is remembered


def test_sliders_change_labels_without_the_network(desk, monkeypatch):
    on = desk()
    image = spots(64, 64)
    image[:32][image[:32] > 0] = 55  # p = 0.73 instead of 1
    on.viewer.add_image(image)
    on.segment()
    assert on.labels.data.max() == 16
    monkeypatch.setattr(Backend, "run", None)
    on.dock._objects._threshold.setValue(0.9)
    on.wait_until(lambda: on.labels.data.max() == 8, 5)
    on.dock._objects._threshold.setValue(0.5)
    on.wait_until(lambda: on.labels.data.max() == 16, 5)
    on.dock._objects._smallest.setValue(40)
    on.wait_until(lambda: on.labels.data.max() == 0, 5)
    assert "0 objects" in on.dock._objects.count.text()


def test_cancel_acts_within_a_second(desk):
    on = desk(slow_model())
    on.viewer.add_image(np.random.default_rng(0).random((2048, 2048), np.float32))
    on.click_segment()
    on.wait_until(on.button("Cancel").isEnabled)
    on.wait_until(lambda: len(engine_threads()) > 0)
    time.sleep(0.3)  # into the first tile
    started = time.monotonic()
    on.button("Cancel").click()
    on.wait_for_end()
    assert time.monotonic() - started < 1
    assert "Cancelled" in on.status
    assert len(on.viewer.layers) == 1
    on.wait_until(lambda: not engine_threads(), 5)
    # The second click works.
    on.session.model = intensity_model()
    on.segment()
    assert len(on.viewer.layers) == 2


@pytest.mark.parametrize("change", ["delete", "rename", "clear", "replace data"])
def test_layers_may_change_during_a_run(desk, change):
    on = desk(slow_model())
    layer = on.viewer.add_image(
        np.random.default_rng(0).random((300, 300), np.float32),
        name="cells",
        scale=(2, 3),
    )
    on.click_segment()
    on.wait_until(on.button("Cancel").isEnabled)
    if change == "delete":
        on.viewer.layers.remove(layer)
    elif change == "rename":
        layer.name = "renamed"
    elif change == "clear":
        on.viewer.layers.clear()
    else:
        layer.data = np.zeros((300, 300), np.float32)
    on.wait_for_end()
    assert on.labels.name == "cells objects"
    np.testing.assert_array_equal(on.labels.scale, (2, 3))
    assert ("has changed" in on.status) == (change == "replace data")
    if change == "rename":
        assert on.image_names() == ["renamed"]
    if change in ("delete", "clear"):
        assert not on.button("Segment").isEnabled()
        assert "no image layer" in on.button("Segment").toolTip()


def test_dims_may_change_during_a_run(desk):
    on = desk(slow_model())
    on.viewer.add_image(np.random.default_rng(0).random((3, 200, 200), np.float32))
    on.click_segment()
    on.wait_until(on.button("Cancel").isEnabled)
    on.viewer.dims.ndisplay = 3
    on.viewer.dims.set_point(0, 2)
    on.viewer.dims.order = (2, 1, 0)
    on.wait_for_end()
    assert on.labels.data.shape == (3, 200, 200)


def test_twenty_clicks_are_one_job(desk):
    on = desk()
    on.viewer.add_image(spots(256, 256))
    on.wait_until(on.button("Segment").isEnabled)
    for _ in range(20):
        on.button("Segment").click()
        on.dock._segment()
    on.wait_for_end()
    assert len(on.viewer.layers) == 2


def test_slices_and_views_add_up(desk):
    on = desk(show=True)
    on.viewer.add_image(spots(3, 64, 64), name="stack")
    on.viewer.dims.set_point(0, 1)
    on.choose_scope("slice")
    on.segment()
    counts = [len(np.unique(plane)) - 1 for plane in on.labels.data]
    assert counts == [0, 16, 0]
    on.viewer.dims.set_point(0, 2)
    on.segment()
    counts = [len(np.unique(plane)) - 1 for plane in on.labels.data]
    assert counts == [0, 16, 16]
    assert on.labels.data.max() == 32  # numbers run on
    on.viewer.dims.set_point(0, 0)
    camera = getattr(on.viewer, "scene", on.viewer).camera  # moved in napari 0.9
    camera.center = (0, 16, 16)
    camera.zoom = 40
    image = on.viewer.layers["stack"]
    on.wait_until(lambda: image.corner_pixels[1][1] < 50)  # when it is drawn
    on.choose_scope("view")
    on.segment()
    seen = len(np.unique(on.labels.data[0])) - 1
    assert 0 < seen < 16
    on.choose_scope("all")
    on.segment()
    assert on.labels.data.max() == 48


def test_view_of_a_volume_is_all_of_it_in_z(desk):
    on = desk(intensity_model(ndim=3), show=True)
    on.viewer.add_image(spots(5, 64, 64))
    on.viewer.dims.set_point(0, 3)
    on.choose_scope("view")
    on.segment()
    assert (on.labels.data.max(axis=(1, 2)) == 16).all()


def test_view_in_a_rolled_display(desk):
    on = desk(show=True)
    image = on.viewer.add_image(spots(64, 64, 64))
    on.viewer.dims.order = (1, 0, 2)
    on.qtbot.wait(100)
    on.choose_scope("view")
    region = on.dock._region(image, on.session.model)
    assert region["Y"] == slice(0, 64)


def test_view_beside_the_image(desk):
    on = desk(show=True)
    image = on.viewer.add_image(spots(64, 64))
    camera = getattr(on.viewer, "scene", on.viewer).camera
    camera.center = (0, 5000, 5000)
    on.wait_until(lambda: image.corner_pixels[0][1] == 63)
    on.choose_scope("view")
    on.segment()
    assert "move the view onto the image" in on.status
    assert len(on.viewer.layers) == 1


def test_flipped_image_has_a_positive_area(desk):
    on = desk()
    on.viewer.add_image(spots(64, 64), scale=(-0.5, 0.5))
    on.segment()
    assert (on.labels.features["area (µm²)"] == 36 * 0.25).all()


def test_labels_lie_on_the_image(desk):
    on = desk()
    image = on.viewer.add_image(
        spots(2, 48, 48),
        scale=(2, 0.5, 0.5),
        translate=(10, 20, 30),
        rotate=(0, 0, 30),
        shear=(0.1, 0.2, 0.3),
        affine=np.array([[1, 0, 0, 5], [0, 1.1, 0, 6], [0, 0, 1.2, 7], [0, 0, 0, 1]]),
        units=("s", "um", "um"),
        axis_labels=("t", "y", "x"),
    )
    on.segment()
    for name in ("scale", "translate", "rotate", "shear"):
        np.testing.assert_allclose(getattr(on.labels, name), getattr(image, name))
    np.testing.assert_allclose(
        on.labels.affine.affine_matrix, image.affine.affine_matrix
    )
    assert on.labels.units == image.units
    assert on.labels.axis_labels == image.axis_labels
    corner = (1, 40, 40)
    np.testing.assert_allclose(
        on.labels.data_to_world(corner), image.data_to_world(corner)
    )
    assert "area (µm²)" in on.labels.features
    np.testing.assert_allclose(on.labels.features["area (µm²)"], 36 * 0.25)


def test_multiscale_uses_the_finest_level(desk):
    on = desk()
    image = spots(128, 128)
    on.viewer.add_image([image, image[::2, ::2]], multiscale=True)
    on.segment()
    assert on.labels.data.shape == (128, 128)
    assert on.labels.data.max() == 64


def test_rgb_layer(desk):
    on = desk()
    gray = spots(64, 64)
    on.viewer.add_image(np.stack([gray, gray, gray], axis=-1), rgb=True)
    on.segment()
    assert on.labels.data.shape == (64, 64)
    assert on.labels.data.max() == 16
    assert "gray" in on.status


def test_channels_from_separate_layers(desk):
    on = desk(intensity_model(channels=2))
    on.viewer.add_image(np.zeros((64, 64), np.uint8), name="red")
    on.viewer.add_image(spots(64, 64), name="green")
    boxes = on.dock._image._channels._boxes
    assert [box.count() for box in boxes] == [2, 2]
    boxes[0].setCurrentText("red")
    boxes[1].setCurrentText("green")
    on.segment()
    assert on.labels.data.max() == 16
    boxes[0].setCurrentText("green")
    boxes[1].setCurrentText("red")
    on.segment()
    assert on.labels.data.max() == 0


def test_chosen_channels_stay(desk):
    on = desk(intensity_model(channels=2))
    first = on.viewer.add_image(np.zeros((64, 64), np.uint8), name="first")
    second = on.viewer.add_image(spots(64, 64), name="second")
    boxes = on.dock._image._channels._boxes
    boxes[0].setCurrentText("first")
    boxes[1].setCurrentText("second")
    first.name = "renamed"
    on.viewer.add_image(spots(64, 64), name="third")
    assert on.dock._image.channels == (first, second)
    boxes = on.dock._image._channels._boxes
    assert [box.currentText() for box in boxes] == ["renamed", "second"]


@pytest.mark.parametrize(
    ("shape", "rgb", "axes", "words"),
    [
        ((3, 64, 64), False, "SYX", "Only an RGB layer"),
        ((64, 64, 3), True, "YXC", "its last axis is S"),
        ((64, 64), False, "YXZ", "2 axes"),
        ((64, 64), False, "", "2 axes"),
    ],
)
def test_wrong_axes_are_explained(desk, shape, rgb, axes, words):
    on = desk()
    on.viewer.add_image(np.zeros(shape, np.uint8), rgb=rgb)
    on.dock._image._axes.setText(axes)
    on.dock._image._axes.textEdited.emit(axes)
    assert words in on.dock._about.text()
    assert not on.button("Segment").isEnabled()


def test_channel_of_one_layer(desk):
    on = desk()
    image = np.stack([np.zeros((64, 64), np.uint8), spots(64, 64)])
    on.viewer.add_image(image, axis_labels=("c", "y", "x"))
    (box,) = on.dock._image._channels._boxes
    assert [box.itemText(i) for i in range(2)] == ["channel 1", "channel 2"]
    box.setCurrentIndex(1)
    on.segment()
    assert on.labels.data.shape == (64, 64)
    assert on.labels.data.max() == 16


def test_axes_can_be_corrected(desk):
    on = desk(intensity_model(ndim=3))
    on.viewer.add_image(spots(5, 64, 64))
    assert on.dock._image.axes == "ZYX"
    on.segment()
    assert on.labels.data.max() == 16  # columns through the volume
    on.dock._image._axes.setText("TYX")
    on.dock._image._axes.textEdited.emit("TYX")
    assert not on.button("Segment").isEnabled()
    assert "has no Z" in on.dock._about.text()


def test_chooser_follows_the_viewer(desk):
    on = desk()
    first = on.viewer.add_image(spots(64, 64), name="first")
    assert on.dock._image.layer is first
    second = on.viewer.add_image(spots(64, 64), name="second")
    assert on.dock._image.layer is second
    on.viewer.layers.selection.active = first
    assert on.dock._image.layer is first
    on.viewer.add_labels(spots(64, 64), name="not an image")
    assert on.dock._image.layer is first
    on.viewer.layers.remove(first)
    assert on.dock._image.layer is second


def test_axes_are_guessed(desk):
    on = desk()
    for shape, more, axes in (
        ((8, 8), {}, "YX"),
        ((3, 8, 8), {}, "ZYX"),
        ((3, 8, 8), {"units": ("min", "um", "um")}, "TYX"),
        ((3, 8, 8), {"axis_labels": ("channel", "y", "x")}, "CYX"),
        ((2, 3, 8, 8), {}, "TZYX"),
        ((2, 2, 3, 8, 8), {}, "TCZYX"),
        ((8, 8, 3), {"rgb": True}, "YXS"),
    ):
        on.viewer.add_image(np.zeros(shape, np.uint8), **more)
        assert on.dock._image.axes == axes
        on.viewer.layers.clear()


def test_probabilities_as_a_layer(desk):
    on = desk()
    on.viewer.add_image(spots(64, 64), name="cells", scale=(2, 2))
    on.dock._show_probabilities.value = True
    on.segment()
    on.segment()
    layers = [x for x in on.viewer.layers if "probability" in x.name]
    assert [x.name for x in layers] == ["cells spot probability"]
    np.testing.assert_array_equal(layers[0].data > 127, spots(64, 64) > 0)


def test_broken_checkpoint_leaves_the_model(desk, tmp_path):
    on = desk()
    before = on.session.model
    good = save_model(before, tmp_path / "good.safetensors")
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(good.read_bytes()[:-100])
    on.viewer.add_image(spots(64, 64))
    on.dock._chooser.open_checkpoint(str(bad))
    on.wait_until(lambda: not on.dock._chooser.loading)
    assert on.session.model is before
    assert any("incomplete" in text for text in messages())
    on.dock._chooser.open_checkpoint(str(good))
    on.wait_until(lambda: on.session.model is not before)
    on.segment()
    assert on.labels.data.max() == 16


def test_engine_errors_are_words_and_the_button_comes_back(desk):
    on = desk()
    on.viewer.add_image(np.full((64, 64), np.nan))
    on.segment()
    assert "no finite pixels" in on.status
    assert any("no finite pixels" in text for text in messages())
    assert on.button("Segment").isEnabled()


@pytest.mark.filterwarnings("ignore:RuntimeError in aborted thread")
def test_runtime_errors_are_not_swallowed(desk, monkeypatch):
    def broken(self, image, keep, **options):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(Backend, "run", broken)
    on = desk()
    on.viewer.add_image(spots(64, 64))
    with on.qtbot.capture_exceptions() as raised:
        on.click_segment()
        on.wait_until(lambda: "shapes do not fit" in on.status)
        on.wait_until(on.button("Segment").isEnabled)
    # Raised on the main thread, where napari shows it with its traceback.
    assert [str(value) for _, value, _ in raised] == ["shapes do not fit"]


def test_settings_are_remembered(desk):
    on = desk()
    on.viewer.add_image(spots(64, 64))
    on.choose_scope("slice")
    on.dock._device.value = "cpu"
    on.dock._objects._threshold.setValue(0.7)
    on.segment()
    assert recall("Segment")["scope"] == "slice"
    again = SegmentWidget(on.viewer, Session(intensity_model()))
    assert again._chosen_scope == "slice"
    assert again._device.value == "cpu"
    assert again._objects.values()["threshold"] == 0.7
    again.deleteLater()


def test_closed_dock_leaves_the_viewer_alone(desk):
    on = desk()
    on.viewer.add_image(spots(64, 64))
    on.viewer.window.remove_dock_widget(on.dock)
    on.dock.deleteLater()
    on.qtbot.wait(50)
    on.viewer.add_image(spots(64, 64), name="later")
    on.viewer.layers[0].name = "renamed"
    on.session.model = intensity_model()


def test_scopes_have_words():
    assert list(segment_module.SCOPES) == ["slice", "view", "all"]
