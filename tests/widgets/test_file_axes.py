"""Axes and pixel sizes that napari's own reader of TIFFs does not tell."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import tifffile
from desk import Desk, intensity_model, spots
from napari.utils.notifications import notification_manager
from qtpy.QtWidgets import QFormLayout, QWidget

from napari_unet import segment
from napari_unet.files.images import read_image
from napari_unet.models.model import Model
from napari_unet.steps import Progress
from napari_unet.widgets import _file_facts, _layers
from napari_unet.widgets._file_facts import FileFacts
from napari_unet.widgets._image_chooser import READING, ImageChooser
from napari_unet.widgets._session import Session


@pytest.fixture
def stack(tmp_path):
    """Two slices of three channels, of which the last has the spots."""
    pixels = np.zeros((2, 3, 64, 64), np.uint8)
    pixels[:, 2] = spots(2, 64, 64)
    path = tmp_path / "stack.ome.tif"
    sizes = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.25, "PhysicalSizeZ": 2}
    tifffile.imwrite(path, pixels, metadata={"axes": "ZCYX", **sizes})
    return path


class Headers:
    """Headers of files, which are read when a test says so."""

    def __init__(self):
        self.begun = 0
        self.may_be_read = threading.Event()
        self._read_steps = _file_facts._read_steps

    def read_steps(self, path):
        self.begun += 1
        yield Progress(0, 1)
        self.may_be_read.wait(60)
        return (yield from self._read_steps(path))


@pytest.fixture
def headers(monkeypatch):
    headers = Headers()
    monkeypatch.setattr(_file_facts, "_read_steps", headers.read_steps)
    yield headers
    headers.may_be_read.set()


def sized_model(size: float) -> Model:
    """The model of bright pixels, of three channels and of pixels of some size."""
    model = intensity_model(3)
    update = {"pixel_size": (size, size)}
    return Model(model.network, model.passport.model_copy(update=update))


def open_file(on, path):
    (layer,) = on.viewer.open(path, plugin="napari")
    on.wait_until(lambda: not _file_facts.is_being_read(layer))
    return layer


def test_a_file_is_segmented_as_without_napari(desk, stack):
    model = sized_model(0.5)
    on = desk(model)
    layer = open_file(on, stack)
    assert on.dock._image.axes == "ZCYX"
    assert on.dock._image._guessed.isHidden()
    assert _layers.pixel_size(layer, "ZCYX") == {"Z": 2, "Y": 0.25, "X": 0.5}
    on.segment()
    assert "rescaling by 0.50" in on.dock._about.text()
    file = read_image(stack)
    expected = segment(file.data, model, axes=file.axes, pixel_size=file.pixel_size)
    assert expected.max() > 4
    np.testing.assert_array_equal(on.labels.data, expected)


def test_what_the_user_says_wins(desk, stack):
    on = desk(sized_model(0.5))
    layer = open_file(on, stack)
    layer.scale = (1, 1, 3, 4)
    assert _layers.pixel_size(layer, "ZCYX") == {"Z": 2, "Y": 3, "X": 4}
    on.dock._image._axes.setText("TCYX")
    on.dock._image._on_axes("TCYX")
    on.dock._image.reset()
    assert on.dock._image.axes == "TCYX"
    assert "Z" not in _layers.pixel_size(layer, "TCYX")
    layer.data = layer.data[0]
    assert _layers.known_axes(layer) == ""


def test_a_guess_is_called_so(desk):
    on = desk()
    on.viewer.add_image(spots(64, 64), name="plane")
    guessed = on.dock._image._guessed
    assert guessed.isHidden()
    on.viewer.add_image(spots(3, 64, 64), name="stack")
    assert not guessed.isHidden()
    assert on.dock._image.axes == "ZYX"
    on.dock._image._on_axes("TYX")
    assert guessed.isHidden()
    labels = ("time", "y", "x")
    on.viewer.add_image(spots(3, 64, 64), name="named", axis_labels=labels)
    assert on.dock._image.axes == "TYX"
    assert guessed.isHidden()


def test_nothing_is_segmented_by_a_guess_while_the_header_is_read(desk, stack, headers):
    on = desk(sized_model(0.5))
    (layer,) = on.viewer.open(stack, plugin="napari")
    start = on.button("Segment")
    assert not start.isEnabled()
    assert start.toolTip() == READING
    assert READING in on.dock._about.text()
    assert "⚠" not in on.dock._about.text()
    assert on.dock._image._guessed.isHidden()
    headers.may_be_read.set()
    on.wait_until(lambda: not _file_facts.is_being_read(layer))
    assert start.isEnabled()
    assert on.dock._image.axes == "ZCYX"


def test_nothing_is_annotated_by_a_guess_while_the_header_is_read(
    tune_desk, stack, headers
):
    on = tune_desk()
    on.add_cells()
    on.annotate()
    on.wait_until(on.job.start.isEnabled)
    (layer,) = on.viewer.open(stack, plugin="napari")
    panel = on.dock._annotations
    buttons = [panel.start, panel.add, on.job.start]
    assert not any(button.isEnabled() for button in buttons)
    assert [button.toolTip() for button in buttons] == [READING] * 3
    assert not panel._labels.isEnabled()
    assert on.problem == READING
    headers.may_be_read.set()
    on.wait_until(lambda: not _file_facts.is_being_read(layer))
    assert all(button.isEnabled() for button in buttons)
    assert not any(READING in button.toolTip() for button in buttons)
    panel.add.click()
    assert panel.current().labels.data.shape == (2, 64, 64)  # ZYX
    assert panel.current().regions.ndim == 3


def test_many_headers_are_read_one_after_the_other(desk, stack, headers):
    on = desk(sized_model(0.5))
    layers = [on.viewer.open(stack, plugin="napari")[0] for _ in range(4)]
    assert headers.begun == 1  # the threads are for other work, too
    shown = []
    on.dock._image._on_change = lambda: shown.append(on.dock._image.layer)
    headers.may_be_read.set()
    on.wait_until(lambda: not any(map(_file_facts.is_being_read, layers)))
    assert headers.begun == 4
    assert shown == [layers[-1]]
    on.dock._image.choose(layers[0])
    assert on.dock._image.axes == "ZCYX"


def test_layers_that_go_do_not_stop_the_others(desk, stack, headers):
    on = desk(sized_model(0.5))
    for _ in range(3):
        on.viewer.open(stack, plugin="napari")
    on.viewer.layers.clear()
    headers.may_be_read.set()
    open_file(on, stack)
    assert on.dock._image.axes == "ZCYX"


def test_a_layer_that_says_all_waits_for_no_file(desk, stack, headers):
    on = desk(sized_model(0.5))
    given = {"axis_labels": ("z", "c", "y", "x"), "scale": (2, 1, 0.25, 0.5)}
    on.viewer.open(stack, plugin="napari", **given)
    assert headers.begun == 0
    assert on.button("Segment").isEnabled()
    on.viewer.open(stack, plugin="napari", axis_labels=given["axis_labels"])
    assert headers.begun == 1  # for its pixel size
    assert not on.button("Segment").isEnabled()


def test_the_field_of_the_axes_keeps_its_width(make_napari_viewer, qtbot):
    viewer, rows = make_napari_viewer(), QWidget()
    qtbot.addWidget(rows)
    chooser = ImageChooser(viewer, QFormLayout(rows), lambda: None)
    rows.resize(300, 100)
    rows.show()
    widths = {}
    for shape in (64, 64), (3, 64, 64):
        viewer.add_image(spots(*shape))
        qtbot.wait(20)
        widths[chooser._guessed.isVisible()] = chooser._axes.width()
    assert widths[True] == widths[False]


def test_a_file_that_has_gone_or_changed_does_no_harm(make_napari_viewer, qtbot, stack):
    viewer = make_napari_viewer()
    (layer,) = viewer.open(stack, plugin="napari")
    stack.unlink()
    notification_manager.records.clear()
    on = Desk(viewer, qtbot, Session(intensity_model()))
    on.wait_until(lambda: not _file_facts.is_being_read(layer))
    assert on.dock._image.axes == "TZYX"
    assert not on.dock._image._guessed.isHidden()
    tifffile.imwrite(stack, spots(5, 64, 64), metadata={"axes": "TYX"})
    again = open_file(on, stack)
    assert on.dock._image.axes == "TYX"
    again.data = spots(2, 5, 64, 64)
    on.dock._image.reset()
    assert on.dock._image.axes == "TZYX"
    assert not notification_manager.records


def test_a_layer_of_each_channel():
    facts = FileFacts("ZCYX", (5, 3, 40, 50), {"Y": 0.5})
    assert facts.of_array((5, 3, 40, 50), is_rgb=False) == facts
    part = facts.of_array((5, 40, 50), is_rgb=False)
    assert part is not None
    assert (part.axes, part.pixel_size) == ("ZYX", {"Y": 0.5})
    assert facts.of_array((40, 50), is_rgb=False) is None
    assert facts.of_array((5, 3, 40, 50), is_rgb=True) is None
    colour = FileFacts("YXS", (40, 50, 3), {})
    assert colour.of_array((40, 50, 3), is_rgb=True) == colour
    assert colour.of_array((40, 50, 3), is_rgb=False) is None
