"""Labels and probabilities come back from the files that we write."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from napari_unet.errors import BadOutput
from napari_unet.files import stack as stack_module
from napari_unet.files import write_tiff
from napari_unet.files.images import read_image
from napari_unet.files.outputs import write_labels, write_probabilities

NO_SIZE: dict = {"pixel_size": {}}
SIZE = {"Z": 0.5, "Y": 0.25, "X": 0.2}


@st.composite
def stacks(draw: st.DrawFn) -> tuple[str, tuple[int, ...]]:
    """Axes in any order and their lengths."""
    stack = draw(st.lists(st.sampled_from("TZC"), max_size=3, unique=True))
    axes = "".join(draw(st.permutations(stack))) + "YX"
    lengths = st.tuples(*(st.integers(1, 4) for _ in stack))
    plane = st.tuples(st.integers(1, 40), st.integers(1, 40))
    return axes, draw(lengths) + draw(plane)


def ordered(data: np.ndarray, axes: str) -> tuple[np.ndarray, str]:
    """Bring an array into the order TZCYX without singletons, as it is read."""
    order = sorted(range(data.ndim), key=lambda i: "TZCYX".index(axes[i]))
    data, axes = data.transpose(order), "".join(axes[i] for i in order)
    kept = [i for i, a in enumerate(axes) if a in "YX" or data.shape[i] > 1]
    data = data[tuple(slice(None) if i in kept else 0 for i in range(data.ndim))]
    return data, "".join(axes[i] for i in kept)


@settings(max_examples=80, deadline=None)
@given(
    stack=stacks(),
    largest=st.sampled_from([0, 1, 255, 256, 65535, 65536, 2**31, 2**32 - 1]),
    dtype=st.sampled_from(["i8", "u8", "f8->", "u4"]),
    suffix=st.sampled_from([".tif", ".ome.tif", ".tiff"]),
    pixel_size=st.sampled_from([SIZE, {}, {"Y": 3.0, "X": 0.001}, {"Z": 2}, {"X": 7}]),
    seed=st.integers(0, 99),
)
def test_labels_come_back(stack, largest, dtype, suffix, pixel_size, seed):
    axes, shape = stack
    labels = np.random.default_rng(seed).integers(0, largest, shape, endpoint=True)
    labels.flat[-1] = largest
    labels = labels.astype(dtype) if dtype != "f8->" else np.asfortranarray(labels)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{suffix}"
        written = write_labels(
            path, labels, axes=axes, pixel_size=pixel_size, description="by a test"
        )
        assert written == path
        image = read_image(path)
        with tifffile.TiffFile(path) as tiff:
            series = tiff.series[0]
            assert series.axes == image.axes
            assert np.array_equal(series.asarray(), image.data)
            assert tiff.pages.first.predictor == 1
            assert tiff.pages.first.compression == tifffile.COMPRESSION.ADOBE_DEFLATE
            assert tiff.is_ome or tiff.is_imagej
            assert "by a test" in (tiff.ome_metadata or tiff.imagej_metadata["Info"])
        # libtiff, as other programs do, finds the same first plane.
        first = imagecodecs.tiff_decode(path.read_bytes(), index=0)
    expected, expected_axes = ordered(labels, axes)
    assert image.axes == expected_axes
    assert image.data.dtype == (np.uint16 if largest < 2**16 else np.uint32)
    assert np.array_equal(image.data, expected)
    assert np.array_equal(first, image.data.reshape(-1, *first.shape)[0])
    assert image.notes == ()
    known = {a: s for a, s in pixel_size.items() if a in image.axes}
    assert image.pixel_size == pytest.approx(known, rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(stack=stacks(), ome=st.booleans(), seed=st.integers(0, 99))
def test_probabilities_come_back(stack, ome, seed):
    axes, shape = stack
    values = np.random.default_rng(seed).random(shape, np.float32)
    classes = shape[axes.index("C")] if "C" in axes else 1
    names = [f"class {i}" for i in range(classes)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("a.ome.tif" if ome else "a.tif")
        write_probabilities(path, values, axes=axes, pixel_size=SIZE, class_names=names)
        image = read_image(path)
        with tifffile.TiffFile(path) as tiff:
            if ome:
                assert all(f'Name="{name}"' in tiff.ome_metadata for name in names)
            else:
                labels = np.atleast_1d(tiff.imagej_metadata["Labels"])
                planes = labels.reshape(-1, classes)
                assert (planes == names).all()
    expected, expected_axes = ordered(values, axes)
    assert image.axes == expected_axes
    assert image.data.dtype == np.float32
    assert np.array_equal(image.data, expected)


def test_true_and_false_are_labels(tmp_path):
    mask = np.eye(5, dtype=bool)
    write_labels(tmp_path / "a.tif", mask, axes="YX", pixel_size={})
    assert np.array_equal(read_image(tmp_path / "a.tif").data, mask)


@pytest.mark.parametrize("largest", [2**32, 2**63 - 1])
def test_labels_never_wrap(tmp_path, largest):
    labels = np.array([[0, largest]])
    with pytest.raises(BadOutput, match=f"from 0 to {largest}"):
        write_labels(tmp_path / "a.tif", labels, axes="YX", pixel_size={})
    with pytest.raises(BadOutput, match="from -1 to 3"):
        write_labels(tmp_path / "a.tif", np.array([[-1, 3]]), axes="YX", pixel_size={})
    with pytest.raises(BadOutput, match="not float64"):
        write_labels(tmp_path / "a.tif", np.ones((2, 2)), axes="YX", pixel_size={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((4, 5), "ZYX"), ((2, 4, 5), "SYX"), ((2, 4, 5), "YYX"), ((4, 5), "ZX")],
)
def test_axes_that_do_not_fit(tmp_path, shape, axes):
    with pytest.raises(BadOutput, match="do not describe"):
        write_labels(tmp_path / "a.tif", np.zeros(shape, int), axes=axes, pixel_size={})
    with pytest.raises(BadOutput, match="no pixels"):
        write_labels(
            tmp_path / "a.tif", np.zeros((0, 5), int), axes="YX", pixel_size={}
        )
    with pytest.raises(BadOutput, match="2 classes along C and 1 names"):
        write_probabilities(
            tmp_path / "a.tif",
            np.zeros((2, 4, 5)),
            axes="CYX",
            pixel_size={},
            class_names=["a"],
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".tif", ".ome.tif"])
@pytest.mark.parametrize("largest", [9, 70_000])
def test_same_result_same_bytes(tmp_path, suffix, largest):
    labels = np.random.default_rng(0).integers(0, largest, (3, 40, 50))
    contents = set()
    for name in ["a", "b"]:
        path = tmp_path / f"{name}{suffix}"
        write_labels(path, labels, axes="ZYX", pixel_size=SIZE, description="x")
        contents.add(path.read_bytes())
    assert len(contents) == 1


def test_other_pixels_have_another_ome_identity(tmp_path):
    headers = set()
    for label in (1, 2):
        path = tmp_path / f"{label}.ome.tif"
        write_labels(path, np.full((4, 5), label), axes="YX", pixel_size=SIZE)
        with tifffile.TiffFile(path) as tiff:
            headers.add(tiff.ome_metadata)
    assert len(headers) == 2


def test_nothing_is_overwritten_unless_asked(tmp_path):
    labels, path = np.ones((4, 5), int), tmp_path / "a.tif"
    path.write_text("precious")
    with pytest.raises(BadOutput, match="--overwrite"):
        write_labels(path, labels, axes="YX", pixel_size={})
    assert path.read_text() == "precious"
    (tmp_path / "link.tif").symlink_to(tmp_path / "nowhere")
    with pytest.raises(BadOutput, match="--overwrite"):
        write_labels(tmp_path / "link.tif", labels, axes="YX", pixel_size={})
    assert sorted(os.listdir(tmp_path)) == ["a.tif", "link.tif"]
    write_labels(path, labels, axes="YX", pixel_size={}, overwrite=True)
    assert np.array_equal(read_image(path).data, labels)


def test_large_files(tmp_path, monkeypatch):
    """Beyond 4 GB: BigTIFF; planes of slide scanners: tiles. With smaller limits."""
    labels = np.random.default_rng(0).integers(0, 9, (2, 700, 600))
    monkeypatch.setattr(write_tiff, "CLASSIC_BYTES", 10**6)
    write_labels(tmp_path / "big.tif", labels, axes="ZYX", pixel_size=SIZE)
    monkeypatch.setattr(stack_module, "TILED_PIXELS", 10**5)
    write_labels(tmp_path / "tiled.tif", labels, axes="ZYX", pixel_size=SIZE)
    for name, tiled in [("big.tif", False), ("tiled.tif", True)]:
        with tifffile.TiffFile(tmp_path / name) as tiff:
            assert tiff.is_bigtiff
            assert tiff.pages.first.is_tiled == tiled
        image = read_image(tmp_path / name)
        assert np.array_equal(image.data, labels)
        assert image.pixel_size == SIZE
        assert image.axes == "ZYX"
    assert write_tiff.TILE[0] % 16 == 0


def test_strips_are_small_enough_to_read_a_part(tmp_path):
    labels = np.zeros((2000, 1000), int)
    write_labels(tmp_path / "a.tif", labels, axes="YX", pixel_size={})
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        assert tiff.pages.first.rowsperstrip * 2000 <= write_tiff.STRIP_BYTES
        assert len(tiff.pages.first.dataoffsets) == 16


def test_description_keeps_other_alphabets(tmp_path):
    labels = np.zeros((4, 5), int)
    for name in ["a.tif", "a.ome.tif"]:
        write_labels(
            tmp_path / name,
            labels,
            axes="YX",
            pixel_size={},
            description='µm & <ファイル> "🔬"',
        )
        assert np.array_equal(read_image(tmp_path / name).data, labels)


@settings(max_examples=30, deadline=None)
@given(
    stack=stacks(),
    parts=st.tuples(*(st.integers(1, 7) for _ in range(5))),
    suffix=st.sampled_from([".tif", ".ome.tif"]),
    tiled=st.booleans(),
    seed=st.integers(0, 99),
)
def test_zarr_and_numpy_give_the_same_bytes(stack, parts, suffix, tiled, seed):
    """Wherever the pixels are kept and however they are read."""
    axes, shape = stack
    labels = np.random.default_rng(seed).integers(0, 70_000, shape)
    chunks = tuple(-(-n // part) for n, part in zip(shape, parts, strict=False))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        if tiled:
            patch.setattr(stack_module, "TILED_PIXELS", 50)
            patch.setattr(stack_module, "BAND_ROWS", 32)
            patch.setattr(write_tiff, "TILE", (16, 16))
        stored = zarr.create_array({}, shape=shape, dtype="i8", chunks=chunks)
        stored[...] = labels
        contents = set()
        for name, array in [("a", labels), ("b", stored), ("c", labels.astype("u4"))]:
            path = Path(folder) / f"{name}{suffix}"
            write_labels(path, array, axes=axes, pixel_size=SIZE)
            contents.add(path.read_bytes())
        image = read_image(path)
    assert len(contents) == 1
    expected, expected_axes = ordered(labels, axes)
    assert image.axes == expected_axes
    assert np.array_equal(image.data, expected)


MEMORY = """
import sys
import numpy as np
from napari_unet.files.outputs import write_labels, write_probabilities
folder, name, planes = sys.argv[1], sys.argv[2], int(sys.argv[3])

class Counted:
    # Made when asked for, so that only what is written takes memory.
    shape, dtype = (planes, 256, 256), np.dtype("u4")
    def __getitem__(self, key):
        z, y, x = (np.arange(*part.indices(n)) for part, n in zip(key, self.shape))
        return (z[:, None, None] + y[None, :, None] // 99 + x // 99).astype("u4")

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if "VmHWM" in line) // 1024

path = f"{folder}/{name}"
before = peak()
if "p-" in name:
    write_probabilities(
        path, Counted(), axes="CYX", pixel_size={}, class_names=["x"] * planes
    )
else:
    write_labels(path, Counted(), axes="ZYX", pixel_size={})
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize("name", ["l-.tif", "l-.ome.zarr", "p-.ome.tif"])
def test_memory_depends_on_the_plane_and_not_on_the_stack(tmp_path, name):
    peaks = []
    for planes in (50, 500):
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                MEMORY,
                tmp_path,
                f"{planes}{name}",
                str(planes),
                "256",
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        peaks.append(int(done.stdout))
    # 500 planes are 131 MB, 450 more than 50 are 118 MB.
    assert peaks[1] < peaks[0] + 20
