"""Blocks give what the whole gives, numbers included."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from tiny import passport_of

from napari_unet.batch.stitch import Stitcher
from napari_unet.inference.instances import ObjectSettings, label_classes
from napari_unet.inference.segment import Found


def fields(count: int, shape, seed: int, blur: float) -> np.ndarray:
    """Probabilities of classes and a background, smooth, some exactly 0."""
    random = np.random.default_rng(seed)
    noise = random.normal(size=(count + 1, *shape))
    smooth = ndimage.gaussian_filter(noise, [0, *[blur] * len(shape)])
    power = np.exp(4 * smooth / smooth.std())
    probabilities = (power / power.sum(axis=0))[1:].astype(np.float32)
    probabilities[:, random.random(shape) < 0.02] = 0
    return probabilities


def stitched(probabilities, passport, wanted, block_shape):
    shape = probabilities.shape[1:]
    labels = np.full(shape, 77, np.uint32)
    stitcher = Stitcher(
        labels, passport, wanted, block_shape, lambda dtype: np.full(shape, 9, dtype)
    )
    for box in stitcher.blocks:
        stitcher.add(box, probabilities[(slice(None), *box)])
    ticks = list(ticks_of(stitcher.label_steps(start_of(passport))))
    return labels, ticks


def ticks_of(steps):
    result = yield from steps
    yield result


def start_of(passport) -> int:
    kinds = [info.kind for info in passport.classes]
    return len(kinds) if "region" in kinds else 1


def check(probabilities, passport, wanted, block_shape) -> np.ndarray:
    whole, classes = label_classes(probabilities, passport, wanted)
    labels, ticks = stitched(probabilities, passport, wanted, block_shape)
    np.testing.assert_array_equal(labels, whole)
    *ticks, found = ticks
    assert found == Found.count(whole, classes, passport)
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
@settings(max_examples=150, deadline=None)
def test_blocks_give_what_the_whole_gives(case, threshold, minimal_size, grow, split):
    _, block, kinds, probabilities = case
    wanted = ObjectSettings(threshold, minimal_size, split, grow)
    check(probabilities, passport_of(*kinds), wanted, block)
