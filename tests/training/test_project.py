"""Annotation projects come back as they were saved, whatever happens in between."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import tracemalloc
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dask.array
import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from napari_unet import Annotation, Model, TrainingSettings, UNet, save_model
from napari_unet.errors import BadInput, BadOutput
from napari_unet.files.pixels import file_pixels, write_pixels_steps
from napari_unet.models.checkpoint import read_model
from napari_unet.steps import run_to_end
from napari_unet.training.fine_tune import fine_tune_project_steps
from napari_unet.training.project import load_project, save_project, save_project_steps
from napari_unet.training.project_file import BASE_FILE, is_project

USUAL = TrainingSettings()
KEPT = "u1 u2 u4 i1 i2 i4 f4 f8".split()
CONVERTED = {"?": "u1", "f2": "f4", "i8": "i4", "u8": "i4", ">u2": "u2", ">f4": "f4"}
NAMES = [
    "",
    "cells.tif",
    "CELLS.TIF",
    "cells",
    "con",
    "../a/b\\c:*?",
    "细胞 ä\n",
    "x" * 400,
]


def example(value=1, shape=(20, 30), **options):
    """Return an annotation all of which tells its number."""
    labels = np.zeros(shape, np.int32)
    labels[..., 2:9, 3:8] = value
    image = np.full(shape, value, np.uint16)
    region = [[value, 0.0], [value, 12.25], [9.5, 12.25]]
    options = {"name": "cells.tif", "regions": [region], **options}
    return Annotation(image, labels, **options)


def files(folder):
    """Return all files by name, and what they are to the operating system."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_ino, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def check_same(found, saved):
    assert np.array_equal(found.image, saved.image, equal_nan=True)
    assert np.array_equal(found.labels, saved.labels)
    assert len(found.regions) == len(saved.regions)
    for one, other in zip(found.regions, saved.regions, strict=True):
        assert np.array_equal(one, other)
    assert found.image_axes == saved.image_axes
    assert dict(found.pixel_size) == dict(saved.pixel_size)
    assert found.unpainted == saved.unpainted
    assert found.labels_are == saved.labels_are


# --- what is saved comes back ---------------------------------------------------------


@st.composite
def annotations(draw):
    """Draw any image that the readers can give, with anything painted on it."""
    more = draw(st.lists(st.sampled_from("TZ"), unique=True))
    channels = draw(st.sampled_from(["", "C", "S"]))
    axes = "".join(draw(st.permutations([*more, *channels, "Y", "X"])))
    shape = tuple(draw(st.integers(1, 4)) for _ in axes)
    kind = np.dtype(draw(st.sampled_from(KEPT + list(CONVERTED))))
    random_ = np.random.default_rng(draw(st.integers(0, 99)))
    image = random_.integers(0, 100, shape) - (50 if kind.kind in "if" else 0)
    image = (image / 7 if kind.kind == "f" else image).astype(kind)
    if kind.kind == "f":
        image.flat[0] = draw(st.sampled_from([0, np.nan, np.inf, -0.0]))
    sides = [n for n, axis in zip(shape, axes, strict=True) if axis not in "CS"]
    highest = draw(st.sampled_from([0, 1, 255, 65535, 65536, 2**32 - 1]))
    labels = random_.integers(0, highest, sides, endpoint=True)
    number = st.floats(-1e9, 1e9)
    vertex = st.tuples(*[number] * draw(st.integers(2, len(sides))))
    size = st.floats(1e-12, 1e12)
    return Annotation(
        image,
        labels.astype(draw(st.sampled_from(["i8", "u4", ">u8"]))),
        draw(st.lists(st.lists(vertex, min_size=1, max_size=5), max_size=2)),
        axes=axes,
        pixel_size=draw(st.dictionaries(st.sampled_from(axes), size)),
        unpainted=draw(st.sampled_from(["background", "unknown"])),
        labels_are=draw(st.sampled_from(["objects", "classes"])),
        name=draw(st.one_of(st.sampled_from(NAMES), st.text(max_size=8))),
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(annotations(), max_size=3), st.text(), st.sampled_from([2, 3]))
def test_everything_comes_back(saved, text, ndim):
    how = TrainingSettings(steps=7, border_weights=None, patch_shape=(32, 48))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "new" / "a.project"
        assert not is_project(folder)
        save_project(folder, saved, how, base=text, ndim=ndim, name=text)
        assert is_project(folder)
        found = load_project(folder)
        before = files(folder)
        save_project(folder, found.annotations, how)
        after = files(folder)
    assert (found.settings, found.ndim) == (how, ndim)
    assert found.base == found.name == text
    assert timedelta() <= datetime.now(UTC) - found.saved < timedelta(minutes=1)
    for one, other in zip(found.annotations, saved, strict=True):
        check_same(one, other)
        assert one.name == other.name
        given = np.dtype(other.image.dtype).str.lstrip("<|=")
        given = "?" if given == "b1" else given
        assert one.image.dtype == CONVERTED.get(given, given)
    # What was loaded is what was saved: nothing but project.json is written again.
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in after if name != "project.json")
    lower = [name.lower() for name in before]
    assert len(set(lower)) == len(lower)
    for name in before:
        assert name.isascii()
        assert len(Path(name).name) < 100
        assert Path(name).stem.split(".")[0].upper() not in ("CON", "NUL", "AUX")


def test_names_that_are_no_text_come_back_as_such(tmp_path):
    save_project(tmp_path, [example(name="a\udc80b")], USUAL)
    assert load_project(tmp_path).annotations[0].name == "a?b"


def test_other_programs_open_the_files(tmp_path):
    stack = np.arange(3 * 20 * 30, dtype=np.uint16).reshape(3, 20, 30)
    size = {"Z": 2.0, "Y": 0.5, "X": 0.25}
    given = Annotation(stack, stack % 3, axes="ZYX", pixel_size=size, name="a b.tif")
    save_project(tmp_path, [given], USUAL)
    (image,) = (tmp_path / "images").iterdir()
    (labels,) = (tmp_path / "labels").iterdir()
    for path, data in ((image, stack), (labels, stack % 3)):
        assert path.name.startswith("a-b-")
        with tifffile.TiffFile(path) as tiff:
            assert tiff.is_imagej  # Fiji needs no Bio-Formats
            assert tiff.series[0].axes == "ZYX"
            assert tiff.imagej_metadata["spacing"] == 2
            assert tiff.pages.first.tags["XResolution"].value == (4, 1)
            assert np.array_equal(tiff.asarray(), data)


@pytest.mark.parametrize(("low", "high"), [(-(2**31), 2**31 - 1), (0, 2**32 - 1)])
def test_large_numbers_of_64_bits_are_kept(tmp_path, low, high):
    image = np.array([[low, 5, high]])
    save_project(tmp_path, [Annotation(image, image * 0)], USUAL)
    assert np.array_equal(load_project(tmp_path).annotations[0].image, image)


def test_lazy_images_stay_out_of_memory(tmp_path):
    shape = (600, 512, 512)
    lazy = dask.array.zeros(shape, np.uint8, chunks=(1, 512, 512))
    labels = np.broadcast_to(np.uint8(0), shape[1:])
    save_project(tmp_path, [Annotation(lazy[0], labels)], USUAL)  # imports all
    pixels = file_pixels(lazy, "TYX")
    tracemalloc.start()
    run_to_end(write_pixels_steps(tmp_path / "a.tif", pixels, {}))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "a.tif").stat().st_size > lazy.nbytes
    assert peak < lazy.nbytes / 1.5


# --- only what has changed is written -------------------------------------------------


def test_only_what_has_changed_is_written(tmp_path):
    first, second = example(1), example(2, name="other")
    save_project(tmp_path, [first, second, first], USUAL)
    before = files(tmp_path)
    assert len(before) == 5  # the same image twice is one
    painted = first.labels.copy()
    painted[0, 0] = 9
    third = Annotation(first.image, painted, name=first.name)
    save_project(tmp_path, [third, second], USUAL)
    after = files(tmp_path)
    new = after.keys() - before.keys()
    assert [name.startswith("labels/cells-") for name in new] == [True]
    assert [name.startswith("labels/cells-") for name in before.keys() - after.keys()]
    kept = before.keys() & after.keys() - {"project.json"}
    assert len(kept) == 3
    assert all(before[name] == after[name] for name in kept)
    # Another name, meaning or region is nothing to the pixels.
    save_project(tmp_path, [example(1, name="new", unpainted="unknown")], USUAL)
    save_project(tmp_path, [example(1, regions=[])], USUAL)
    image = next(name for name in files(tmp_path) if name.startswith("images"))
    assert files(tmp_path)[image] == before[image]
    save_project(tmp_path, [], USUAL)
    assert files(tmp_path).keys() == {"project.json"}


def test_a_copied_folder_is_not_written_again(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    save_project(old, [example()], USUAL)
    shutil.copytree(old, new, copy_function=shutil.copyfile)  # without times
    before = files(new)
    save_project(new, [example()], USUAL)
    after = files(new)
    assert after.keys() == before.keys() == files(old).keys()
    assert all(after[name] == before[name] for name in after if name != "project.json")


def test_what_another_program_changes_is_read_and_never_destroyed(tmp_path):
    save_project(tmp_path, [example()], USUAL)
    (path,) = (tmp_path / "labels").iterdir()
    edited = tifffile.imread(path)
    edited[0, 0] = 77
    tifffile.imwrite(path, edited)
    # Saved without having been loaded: both stay.
    save_project(tmp_path, [example()], USUAL)
    check_same(load_project(tmp_path).annotations[0], example())
    assert np.array_equal(tifffile.imread(path), edited)
    # Loaded and saved: it is what belongs to the project.
    shutil.rmtree(tmp_path / "labels")
    save_project(tmp_path, [example()], USUAL)
    (path,) = (tmp_path / "labels").iterdir()
    tifffile.imwrite(path, edited)
    found = load_project(tmp_path).annotations
    assert found[0].labels[0, 0] == 77
    save_project(tmp_path, found, USUAL)
    assert [*(tmp_path / "labels").iterdir()] == [path]


# --- nothing is lost ------------------------------------------------------------------


@pytest.mark.parametrize("is_new", [True, False])
def test_cancelled_at_any_step_leaves_everything_as_before(tmp_path, is_new):
    folder = tmp_path / "a.project"
    if not is_new:
        save_project(folder, [example(1), example(2)], USUAL)
    before = load_project(folder).annotations if not is_new else ()
    names = files(folder).keys()
    count = 0
    while True:
        steps = save_project_steps(folder, [example(3), example(4)], USUAL)
        try:
            for _ in range(count + 1):
                next(steps)
        except StopIteration:
            break
        steps.close()
        assert files(folder).keys() == names
        assert folder.exists() == (not is_new)
        if not is_new:
            for one, other in zip(
                load_project(folder).annotations, before, strict=True
            ):
                check_same(one, other)
        count += 1
    assert count > 8
    check_same(load_project(folder).annotations[1], example(4))


@pytest.mark.parametrize("is_new", [True, False])
def test_a_full_disk_leaves_everything_as_before(tmp_path, monkeypatch, is_new):
    """Let each file in turn not be finished until all are."""
    folder = tmp_path / "a.project"
    if not is_new:
        save_project(folder, [example(1)], USUAL)
    names, failures = files(folder).keys(), 0
    real = os.replace
    for nth in range(1, 20):
        left = nth

        def replace(source, target):
            nonlocal left
            left -= 1
            if left == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            with suppress(BadOutput):
                save_project(folder, [example(2)], USUAL)
                break
        failures += 1
        assert files(folder).keys() == names
        if not is_new:
            check_same(load_project(folder).annotations[0], example(1))
    assert failures == 4  # the plan, an image, its labels, the project
    check_same(load_project(folder).annotations[0], example(2))


SAVER = """
import sys
sys.path.insert(0, sys.argv[2])
from test_project import USUAL, example, save_project
number = 0
while True:
    number += 1
    annotations = [example(number, (2, 100, 130)), example(number + 1000, name="other")]
    save_project(sys.argv[1], annotations, USUAL, name=str(number))
    print(number, flush=True)
"""


def test_killed_at_any_moment_it_holds_what_belongs_together(tmp_path):
    chance = random.Random(0)
    folder = tmp_path / "a.project"
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(folder), str(Path(__file__).parent)],
            stdout=subprocess.PIPE,
            text=True,
        )
        saved = int(process.stdout.readline())
        time.sleep(chance.random() / 10)
        process.kill()
        rest, _ = process.communicate()
        saved = int(rest.split()[-1]) if rest.split() else saved
        project = load_project(folder)
        number = int(project.name)
        assert number in (saved, saved + 1)
        check_same(project.annotations[0], example(number, (2, 100, 130)))
        check_same(project.annotations[1], example(number + 1000))
    save_project(folder, [example(5)], USUAL)
    assert len(files(folder)) == 3  # nothing is left of those that were killed


def test_killed_in_the_first_save_it_can_be_saved_again(tmp_path):
    steps = save_project_steps(tmp_path, [example(1)], USUAL)
    while not any(name.startswith("images") for name in files(tmp_path)):
        next(steps)
    shutil.copytree(tmp_path, tmp_path / ".killed")
    steps.close()
    killed = (tmp_path / ".killed").rename(tmp_path.with_name("killed"))
    assert load_project(killed).annotations == ()
    save_project(killed, [example(2)], USUAL)
    names = [name for name in files(killed) if not name.endswith(".part")]
    assert len(names) == 3  # a file under way is left to the one whose process lives


# --- what is refused ------------------------------------------------------------------


def test_files_of_the_user_are_never_touched(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "mine.tif").write_bytes(b"precious")
    with pytest.raises(BadOutput, match="has files already and is no annotation"):
        save_project(tmp_path, [example()], USUAL)
    (tmp_path / "project.json").write_text('{"format": "of another program"}')
    with pytest.raises(BadOutput, match="not of an annotation project"):
        save_project(tmp_path, [example()], USUAL)
    assert files(tmp_path).keys() == {"images/mine.tif", "project.json"}
    with pytest.raises(BadOutput, match="a part of the path is a file"):
        save_project(tmp_path / "project.json" / "new", [example()], USUAL)
    folder = tmp_path / "mine"
    save_project(folder, [example(1)], USUAL)
    (folder / "images" / "notes.txt").write_text("mine")
    save_project(folder, [], USUAL)
    assert files(folder).keys() == {"images/notes.txt", "project.json"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image": np.zeros((20, 30), complex)}, "complex128 cannot be kept"),
        ({"image": np.full((20, 30), 2**40)}, "run from 0 to 1099511627776"),
        ({"labels": np.full((20, 30), 2**32)}, "labels go up to 4294967296"),
        ({"labels": np.full((20, 30), -1)}, "labels go down to -1"),
        ({"labels": np.zeros((20, 31), int)}, "sizes differ"),
        ({"axes": "CYXS"}, "cannot have the axes"),
        ({"regions": [[[0, 1], [0, np.nan]]]}, "Region 1 has a corner that is no"),
        ({"pixel_size": {"Y": 0.0}}, "pixel size along Y is 0.0"),
    ],
)
def test_what_cannot_be_saved_is_said_in_words(tmp_path, change, words):
    given = {**vars(example(name="mine.tif")), **change}
    with pytest.raises(BadInput, match="^mine.tif: .*" + words):
        save_project(tmp_path / "new", [example(), Annotation(**given)], USUAL)
    assert not (tmp_path / "new").exists()


def changed(**changes):
    def change(folder):
        path = folder / "project.json"
        document = json.loads(path.read_text())
        for keys, value in changes.items():
            *outer, last = keys.split("__")
            part = document
            for key in outer:
                part = part[int(key) if key.isdigit() else key]
            part[last] = value
        path.write_text(json.dumps(document))

    return change


def written(text):
    return lambda folder: (folder / "project.json").write_text(text)


def link_outside(folder):
    (folder / "labels").rename(folder.with_name("outside"))
    (folder / "labels").symlink_to(folder.with_name("outside"))


def first_labels(folder):
    return next((folder / "labels").iterdir())


FORGED = "images__0__image__file"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "project.json").unlink(), "is no annotation project"),
        (written(""), "is damaged, or not of an annotation project"),
        (written("[" * 10**6), "is damaged"),
        (written('{"format": "napari-unet project 2", "x": 1}'), "newer version"),
        (written('{"format": "napari-unet project -1"}'), "is damaged"),
        (changed(more=1), "more: Extra inputs"),
        (changed(**{FORGED: "../../secret.tif"}), "is damaged"),
        (changed(**{FORGED: "/etc/secret.tif"}), "is damaged"),
        (changed(**{FORGED: "images/../../secret.tif"}), "is damaged"),
        (changed(**{FORGED: "images/none.tif"}), "images/none.tif is missing"),
        (changed(images__0__shape=[10**15, 30]), "was 1000000000000000 x 30"),
        (changed(images__0__shape=[20]), "do not fit"),
        (changed(images__0__shape=[-20, 30]), "do not fit"),
        (changed(images__0__axes="YY"), "do not fit"),
        (changed(images__0__regions=[[[0, "a"]]]), "is damaged"),
        (changed(images__0__pixel_size={"Y": -1}), "is damaged"),
        (changed(images__0__labels=None), "is damaged"),
        (changed(settings__steps=0), "settings.steps"),
        (changed(saved="yesterday"), "saved"),
        (changed(obsolete=["../x.tif"]), "obsolete"),
        (lambda folder: first_labels(folder).unlink(), "is missing"),
        (lambda folder: first_labels(folder).write_bytes(b"II*\0"), "cannot be read"),
        (
            lambda folder: tifffile.imwrite(
                first_labels(folder), np.zeros((20, 30), "f4")
            ),
            "labels are whole numbers",
        ),
        (
            lambda folder: tifffile.imwrite(
                first_labels(folder), np.zeros((21, 30), "u1")
            ),
            "is 21 x 30 and was 20 x 30",
        ),
        pytest.param(
            link_outside,
            "is a link to another folder",
            marks=pytest.mark.skipif(os.name == "nt", reason="needs rights"),
        ),
    ],
)
def test_damaged_and_forged_projects_are_refused_in_words(tmp_path, change, words):
    folder = tmp_path / "a.project"
    save_project(folder, [example()], USUAL)
    change(folder)
    with pytest.raises(BadInput, match=words) as caught:
        load_project(folder)
    assert len(str(caught.value)) < 500


# --- training -------------------------------------------------------------------------


def learnable(seed):
    random_ = np.random.default_rng(seed)
    labels = np.zeros((64, 64), np.int32)
    for number in range(9):
        y, x = 20 * (number // 3) + 3, 20 * (number % 3) + 3
        labels[y : y + 12, x : x + 12] = number + 1
    image = 100 + 100 * (labels > 0) + random_.normal(0, 20, labels.shape)
    return Annotation(image.astype(np.uint16), labels, name=f"{seed}.tif")


QUICK = TrainingSettings(
    steps=12,
    batch_size=2,
    patch_shape=(32, 32),
    validate_every=4,
    patience=9,
    device="cpu",
    precision="float32",
)


def weights(path):
    return read_model(path).network.state_dict()


@pytest.mark.parametrize("base", ["in the folder", "named", "new"])
def test_a_stopped_training_goes_on_from_its_folder(
    tmp_path, own_library, request, base
):
    if base == "new":
        request.getfixturevalue("small_new_models")
    own_library.mkdir(parents=True)
    folder = tmp_path / "a.project"
    named = "tiny" if base == "named" else ""
    save_project(folder, [learnable(0), learnable(1)], QUICK, base=named, name="mine")
    tiny = Model(UNet(1, 2, depth=1, base_channels=4))
    if base == "in the folder":
        save_model(tiny, folder / BASE_FILE)
    elif base == "named":
        save_model(tiny, own_library / "tiny")
    whole = run_to_end(fine_tune_project_steps(folder, tmp_path / "whole"))
    steps = fine_tune_project_steps(folder, tmp_path / "halves")
    for step in steps:
        if step.done == 6:
            break
    steps.close()
    assert (folder / "training.snapshot").exists()
    assert not (tmp_path / "halves.safetensors").exists()
    halves = run_to_end(
        fine_tune_project_steps(folder, tmp_path / "halves", resume=True)
    )
    assert not (folder / "training.snapshot").exists()
    assert read_model(halves).passport == read_model(whole).passport
    assert read_model(halves).passport.name == "mine"
    for one, other in zip(
        weights(halves).values(), weights(whole).values(), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("small_new_models")
def test_a_training_of_what_was_painted_since_is_not_resumed(tmp_path):
    save_project(tmp_path, [learnable(0), learnable(1)], QUICK)
    steps = fine_tune_project_steps(tmp_path, tmp_path / "mine")
    while next(steps).done < 5:
        pass
    steps.close()
    save_project(tmp_path, [learnable(0), learnable(2)], QUICK)
    assert (tmp_path / "training.snapshot").exists()
    with pytest.raises(BadInput, match="annotations have changed"):
        run_to_end(fine_tune_project_steps(tmp_path, tmp_path / "mine", resume=True))
    save_project(tmp_path, [learnable(0), learnable(1)], QUICK, ndim=3)
    with pytest.raises(BadInput, match="needs the axes ZYX"):
        run_to_end(fine_tune_project_steps(tmp_path, tmp_path / "mine"))
