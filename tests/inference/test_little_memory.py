"""Memory really runs out while OpenVINO computes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from whole_image import random_image, reference, trained_model

CHILD = Path(__file__).with_name("child_little_memory.py")


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is one of Linux")
def test_smaller_tiles_do_where_memory_is_little(tmp_path):
    image, result = tmp_path / "image.npy", tmp_path / "result.npy"
    pixels = random_image((1, 1024, 1024))
    np.save(image, pixels[0])
    told = subprocess.run(
        [sys.executable, CHILD, image, result, "500"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Memory ran out on cpu; going on with smaller tiles." in told.stdout
    wanted = reference(trained_model(base_channels=32), pixels)
    np.testing.assert_allclose(np.load(result), wanted, atol=1e-4)
