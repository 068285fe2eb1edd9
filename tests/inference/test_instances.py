"""From probabilities to objects, and their numbers through a stack."""

import numpy as np
import pytest
from exact import predict, segment
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage import draw
from ticks import collect
from whole_image import EXAMPLES, random_image, trained_model

from napari_unet.inference import segment as segment_module
from napari_unet.inference.instances import label_classes, label_objects
from napari_unet.inference.segment import Numbering, foreground
from napari_unet.inference.settings import ObjectSettings
from napari_unet.models.model import ClassInfo, Model, Passport


def smooth_noise(shape, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=shape)
    noise = ndimage.gaussian_filter(noise, 1.0)
    noise = (noise - noise.min()) / np.ptp(noise)
    return noise.astype(np.float32)


def assert_dense(labels: np.ndarray) -> int:
    numbers = np.unique(labels)
    numbers = numbers[numbers > 0]
    np.testing.assert_array_equal(numbers, np.arange(1, len(numbers) + 1))
    return len(numbers)


def assert_connected(labels: np.ndarray) -> None:
    for number, box in enumerate(ndimage.find_objects(labels.astype(int)), start=1):
        assert ndimage.label(labels[box] == number)[1] == 1


def disc(shape, *centre: float, radius: float) -> np.ndarray:
    distance = sum(
        (axis - c) ** 2 for axis, c in zip(np.indices(shape), centre, strict=True)
    )
    return distance <= radius**2


def objects(mask: np.ndarray, **options) -> np.ndarray:
    return label_objects(mask.astype(np.float32), ObjectSettings(**options))


SHAPES = st.one_of(
    st.tuples(*[st.integers(1, 40)] * 2), st.tuples(*[st.integers(1, 12)] * 3)
)


@given(
    shape=SHAPES,
    threshold=st.floats(0.05, 0.95),
    minimal_size=st.integers(0, 20),
    split=st.booleans(),
    grow=st.integers(0, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=150 * EXAMPLES, deadline=None)
def test_what_holds_for_all_objects(shape, threshold, minimal_size, split, grow, seed):
    probability = smooth_noise(shape, seed) if np.prod(shape) > 1 else np.ones(shape)
    before = probability.copy()
    settings_ = ObjectSettings(threshold, minimal_size, split, grow)
    labels = label_objects(probability, settings_)
    np.testing.assert_array_equal(probability, before)
    assert labels.shape == shape
    assert labels.dtype.kind == "u"
    count = assert_dense(labels)
    assert_connected(labels)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    assert (sizes >= minimal_size).all()
    mask = probability > threshold
    components, number = ndimage.label(mask)
    if not grow:
        # Splitting fills small holes.
        filled = ndimage.binary_fill_holes(mask) if split else mask
        assert not labels[~filled].any()
        if not minimal_size:
            assert labels[mask].all()
            assert split or count == number
        if not split:
            large = np.bincount(components.ravel())[1:] >= minimal_size
            assert count == large.sum()
    else:
        near = ndimage.distance_transform_edt(~mask) <= grow
        assert split or not labels[~near].any()


def test_the_threshold_itself_is_outside():
    probability = np.array([[0.5, 0.5000001, 0.4999, 1.0]], dtype=np.float32)
    labels = label_objects(probability, ObjectSettings(threshold=0.5))
    np.testing.assert_array_equal(labels, [[0, 1, 0, 2]])


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("split", [False, True])
def test_objects_that_touch_at_a_corner_are_two(ndim, split):
    mask = np.zeros((8,) * ndim)
    mask[(slice(1, 4),) * ndim] = 1
    mask[(slice(4, 7),) * ndim] = 1
    assert objects(mask, split_touching=split).max() == 2
    edge = np.zeros((8,) * ndim)
    edge[(slice(1, 4),) * ndim] = 1
    edge[(slice(4, 7), *[slice(1, 4)] * (ndim - 1))] = 1
    assert objects(edge).max() == 1


@pytest.mark.parametrize(
    ("minimal_size", "count"), [(0, 3), (1, 3), (2, 2), (9, 1), (10, 0)]
)
def test_minimal_size(minimal_size, count):
    mask = np.zeros((12, 12))
    mask[0, 0] = 1
    mask[3, 3:7] = 1
    mask[6:9, 6:9] = 1
    labels = objects(mask, minimal_size=minimal_size)
    assert assert_dense(labels) == count


@pytest.mark.parametrize("distance", [1.7, 1.8, 1.9])
@pytest.mark.parametrize("radius", [8, 12, 25])
def test_two_overlapping_discs_are_split_at_the_neck(distance, radius):
    shape = (4 * radius, 6 * radius)
    row, column = 2 * radius, 2 * radius + distance * radius
    both = disc(shape, row, row, radius=radius) | disc(
        shape, row, column, radius=radius
    )
    assert objects(both).max() == 1
    labels = objects(both, split_touching=True)
    assert assert_dense(labels) == 2
    neck = (row + column) / 2
    columns = np.indices(shape)[1]
    left = labels[row, row]
    assert (labels[both & (columns < neck - 1)] == left).all()
    assert (labels[both & (columns > neck + 1)] == 3 - left).all()


@pytest.mark.parametrize("radius", [6, 12, 25])
def test_discs_that_are_nearly_one_stay_one(radius):
    shape = (4 * radius, 6 * radius)
    row = 2 * radius
    both = disc(shape, row, row, radius=radius)
    both |= disc(shape, row, row + 1.1 * radius, radius=radius)
    assert objects(both, split_touching=True).max() == 1


@pytest.mark.parametrize("angle", [0, 0.4, 0.8, 1.2])
@pytest.mark.parametrize(("long", "short"), [(20, 14), (30, 12), (40, 10)])
def test_an_ellipse_stays_whole(angle, long, short):
    mask = np.zeros((120, 120))
    mask[draw.ellipse(60, 60, long, short, rotation=angle)] = 1
    assert objects(mask, split_touching=True).max() == 1


@pytest.mark.parametrize("angle", [0.0, 0.3, 0.7, 1.1])
@pytest.mark.parametrize("width", [3, 6, 10])
def test_an_elongated_rod_stays_whole(angle, width):
    y, x = np.indices((160, 160)) - 80
    along = x * np.cos(angle) + y * np.sin(angle)
    across = -x * np.sin(angle) + y * np.cos(angle)
    mask = (np.abs(along) < 60) & (np.abs(across) < width)
    assert objects(mask, split_touching=True).max() == 1


@pytest.mark.parametrize("seed", range(5))
def test_a_rough_outline_stays_whole(seed):
    """A disc whose outline wobbles by a pixel, as a network draws it."""
    rng = np.random.default_rng(seed)
    y, x = np.indices((80, 80)) - 40
    angle = np.arctan2(y, x)
    wobble = sum(
        rng.normal() * np.cos(k * angle + rng.uniform(0, 6)) for k in range(3, 9)
    )
    mask = np.hypot(y, x) < 22 + 0.7 * wobble
    assert objects(mask, split_touching=True).max() == 1


def test_two_balls_are_split():
    shape = (24, 24, 40)
    balls = disc(shape, 12, 12, 12, radius=8) | disc(shape, 12, 12, 26, radius=8)
    assert objects(balls).max() == 1
    assert objects(balls, split_touching=True).max() == 2


@given(seed=st.integers(0, 999), grow=st.integers(1, 4), ndim=st.sampled_from([2, 3]))
@settings(max_examples=60 * EXAMPLES, deadline=None)
def test_growing_never_merges_or_loses_objects(seed, grow, ndim):
    probability = smooth_noise((30, 34) if ndim == 2 else (9, 12, 14), seed)
    probability = 0.01 + 0.99 * probability  # 0 is certain background
    threshold = float(np.quantile(probability, 0.8))
    seeds = label_objects(probability, ObjectSettings(threshold))
    grown = label_objects(probability, ObjectSettings(threshold, grow=grow))
    assert grown.max() == seeds.max()
    # Every object keeps all its pixels and its own number.
    np.testing.assert_array_equal(grown[seeds > 0], seeds[seeds > 0])
    near = ndimage.distance_transform_edt(seeds == 0) <= grow
    np.testing.assert_array_equal(grown > 0, near)


@given(
    seed=st.integers(0, 999),
    grow=st.integers(0, 2),
    split=st.booleans(),
    certain=st.booleans(),
)
@settings(max_examples=60 * EXAMPLES, deadline=None)
def test_numbers_follow_the_first_pixels(seed, grow, split, certain):
    probability = 0.01 + smooth_noise((40, 44), seed)
    threshold = float(np.quantile(probability, 0.7))
    if certain:
        probability[np.random.default_rng(seed).random((40, 44)) < 0.05] = 0
    wanted = ObjectSettings(threshold, 3, split, grow)
    labels = label_objects(probability, wanted)
    above = labels[probability > threshold]
    _, first = np.unique(above[above > 0], return_index=True)
    assert len(first) == labels.max()
    assert (np.diff(first) > 0).all()


@pytest.mark.parametrize("split", [False, True])
def test_certain_background_is_never_in_an_object(split):
    """As of NaN: also in the middle of an object, and when objects grow."""
    probability = np.where(disc((40, 40), 20, 20, radius=10), 0.9, 0.1)
    probability[20, 20] = probability[20, 31] = 0
    found = objects(probability, split_touching=split, grow=3)
    assert found[20, 20] == found[20, 31] == 0
    assert found[20, 19] == found[20, 30] == found[20, 32] == 1


def test_growing_stops_where_two_meet():
    mask = np.full((7, 9), 0.1)
    mask[2:5, 1:3] = mask[2:5, 4:6] = 1
    grown = objects(mask, grow=1)
    assert assert_dense(grown) == 2
    assert (grown[2:5, 3] > 0).all()


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 5)])
def test_nothing_and_everything(shape, split):
    options = {"split_touching": split, "grow": 1}
    assert not objects(np.zeros(shape), **options).any()
    np.testing.assert_array_equal(objects(np.ones(shape), **options), np.ones(shape))


@pytest.mark.parametrize("split", [False, True])
def test_uint8_equals_float_within_rounding(split):
    probability = smooth_noise((60, 70))
    rounded = np.round(probability * 255).astype(np.uint8)
    for threshold in (0.3, 0.5, 0.62):
        settings_ = ObjectSettings(threshold, 3, split, 1)
        np.testing.assert_array_equal(
            label_objects(rounded, settings_),
            label_objects(rounded.astype(np.float32) / 255, settings_),
        )
        plain = ObjectSettings(threshold)
        sure = np.abs(probability - threshold) > 0.5 / 255
        np.testing.assert_array_equal(
            (label_objects(rounded, plain) > 0)[sure],
            (label_objects(probability, plain) > 0)[sure],
        )


def test_more_objects_than_16_bits():
    mask = np.zeros((700, 700), dtype=np.float32)
    mask[::2, ::2] = 1
    for split in (False, True):
        labels = label_objects(mask, ObjectSettings(split_touching=split))
        assert labels.max() == 350**2
        assert assert_dense(labels) == 350**2


# --- several classes -----------------------------------------------------------


def passport_of(*kinds: str) -> Passport:
    classes = [ClassInfo(name="background", kind="background")]
    classes += [ClassInfo(name=f"{k} {i}", kind=k) for i, k in enumerate(kinds)]
    return Passport(classes=tuple(classes), channels=("c",))


def one_hot(labels: np.ndarray, count: int) -> np.ndarray:
    """Probabilities without background: 0.9 for the class, the rest shared."""
    classes = np.arange(1, count + 1)[:, None, None]
    return np.where(labels == classes, 0.9, 0.1 / count).astype(np.float32)


@pytest.fixture
def truth() -> np.ndarray:
    """Two blobs of class 1, one of class 2 touching one of them, one of class 3."""
    classes = np.zeros((20, 20), dtype=int)
    classes[1:4, 1:4] = classes[1:4, 8:11] = 1
    classes[4:8, 1:4] = 2
    classes[12:18, 10:16] = 3
    return classes


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_objects_of_three_classes(truth, dtype):
    probabilities = one_hot(truth, 3)
    if dtype == np.uint8:
        probabilities = np.round(probabilities * 255).astype(np.uint8)
    passport = passport_of("objects", "objects", "objects")
    labels, classes = label_classes(probabilities, passport, ObjectSettings())
    assert assert_dense(labels) == 4
    np.testing.assert_array_equal(labels > 0, truth > 0)
    np.testing.assert_array_equal(classes, [1, 1, 2, 3])
    np.testing.assert_array_equal(np.append(0, classes)[labels], truth)


def test_regions_keep_their_class_as_label(truth):
    passport = passport_of("region", "region", "region")
    labels, classes = label_classes(one_hot(truth, 3), passport, ObjectSettings())
    np.testing.assert_array_equal(labels, truth)
    assert len(classes) == 0


def test_objects_among_regions_are_numbered_behind_the_classes(truth):
    passport = passport_of("objects", "region", "objects")
    labels, classes = label_classes(one_hot(truth, 3), passport, ObjectSettings())
    np.testing.assert_array_equal(labels == 2, truth == 2)
    assert sorted(np.unique(labels)) == [0, 2, 4, 5, 6]
    np.testing.assert_array_equal(classes, [1, 1, 3])
    for label, index in zip((4, 5, 6), classes, strict=True):
        assert set(truth[labels == label]) == {index}


def test_the_background_wins_where_it_is_likeliest():
    # Background 0.4, the classes 0.35 and 0.25; then 0.2, 0.45 and 0.35.
    probabilities = np.array([[[0.35, 0.45]], [[0.25, 0.35]]], dtype=np.float32)
    passport = passport_of("region", "region")
    labels, _ = label_classes(probabilities, passport, ObjectSettings())
    np.testing.assert_array_equal(labels, [[0, 1]])


def test_settings_come_from_the_passport():
    passport = passport_of("objects").model_copy(
        update={"threshold": 0.7, "minimal_size": 5, "split_touching": True, "grow": 2}
    )
    assert ObjectSettings.recommended(passport) == ObjectSettings(0.7, 5, True, 2)


# --- numbers through a stack -----------------------------------------------------


@pytest.mark.parametrize("kinds", [("objects",), ("region", "objects")])
def test_numbers_run_on(kinds):
    passport = passport_of(*kinds)
    numbering = Numbering(passport)
    first = len(kinds) + 1 if "region" in kinds else 1
    plane = np.array([[0, first, first + 1]], dtype=np.uint16)
    found = np.array([len(kinds)] * 2)
    np.testing.assert_array_equal(numbering.renumber(plane, found), plane)
    np.testing.assert_array_equal(
        numbering.renumber(plane, found), [[0, first + 2, first + 3]]
    )
    if "region" in kinds:
        region = np.array([[0, 1, first]], dtype=np.uint16)
        np.testing.assert_array_equal(
            numbering.renumber(region, found[:1]), [[0, 1, first + 4]]
        )
    assert numbering.count == (5 if "region" in kinds else 4)


@pytest.mark.parametrize("before", [2**16 - 2, 2**31 - 2, 2**32 - 4, 2**32 - 2, 2**40])
def test_numbers_never_overflow(before):
    numbering = Numbering(passport_of("objects"))
    numbering.count = before
    plane = np.array([[0, 1, 2, 3]], dtype=np.uint8)
    labels = numbering.renumber(plane, np.ones(3, dtype=int))
    wanted = [0, before + 1, before + 2, before + 3]
    assert labels.tolist() == [wanted]
    assert labels.dtype == (np.uint32 if before + 3 < 2**32 - 1 else np.uint64)


def test_a_stack_is_numbered_through(model):
    image = random_image((1, 4, 40, 36))[0]
    probabilities = predict(image, model, axes="ZYX")[1]
    threshold = float(np.quantile(probabilities, 0.8))
    labels = segment(image, model, axes="ZYX", threshold=threshold)
    assert labels.dtype == np.uint32
    assert assert_dense(labels) > 10
    np.testing.assert_array_equal(labels > 0, probabilities > threshold)
    per_plane = [set(np.unique(plane)) - {0} for plane in labels]
    assert sum(map(len, per_plane)) == len(set.union(*per_plane))


def test_a_stack_beyond_32_bits_is_widened(model, monkeypatch):
    image = random_image((1, 3, 40, 36))[0]
    threshold = float(np.quantile(predict(image, model, axes="ZYX")[1], 0.8))
    options = {"axes": "ZYX", "threshold": threshold}
    wanted = segment(image, model, **options)
    start = Numbering.__init__
    shift = 2**32 - 5 - int(wanted[0].max())

    def begin_high(self, passport):
        start(self, passport)
        self.count = shift

    monkeypatch.setattr(Numbering, "__init__", begin_high)
    labels = segment(image, model, **options)
    assert labels.dtype == np.uint64
    assert labels.max() > 2**32
    assert set(np.unique(labels[labels > 0] - np.uint64(shift))) == set(
        np.unique(wanted[wanted > 0])
    )


def test_objects_of_a_volume_are_joined_through_its_planes():
    image = random_image((1, 8, 30, 30))[0]
    model = trained_model(ndim=3, depth=1)
    probability = predict(image, model, axes="ZYX")[1]
    threshold = float(np.quantile(probability, 0.7))
    labels = segment(image, model, axes="ZYX", threshold=threshold)
    np.testing.assert_array_equal(
        labels, label_objects(probability, ObjectSettings(threshold))
    )
    spans = [box[0].stop - box[0].start for box in ndimage.find_objects(labels)]
    assert max(spans) > 2


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": 0.3, "minimal_size": 4},
        {"split_touching": True},
        {"minimal_size": 0},
    ],
)
def test_given_settings_replace_the_recommended_ones(options, image, model):
    passport = model.passport.model_copy(update={"threshold": 0.45, "minimal_size": 9})
    recommended = Model(model.network, passport)
    probability = predict(image, model)[1]
    settings_ = {"threshold": 0.45, "minimal_size": 9} | options
    np.testing.assert_array_equal(
        segment(image, recommended, **options),
        label_objects(probability, ObjectSettings(**settings_)),
    )


def test_a_sigmoid_is_all_foreground():
    one, two = np.zeros((1, 4, 4)), np.zeros((2, 4, 4))
    assert foreground(one).shape == (1, 4, 4)
    assert foreground(two).shape == (1, 4, 4)
    image = random_image((1, 30, 30))[0]
    model = trained_model(num_classes=1)
    probability = predict(image, model)[0]
    threshold = float(np.median(probability))
    labels = segment(image, model, threshold=threshold)
    np.testing.assert_array_equal(labels > 0, probability > threshold)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("axes", ["ZYX", "YZX", "YX"])
def test_rows_of_tiles_make_the_same_objects(model, split, axes):
    """They cut through objects, of planes that lie across the axes, too."""
    image = random_image((1, 3, 100, 60))[0]
    image = image[0] if axes == "YX" else np.moveaxis(image, 0, axes.index("Z"))
    image = image.astype(np.float32)
    image[..., 30:33] = np.nan
    found = np.sort(predict(image, model, axes=axes)[1], axis=None)
    found = found[int(0.7 * found.size) :][:500]
    widest = int(np.diff(found).argmax())  # no rounding reaches over it
    options = {
        "axes": axes,
        "threshold": float(found[widest : widest + 2].mean()),
        "split_touching": split,
        "precision": "float32",
    }
    whole = segment(image, model, **options)
    steps = segment_module.segment_steps(image, model, tile_shape=(32, 32), **options)
    ticks, labels = collect(steps)
    assert whole.max() > 10
    np.testing.assert_array_equal(labels, whole)
    assert labels.dtype == whole.dtype
    done = [tick.done for tick in ticks]
    assert done == sorted(done)
    assert done[-1] == ticks[-1].total
    assert sum("NaN" in tick.note for tick in ticks) == 1
