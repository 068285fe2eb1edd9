"""Blocks give what the whole gives, numbers included."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from tiny import passport_of

from napari_unet.batch import stitch
from napari_unet.batch.stitch import Stitcher
from napari_unet.errors import BadOutput
from napari_unet.inference.classify import encode
from napari_unet.inference.objects import find_objects_steps
from napari_unet.inference.segment import Found
from napari_unet.inference.settings import ObjectSettings
from napari_unet.steps import run_to_end


def fields(count: int, shape, seed: int, blur: float) -> np.ndarray:
    """Probabilities of classes and a background, smooth, some exactly 0."""
    random = np.random.default_rng(seed)
    noise = random.normal(size=(count + 1, *shape))
    smooth = ndimage.gaussian_filter(noise, [0, *[blur] * len(shape)])
    power = np.exp(4 * smooth / smooth.std())
    probabilities = (power / power.sum(axis=0))[1:].astype(np.float32)
    probabilities[:, random.random(shape) < 0.02] = 0
    return probabilities


def stitched(probabilities, passport, wanted, block_shape, dtype=np.uint32):
    shape = probabilities.shape[1:]
    labels = np.full(shape, 77, dtype)
    stitcher = Stitcher(
        labels, passport, wanted, block_shape, lambda dtype: np.full(shape, 9, dtype)
    )
    kinds = [info.kind for info in passport.classes[1:]]
    for box in stitcher.blocks:
        part = probabilities[(slice(None), *box)]
        stitcher.add(box, encode(part, kinds, wanted.threshold))
    ticks = list(ticks_of(stitcher.label_steps(start_of(passport))))
    return labels, ticks


def ticks_of(steps):
    result = yield from steps
    yield result


def start_of(passport) -> int:
    kinds = [info.kind for info in passport.classes]
    return len(kinds) if "region" in kinds else 1


def check(probabilities, passport, wanted, block_shape) -> np.ndarray:
    kinds = [info.kind for info in passport.classes[1:]]
    objects = run_to_end(find_objects_steps(probabilities, kinds, wanted))
    whole = objects.labels
    labels, ticks = stitched(probabilities, passport, wanted, block_shape)
    np.testing.assert_array_equal(labels, whole)
    *ticks, found = ticks
    assert found == Found.count(objects, passport)
    sizes = np.bincount(whole.ravel(), minlength=objects.first + len(objects.classes))
    for index, kind in enumerate(kinds, start=1):
        of_class = sizes[objects.first :][objects.classes == index]
        region = sizes[index] if kind == "region" else 0
        assert found.objects[index] == len(of_class)
        assert found.pixels[index] == of_class.sum() + region
    assert sum(found.pixels) == whole.size
    if ticks:
        assert [tick.done for tick in ticks] == sorted(tick.done for tick in ticks)
        assert ticks[-1].done == ticks[-1].total
    return labels


@st.composite
def cases(draw):
    ndim = draw(st.sampled_from([2, 3]))
    side = st.integers(1, 40 if ndim == 2 else 14)
    shape = draw(st.tuples(*[side] * ndim))
    block = draw(st.tuples(*[st.integers(3, 20)] * ndim))
    kinds = draw(
        st.sampled_from(
            [
                ("objects",),
                ("objects", "objects"),
                ("region", "objects"),
                ("objects", "region", "objects"),
                ("region",),
            ]
        )
    )
    blur = draw(st.sampled_from([0.0, 0.7, 1.5, 3.0]))
    return (
        shape,
        block,
        kinds,
        fields(len(kinds), shape, draw(st.integers(0, 99)), blur),
    )


@given(
    case=cases(),
    threshold=st.sampled_from([0.0, 0.2, 0.5, 0.8]),
    minimal_size=st.integers(0, 12),
    grow=st.integers(0, 3),
    split=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_blocks_give_what_the_whole_gives(case, threshold, minimal_size, grow, split):
    _, block, kinds, probabilities = case
    wanted = ObjectSettings(threshold, minimal_size, split, grow)
    check(probabilities, passport_of(*kinds), wanted, block)


def objects(mask: np.ndarray, block_shape, **options) -> np.ndarray:
    """Check one class of objects made of a mask; return the labels."""
    probabilities = np.where(mask, 0.9, 0.1).astype(np.float32)[None]
    return check(
        probabilities, passport_of("objects"), ObjectSettings(**options), block_shape
    )


@pytest.mark.parametrize("split", [False, True])
def test_a_spiral_through_many_blocks_is_one_object(split):
    mask = np.zeros((61, 61), bool)
    for turn in range(0, 30, 6):  # rings that are cut open and linked
        end = 60 - turn
        mask[turn, turn : end + 1] = mask[end, turn : end + 1] = True
        mask[turn : end + 1, [turn, end]] = True
        mask[turn + 3, turn] = False
        mask[turn + 5, turn : turn + 7] = True
    labels = objects(mask, (7, 9), split_touching=split)
    assert labels.max() == 1 or split


def test_touching_discs_on_a_corner_of_blocks_are_split():
    y, x = np.indices((64, 64))
    mask = (np.hypot(y - 32, x - 24) < 10) | (np.hypot(y - 32, x - 41) < 10)
    assert objects(mask, (32, 32)).max() == 1
    assert objects(mask, (32, 32), split_touching=True).max() == 2


def test_a_hole_across_blocks_is_filled():
    y, x = np.indices((40, 40))
    mask = np.hypot(y - 20, x - 20) < 15
    mask[18:22, 18:22] = False
    labels = objects(mask, (20, 20), split_touching=True)
    assert labels[20, 20] == labels[10, 20] > 0


def test_blocks_of_one_column():
    """Where the last block has one pixel along two axes."""
    mask = np.random.default_rng(0).random((12, 19, 13)) < 0.6
    objects(mask, (8, 9, 6), grow=2)
    objects(mask, (8, 9, 6), grow=2, split_touching=True)


def test_what_is_too_large_to_split_stays_whole(monkeypatch):
    monkeypatch.setattr(stitch, "MAX_OBJECT_PIXELS", 60**2)
    y, x = np.indices((128, 128))
    large = (np.hypot(y - 64, x - 40) < 25) | (np.hypot(y - 64, x - 84) < 25)
    small = (np.hypot(y - 10, x - 56) < 8) | (np.hypot(y - 10, x - 70) < 8)
    probabilities = np.where(large | small, 0.9, 0.1).astype(np.float32)[None]
    settings = ObjectSettings(split_touching=True)
    labels, ticks = stitched(probabilities, passport_of("objects"), settings, (64, 64))
    assert len(np.unique(labels[large])) == 1
    assert len(np.unique(labels[small])) == 2
    notes = [tick.note for tick in ticks[:-1] if tick.note]
    assert len(notes) == 1
    assert notes[0].startswith("1 connected area too large to split stays whole")


def test_more_objects_than_the_labels_can_number():
    checkers = np.indices((30, 30)).sum(axis=0) % 2 == 0
    probabilities = checkers[None].astype(np.float32)
    args = probabilities, passport_of("objects"), ObjectSettings(), (16, 16)
    with pytest.raises(BadOutput, match="more objects than labels of type uint8"):
        stitched(*args, dtype=np.uint8)
    labels, _ = stitched(*args, dtype=np.uint16)
    assert labels.max() == 450
