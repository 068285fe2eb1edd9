"""Whichever attempt to write fails: nothing is lost, and one sentence says why."""

import errno
import json
import os
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
import tifffile
import torch
from batch_cases import make_images, make_job, parts, results, run, run_well
from cli_cases import squares, threshold_model, write_image
from failing_disk import FOLDER_SYNC, failing_disk

from napari_unet.batch import file as batch_file
from napari_unet.batch import volume
from napari_unet.errors import BadOutput

WORDS = {
    errno.ENOSPC: "the disk is full; free some space or choose another folder",
    errno.EACCES: "you are not allowed to write there; choose another folder",
}
TABLES = ("summary.csv", "measurements.csv")


@pytest.fixture
def place(monkeypatch):
    """A model and images, in memory where the system can: thousands of files follow."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="napari-unet-test-", dir=memory) as name:
        folder = Path(name)
        monkeypatch.setenv("NAPARI_UNET_HOME", str(folder / "home"))
        threshold_model(folder / "m.safetensors")
        make_images(folder / "in")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # more would wait for each other
        yield folder
        torch.set_num_threads(threads)


def make_in_pieces(monkeypatch):
    """Take every image for a large one: through files, and block by block."""
    monkeypatch.setattr(batch_file, "LAZY_BYTES", 100)
    monkeypatch.setattr(batch_file, "LAZY_VALUES", 100)
    monkeypatch.setattr(volume, "BLOCK_PIXELS", 100)
    monkeypatch.setitem(volume.BLOCK_SHAPES, 2, (16, 16))


def make_small_images(folder, count):
    shutil.rmtree(folder)
    for i in range(count):
        write_image(folder / f"a{i}.tif", squares(i + 1, (16, 12 * i + 20)))


def run_on_failing_disk(monkeypatch, job, n, number, **options):
    """Run until the n-th attempt to write fails, and check what is told.

    Return whether there was such an attempt, and what is there then but for tables,
    which are brought up to date.
    """
    told = None
    with failing_disk(monkeypatch, n, number) as disk:
        try:
            report = run(job, **options)
        except BadOutput as error:
            told = str(error)
    assert not parts(job.output.parent), n
    if told is None:
        # What only makes a power cut less harmful may fail; and a lock that may not be
        # created is opened where it exists.
        assert disk.failed.strip() in ("", FOLDER_SYNC, "open lock"), n
        assert report.error is None, (n, report.failed)
    else:
        # Before there is an output folder, it is the one in which that will lie.
        sentences = (
            rf"Cannot write {job.output.parent}[^:;]*: {WORDS[number]}[.]"
            r"( (None|\d|The image is(?: not)? done)[^.:;]*; resume the batch "
            r"\(--resume\) for the rest[.])?"
        )
        match = re.fullmatch(sentences, told)
        assert match, (n, told)
        # Of a line that could not be synced nobody knows whether it will stay.
        said = {None: 0, "None": 0, "The image is not done": 0, "The image is done": 1}
        kept = said[match[2]] if match[2] in said else int(match[2])
        assert kept <= len(done_in_journal(job)) <= kept + 1, (n, told)
    there = results(job.output)
    return disk.failed, {name: there[name] for name in there.keys() - set(TABLES)}


def done_in_journal(job):
    done = set()
    journal = job.output / "journal.jsonl"
    for line in journal.read_text().splitlines() if journal.exists() else []:
        with suppress(json.JSONDecodeError):  # torn
            told = json.loads(line)
            done -= {told["name"]}
            done |= {told["name"]} if told["status"] == "done" else set()
    return done


def check_resumed(job, reference, n):
    """What the journal calls done is not done again, and in the end all is there."""
    done = done_in_journal(job)
    assert run_well(job, resume=True).skipped == len(done), n
    assert results(job.output) == reference, n
    assert not parts(job.output.parent), n
    return len(done)


@pytest.mark.parametrize(
    ("kind", "count", "in_pieces", "number"),
    [
        ("tif", 2, False, errno.ENOSPC),
        ("ome.tif", 1, True, errno.ENOSPC),
        ("ome.zarr", 1, False, errno.EACCES),
        pytest.param("tif", 2, False, errno.EACCES, marks=pytest.mark.slow),
        pytest.param("ome.tif", 1, True, errno.EACCES, marks=pytest.mark.slow),
        pytest.param("ome.zarr", 1, False, errno.ENOSPC, marks=pytest.mark.slow),
        pytest.param("ome.zarr", 2, True, errno.ENOSPC, marks=pytest.mark.slow),
    ],
)
def test_each_write_fails_once(place, monkeypatch, kind, count, in_pieces, number):
    make_small_images(place / "in", count)
    job = make_job(place, format=kind, probabilities=True, measure=True)
    run_well(job.model_copy(update={"output": place / "reference"}))
    reference = results(place / "reference")
    kept = set()
    for n in range(1, 10_000):
        shutil.rmtree(place / "out", ignore_errors=True)
        with monkeypatch.context() as patch:
            if in_pieces:
                make_in_pieces(patch)
            failed, there = run_on_failing_disk(patch, job, n, number)
        if not failed:
            break
        assert there.items() <= reference.items(), n
        for folder in (place / "out").glob("*.zarr"):
            whole = {name for name in reference if name.startswith(f"{folder.name}/")}
            assert whole <= there.keys(), n
        kept.add(check_resumed(job, reference, n))
    assert n > 50
    assert kept == set(range(count + 1))
    assert there.keys() | set(TABLES) == reference.keys()


@pytest.mark.parametrize(
    ("kind", "number"), [("tif", errno.ENOSPC), ("ome.zarr", errno.EACCES)]
)
def test_each_write_over_older_results_fails_once(place, monkeypatch, kind, number):
    """Each result is the older or the newer one: here they are the same."""
    make_small_images(place / "in", 1)
    job = make_job(place, format=kind, measure=True)
    run_well(job)
    reference = results(place / "out")
    for n in range(1, 10_000):
        failed, there = run_on_failing_disk(monkeypatch, job, n, number, overwrite=True)
        if not failed:
            break
        assert there.items() <= reference.items(), n
        assert reference.keys() - there.keys() <= set(TABLES), n
        check_resumed(job, reference, n)
    assert n > 50


def test_finished_files_are_not_done_again(place, monkeypatch):
    """The disk fills up while the second file is written."""
    job = make_job(place)
    original = tifffile.TiffWriter.write
    written = []

    def write(writer, *arguments, **options):
        written.append(writer)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "full")
        return original(writer, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(tifffile.TiffWriter, "write", write)
        with pytest.raises(BadOutput, match=r"a1.tif: the disk is full; free some"):
            run(job)
    assert len(written) == 2  # no identical error for each file
    assert [path.name for path in (place / "out").glob("*.tif")] == ["a0.tif"]
    assert run_well(job, resume=True).skipped == 1
