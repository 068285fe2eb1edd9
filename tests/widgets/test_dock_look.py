"""Nothing in a dock jumps, and nothing makes it wider than it has to be."""

from __future__ import annotations

import pytest

from napari_unet.widgets._dock import Dock, Fold, TextLabel
from napari_unet.widgets._running import choose_tile


def test_docks_lie_on_each_other(make_napari_viewer, qtbot):
    """Side by side there is no room for their buttons; who moves one away may."""
    viewer = make_napari_viewer(show=True)
    window = viewer.window
    added = [window.add_dock_widget(Dock(), name=name) for name in ("one", "two")]
    main = added[0].window()
    qtbot.waitUntil(lambda: main.tabifiedDockWidgets(added[1]) == [added[0]])
    qtbot.waitUntil(lambda: not added[1].visibleRegion().isEmpty())
    assert added[0].visibleRegion().isEmpty()
    for dock in added:
        dock.setFloating(True)
    alone = window.add_dock_widget(Dock(), name="three")
    qtbot.wait(50)
    assert main.tabifiedDockWidgets(alone) == []
    other = window.add_dock_widget(Dock(), name="left", area="left")
    qtbot.wait(50)
    assert main.tabifiedDockWidgets(other) == []


@pytest.mark.parametrize("lines", [1, 2, 4])
def test_a_label_keeps_its_height(make_napari_viewer, qtbot, lines):
    viewer = make_napari_viewer(show=True)
    dock, label = Dock(), TextLabel(lines)
    dock.column.addWidget(label)
    dock.column.addStretch(1)
    viewer.window.add_dock_widget(dock)
    heights = []
    for count in range(lines + 2):
        label.setText("\n".join("a word" for _ in range(count)))
        qtbot.wait(20)
        heights.append(label.height())
    assert len(set(heights[:-1])) == 1
    assert heights[-1] > heights[-2]  # there is room for no more than that


def test_a_fold_shows_whether_it_is_open(qtbot):
    fold = Fold("More")
    qtbot.addWidget(fold)
    assert fold.text() == "▸ More"
    fold.toggleButton().click()
    assert fold.text() == "▾ More"
    fold.collapse(animate=False)
    assert fold.text() == "▸ More"


def test_no_tile_size_is_called_automatic(qtbot):
    tile = choose_tile()
    qtbot.addWidget(tile.native)
    assert (tile.value, tile.native.text()) == (0, "automatic")
    tile.value = 512
    assert tile.native.text() == "512 pixels"


def test_the_plots_of_a_training_fit_into_a_narrow_dock(make_napari_viewer):
    viewer = make_napari_viewer()
    dock, _ = viewer.window.add_plugin_dock_widget("napari-unet", "Fine-tune")
    assert dock.sizeHint().width() <= 380
