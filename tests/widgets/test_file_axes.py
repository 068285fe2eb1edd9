"""Axes and pixel sizes that napari's own reader of TIFFs does not tell."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
from desk import Desk, intensity_model, spots
from napari.utils.notifications import notification_manager

from napari_unet import segment
from napari_unet.files.images import read_image
from napari_unet.models.model import Model
from napari_unet.widgets import _file_facts, _layers
from napari_unet.widgets._file_facts import FileFacts
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
