from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import numpy as np
import pytest
from whole_image import trained_model

from napari_unet.inference import store as store_module
from napari_unet.inference.instances import ObjectSettings
from napari_unet.inference.segment import segment
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
