"""What is saved by itself, without a dock."""

from __future__ import annotations

import numpy as np
import pytest
from napari.layers import Image

from napari_unet.steps import run_to_end
from napari_unet.training.annotations import Annotation
from napari_unet.training.project import load_project, save_project
from napari_unet.training.project_file import is_project
from napari_unet.training.settings import TrainingSettings
from napari_unet.widgets._autosave import Autosave, Choices, Contents
from napari_unet.widgets._slots import find_left


class Docked:
    """An `Autosave`, and what is annotated."""

    def __init__(self):
        self.pairs = {}
        self.autosave = Autosave(self.read)

    def read(self):
        if not self.pairs:
            return None
        choices = Choices(TrainingSettings(), "", 2, "")
        images, annotations = zip(*self.pairs.values(), strict=True)
        return Contents(list(images), list(annotations), choices)

    def add(self, name: str, axes: str = "YX") -> Image:
        pixels = np.full((9, 9), len(name), np.uint8)
        note = Annotation(pixels, np.eye(9, dtype=int), axes=axes, name=name)
        self.pairs[name] = Image(pixels), note
        return self.pairs[name][0]

    def paint(self, name: str, label: int) -> None:
        self.pairs[name][1].labels[0, 0] = label
        self.autosave.note_change()

    def remove(self, *names: str) -> None:
        for name in names:
            self.autosave.note_removal()
            del self.pairs[name]

    def save(self) -> None:
        steps = self.autosave.save_steps()
        assert steps is not None
        run_to_end(steps)


@pytest.fixture
def on(home):
    docked = Docked()
    yield docked
    docked.autosave.finish()


def saved(folder) -> dict[str, int]:
    return {a.name: a.labels[0, 0] for a in load_project(folder).annotations}


def left(on) -> dict[str, int]:
    slot = find_left(on.autosave.home)
    assert slot is not None
    slot.lock.release()
    return saved(slot.folder)


def test_what_is_annotated_after_a_removal_is_saved_at_the_end(on):
    on.add("first")
    on.paint("first", 5)
    on.add("other")
    on.remove("other")
    on.add("second")
    on.paint("second", 6)
    on.autosave.finish()
    assert left(on) == {"first": 5, "second": 6}


def test_all_that_is_removed_at_the_end_is_saved(on):
    on.add("first")
    on.paint("first", 5)
    on.add("other")
    on.remove("other")
    on.add("second")
    on.paint("second", 6)
    on.remove("first", "second")
    on.autosave.finish()
    assert left(on) == {"first": 5, "second": 6}


def test_what_cannot_be_saved_is_left_out_until_it_is_mended(on, tmp_path):
    images = [on.add("good"), on.add("bad")]
    folder = save_project(tmp_path / "p", on.read().annotations, TrainingSettings())
    assert on.autosave.opened(folder, images)
    before = saved(folder)
    right = on.pairs["bad"]
    on.add("bad", axes="ZYX")
    on.pairs["bad"] = images[1], on.pairs["bad"][1]
    on.paint("good", 7)
    on.save()
    assert "bad" in on.autosave.left_out
    assert on.autosave.is_needed
    assert saved(folder) == before  # which has all images
    on.pairs["bad"] = right
    on.save()
    assert not on.autosave.left_out
    assert not on.autosave.is_needed
    assert saved(folder) == {"good": 7, "bad": 1}


def test_what_can_be_saved_is_saved_at_the_end(on):
    on.add("bad", axes="ZYX")
    on.add("good")
    on.paint("good", 7)
    on.autosave.finish()
    assert left(on) == {"good": 7}


def test_a_project_that_was_closed_gets_its_last_strokes(on, tmp_path):
    first = on.add("first")
    one = save_project(tmp_path / "1", on.read().annotations, TrainingSettings())
    assert on.autosave.opened(one, [first])
    on.paint("first", 8)
    on.remove("first")
    second = on.add("second")
    two = save_project(tmp_path / "2", on.read().annotations, TrainingSettings())
    assert on.autosave.opened(two, [second])
    assert on.autosave.is_needed
    on.save()
    assert saved(one) == {"first": 8}
    assert on.autosave.project == two
    on.paint("second", 9)
    on.save()
    assert saved(two) == {"second": 9}
    assert saved(one) == {"first": 8}


def test_what_was_restored_stays_until_it_is_saved(on):
    on.add("old")
    save_project(on.autosave.home / "1", on.read().annotations, TrainingSettings())
    on.pairs.clear()
    on.add("new")
    on.paint("new", 3)
    on.remove("new")
    on.autosave.left = find_left(on.autosave.home)
    on.add("old")
    on.autosave.restored()
    on.save()  # what was removed
    assert is_project(on.autosave.home / "1")
    on.save()
    assert not is_project(on.autosave.home / "1")
