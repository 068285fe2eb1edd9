"""Planes of deep chunks: each chunk is decoded once, and every pixel is as stored."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from napari_unet.files import slabs
from napari_unet.files.slabs import Slabs


class Store:
    """Decodes chunks: what is read is nobody else's, and is counted."""

    def __init__(self, pixels, chunks):
        self.pixels, self.chunks = pixels, chunks
        self.shape, self.dtype, self.reads = pixels.shape, pixels.dtype, 0

    def __getitem__(self, key):
        self.reads += 1
        return self.pixels[key].copy()


@st.composite
def stored(draw):
    """An array, its axes and chunks, and keys of all kinds."""
    axes = draw(st.sampled_from(["ZYX", "TYX", "TZYX", "CZYX", "TZCYX", "ZYXS"]))
    shape = draw(st.tuples(*[st.integers(1, 9)] * len(axes)))
    chunks = draw(st.tuples(*[st.integers(1, 6)] * len(axes)))
    keys = []
    for _ in range(draw(st.integers(1, 12))):
        key = []
        for n in shape:
            start = draw(st.integers(0, n - 1))
            stop = draw(st.integers(start, n))
            step = draw(st.sampled_from([1, 1, 1, 2]))
            part = st.sampled_from(
                [start, slice(start, start + 1), slice(start, stop, step), slice(None)]
            )
            key.append(draw(part))
        keys.append(tuple(key))
    return axes, shape, chunks, keys


@settings(max_examples=200, deadline=None)
@given(stored(), st.sampled_from([0, 30, 400, 10_000]))
def test_pixels_are_those_of_the_array(case, budget):
    axes, shape, chunks, keys = case
    pixels = np.arange(np.prod(shape), dtype="u2").reshape(shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slabs, "SLAB_BYTES", budget)
        kept = Slabs(Store(pixels, chunks), axes, chunks)
        for key in keys:
            part = kept[key]
            np.testing.assert_array_equal(part, pixels[key])
            if part.ndim:
                part[...] = 0  # nobody else sees that
            assert sum(slab.nbytes for slab in kept._kept.values()) <= budget
        again = pickle.loads(pickle.dumps(kept))
        np.testing.assert_array_equal(again[keys[0]], pixels[keys[0]])


@pytest.mark.parametrize(
    ("budget", "reads"),
    # Of a plane of 2 * 4 * 6 * 2 bytes: all 8 of a chunk, 4, 3 and none.
    [(800, 3), (400, 5), (300, 8), (100, 20)],
)
def test_a_chunk_is_read_as_often_as_it_does_not_fit(budget, reads, monkeypatch):
    """20 planes in chunks of 8, 8 and 4; each is read in four parts."""
    monkeypatch.setattr(slabs, "SLAB_BYTES", budget)
    store = Store(np.zeros((2, 20, 4, 6), "u2"), (1, 8, 2, 3))
    kept = Slabs(store, "CZYX", store.chunks)
    for z in range(20):
        for y in (0, 2):
            for x in (0, 3):
                kept[:, z, y : y + 2, x : x + 3]
    assert store.reads == 4 * reads
    # Whole blocks are not kept.
    before = store.reads
    kept[:, 0:20, :2, :3]
    kept[:, 4:12, :2, :3]
    assert store.reads == before + 2
