"""Closing napari during a batch keeps what is finished; the next start resumes."""

from __future__ import annotations

from batch_desk import BatchDesk, keep_model, write_images
from desk import close_napari

from napari_unet.files.images import read_image
from napari_unet.widgets._session import Session

PROGRAM = """
import sys
from pathlib import Path
import napari
from qtpy.QtCore import QTimer
from napari_unet.widgets.batch import BatchWidget

viewer = napari.Viewer()
dock = BatchWidget(viewer)
viewer.window.add_dock_widget(dock)
dock._form.input.text.setText(sys.argv[1])
dock._form.chooser.open_checkpoint("bright")

def look():
    done = sum(row.status == "done" for row in dock._table.rows)
    if dock._worker is None and dock._row.start.isEnabled():
        dock._row.start.click()
    elif done >= 3:
        timer.stop()
        assert done < 300, "the run has ended too early"
        print("closing", flush=True)
        viewer.close()

timer = QTimer()
timer.timeout.connect(look)
timer.start(5)
napari.run()
print("closed", flush=True)
"""


def test_close_and_resume(home, tmp_path, make_napari_viewer, qtbot):
    keep_model()
    images = write_images(tmp_path / "in", 300, side=32)
    line, seconds = close_napari(PROGRAM, images)
    assert line == "closing\n"
    assert seconds < 10
    made = list((tmp_path / "in-labels").glob("*.tif"))
    assert 3 <= len(made) < 300
    assert all(read_image(path).data.max() > 0 for path in made)
    on = BatchDesk(make_napari_viewer(), qtbot, Session())
    on.wait_for_words(f"{len(made)} of 300 are done; Resume does the rest.")
    assert on.start.text() == "Resume"
