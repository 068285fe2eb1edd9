"""A slider's move changes first what is looked at, then everything."""

import time

import numpy as np
import pytest
from desk import spots
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from qtpy.QtCore import QTimer

from napari_unet.inference.instances import label_objects
from napari_unet.widgets._part import keep_numbers

LOOKED_AT = (slice(425, 475), slice(425, 475))  # some of both halves
SIDE = 8192
ANSWER, FREEZE = 0.3, 0.2  # seconds


def uneven(side: int, period: int = 16) -> np.ndarray:
    """Spots of which the upper half is less likely to be objects."""
    image = spots(side, side)
    if period != 16:
        inside = np.arange(side) % period < period // 3
        image[:] = 100 * (inside[:, None] & inside)
    image[: side // 2][image[: side // 2] > 0] = 55
    return image


def look_at(on, side: int) -> None:
    """Show the middle of an image, some hundred pixels of it."""
    on.viewer.scene.camera.center = (side / 2, side / 2)
    on.viewer.scene.camera.zoom = 4
    on.qtbot.wait(50)


def whole_labels(on) -> np.ndarray:
    """Make objects of what the dock has kept, with what its sliders say."""
    settings = on.dock._object_settings(on.session.model)
    return label_objects(on.dock._segmented.store.data[0], settings)


@pytest.fixture
def seen(desk):
    """A segmented image that is looked at closely, and the labels at each change."""
    on = desk(show=True)
    on.viewer.add_image(uneven(900))
    on.segment()
    look_at(on, 900)
    changes = []

    def note(name: str) -> None:
        changes.append((name, on.labels.data.copy()))

    on.labels.events.labels_update.connect(lambda event: note("part"))
    on.labels.events.data.connect(lambda event: note("whole"))
    return on, changes


def move(on, threshold: float) -> None:
    on.dock._objects._threshold.setValue(threshold)
    on.wait_until(lambda: on.dock._worker is not None, 5)
    on.wait_until(lambda: on.dock._worker is None, 20)


def test_what_is_looked_at_comes_first(seen):
    on, changes = seen
    before = on.labels.data.copy()
    move(on, 0.9)
    assert [name for name, _ in changes] == ["part", "whole"]
    (_, part), (_, whole) = changes
    np.testing.assert_array_equal(part[LOOKED_AT] > 0, whole[LOOKED_AT] > 0)
    np.testing.assert_array_equal(part[:100], before[:100])  # is out of sight
    kept = part[LOOKED_AT] > 0
    assert kept.any()
    assert (before[LOOKED_AT][~kept] > 0).any()
    # What stays keeps its number, and with it its colour, until the whole is there.
    np.testing.assert_array_equal(part[LOOKED_AT][kept], before[LOOKED_AT][kept])
    np.testing.assert_array_equal(whole, whole_labels(on))
    np.testing.assert_array_equal(on.labels.data, whole)


def test_objects_come_back_first_where_somebody_looks(seen):
    on, changes = seen
    before = on.labels.data.copy()
    move(on, 0.9)
    changes.clear()
    move(on, 0.5)
    assert [name for name, _ in changes] == ["part", "whole"]
    assert (changes[0][1] > 0).sum() < (before > 0).sum()
    np.testing.assert_array_equal(changes[0][1][LOOKED_AT] > 0, before[LOOKED_AT] > 0)
    np.testing.assert_array_equal(on.labels.data, before)


def test_cancel_takes_the_part_back(seen):
    on, changes = seen
    before = on.labels.data.copy()
    on.labels.events.labels_update.connect(lambda event: on.button("Cancel").click())
    on.dock._objects._threshold.setValue(0.9)
    on.wait_until(lambda: bool(changes), 5)
    on.wait_until(lambda: on.dock._worker is None, 20)
    assert {name for name, _ in changes} == {"part"}
    assert (changes[0][1] != before).any()
    np.testing.assert_array_equal(on.labels.data, before)
    assert "as they were" in on.status


def test_parts_cannot_be_undone_and_nobody_has_painted(seen):
    on, _ = seen
    layer = on.labels
    layer.mode = "paint"
    move(on, 0.9)
    found = layer.data.copy()
    layer.undo()
    np.testing.assert_array_equal(layer.data, found)
    assert layer.editable
    assert layer.mode == "paint"
    move(on, 0.5)
    assert on.labels is layer
    assert "kept" not in on.status


def test_painted_labels_are_not_written_over(seen):
    on, changes = seen
    layer = on.labels
    layer.data_setitem((np.array([5]), np.array([5])), 7)
    changes.clear()
    painted = layer.data.copy()
    move(on, 0.9)
    assert not changes
    np.testing.assert_array_equal(layer.data, painted)


NUMBERS = arrays.arrays(np.uint16, (6, 7), elements=st.integers(0, 6))


@given(labels=NUMBERS, before=NUMBERS, first=st.integers(1, 3))
def test_objects_keep_one_of_the_numbers_they_lie_on(labels, before, first):
    numbered = keep_numbers(labels, before, first, 7)
    # One to one, and nothing becomes or stops being an object.
    pairs = np.unique(np.stack([labels.ravel(), numbered.ravel()]), axis=1).T
    assert len(np.unique(pairs[:, 0])) == len(np.unique(pairs[:, 1])) == len(pairs)
    for old, new in pairs.tolist():
        if old < first:
            assert new == old
        elif new < 7:
            assert new >= first
            assert (before[labels == old] == new).any()


@pytest.mark.slow
def test_a_large_plane_answers_at_once(desk):
    """Two moves of four at least, as other programs may use the machine."""
    on = desk(show=True)
    on.viewer.add_image(uneven(SIDE, 58))  # 20,000 objects
    on.click_segment()
    on.wait_until(on.button("Cancel").isEnabled)
    on.wait_until(lambda: not on.button("Cancel").isEnabled(), 900)
    look_at(on, SIDE)
    beats: list[float] = []
    heart = QTimer()
    heart.setInterval(5)
    heart.timeout.connect(lambda: beats.append(time.monotonic()))
    heart.start()
    box = slice(SIDE // 2 - 60, SIDE // 2), slice(SIDE // 2 - 60, SIDE // 2)
    answers, freezes = [], []
    for threshold in (0.9, 0.5, 0.8, 0.5):
        is_there = threshold == 0.5
        begin = time.monotonic()
        beats[:] = [begin]
        on.dock._objects._threshold.setValue(threshold)
        while (on.labels.data[box] > 0).any() != is_there:
            on.qtbot.wait(1)
        answers.append(time.monotonic() - begin)
        on.wait_until(lambda: on.dock._worker is None, 60)
        on.qtbot.wait(20)
        freezes.append(float(np.diff(beats).max()))
        np.testing.assert_array_equal(on.labels.data, whole_labels(on))
    heart.stop()
    assert sorted(answers)[1] <= ANSWER, answers
    assert sorted(freezes)[1] <= FREEZE, freezes
