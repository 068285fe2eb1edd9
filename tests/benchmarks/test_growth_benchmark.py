"""The benchmark of growth segments what it says, both ways, and fits what it says."""

import numpy as np
import pytest


@pytest.fixture(scope="module")
def benchmark(load):
    return load("growth")


def test_both_ways_find_the_same_objects(benchmark, tmp_path):
    image = benchmark.new_array(tmp_path / "300.zarr", 300, np.uint16)
    image[:] = benchmark.draw_band(0, 300, 300)
    rows = []
    for way in ("file", "array"):
        folder = tmp_path / way
        folder.mkdir()
        (folder / "300.zarr").symlink_to(tmp_path / "300.zarr")
        rows.append(benchmark.measure(way, 300, "nuclei", folder))
    assert [row.objects for row in rows] == [36, 36]
    assert all(min(row.seconds, row.constant) > 0 <= row.added for row in rows)


@pytest.mark.slow
def test_each_size_has_a_process_of_its_own(benchmark):
    rows = benchmark.compare([300, 600], "nuclei", 300)
    assert [list(found) for found in rows.values()] == [[300, 600], [300]]
    assert rows["file"][600].objects == 144


@pytest.mark.parametrize("power", [1, 1.3])
def test_the_exponent_is_that_of_the_pixels(benchmark, power):
    rows = {
        side: benchmark.Row(0.7 + 1e-6 * side ** (2 * power), 0.7, 0, 0)
        for side in (1024, 2048, 4096)
    }
    assert benchmark.exponent(rows) == pytest.approx(power)
