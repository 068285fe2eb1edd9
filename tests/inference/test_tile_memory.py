"""The formula by which tiles are chosen, against the peak of a process."""

import subprocess
import sys
from pathlib import Path

import pytest

CHILD = Path(__file__).with_name("child_memory.py")


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells the peak alone")
@pytest.mark.parametrize("precision", ["auto", "float32"])
@pytest.mark.parametrize("through", ["openvino", "torch"])
def test_a_tile_takes_what_is_expected(through, precision):
    told = subprocess.run(
        [sys.executable, CHILD, through, precision, "768", "32"],
        capture_output=True,
        text=True,
        check=True,
    )
    measured, expected = map(float, told.stdout.split())
    # Tiles may take a third of the free memory, so that a little more does no harm.
    assert 0.5 * expected < measured < 1.25 * expected
