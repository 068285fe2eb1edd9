"""The formula by which tiles are chosen, against the peak of a process."""

import subprocess
import sys
from pathlib import Path

import pytest

CHILD = Path(__file__).with_name("child_memory.py")


pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="Linux tells the peak alone"
)


def measured_and_expected(*arguments: object) -> tuple[float, ...]:
    told = subprocess.run(
        [sys.executable, CHILD, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    return tuple(map(float, told.stdout.split()))


@pytest.mark.parametrize("precision", ["auto", "float32"])
@pytest.mark.parametrize("through", ["openvino", "torch"])
def test_a_tile_takes_what_is_expected(through, precision):
    measured, expected = measured_and_expected(through, precision, 768, 32, 0)
    # Tiles may take a third of the free memory, so that a little more does no harm.
    assert 0.5 * expected < measured < 1.25 * expected


@pytest.mark.parametrize(("through", "limit"), [("openvino", 0.3), ("torch", 0.6)])
def test_a_limit_is_kept_and_used(through, limit):
    """From nothing: also what compiling takes, and the weights."""
    measured, expected = measured_and_expected(through, "auto", 768, 32, 96, limit)
    assert 0.5 * expected < measured <= expected


def test_tiles_of_several_shapes_take_no_more():
    """OpenVINO has memory for each."""
    measured, expected = measured_and_expected("openvino", "auto", 768, 32, 0, "", 4)
    assert 0.5 * expected < measured < 1.5 * expected
