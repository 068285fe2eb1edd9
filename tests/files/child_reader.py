"""Reading files in a process of its own, with little memory and time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

needs_limits = pytest.mark.skipif(
    os.name != "posix", reason="limits of memory and time of POSIX"
)

SCRIPT = """
import json, os, pathlib, resource, signal, sys, time
import dask.array, numpy as np, imagecodecs, tifffile, zarr, PIL.Image
from napari_unet.errors import BadInput
from napari_unet.files.images import read_image

signal.signal(signal.SIGALRM, signal.SIG_DFL)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    # What is printed last names the file that crashed the process.
    print(json.dumps({"file": path.name}), flush=True)
    # The kernel ends a process that hangs, also inside of a decoder.
    signal.alarm(10)
    started = time.monotonic()
    try:
        image = read_image(path)
        pixels = np.asarray(image.data)
        assert pixels.ndim == len(image.axes) and pixels.size
        assert pixels.dtype.kind in "buif"
        outcome = "read"
    except BadInput as error:
        outcome = str(error)
    signal.alarm(0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = time.monotonic() - started
    print(json.dumps({"outcome": outcome, "kB": peak - before, "s": seconds}))
"""


def read_in_child(folder: Path) -> dict[str, dict]:
    """Read all files of a folder in a process with little memory."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONUTF8": "1"},
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (lines[-1:], done.stderr)
    # tifffile's complaints are in the message, not on the user's terminal.
    assert done.stderr == ""
    return {a["file"]: b for a, b in zip(lines[::2], lines[1::2], strict=True)}
