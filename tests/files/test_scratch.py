"""Temporary arrays: there as long as they are needed, and not a moment longer."""

import time

import numpy as np
import pytest

from napari_unet.files.scratch import Scratch


def test_arrays_hold_what_is_put_into_them(tmp_path):
    scratch = Scratch(tmp_path / "scratch")
    values = np.random.default_rng(0).integers(0, 2**32, (30, 40), dtype=np.uint32)
    arrays = [scratch.new_array((30, 40), (8, 16), np.dtype(np.uint32)) for _ in "ab"]
    arrays[0][5:, :9] = values[5:, :9]
    arrays[1][...] = values
    np.testing.assert_array_equal(arrays[0][5:, :9], values[5:, :9])
    assert not np.any(arrays[0][:5])
    np.testing.assert_array_equal(arrays[1][...], values)
    scratch.remove()
    assert not list(tmp_path.iterdir())


def test_what_is_removed_after_an_error_does_not_come_back(tmp_path):
    """When a chunk fails, zarr goes on with the others in the background."""
    for attempt in range(5):
        scratch = Scratch(tmp_path / str(attempt))
        array = scratch.new_array((64, 64), (2, 2), np.dtype(np.uint8))
        chunks = scratch.folder / "0" / "c"
        chunks.mkdir()
        (chunks / "7").write_bytes(b"a file where a folder of chunks has to be")
        with pytest.raises(OSError, match="7"):
            array[...] = 1
        scratch.remove()
        assert not scratch.folder.exists()
    time.sleep(0.5)
    assert not list(tmp_path.iterdir())
