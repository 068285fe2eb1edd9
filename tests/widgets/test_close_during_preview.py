"""Closing napari while a preview is being computed ends the program soon."""

from __future__ import annotations

from desk import close_napari, slow_model

from napari_unet.models.checkpoint import save_model
from napari_unet.models.library import library_dir

PROGRAM = """
import sys
import napari
import numpy as np
from qtpy.QtCore import QTimer
from napari_unet.widgets._session import Session
from napari_unet.widgets.models import ModelsWidget

viewer = napari.Viewer()
dock = ModelsWidget(viewer, Session())
viewer.window.add_dock_widget(dock)
viewer.add_image(np.random.default_rng(0).random((3000, 3000), np.float32))
dock.refresh("slow")
dock._fold.expand(animate=False)

def close():
    if dock._preview.later._worker is None:
        QTimer.singleShot(10, close)
        return
    print("closing", flush=True)
    viewer.close()

def wait():
    if dock._preview.status.text() == "Looking at the image …":
        QTimer.singleShot(int(sys.argv[1]), close)
    else:
        QTimer.singleShot(10, wait)

wait()
napari.run()
print("closed", flush=True)
"""


def test_close_during_preview(home):
    library_dir().mkdir(parents=True)
    save_model(slow_model(), library_dir() / "slow")
    line, seconds = close_napari(PROGRAM, 100)
    assert line == "closing\n"
    assert seconds < 5
