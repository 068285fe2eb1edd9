"""Docks open before torch is there; a thread imports it, and clicks wait for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from desk import close_napari

from napari_unet import widgets

FILES = Path(widgets.__file__).parent.glob("*.py")
MODULES = sorted(path.stem for path in FILES if path.stem != "demo")

IMPORTS = """
import sys
import napari
for name in sys.argv[1:]:
    __import__(f"napari_unet.widgets.{name}")
    for heavy in ("torch", "dask.array"):
        assert heavy not in sys.modules, f"{name} imports {heavy}"
"""

PROGRAM = """
import json
import sys
import threading
import time

import napari
import numpy as np
from qtpy.QtWidgets import QApplication, QPushButton

is_open = threading.Event()

class Gate:
    # Holds torch back until the docks are open, and from the main thread for ever.

    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            assert threading.current_thread() is not threading.main_thread()
            is_open.wait(60)

sys.meta_path.insert(0, Gate())
viewer = napari.Viewer()
image = np.zeros((64, 64), np.uint16)
image[20:40, 20:40] = 1000
viewer.add_image(image, name="cells")
docks = {}
for name in ("Segment", "Fine-tune", "Batch", "Models"):
    _, docks[name] = viewer.window.add_plugin_dock_widget("napari-unet", name)

def button(dock, text):
    return next(b for b in docks[dock].findChildren(QPushButton) if b.text() == text)

def wait_until(holds):
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end, "it never came"
        QApplication.processEvents()
        time.sleep(0.001)

segment, use = button("Segment", "Segment"), button("Models", "Use")
work = docks["Models"]._work
end = time.monotonic() + 1
wait_until(lambda: time.monotonic() > end)  # threads begin to import
panel = docks["Segment"]._objects
shown = [panel.values(), docks["Fine-tune"]._name.text()]
said = [segment.isEnabled(), segment.toolTip(), panel.isEnabled()]
use.click()
said += [work.status.text(), "torch" in sys.modules, "dask.array" in sys.modules]
is_open.set()
wait_until(segment.isEnabled)
wait_until(lambda: not work.busy)
said += [work.status.text(), panel.isEnabled()]
said.append(shown == [panel.values(), docks["Fine-tune"]._name.text()])
segment.click()
wait_until(lambda: "cells objects" in viewer.layers)
said.append(int(viewer.layers["cells objects"].data.max()))
print(json.dumps(said), flush=True)
viewer.close()
print("closed", flush=True)
"""


def test_no_module_of_the_docks_imports_torch():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IMPORTS, *MODULES],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("home")
def test_a_thread_imports_torch_and_early_clicks_are_honoured():
    line, _ = close_napari(PROGRAM, flags=("-W", "ignore"))
    assert json.loads(line) == [
        False,
        "The model is being loaded.",
        False,
        "Loading 'nuclei' …",
        False,
        False,
        "'nuclei' is used now, also in the other docks.",
        True,
        True,  # nothing that was shown has changed
        1,
    ]
