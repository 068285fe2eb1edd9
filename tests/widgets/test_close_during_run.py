"""Closing napari while a tile is being computed ends the program soon."""

from __future__ import annotations

import pytest
from desk import close_napari

PROGRAM = """
import sys
import napari
import numpy as np
from qtpy.QtCore import QTimer
from desk import slow_model
from napari_unet.widgets._session import Session
from napari_unet.widgets.segment import SegmentWidget

viewer = napari.Viewer()
dock = SegmentWidget(viewer, Session(slow_model()))
viewer.window.add_dock_widget(dock)
viewer.add_image(np.random.default_rng(0).random((3000, 3000), np.float32))
assert dock._job.start.isEnabled()
dock._job.start.click()

def close():
    assert dock._worker is not None, "the run has ended too early"
    print("closing", flush=True)
    viewer.close()

QTimer.singleShot(int(sys.argv[1]), close)
napari.run()
print("closed", flush=True)
"""


@pytest.mark.parametrize("after_ms", [0, 700, 2500])
def test_close_during_run(after_ms, home):
    line, seconds = close_napari(PROGRAM, after_ms)
    assert line == "closing\n"
    assert seconds < 5
