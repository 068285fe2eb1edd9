from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import numpy as np
import pytest
from ticks import collect
from whole_image import trained_model

from napari_unet.inference import store as store_module
from napari_unet.inference.engine import Predictor
from napari_unet.inference.part import LabelledPart
from napari_unet.inference.segment import segment
from napari_unet.inference.settings import ObjectSettings
from napari_unet.inference.store import segment_stored_steps
from napari_unet.steps import run_to_end

if TYPE_CHECKING:
    from napari_unet.models.model import Model

SETTINGS = ObjectSettings(threshold=0.5, minimal_size=3)


@pytest.fixture(scope="module")
def model() -> Model:
    return trained_model()


@pytest.fixture(scope="module")
def stack() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (3, 40, 50), dtype=np.uint8)


def run(image, model, store=None, **options):
    steps = segment_stored_steps(store, image, model, SETTINGS, **options)
    return run_to_end(steps)


@pytest.mark.parametrize("limit", [store_module.MAX_BYTES, 0], ids=["memory", "zarr"])
def test_same_objects_as_segment(model, stack, limit, monkeypatch):
    monkeypatch.setattr(store_module, "MAX_BYTES", limit)
    store, labels, table = run(stack, model)
    assert isinstance(store.data, np.ndarray) == (limit > 0)
    direct = segment(stack, model, threshold=0.5, minimal_size=3)
    # 8-bit probabilities: equal but for pixels within half a step of the threshold.
    assert ((labels > 0) != (direct > 0)).mean() < 0.01
    assert len(table) == labels.max() > 10


@pytest.mark.parametrize(
    "settings",
    [SETTINGS, ObjectSettings(0.52, 3, split_touching=True, grow=1)],
    ids=["plain", "split and grown"],
)
def test_made_while_predicting_and_again_they_are_the_same(model, stack, settings):
    options = {"tile_shape": (16, 16), "region": {"Z": slice(1, 3)}}
    steps = segment_stored_steps(None, stack, model, settings, **options)
    store, labels, table = run_to_end(steps)
    _, again, table_again = run_to_end(store.label_steps(model, settings))
    assert labels.max() > 10
    np.testing.assert_array_equal(labels, again)
    assert table.columns == table_again.columns


@pytest.mark.parametrize(
    ("shape", "axes", "region", "limit", "places"),
    [
        ((3, 40, 50), "ZYX", None, store_module.MAX_BYTES, {(0,), (1,), (2,)}),
        ((40, 50), "YX", None, store_module.MAX_BYTES, {()}),
        ((3, 40, 50), "ZYX", {"Y": slice(0, 39)}, store_module.MAX_BYTES, set()),
        ((3, 40, 50), "ZYX", None, 0, set()),
        ((50, 40), "XY", None, store_module.MAX_BYTES, set()),
    ],
    ids=["stack", "plane", "part", "beyond memory", "other order"],
)
def test_objects_of_whole_planes_are_made_while_the_network_computes(
    model, shape, axes, region, limit, places, monkeypatch
):
    monkeypatch.setattr(store_module, "MAX_BYTES", limit)
    image = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    predictor = Predictor(image, model, axes=axes, region=region)
    kept = store_module.ProbabilityStore((1, *shape), axes, predictor.source.loop)
    found = run_to_end(kept.fill_steps(predictor, SETTINGS))
    assert set(found) == places
    assert all(made.done() for made in list(found.values())[:-1])
    labels = run_to_end(kept.label_steps(model, SETTINGS, found=found))[1]
    predictor.close()
    assert not found
    np.testing.assert_array_equal(
        labels, run_to_end(kept.label_steps(model, SETTINGS))[1]
    )


def test_temporary_files_vanish(model, stack, monkeypatch, tmp_path):
    monkeypatch.setattr(store_module, "MAX_BYTES", 0)
    monkeypatch.setattr(store_module.tempfile, "tempdir", str(tmp_path))
    store, _, _ = run(stack, model)
    assert len(list(tmp_path.iterdir())) == 1
    del store
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_parts_add_up_to_the_whole(model, stack):
    whole, labels, table = run(stack, model)
    store = None
    for z in (2, 0, 1):
        for rows in (slice(0, 13), slice(13, 40)):
            region = {"Z": slice(z, z + 1), "Y": rows}
            store, parts, rows_table = run(stack, model, store, region=region)
    np.testing.assert_array_equal(store.data, whole.data)
    np.testing.assert_array_equal(parts, labels)
    assert rows_table.columns == table.columns


def test_table_describes_the_labels(model, stack):
    _, labels, table = run(stack, model)
    columns = table.columns
    assert columns["label"] == list(range(1, labels.max() + 1))
    for label, z, y, x, size in zip(
        *(columns[name] for name in ("label", "Z", "Y", "X", "size")), strict=True
    ):
        where = np.argwhere(labels == label)
        assert size == len(where)
        np.testing.assert_allclose(where.mean(axis=0), (z, y, x))


def test_cancelled_run_keeps_what_was_there(model, stack):
    store, _, _ = run(stack, model, region={"Z": slice(0, 1)})
    before = store.data.copy()
    steps = segment_stored_steps(store, stack, model, SETTINGS)
    next(steps)
    steps.close()
    np.testing.assert_array_equal(store.data, before)


def filled(probabilities: np.ndarray) -> store_module.ProbabilityStore:
    """A store of planes (class, Z, Y, X) that are all covered."""
    kept = store_module.ProbabilityStore(probabilities.shape, "ZYX", "Z")
    kept.data[:] = probabilities
    kept._covered = {(z,) for z in range(probabilities.shape[1])}
    return kept


def steps_of(kept, model, settings, first):
    ticks, result = collect(kept.label_steps(model, settings, first))
    return ticks, result[1]


@pytest.mark.parametrize("split", [False, True])
def test_what_is_looked_at_comes_first_and_as_in_the_whole(model, split):
    """Objects reach out of it, by more than is first labelled around it, too."""
    planes = np.zeros((1, 2, 400, 500), dtype=np.uint8)
    planes[0, 1, ::9] = 255  # lines through the whole plane, larger than the smallest
    planes[0, 1, 4::9, ::7] = 255  # dots, smaller
    settings = ObjectSettings(minimal_size=450, split_touching=split)
    first = {"Z": slice(1, 2), "Y": slice(150, 200), "X": slice(200, 300)}
    ticks, labels = steps_of(filled(planes), model, settings, first)
    parts = [tick for tick in ticks if isinstance(tick, LabelledPart)]
    assert len(parts) == 1
    assert ticks[0] is parts[0]
    assert parts[0].place == (slice(1, 2), slice(150, 200), slice(200, 300))
    shown = labels[parts[0].place]
    assert shown.shape == parts[0].labels.shape == (1, 50, 100)
    np.testing.assert_array_equal(parts[0].labels > 0, shown > 0)
    assert shown.any()
    pairs = np.unique([parts[0].labels.ravel(), shown.ravel()], axis=1).T
    assert len(pairs) == len(np.unique(shown))


@pytest.mark.parametrize(
    "first",
    [
        None,
        {"Z": slice(2, 3)},
        {"Z": slice(0, 1), "Y": slice(7, 7)},
        {"Z": slice(0, 1), "Y": slice(0, 30)},
    ],
    ids=["no part", "not covered", "empty", "nearly all"],
)
def test_nothing_comes_first_where_it_would_be_of_no_use(model, first):
    kept = filled(np.full((1, 3, 40, 50), 200, dtype=np.uint8))
    kept._covered.remove((2,))
    ticks, labels = steps_of(kept, model, SETTINGS, first)
    assert not any(isinstance(tick, LabelledPart) for tick in ticks)
    assert labels.max() == 2


def test_labels_have_16_bits_as_long_as_there_is_room_for_more(model):
    few = np.zeros((1, 3, 240, 240), dtype=np.uint8)
    few[..., ::2, ::2] = 255  # 14,400 objects in a plane
    _, labels = steps_of(filled(few[:, :2]), model, ObjectSettings(), None)
    assert (labels.dtype, labels.max()) == (np.uint16, 28_800)
    _, labels = steps_of(filled(few), model, ObjectSettings(), None)
    assert (labels.dtype, labels.max()) == (np.uint32, 43_200)
    np.testing.assert_array_equal(labels > 0, few[0] > 0)
    assert len(np.unique(labels)) == 43_201
