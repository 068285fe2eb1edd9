"""Folders and images that are taken away or changed while a batch runs."""

import os
import shutil
import subprocess
import sys
from contextlib import closing

import numpy as np
import pytest
from batch_cases import make_job, parts, results, run_well
from cli_cases import hashes, squares, write_image

from napari_unet.batch import file as batch_file
from napari_unet.batch.folder import batch_steps
from napari_unet.errors import BadOutput
from napari_unet.steps import run_to_end


def steps_after_the_first_file(job):
    """Begin a batch, and wait until its first image is done."""
    steps = batch_steps(job)
    while next(steps).status != "done":
        pass
    return steps


def large(monkeypatch):
    """Take every image for a large one: such a one is alone, and read in pieces."""
    monkeypatch.setattr(batch_file, "LAZY_BYTES", 1000)
    monkeypatch.setattr(batch_file, "LAZY_VALUES", 1000)


# Root may write everywhere, unless it gives that up.
OBEY = """
import os, sys
if os.getuid() == 0:
    import ctypes
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        assert ctypes.CDLL(None).prctl(24, capability, 0, 0, 0) == 0
os.execv(sys.executable, [sys.executable, "-c", *sys.argv[1:]])
"""
TWICE = """
import sys
from napari_unet.cli import main
images, model, *outputs = sys.argv[1:]
for output in outputs:
    print(main(["batch", images, output, "-m", model]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="permissions of Linux")
def test_a_read_only_output_folder(place):
    """It is refused before anything is done, by the system itself."""
    locked = place / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    command = [sys.executable, "-c", OBEY, TWICE, place / "in", place / "m.safetensors"]
    # One that is there, and one that would have to be made.
    done = subprocess.run(
        [*command, locked, locked / "out"], capture_output=True, text=True
    )
    locked.chmod(0o755)
    assert done.stdout == "4\n4\n"
    assert done.stderr == 2 * (
        f"Error: Cannot write {locked}: you are not allowed to write there; choose "
        "another folder.\n"
    )
    assert not any(locked.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="open files cannot be removed there")
def test_the_output_folder_is_removed(place, monkeypatch):
    large(monkeypatch)
    job = make_job(place, measure=True)
    steps = steps_after_the_first_file(job)
    shutil.rmtree(place / "out")
    with pytest.raises(BadOutput) as caught:
        run_to_end(steps)
    assert str(caught.value) == (
        f"{place / 'out'} was removed while the batch wrote into it, and what was done "
        "with it. Start the batch again, or choose another output."
    )
    assert not (place / "out").exists()
    assert run_well(job).skipped == 0


def test_an_image_is_deleted(place, monkeypatch):
    large(monkeypatch)
    job = make_job(place)
    run_well(job.model_copy(update={"output": place / "reference"}))
    steps = steps_after_the_first_file(job)
    (place / "in" / "a2.tif").rename(place / "kept.tif")
    report = run_to_end(steps)
    assert [entry.status for entry in report.entries] == ["done", "done", "failed"]
    image = place / "in" / "a2.tif"
    assert report.entries[2].reason == f"{image} does not exist; check the name."
    assert not (place / "out" / "a2.tif").exists()
    (place / "kept.tif").rename(image)
    assert run_well(job, resume=True).skipped == 2
    assert results(place / "out") == results(place / "reference")


@pytest.mark.parametrize("change", ["pixels", "time", "gone"])
@pytest.mark.parametrize("is_large", [True, False])
def test_an_image_is_changed_while_it_is_segmented(
    place, monkeypatch, change, is_large
):
    """What was made of the older pixels does not pass for the newer ones'."""
    write_image(place / "in" / "a1.tif", np.stack([squares(2)] * 4), "TYX")
    if is_large:
        large(monkeypatch)
    job, image = make_job(place), place / "in" / "a1.tif"
    with closing(batch_steps(job)) as steps:
        while True:
            step = next(steps)
            if (step.name, step.status) == ("a1.tif", "running"):
                break
        if change == "pixels":
            write_image(image, np.stack([squares(3)] * 4), "TYX")
        elif change == "time":
            os.utime(image, ns=(0, image.stat().st_mtime_ns + 1))
        else:
            image.rename(place / "kept.tif")
        before = hashes(place / "in")
        report = run_to_end(steps)
    assert hashes(place / "in") == before
    assert [entry.status for entry in report.entries] == ["done", "failed", "done"]
    assert report.entries[1].reason in (
        f"{image} was changed or removed while the batch ran. Leave the images alone "
        "until it has ended, and resume it (--resume).",
        f"{image} does not exist; check the name.",
    )
    assert not (place / "out" / "a1.tif").exists()
    assert not parts(place)
    if change == "gone":
        (place / "kept.tif").rename(image)
    assert run_well(job, resume=True).skipped == 2
    run_well(job.model_copy(update={"output": place / "reference"}))
    assert results(place / "out") == results(place / "reference")
