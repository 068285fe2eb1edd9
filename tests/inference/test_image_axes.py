"""Axes in any order, stacks, channels, lazy arrays."""

import itertools

import dask.array as da
import numpy as np
import pytest
import zarr
from exact import predict, segment
from whole_image import random_image, reference, trained_model

from napari_unet import Annotation, fine_tune
from napari_unet.errors import BadInput
from napari_unet.inference import source as source_module
from napari_unet.models.normalize import Normalization

FIXED = Normalization(method="fixed", lower=8000, upper=12_000)


def reordered(image: np.ndarray, axes: str, wanted: str) -> np.ndarray:
    return image.transpose([axes.index(axis) for axis in wanted])


@pytest.mark.parametrize("axes", list(map("".join, itertools.permutations("ZYX"))))
@pytest.mark.parametrize("ndim", [2, 3])
def test_every_order_of_three_axes(axes, ndim):
    model = trained_model(ndim=ndim, depth=1)
    image = random_image((1, 6, 22, 17))[0]
    wanted = predict(image, model, axes="ZYX")
    result = predict(reordered(image, "ZYX", axes), model, axes=axes)
    assert result.shape[1:] == reordered(image, "ZYX", axes).shape
    back = reordered(result, "K" + axes, "KZYX")
    np.testing.assert_allclose(back, wanted, atol=1e-6)
    labels = segment(reordered(image, "ZYX", axes), model, axes=axes)
    assert labels.shape == reordered(image, "ZYX", axes).shape


@pytest.mark.parametrize(
    "axes", ["CYX", "YXC", "YCX", "TZYXC", "CTZYX", "XYZCT", "ZCYX", "TCYX", "xyc"]
)
def test_channels_anywhere(axes):
    model = trained_model(in_channels=2, depth=1)
    letters = "TZCYX"
    sizes = dict(zip(letters, (2, 3, 2, 14, 18), strict=True))
    kept = "".join(a for a in letters if a in axes.upper())
    image = random_image(tuple(sizes[a] for a in kept))
    wanted = predict(image, model, axes=kept)
    result = predict(reordered(image, kept, axes.upper()), model, axes=axes)
    given = axes.upper().replace("C", "")
    back = reordered(result, "K" + given, "K" + kept.replace("C", ""))
    np.testing.assert_allclose(back, wanted, atol=1e-6)


@pytest.mark.parametrize("ndim", [2, 3])
def test_default_axes(ndim):
    model = trained_model(ndim=ndim, depth=1)
    for shape, axes in (((9, 20), "YX"), ((4, 9, 20), "ZYX"), ((2, 4, 9, 20), "TZYX")):
        if len(axes) < ndim:
            continue
        image = random_image((1, *shape))[0]
        np.testing.assert_array_equal(
            predict(image, model), predict(image, model, axes=axes)
        )


def test_a_list_is_an_image():
    model = trained_model(depth=1)
    image = random_image((1, 9, 20))[0]
    np.testing.assert_array_equal(
        predict(image.tolist(), model), predict(image.astype(np.int64), model)
    )


def test_slices_of_a_stack_are_predicted_alone_with_its_statistics():
    image = random_image((1, 5, 30, 26))[0] + (np.arange(5) * 700)[:, None, None]
    how = Normalization()
    scaling = how.fit(image[None])
    low = float(scaling.offset[0])
    fixed = Normalization(
        method="fixed", lower=low, upper=low + 1 / float(scaling.gain[0])
    )
    stack = predict(image, trained_model(how), axes="ZYX")
    for z, plane in enumerate(image):
        alone = predict(plane, trained_model(fixed))
        np.testing.assert_allclose(stack[:, z], alone, atol=1e-5)
    own = predict(image[0], trained_model(how))
    assert np.abs(own - stack[:, 0]).max() > 1e-3


def test_planes_with_their_own_statistics():
    image = random_image((1, 4, 30, 26))[0] * np.arange(1, 5)[:, None, None]
    model = trained_model(Normalization(scope="plane"))
    stack = predict(image, model, axes="ZYX")
    for z, plane in enumerate(image):
        np.testing.assert_allclose(stack[:, z], predict(plane, model), atol=1e-6)


def test_a_volume_is_more_than_its_planes():
    model = trained_model(ndim=3, depth=1)
    image = random_image((1, 8, 20, 20))
    np.testing.assert_allclose(
        predict(image[0], model, axes="ZYX"), reference(model, image), atol=1e-4
    )
    changed = image.copy()
    changed[0, 3] = changed[0, 3, ::-1]
    other = predict(changed[0], model, axes="ZYX")
    assert np.abs(other - reference(model, image))[:, 4].max() > 1e-3


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_colour_becomes_gray_for_one_channel(dtype, model):
    colour = np.random.default_rng(0).integers(0, 255, (20, 24, 4)).astype(dtype)
    red, green, blue = np.moveaxis(colour[..., :3].astype(float), -1, 0)
    gray = 0.2125 * red + 0.7154 * green + 0.0721 * blue
    wanted = predict(gray, model)
    for samples in (3, 4):
        result = predict(colour[..., :samples], model, axes="YXS")
        assert result.shape == wanted.shape
        np.testing.assert_allclose(result, wanted, atol=1e-5)


def test_colour_for_three_channels_leaves_out_alpha():
    model = trained_model(in_channels=3)
    colour = np.random.default_rng(0).integers(0, 255, (20, 24, 4), dtype=np.uint8)
    wanted = predict(colour[..., :3].transpose(2, 0, 1), model, axes="CYX")
    for samples in (3, 4):
        result = predict(colour[..., :samples], model, axes="YXS")
        np.testing.assert_array_equal(result, wanted)


def test_chosen_channels_in_the_given_order():
    model = trained_model(in_channels=2)
    image = random_image((4, 20, 24))
    for channels in ((0, 1), (3, 1), (2, 2)):
        np.testing.assert_array_equal(
            predict(image, model, axes="CYX", channels=channels),
            predict(image[list(channels)], model, axes="CYX"),
        )


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((3, 20, 20), {"axes": "CYX"}, r"has 3 channels.* expects 1 \(channel 1\)"),
        ((20, 20, 2), {"axes": "YXS"}, r"has 2 channels"),
        ((3, 20, 20), {"axes": "CYX", "channels": (0, 1)}, "has 2 channels"),
        ((3, 20, 20), {"axes": "CYX", "channels": ()}, "has 0 channels"),
        ((3, 20, 20), {"axes": "CYX", "channels": (3,)}, r"no channel 3: it has 3"),
        ((3, 20, 20), {"axes": "CYX", "channels": (-1,)}, r"no channel -1"),
        ((20, 20), {"axes": "ZYX"}, r"has 2 axes \(20 x 20\),? but .* names 3"),
        ((20, 20), {"axes": "XX"}, "different letters"),
        ((20, 20), {"axes": "YQ"}, "different letters"),
        ((20, 20, 3, 3), {"axes": "YXCS"}, "different letters"),
        ((20, 20), {"axes": "ZY"}, "has no X"),
        ((20, 20), {"axes": ""}, "names 0"),
        ((20,), {}, "has 1 axes"),
        ((), {}, "has no Y"),
        ((2, 2, 2, 20, 20), {}, r"axes='TCZYX'"),
        ((0, 20), {}, "axis Y has length 0"),
        ((20, 0), {}, "axis X has length 0"),
        ((0, 20, 20), {"axes": "TYX"}, "axis T has length 0"),
        ((0, 20, 20), {"axes": "CYX"}, "axis C has length 0"),
        ((20, 20), {"tile_shape": (16,)}, "2 positive sides"),
        ((20, 20), {"tile_shape": (0, 16)}, "2 positive sides"),
        ((20, 20), {"region": {"X": slice(30, 40)}}, "empty along X"),
        ((20, 20), {"region": {"Y": slice(5, 5)}}, "empty along Y"),
        ((20, 20), {"device": "gpu"}, "no device 'gpu'.*auto, cpu, cuda, mps"),
    ],
)
def test_what_does_not_fit_is_said(shape, options, message, model):
    with pytest.raises(BadInput, match=message):
        predict(np.zeros(shape, dtype=np.uint8), model, **options)


def test_a_hint_names_axes_that_are_accepted(model):
    for ndim in (2, 3, 4):
        with pytest.raises(BadInput) as caught:
            predict(np.zeros((1,) * ndim), model, axes="Y")
        hint = str(caught.value).split("axes='")[-1].split("'")[0]
        assert predict(np.ones((1,) * ndim), model, axes=hint).ndim >= 3


def test_a_plane_for_a_volume_model():
    with pytest.raises(BadInput, match=r"works on ZYX.* has no Z.* 2D model"):
        predict(np.zeros((20, 20)), trained_model(ndim=3))


# --- lazy images --------------------------------------------------------------


class LazyImage:
    """An array that only hands out boxes and remembers them."""

    def __init__(self, pixels: np.ndarray):
        self._pixels = pixels
        self.shape, self.dtype, self.ndim = pixels.shape, pixels.dtype, pixels.ndim
        self.boxes: list[tuple[int, ...]] = []

    def __getitem__(self, index):
        box = self._pixels[index]
        self.boxes.append(box.shape)
        return box

    @property
    def largest(self) -> int:
        return max(int(np.prod(box)) for box in self.boxes)


def test_a_lazy_stack_is_read_plane_by_plane(model):
    image = random_image((1, 6, 50, 40))[0]
    lazy = LazyImage(image)
    result = predict(lazy, model, axes="ZYX", tile_shape=(16, 16))
    np.testing.assert_array_equal(
        result, predict(image, model, axes="ZYX", tile_shape=(16, 16))
    )
    assert lazy.largest == 50 * 40
    # Once for the statistics, once for the prediction: never tile by tile.
    assert len(lazy.boxes) == 12


def test_a_lazy_plane_is_read_once(model, image):
    lazy = LazyImage(image)
    result = predict(lazy, model, tile_shape=(16, 16))
    np.testing.assert_array_equal(result, predict(image, model, tile_shape=(16, 16)))
    assert len(lazy.boxes) == 1


@pytest.mark.parametrize("kind", ["uint16", "float32"])
def test_a_huge_lazy_plane_is_read_in_boxes(kind, monkeypatch):
    monkeypatch.setattr(source_module, "MAX_PLANE_BYTES", 10_000)
    monkeypatch.setattr(source_module, "SAMPLE_PIXELS", 6400)
    image = random_image((1, 300, 310))[0].astype(kind)
    lazy = LazyImage(image)
    model = trained_model(FIXED)
    result = predict(lazy, model, tile_shape=(32, 32))
    np.testing.assert_allclose(result, reference(model, image[None]), atol=1e-4)
    boxes = [box for box in lazy.boxes if max(box) < 300]
    assert max(int(np.prod(box)) for box in boxes) < 100**2
    if kind == "uint16":  # whole rows are only looked through for NaN
        assert boxes == lazy.boxes


def test_statistics_of_huge_lazy_images_are_sampled_and_close(monkeypatch):
    monkeypatch.setattr(source_module, "MAX_PLANE_BYTES", 10_000)
    monkeypatch.setattr(source_module, "SAMPLE_PIXELS", 6400)
    rng = np.random.default_rng(0)
    image = rng.normal(1000, 100, (300, 310)).astype(np.uint16)
    model = trained_model()
    results = [predict(LazyImage(image), model, tile_shape=(64, 64)) for _ in range(2)]
    np.testing.assert_array_equal(*results)
    np.testing.assert_allclose(results[0], reference(model, image[None]), atol=0.05)


def test_dask_is_never_computed_whole(model):
    image = random_image((1, 6, 50, 40))[0]
    lazy = LazyImage(image)
    array = da.from_array(lazy, chunks=(1, 25, 40), asarray=False, fancy=False)
    lazy.boxes.clear()  # dask tries an empty one
    result = predict(array, model, axes="ZYX")
    np.testing.assert_array_equal(result, predict(image, model, axes="ZYX"))
    assert lazy.largest <= 25 * 40
    assert len(lazy.boxes) == 2 * 12


def test_a_region_of_a_stack_reads_only_its_planes():
    lazy = LazyImage(random_image((1, 40, 20, 20))[0])
    model = trained_model(Normalization(scope="plane"))
    result = predict(lazy, model, axes="ZYX", region={"Z": slice(7, 9)})
    assert result.shape == (2, 2, 20, 20)
    assert len(lazy.boxes) <= 4


@pytest.mark.parametrize("axes", ["YX", "ZYX", "CYX", "YXC"])
def test_zarr(axes, tmp_path):
    sizes = {"Z": 3, "C": 2, "Y": 40, "X": 50}
    model = trained_model(in_channels=2 if "C" in axes else 1)
    image = random_image((1, *[sizes[a] for a in axes]))[0]
    stored = zarr.create_array(
        tmp_path / "image.zarr",
        data=image,
        chunks=tuple(min(n, 16) for n in image.shape),
    )
    np.testing.assert_array_equal(
        predict(stored, model, axes=axes), predict(image, model, axes=axes)
    )


def test_a_memory_map(model, image, tmp_path):
    np.save(tmp_path / "image.npy", image)
    mapped = np.load(tmp_path / "image.npy", mmap_mode="r")
    np.testing.assert_array_equal(predict(mapped, model), predict(image, model))


def test_the_image_is_left_as_it_is(model):
    image = random_image((1, 30, 30))[0].astype(np.float32)
    image[3, 4] = np.nan
    image.setflags(write=False)
    before = image.copy()
    predict(image, model, test_time_augmentation=True)
    np.testing.assert_array_equal(image, before)


def test_regions_of_a_stack(model):
    image = random_image((1, 5, 30, 26))[0]
    whole = predict(image, model, axes="ZYX")
    part = predict(
        image, model, axes="ZYX", region={"Z": slice(1, 4), "X": slice(-9, None)}
    )
    np.testing.assert_allclose(part, whole[:, 1:4, :, -9:], atol=1e-5)


def test_a_lazy_image_that_cannot_be_read_is_explained(model):
    def fail(block):
        raise OSError("disk gone")

    lazy = da.zeros((70, 90), chunks=50, dtype=np.uint8)
    broken = lazy.map_blocks(fail, dtype=np.uint8, meta=np.zeros((0, 0), np.uint8))
    with pytest.raises(BadInput, match="cannot be read: disk gone"):
        predict(broken, model)


def test_what_is_no_image_and_no_model_is_said(tmp_path):
    model, image = trained_model(depth=1), random_image((1, 20, 20))[0]
    with pytest.raises(BadInput, match="'nuclei' is not a Model; load_model loads"):
        segment(image, "nuclei")
    with pytest.raises(BadInput, match=r"The image is a path, .*cells\.tif'; read"):
        predict(tmp_path / "cells.tif", model)
    with pytest.raises(BadInput, match=r"pixel_size=0\.3 does not name the axes"):
        segment(image, model, pixel_size=0.3)
    with pytest.raises(BadInput, match="'nuclei' is not a Model"):
        fine_tune("nuclei", [Annotation(image, image > 0)])
