"""Closing napari in the moment in which workers start ends the program in peace."""

from __future__ import annotations

from desk import close_napari

PROGRAM = """
import sys
import time
import napari
from qtpy.QtCore import QTimer
from napari_unet.steps import Progress
from napari_unet.widgets._worker import start_worker

def count_steps():
    yield Progress(0, 1)

def ignore(*given):
    pass

def start_and_close():
    sys.setswitchinterval(60)  # threads begin when this one waits
    for _ in range(100):
        start_worker(
            count_steps(),
            title="",
            on_progress=ignore,
            on_result=ignore,
            on_error=ignore,
            on_finished=ignore,
        )
    time.sleep(0.01)  # now all of them want to begin
    print("closing", flush=True)
    viewer.close()

viewer = napari.Viewer()
QTimer.singleShot(500, start_and_close)  # once all is drawn
napari.run()
print("closed", flush=True)
"""


def test_close_as_workers_start(home):
    line, _ = close_napari(PROGRAM)
    assert line == "closing\n"
