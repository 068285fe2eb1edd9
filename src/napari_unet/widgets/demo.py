"""``make demo``: open a sample in napari, click Segment, look at the objects."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import napari
from napari.qt import get_qapp
from qtpy.QtCore import QTimer
from qtpy.QtWidgets import QPushButton

from napari_unet.files.outputs import write_labels

TIMEOUT = 180  # seconds


def main() -> None:
    """Run the main job; without a screen leave a picture and the labels."""
    on_screen = "NAPARI_UNET_VIRTUAL_DISPLAY" not in os.environ
    viewer = napari.Viewer(title="napari-unet demo")
    viewer.window.resize(1400, 900)
    viewer.open_sample("napari-unet", "nuclei")
    _, dock = viewer.window.add_plugin_dock_widget("napari-unet", "Segment")
    button = next(b for b in dock.findChildren(QPushButton) if b.text() == "Segment")
    outcome: list[str] = []

    def look() -> None:
        """Click as soon as the model is there; end when the labels are."""
        found = [layer for layer in viewer.layers if layer.name == "nuclei objects"]
        if found and button.isEnabled():
            timer.stop()
            found[0].contour = 2
            viewer.reset_view()
            outcome.append(f"{int(found[0].data.max())} objects")
            if not on_screen:
                # A moment for the canvas to be drawn.
                QTimer.singleShot(1500, finish)
        elif button.isEnabled() and not outcome and not clicked:
            clicked.append(True)
            button.click()

    def finish() -> None:
        labels = next(lay for lay in viewer.layers if lay.name == "nuclei objects")
        viewer.screenshot("demo.png", canvas_only=False, flash=False)
        write_labels(
            Path("demo_labels.tif"),
            labels.data,
            axes="YX",
            pixel_size={"Y": float(labels.scale[0]), "X": float(labels.scale[1])},
            overwrite=True,
        )
        viewer.close()

    clicked: list[bool] = []
    timer = QTimer()
    timer.timeout.connect(look)
    timer.start(100)
    if not on_screen:
        QTimer.singleShot(TIMEOUT * 1000, get_qapp().quit)
    napari.run()
    if not outcome:
        sys.exit("The demo did not finish; see the messages above.")
    done = "Look at demo.png and demo_labels.tif." if not on_screen else ""
    sys.stdout.write(f"napari-unet found {outcome[0]}. {done}\n")


if __name__ == "__main__":
    main()
