import importlib
import itertools
import subprocess
import sys

import numpy as np
import pytest
import tifffile
from scipy import ndimage as ndi
from skimage.measure import label as components

from napari_unet import sample

_SAMPLES = {
    "nuclei": ((512, 512), np.uint16, "YX", (80, 120)),
    "timelapse": ((12, 256, 256), np.uint16, "TYX", (40, 100)),
    "membrane": ((512, 512), np.uint8, "YX", (60, 250)),
    "nuclei3d": ((24, 128, 128), np.uint16, "ZYX", (30, 100)),
}


def _frames(name, labels):
    return labels if name == "timelapse" else [labels]


def _touch(labels):
    """Whether two objects have pixels next to each other."""
    wall = np.iinfo(labels.dtype).max
    background = np.where(labels == 0, wall, labels)
    lowest = ndi.minimum_filter(background, footprint=_cross(labels.ndim))
    highest = ndi.maximum_filter(labels, footprint=_cross(labels.ndim))
    return np.any((labels > 0) & (lowest < highest))


def _cross(ndim):
    return ndi.generate_binary_structure(ndim, 1)


@pytest.mark.parametrize("name", _SAMPLES)
def test_a_sample_is_an_image_and_its_hidden_true_labels(name):
    shape, dtype, _, (fewest, most) = _SAMPLES[name]
    (image, shown, image_type), (labels, hidden, labels_type) = getattr(sample, name)()
    assert (image_type, labels_type) == ("image", "labels")
    assert (image.shape, image.dtype) == (labels.shape, dtype) == (shape, dtype)
    assert labels.dtype == np.uint16
    assert shown["name"] == name
    assert hidden["name"] == f"{name} true labels"
    assert hidden["visible"] is False
    for key in ("scale", "units"):
        assert len(shown[key]) == image.ndim
        assert shown[key] == hidden[key]
    found = np.unique(labels)
    assert fewest <= len(found) - 1 <= most
    np.testing.assert_array_equal(found, np.arange(len(found)))


@pytest.mark.parametrize("name", _SAMPLES)
def test_the_files_say_what_napari_is_told(name):
    _, _, axes, _ = _SAMPLES[name]
    place = getattr(sample, name)()[0][1]
    for suffix in ("", "_labels"):
        with tifffile.TiffFile(sample.sample_dir() / f"{name}{suffix}.tif") as file:
            numerator, denominator = file.pages[0].tags["XResolution"].value
            assert denominator / numerator == pytest.approx(place["scale"][-1])
            assert file.series[0].axes == axes
            metadata = file.imagej_metadata
        assert metadata["unit"] == place["units"][-1] == "um"
        if axes == "ZYX":
            assert metadata["spacing"] == place["scale"][0]
        if axes == "TYX":
            assert metadata["finterval"] == 60 * place["scale"][0]


@pytest.mark.parametrize("name", _SAMPLES)
def test_every_object_is_one_piece(name):
    labels = getattr(sample, name)()[1][0]
    for frame in _frames(name, labels):
        pieces = components(frame, connectivity=1)
        assert pieces.max() == len(np.unique(frame)) - 1


@pytest.mark.parametrize("name", ["nuclei", "timelapse", "nuclei3d"])
def test_some_nuclei_touch_and_all_are_brighter_than_the_rest(name):
    (image, *_), (labels, *_) = getattr(sample, name)()
    for frame, objects in zip(_frames(name, image), _frames(name, labels), strict=True):
        assert _touch(objects)
        assert np.median(frame[objects > 0]) > 1.5 * np.median(frame[objects == 0])


def test_cells_of_the_membrane_sample_are_parted_by_dark_membranes():
    (image, *_), (labels, *_) = sample.membrane()
    assert not _touch(labels)
    assert np.median(image[labels == 0]) < 0.6 * np.median(image[labels > 0])


def test_nuclei_of_the_film_keep_their_labels_until_they_divide():
    labels = sample.timelapse()[1][0]
    kept = [
        len(np.intersect1d(before, after)) / len(np.unique(before))
        for before, after in itertools.pairwise(labels)
    ]
    assert min(kept) > 0.9
    assert len(np.setdiff1d(labels[-1], labels[0])) >= 8


def test_the_samples_are_small():
    assert sum(path.stat().st_size for path in sample.sample_dir().iterdir()) < 3e6


def test_generating_again_gives_the_same_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(sample.sample_dir())
    generate = importlib.import_module("generate")
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        generate.write("nuclei", folder)
    for name in ("nuclei.tif", "nuclei_labels.tif"):
        again = (tmp_path / "one" / name).read_bytes()
        assert again == (tmp_path / "two" / name).read_bytes()
    # The bundled file may stem from other versions of the libraries, whose last
    # bits differ.
    labels = tifffile.imread(tmp_path / "one" / "nuclei_labels.tif")
    assert np.mean(labels == sample.nuclei()[1][0]) > 0.99
    image = tifffile.imread(tmp_path / "one" / "nuclei.tif")
    pair = image.ravel(), sample.nuclei()[0][0].ravel()
    assert np.corrcoef(*pair)[0, 1] > 0.95


def test_reading_a_sample_loads_neither_torch_nor_qt_nor_napari():
    code = (
        "import sys; from napari_unet import sample; sample.nuclei();"
        "print({'torch', 'napari', 'qtpy', 'vispy'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
