"""Labels and probabilities come back from the OME-Zarr images that we write."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from napari_unet.errors import BadOutput
from napari_unet.files import stack as stack_module
from napari_unet.files import write_ome_zarr
from napari_unet.files.images import list_images, read_image
from napari_unet.files.outputs import write_labels, write_probabilities

SIZE = {"Z": 0.5, "Y": 0.25, "X": 0.2}


@pytest.fixture
def small_limits(monkeypatch):
    """Let images of a test's size have several chunks, levels, bands and slabs."""
    monkeypatch.setattr(write_ome_zarr, "CHUNK", (1, 1, 1, 16, 24))
    monkeypatch.setattr(write_ome_zarr, "SHORT", 10)
    monkeypatch.setattr(stack_module, "BAND_ROWS", 16)


def levels(path: Path) -> list[zarr.Array]:
    """Open all levels as another program does, by the metadata alone."""
    group = zarr.open_group(path, mode="r")
    (image,) = group.attrs["multiscales"]
    return [group[dataset["path"]] for dataset in image["datasets"]]


@settings(max_examples=12, deadline=None)
@given(
    axes=st.sampled_from(["YX", "ZYX", "XYZ", "TZYX", "ZTYX", "TYX"]),
    seed=st.integers(0, 99),
    largest=st.sampled_from([0, 65535, 65536, 2**32 - 1]),
    dtype=st.sampled_from(["i8", "u4", ">u4", "f8->"]),
    tiled=st.booleans(),
)
@pytest.mark.usefixtures("small_limits")
def test_labels_come_back_at_every_level(axes, seed, largest, dtype, tiled):
    random = np.random.default_rng(seed)
    limits = {"T": 3, "Z": 13, "Y": 40, "X": 60}
    shape = tuple(int(random.integers(1, limits[axis])) for axis in axes)
    labels = random.integers(0, largest, shape, endpoint=True, dtype="i8")
    labels.flat[-1] = largest
    labels = np.asfortranarray(labels) if dtype == "f8->" else labels.astype(dtype)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        if tiled:
            patch.setattr(stack_module, "TILED_PIXELS", 100)
        path = Path(folder) / "a.ome.zarr"
        assert write_labels(path, labels, axes=axes, pixel_size=SIZE) == path
        image = read_image(path)
        stored = [level[:] for level in levels(path)]
        scales = [
            dataset["coordinateTransformations"][0]["scale"]
            for dataset in zarr.open_group(path).attrs["multiscales"][0]["datasets"]
        ]
    order = [axes.index(axis) for axis in "TZYX" if axis in axes]
    expected = labels.transpose(order)
    assert image.notes == ()
    assert image.data.dtype == (np.uint16 if largest < 2**16 else np.uint32)
    assert np.array_equal(image.data, expected.squeeze(_dropped(expected)))
    assert image.pixel_size == {a: SIZE[a] for a in image.axes if a in SIZE}
    # The coarser levels are the nearest pixels, where their scale says.
    for level, scale in zip(stored, scales, strict=True):
        size = [SIZE.get(a, 1.0) for a in "TZYX" if a in axes]
        steps = [round(a / b) for a, b in zip(scale, size, strict=True)]
        assert np.array_equal(
            level, expected[tuple(slice(None, None, n) for n in steps)]
        )
    assert max(stored[-1].shape[-2:]) <= 10
    assert len(stored) > 1 or max(expected.shape[-2:]) <= 10


def _dropped(array: np.ndarray) -> tuple[int, ...]:
    """Return the axes that a reader drops: of length 1, but not Y and X."""
    return tuple(i for i in range(array.ndim - 2) if array.shape[i] == 1)


@pytest.mark.usefixtures("small_limits")
def test_probabilities_come_back(tmp_path):
    values = np.random.default_rng(0).random((3, 2, 4, 20, 30), np.float32)
    path = tmp_path / "µ.zarr"
    names = ["background", "cell", "<ядро>"]
    write_probabilities(
        path, values, axes="CTZYX", pixel_size={"Y": 2, "X": 3}, class_names=names
    )
    image = read_image(path)
    assert image.axes == "TCZYX"
    assert image.pixel_size == {"Y": 2, "X": 3}
    assert image.notes == ()
    assert image.data.dtype == np.float32
    assert np.array_equal(image.data, values.transpose(1, 0, 2, 3, 4))
    attributes = zarr.open_group(path, mode="r").attrs
    assert [c["label"] for c in attributes["omero"]["channels"]] == names
    assert "image-label" not in attributes


def test_metadata_are_those_of_the_specification(tmp_path):
    """As the validators of ome-zarr-models and ome-zarr-py have accepted them."""
    path = tmp_path / "cells.ome.zarr"
    labels = np.zeros((2, 3, 700, 80), np.uint8)
    write_labels(
        path, labels, axes="TZYX", pixel_size={"Y": 0.5, "X": 0.25}, description="by x"
    )
    attributes = json.loads((path / ".zattrs").read_text(encoding="utf-8"))
    space = {"type": "space", "unit": "micrometer"}
    assert attributes == {
        "multiscales": [
            {
                "version": "0.4",
                "name": "cells",
                "axes": [
                    {"name": "t", "type": "time"},
                    {"name": "z", "type": "space"},
                    {"name": "y", **space},
                    {"name": "x", **space},
                ],
                "datasets": [
                    {
                        "path": str(level),
                        "coordinateTransformations": [
                            {"type": "scale", "scale": [1.0, 1.0, y, 0.25]}
                        ],
                    }
                    for level, y in enumerate([0.5, 1.0])
                ],
                "type": "nearest",
                "metadata": {"description": "by x", "creator": "napari-unet"},
            }
        ],
        "image-label": {"version": "0.4"},
    }
    array = zarr.open_array(path / "0", mode="r")
    assert array.chunks == (1, 1, 700, 80)
    assert array.metadata.dimension_separator == "/"
    assert list_images(tmp_path) == [path]


def test_same_result_same_bytes(tmp_path):
    labels = np.random.default_rng(0).integers(0, 9, (2, 30, 1100))
    as_zarr = zarr.create_array(
        tmp_path / "raw", shape=labels.shape, dtype="u4", chunks=(2, 30, 100)
    )
    as_zarr[:] = labels
    found = []
    for folder, array in [("a", labels), ("b", as_zarr)]:
        (tmp_path / folder).mkdir()
        write_labels(tmp_path / folder / "x.ome.zarr", array, axes="ZYX", pixel_size={})
        found.append(
            {
                file.relative_to(tmp_path / folder): file.read_bytes()
                for file in (tmp_path / folder).rglob("*")
                if file.is_file()
            }
        )
    assert found[0] == found[1]


def test_what_is_replaced_and_what_is_not(tmp_path):
    path = tmp_path / "a.ome.zarr"
    labels = np.ones((4, 5), int)
    write_labels(path, labels, axes="YX", pixel_size={})
    with pytest.raises(BadOutput, match="--overwrite"):
        write_labels(path, labels, axes="YX", pixel_size={})
    write_labels(path, labels * 2, axes="YX", pixel_size={}, overwrite=True)
    assert np.array_equal(read_image(path).data, labels * 2)
    # A folder of something else that happens to have the name.
    (tmp_path / "mine.zarr").mkdir()
    (tmp_path / "mine.zarr" / "thesis.txt").write_text("precious")
    with pytest.raises(BadOutput, match="not replaced"):
        write_labels(
            tmp_path / "mine.zarr", labels, axes="YX", pixel_size={}, overwrite=True
        )
    assert (tmp_path / "mine.zarr" / "thesis.txt").read_text() == "precious"
    with pytest.raises(BadOutput, match="classes along C"):
        write_probabilities(
            path, labels, axes="YX", pixel_size={}, class_names=[], overwrite=True
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ome.zarr", "mine.zarr"]
