"""Images of any size into arrays that are written in parts."""

from contextlib import closing

import numpy as np
import pytest
import zarr
from tiny import noise, tiny_model

from napari_unet import predict, segment
from napari_unet.batch import stitch
from napari_unet.batch.volume import segment_into_steps
from napari_unet.errors import BadOutput, OutOfMemory
from napari_unet.inference.backends import Backend
from napari_unet.inference.engine import Predictor
from napari_unet.inference.segment import Found
from napari_unet.inference.settings import ObjectSettings
from napari_unet.models.model import Model
from napari_unet.models.normalize import Normalization
from napari_unet.network.receptive_field import receptive_field
from napari_unet.steps import run_to_end


def segment_into(
    image, model, settings, *, labels=None, keep=True, block_shape=None, **options
):
    """Return labels, probabilities and what was found, of arrays of zeros."""
    with closing(Predictor(image, model, **options)) as predictor:
        shape = predictor.output_shape
        if labels is None:
            labels = np.full(shape[1:], 77, np.uint32)
        probabilities = np.full(shape, np.nan, np.float32) if keep else None
        found = run_to_end(
            segment_into_steps(
                predictor, settings, labels, probabilities, block_shape=block_shape
            )
        )
    return labels, probabilities, found


def check_found(found: Found, labels: np.ndarray, kinds: tuple[str, ...]) -> None:
    """Count everything anew."""
    first = len(kinds) + 1 if "region" in kinds else 1
    assert sum(found.objects) == labels.max(initial=first - 1) - first + 1
    assert sum(found.pixels) == labels.size
    assert found.pixels[0] == (labels == 0).sum()
    for index, kind in enumerate(kinds, 1):
        if kind == "region":
            assert found.pixels[index] == (labels == index).sum()
            assert found.objects[index] == 0
    assert found.covered == pytest.approx((labels > 0).mean())


# --- planes ------------------------------------------------------------------------


@pytest.mark.parametrize("axes", ["YX", "TYX", "XYT"])
@pytest.mark.parametrize("kinds", [("objects",), ("region", "objects", "objects")])
def test_the_same_as_segment_and_predict(axes, kinds):
    image = noise(5, 40, 36)[(0,) * (3 - len(axes))]
    model = tiny_model(*kinds)
    options = {"axes": axes}
    wanted = predict(image, model, **options)
    threshold = float(np.quantile(wanted[-1], 0.8))
    labels, probabilities, found = segment_into(
        image, model, ObjectSettings(threshold), **options
    )
    np.testing.assert_array_equal(probabilities, wanted)
    np.testing.assert_array_equal(
        labels, segment(image, model, threshold=threshold, **options)
    )
    assert sum(found.objects) > 5
    check_found(found, labels, kinds)


def test_into_a_zarr(tmp_path):
    model = tiny_model()
    image = noise(3, 40, 36)
    labels = zarr.create_array(
        store=str(tmp_path / "labels"),
        shape=image.shape,
        chunks=(1, 16, 16),
        dtype="u4",
    )
    segment_into(image, model, ObjectSettings(), labels=labels, keep=False, axes="TYX")
    np.testing.assert_array_equal(
        labels[:], segment(image, model, axes="TYX", threshold=0.5)
    )


def test_what_was_found_in_words():
    passport = tiny_model("region", "objects").passport
    assert Found.nothing(passport).describe() == "0 objects, 0.0% region 1"
    one = Found(passport, (0, 0, 1), (60, 30, 10))
    assert one.describe() == "1 object, 30.0% region 1"
    assert one.covered == pytest.approx(0.4)
    two = one + Found(passport, (0, 0, 1), (100, 0, 0))
    assert two.describe() == "2 objects, 15.0% region 1"
    many = tiny_model("region", "region", "region").passport
    assert Found(many, (0,) * 4, (5, 0, 5, 0)).describe() == "50.0% region 2"
    assert Found.nothing(many).describe() == "only background"


def test_more_objects_than_the_labels_can_number():
    model = tiny_model()
    image = noise(120, 130)
    threshold = float(np.quantile(predict(image, model)[1], 0.8))
    small = np.zeros(image.shape, np.uint8)
    with pytest.raises(BadOutput, match="more objects"):
        segment_into(image, model, ObjectSettings(threshold), labels=small)


# --- blocks ------------------------------------------------------------------------


def far_from(threshold: float, probabilities: np.ndarray) -> float:
    """A threshold near another one that no probability is near."""
    values = np.sort(probabilities.ravel())
    values = values[np.abs(values - threshold) < 0.05]
    gap = int(np.diff(values).argmax())
    return float(values[gap : gap + 2].mean())


@pytest.mark.parametrize(
    ("axes", "shape", "block"),
    [
        ("YX", (70, 90), (32, 40)),
        ("TYX", (3, 70, 50), (32, 32)),
        ("XTY", (50, 2, 70), (32, 32)),
        ("ZYX", (12, 24, 30), (8, 16, 16)),
        ("XYTZ", (18, 16, 2, 12), (8, 16, 16)),
    ],
)
@pytest.mark.parametrize(
    ("kinds", "split"),
    [(("objects",), False), (("objects", "region", "objects"), True)],
)
def test_blocks_are_the_whole(axes, shape, block, kinds, split):
    image = noise(*shape)
    model = tiny_model(*kinds, ndim=3 if "Z" in axes else 2)
    whole = predict(image, model, axes=axes)
    wanted = ObjectSettings(far_from(0.5, whole), 2, split, grow=1)
    one, _, found = segment_into(image, model, wanted, axes=axes)
    labels, probabilities, in_blocks = segment_into(
        image, model, wanted, axes=axes, block_shape=block
    )
    np.testing.assert_allclose(probabilities, whole, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(labels, one)
    assert in_blocks == found
    check_found(found, labels, kinds)


def ticks_of(image, model, settings=None, *, scratch=None, block=(32, 32), **options):
    """All that is yielded, and the labels."""
    with closing(Predictor(image, model, **options)) as predictor:
        labels = np.zeros(predictor.output_shape[1:], np.uint32)
        steps = segment_into_steps(
            predictor,
            settings or ObjectSettings(),
            labels,
            block_shape=block,
            scratch=scratch,
        )
        return list(steps), labels


def test_progress_counts_all_blocks(tmp_path):
    model = tiny_model()
    settings = ObjectSettings(0.5, split_touching=True)
    ticks, _ = ticks_of(noise(2, 70, 50), model, settings, axes="TYX", scratch=tmp_path)
    done = [tick.done for tick in ticks]
    assert done == sorted(done)
    assert len({tick.total for tick in ticks}) == 1
    assert done[-1] == ticks[-1].total
    assert "block 12 of 12" in {tick.message for tick in ticks}
    assert not list(tmp_path.iterdir())


def test_what_is_said_is_said_once():
    image = noise(70, 90).astype(np.float32)
    image[3, 3] = image[60, 80] = np.nan
    model = trained_for_pixel_size(0.5)
    ticks, labels = ticks_of(image, model, pixel_size={"Y": 0.3, "X": 0.3})
    notes = [tick.note for tick in ticks if tick.note]
    assert len(notes) == 2
    assert "rescaling" in notes[0]
    assert notes[1].startswith("2 pixels are NaN")
    assert labels[3, 3] == labels[60, 80] == 0


def trained_for_pixel_size(size: float) -> Model:
    return tiny_model("objects", pixel_size=(size, size))


@pytest.mark.parametrize("size", [0.3, 0.5, 0.8])
def test_blocks_of_a_rescaled_image(size):
    """The grid of the model lies over the whole image, not over each block."""
    image = noise(75, 90)
    model = trained_for_pixel_size(0.5)
    # Of 16 bits a rescaled block may round otherwise than the whole.
    options = {"pixel_size": {"Y": size, "X": size * 1.1}, "precision": "float32"}
    whole = predict(image, model, **options)
    wanted = ObjectSettings(far_from(0.5, whole), 2)
    one, _, _ = segment_into(image, model, wanted, **options)
    labels, probabilities, _ = segment_into(
        image, model, wanted, block_shape=(28, 40), **options
    )
    np.testing.assert_allclose(probabilities, whole, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(labels, one)


def test_blocks_of_a_part_of_an_image():
    image, model = noise(3, 80, 90), tiny_model()
    region = {"T": slice(1, 3), "Y": slice(5, 70), "X": slice(21, 88)}
    options = {"axes": "TYX", "region": region}
    wanted = ObjectSettings(far_from(0.5, predict(image, model, **options)))
    one, _, _ = segment_into(image, model, wanted, **options)
    labels, _, _ = segment_into(image, model, wanted, block_shape=(32, 32), **options)
    np.testing.assert_array_equal(labels, one)


class Counted:
    """A lazy image that counts the pixels that are read of it."""

    def __init__(self, pixels: np.ndarray):
        self.pixels, self.shape = pixels, pixels.shape
        self.dtype, self.ndim, self.read = pixels.dtype, pixels.ndim, 0

    def __getitem__(self, index):
        part = self.pixels[index]
        self.read += part.size
        return part


@pytest.mark.parametrize("scope", ["image", "plane"])
def test_each_block_of_a_lazy_image_is_read_once(scope):
    pixels = noise(2, 96, 96)
    model = tiny_model("objects", normalization=Normalization(scope=scope))
    image = Counted(pixels)
    settings = ObjectSettings(0.6)
    _, labels = ticks_of(
        image, model, settings, axes="TYX", block=(48, 48), tile_shape=(8, 8)
    )
    # Once for the statistics, and once with the halos of four blocks.
    halo = sum(receptive_field(model.network.config).halo)
    assert image.read <= pixels.size + 2 * 4 * (48 + halo) ** 2
    _, in_memory = ticks_of(
        pixels, model, settings, axes="TYX", block=(48, 48), tile_shape=(8, 8)
    )
    np.testing.assert_array_equal(labels, in_memory)


def test_blocks_to_come_are_cut_as_memory_ran_out(monkeypatch):
    run, failures = Backend.run, []

    def limited(self, image, keep, **options):
        if image[0, 0].numel() > 110**2:
            failures.append(image.shape)
            raise MemoryError
        return run(self, image, keep, **options)

    monkeypatch.setattr(Backend, "run", limited)
    ticks, _ = ticks_of(
        noise(260, 260), tiny_model(), block=(128, 128), tile_shape=(128, 128)
    )
    notes = [tick.note for tick in ticks if tick.note]
    assert notes == ["Memory ran out on cpu; going on with smaller tiles."]
    assert len(failures) < 3
    done = [tick.done for tick in ticks]
    assert done == sorted(done)


def test_cancelled_at_any_time_nothing_stays(tmp_path):
    model = tiny_model()
    settings = ObjectSettings(0.5, split_touching=True)
    options = {"scratch": tmp_path, "block_shape": (32, 32)}
    count = 0
    while True:
        count += 5
        with closing(Predictor(noise(40, 30), model)) as predictor:
            labels = np.zeros((40, 30), np.uint32)
            steps = segment_into_steps(predictor, settings, labels, **options)
            ended = sum(1 for _ in zip(range(count), steps, strict=False)) < count
            steps.close()
        assert not list(tmp_path.iterdir())
        if ended:
            break
    assert count > 10


def test_memory_that_runs_out_is_told(monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(stitch, "components", fail)
    with pytest.raises(OutOfMemory, match="Close other programs"):
        ticks_of(noise(40, 40), tiny_model())
