"""The numbers are those of scikit-image, however the pixels are kept and divided."""

import math
import subprocess
import sys
import warnings

import dask.array
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage.measure import regionprops_table

from napari_unet.errors import BadInput
from napari_unet.files import measurements, sums
from napari_unet.files.hull import Outline
from napari_unet.files.measurements import measure, measure_steps


def solidity(mask: np.ndarray) -> float:
    """That of an object which is read at once."""
    outline = Outline(mask.shape)
    outline.add(mask, (0,) * mask.ndim)
    return outline.solidity()


def cells(shape: tuple[int, ...], seed: int, smooth: float = 1.0) -> np.ndarray:
    """Draw objects of odd shapes, numbered with gaps."""
    random = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(random.random(shape), smooth)
    labels, _ = ndimage.label(noise > np.quantile(noise, random.uniform(0.4, 0.95)))
    return (labels * 3).astype("u4")


def of_scikit_image(labels, image, spacing):
    """Measure a plane or volume with regionprops_table, except for solidity."""
    ndim = labels.ndim
    names = ["label", "num_pixels", "centroid", "bbox", "equivalent_diameter_area"]
    names += ["intensity_mean", "intensity_min", "intensity_max"]
    names += ["eccentricity"] if ndim == 2 else []
    with warnings.catch_warnings():
        # Of the centroid of an image whose spacing is no tuple of integers.
        warnings.simplefilter("ignore")
        return regionprops_table(labels, image, properties=names, spacing=spacing)


@settings(max_examples=40, deadline=None)
@given(
    ndim=st.sampled_from([2, 3]),
    seed=st.integers(0, 999),
    smooth=st.sampled_from([0.0, 0.8, 2.0]),
    dtype=st.sampled_from(["u1", "u2", "i4", "f4", "bool"]),
    divided=st.booleans(),
    known=st.booleans(),
)
def test_numbers_of_scikit_image(ndim, seed, smooth, dtype, divided, known):
    shape = (30, 41) if ndim == 2 else (9, 13, 11)
    labels = cells(shape, seed, smooth)
    random = np.random.default_rng(seed)
    image = (random.random(shape) * 200).astype(dtype)
    size = dict(zip("ZYX"[-ndim:], (0.7, 0.3, 0.45)[-ndim:], strict=True))
    with pytest.MonkeyPatch.context() as patch:
        if divided:
            patch.setattr(measurements, "PIECE_PIXELS", int(random.integers(8, 300)))
            patch.setattr(measurements, "BAND_ROWS", 1)
            patch.setattr(sums, "AT_ONCE", 37)
        table = measure(
            labels,
            image,
            label_axes="ZYX"[-ndim:],
            image_axes="ZYX"[-ndim:],
            pixel_size=size if known else {"Y": 2},
            ndim=ndim,
        )
    expected = of_scikit_image(
        labels, image.astype("f8"), tuple(size.values()) if known else (1,) * ndim
    )
    what, unit = ("area", "px") if ndim == 2 else ("volume", "vx")
    scale = np.array([*size.values()]) if known else np.ones(ndim)
    assert np.array_equal(table["label"], expected["label"])
    assert np.array_equal(table[f"{what}_{unit}"], expected["num_pixels"])
    end = "um" if known else "px"
    for i, axis in enumerate("zyx"[-ndim:]):
        assert np.array_equal(table[f"bbox_{axis}_min_px"], expected[f"bbox-{i}"])
        assert np.array_equal(
            table[f"bbox_{axis}_max_px"], expected[f"bbox-{i + ndim}"]
        )
        centre = expected[f"centroid-{i}"]
        assert table[f"centroid_{axis}_{end}"] == pytest.approx(centre)
        assert table[f"centroid_{axis}_px"] == pytest.approx(centre / scale[i])
    diameter = expected["equivalent_diameter_area"]
    assert table[f"equivalent_diameter_{end}"] == pytest.approx(diameter)
    assert (f"{what}_um{ndim}" in table) == known
    if known:
        content = expected["num_pixels"] * scale.prod()
        assert table[f"{what}_um{ndim}"] == pytest.approx(content)
    if ndim == 2:
        assert table["eccentricity"] == pytest.approx(
            expected["eccentricity"], abs=1e-6
        )
    assert table["mean_intensity"] == pytest.approx(expected["intensity_mean"])
    assert np.array_equal(table["min_intensity"], expected["intensity_min"])
    assert np.array_equal(table["max_intensity"], expected["intensity_max"])
    integrated = expected["intensity_mean"] * expected["num_pixels"]
    assert table["integrated_intensity"] == pytest.approx(integrated)
    assert ("f" in dtype) == (table["integrated_intensity"].dtype.kind == "f")
    whole = np.array([solidity(labels[box] == i + 1) for i, box in boxes(labels)])
    same = table["solidity"] == whole
    # Boxes that are larger than what is read at once are left out.
    assert (same | (np.isnan(table["solidity"]) & divided)).all()


def boxes(labels):
    found = ndimage.find_objects(labels.astype(int))
    return [(i, box) for i, box in enumerate(found) if box is not None]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 9999), ndim=st.sampled_from([2, 3]))
def test_solidity_of_scikit_image(seed, ndim):
    random = np.random.default_rng(seed)
    shape = tuple(random.integers(1, 25 if ndim == 2 else 8, ndim))
    labels = cells(shape, seed, random.choice([0, 0.7, 1.5]))
    for i, box in boxes(labels):
        mask = labels[box] == i + 1
        found = solidity(mask)
        assert 0 < found <= 1
        places = np.argwhere(mask)
        if ndim == 2 or np.linalg.matrix_rank(places - places[0]) == ndim:
            names = ["solidity"]
            expected = regionprops_table(mask.astype(int), properties=names)
            assert found == expected["solidity"][0]


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 7), (7, 1), (1, 1, 1), (1, 1, 9), (5, 1, 1), (1, 6, 7)]
)
def test_flat_objects_are_solid(shape):
    """scikit-image fails for those of a volume."""
    assert solidity(np.ones(shape, bool)) == 1
    diagonal = np.eye(5, dtype=bool)
    assert solidity(diagonal) == 1
    assert solidity(diagonal[None]) == 1
    line = np.zeros((5, 5, 5), bool)
    line[range(5), range(5), range(5)] = True
    assert solidity(line) == 1


class Counted:
    """A stored array that counts the pixels that are read of it."""

    def __init__(self, pixels):
        self.pixels, self.shape, self.dtype = pixels, pixels.shape, pixels.dtype
        self.read = 0

    def __getitem__(self, key):
        part = self.pixels[key]
        self.read += part.size
        return part


@pytest.mark.parametrize("planes", [1, 3])
def test_objects_across_pieces_are_not_read_one_by_one(planes, monkeypatch):
    labels = cells((12, 60, 70), seed=1, smooth=1.5)
    options = {"label_axes": "ZYX", "image_axes": "ZYX", "ndim": 3}
    whole = measure(labels, labels, **options)
    thick = whole["bbox_z_max_px"] - whole["bbox_z_min_px"]
    assert (thick > planes).sum() > 10
    monkeypatch.setattr(measurements, "PIECE_PIXELS", planes * 60 * 70)
    stored = Counted(labels)
    divided = measure(stored, labels, **options)
    # Once to add up, once for the shapes.
    assert stored.read == 2 * labels.size
    is_small = ~np.isnan(divided["solidity"])
    assert is_small.sum() > 10
    assert (divided["solidity"] == whole["solidity"])[is_small].all()


def test_stacks_have_a_row_for_each_object_in_each_plane():
    labels = np.zeros((2, 3, 8, 9), int)
    labels[0, 1, 2:4, 3:5] = 1
    labels[1, 1:3, 2:4, 3:5] = 2
    image = np.arange(2 * 3 * 2 * 8 * 9).reshape(2, 3, 2, 8, 9)
    options = {"label_axes": "TZYX", "image_axes": "TZCYX", "channel_names": ["dna"]}
    planes = measure(labels, image, **options)
    assert planes["frame"].tolist() == [0, 1, 1]
    assert planes["plane"].tolist() == [1, 1, 2]
    assert planes["label"].tolist() == [1, 2, 2]
    assert planes["area_px"].tolist() == [4, 4, 4]
    assert planes["min_intensity_dna"].tolist() == [
        int(image[t, z, 0, 2, 3]) for t, z in [(0, 1), (1, 1), (1, 2)]
    ]
    assert planes["max_intensity_1"].tolist() == [
        int(image[t, z, 1, 3, 4]) for t, z in [(0, 1), (1, 1), (1, 2)]
    ]
    volumes = measure(labels, image, ndim=3, **options)
    assert "plane" not in volumes
    assert volumes["frame"].tolist() == [0, 1]
    assert volumes["volume_vx"].tolist() == [4, 8]
    assert volumes["centroid_z_px"].tolist() == [1, 1.5]
    # The same from turned, lazy and stored arrays.
    turned = measure(
        dask.array.from_array(labels.transpose(3, 0, 2, 1), chunks=2),
        zarr.array(image.transpose(2, 4, 1, 0, 3), chunks=(1, 2, 2, 2, 2)),
        **{**options, "label_axes": "XTYZ", "image_axes": "CXZTY"},
    )
    assert {name: column.tolist() for name, column in turned.items()} == {
        name: column.tolist() for name, column in planes.items()
    }


def test_colours_have_names_and_alpha_is_left_out():
    image = np.zeros((4, 5, 4), "u1")
    image[..., :3] = 10, 20, 30
    image[..., 3] = 255
    table = measure(np.ones((4, 5), int), image, label_axes="YX", image_axes="YXS")
    assert table["mean_intensity_red"] == 10
    assert table["max_intensity_blue"] == 30
    assert not [name for name in table if "alpha" in name or name.endswith("_3")]


def test_channels_of_one_name_stay_apart():
    image = np.stack([np.full((4, 5), 1), np.full((4, 5), 2)])
    table = measure(
        np.ones((4, 5), int),
        image,
        label_axes="YX",
        image_axes="CYX",
        channel_names=["x", "x"],
    )
    assert table["mean_intensity_x_0"] == 1
    assert table["mean_intensity_x_1"] == 2


def test_pixels_that_are_not_finite_are_left_out():
    image = np.arange(12, dtype="f4").reshape(3, 4)
    image[0, :2] = np.nan, np.inf
    image[2, 3] = -np.inf
    labels = np.array([[1, 1, 1, 1], [2, 2, 2, 2], [3, 3, 3, 4]])
    table = measure(labels, image, label_axes="YX", image_axes="YX")
    assert table["mean_intensity"].tolist()[:3] == [2.5, 5.5, 9]
    assert table["min_intensity"].tolist()[:3] == [2, 4, 8]
    assert table["integrated_intensity"].tolist()[:3] == [5, 22, 27]
    for what in ("mean", "min", "max", "integrated"):
        assert math.isnan(table[f"{what}_intensity"][3])
    assert table["area_px"].tolist() == [4, 4, 3, 1]


def test_regions_have_a_size_and_no_shape():
    labels = np.zeros((6, 6), int)
    labels[0] = 1
    labels[3:5, 2:4] = 2
    table = measure(
        labels, labels, label_axes="YX", image_axes="YX", regions=[1], pixel_size={}
    )
    assert table["label"].tolist() == [1, 2]
    assert table["area_px"].tolist() == [6, 4]
    assert np.isnan(table["solidity"]).tolist() == [True, False]
    assert np.isnan(table["eccentricity"]).tolist() == [True, False]


def test_nothing_there_gives_the_same_columns():
    image = np.zeros((3, 4, 5))
    options = {"label_axes": "ZYX", "image_axes": "ZYX", "pixel_size": {"Y": 1, "X": 1}}
    some = measure(np.ones((3, 4, 5), int), image, **options)
    none = measure(np.zeros((3, 4, 5), int), image, **options)
    assert [*none] == [*some]
    assert {column.size for column in none.values()} == {0}
    assert {column.size for column in some.values()} == {3}


def test_image_of_another_size_is_refused():
    with pytest.raises(BadInput, match="same pixels"):
        measure(
            np.zeros((4, 5), int), np.zeros((5, 4)), label_axes="YX", image_axes="YX"
        )


def test_progress_is_over_planes():
    labels = np.ones((3, 4, 5), int)
    options = {"label_axes": "ZYX", "image_axes": "ZYX"}
    tables = []
    steps = measure_steps(labels, labels, tables.append, **options)
    ticks = []
    for tick in steps:
        ticks.append((tick.done, tick.total))
        # Each table is given away before the next plane is begun.
        assert len(tables) == tick.done
    assert [table["plane"].tolist() for table in tables] == [[0], [1], [2]]
    assert sorted(set(ticks)) == [(0, 3), (1, 3), (2, 3)]
    assert ticks == sorted(ticks)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")
def test_memory_depends_on_the_piece():
    """A plane and an image of 64 MB each in pieces of 1 MB; one object is all over."""
    script = """
import numpy as np
from napari_unet.files import measurements
measurements.PIECE_PIXELS, measurements.BAND_ROWS = 2**18, 64

class Made:
    shape, dtype = (4000, 4000), np.dtype("u4")
    def __getitem__(self, key):
        y, x = (np.arange(*part.indices(n)) for part, n in zip(key, self.shape))
        inner = (y[:, None] % 100 < 50) & (x % 100 < 50)
        return np.where(inner, y[:, None] // 100 * 40 + x // 100 + 2, 1).astype("u4")

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if "VmHWM" in line) // 1024

before = peak()
table = measurements.measure(Made(), Made(), label_axes="YX", image_axes="YX")
assert table["area_px"].tolist() == [12_000_000] + [2500] * 1600
assert table["solidity"].tolist()[1:] == [1] * 1600
assert np.array_equal(table["mean_intensity"], table["label"])
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 45
