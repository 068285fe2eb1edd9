"""However a batch ends, its tables tell what is done, and its message how to go on."""

import csv
import errno
import os
from contextlib import closing, contextmanager

import numpy as np
import pytest
import tifffile
from batch_cases import make_job, parts, results, run, run_well
from cli_cases import write_image

from napari_unet.batch import run as batch_run
from napari_unet.batch.folder import batch_steps
from napari_unet.errors import BadOutput
from napari_unet.files import members


@pytest.fixture
def every_tick(monkeypatch):
    """Let through also the ticks that come too fast for anybody."""
    monkeypatch.setattr(batch_run, "seldom_steps", lambda steps: steps)


@contextmanager
def full_disk(monkeypatch, at):
    """A disk that becomes full while the labels of an image are written."""
    original = tifffile.TiffWriter.write
    written = []

    def write(writer, *arguments, **options):
        written.append(writer)
        if len(written) == at:
            raise OSError(errno.ENOSPC, "full")
        return original(writer, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(tifffile.TiffWriter, "write", write)
        yield


def table(place, name):
    with open(place / "out" / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def check_tables(place, *names):
    """The tables and the report tell of these images of three."""
    assert [row["file"] for row in table(place, "summary.csv")] == [*names]
    assert {row["file"] for row in table(place, "measurements.csv")} == {*names}
    html = (place / "out" / "report.html").read_text()
    assert f"<b>{len(names)}</b>of 3 images done" in html


def test_after_a_full_disk(place, monkeypatch):
    job = make_job(place, measure=True)
    with full_disk(monkeypatch, at=2), pytest.raises(BadOutput) as caught:
        run(job)
    assert str(caught.value).endswith(
        "a1.tif: the disk is full; free some space or choose another folder. 1 of 3 "
        "images are done and kept; resume the batch (--resume) for the rest."
    )
    assert caught.value.exit_code == 4
    check_tables(place, "a0.tif")
    run_well(job, resume=True)
    check_tables(place, "a0.tif", "a1.tif", "a2.tif")


def test_a_disk_that_is_full_at_once(place, monkeypatch):
    with (
        full_disk(monkeypatch, at=1),
        pytest.raises(BadOutput, match="None of the 3 images is done yet; resume the"),
    ):
        run(make_job(place))
    run_well(make_job(place), resume=True)


def test_tables_that_fail_too_do_not_hide_the_first_error(place, monkeypatch):
    def write_summary(*arguments):
        raise BadOutput("Cannot write the table.")

    monkeypatch.setattr(batch_run, "write_summary", write_summary)
    with (
        full_disk(monkeypatch, at=2),
        pytest.raises(BadOutput, match=r"a1.tif: the disk is full; .* 1 of 3 images"),
    ):
        run(make_job(place))


def test_only_the_tables_cannot_be_written(place, monkeypatch):
    job = make_job(place, measure=True)
    (place / "out" / "measurements.csv").mkdir(parents=True)
    with pytest.raises(BadOutput, match=r"measurements.csv: .* 3 of 3 images are done"):
        run(job, overwrite=True)  # a folder is in the way
    assert len(table(place, "summary.csv")) == 3
    (place / "out" / "measurements.csv").rmdir()
    assert run_well(job, resume=True).skipped == 3
    check_tables(place, "a0.tif", "a1.tif", "a2.tif")


def test_after_cancel(place):
    job = make_job(place, measure=True)
    with closing(batch_steps(job)) as steps:
        while next(steps).status != "done":
            pass
    done = [path.name for path in sorted((place / "out").glob("a?.tif"))]
    assert 1 <= len(done) < 3  # what was being written is rather finished
    check_tables(place, *done)


# --- before and after the files ----------------------------------------------------


def test_planning_can_be_watched_and_cancelled(place, every_tick):
    with closing(batch_steps(make_job(place))) as steps:
        ticks = [next(steps) for _ in range(4)]
    assert [tick.message for tick in ticks] == [
        *(f"looking at the folder, {i} of 3" for i in range(3)),
        "looking at the images, 0 of 3",
    ]
    assert not (place / "out").exists()
    run_well(make_job(place))
    again = batch_steps(make_job(place), resume=True)
    with closing(again):
        told = [step.message for step in again if not step.name]
    assert "looking at the results, 2 of 3" in told


def test_putting_the_tables_together_can_be_watched_and_cancelled(place, every_tick):
    job = make_job(place, measure=True)
    with closing(batch_steps(job)) as steps:
        while not (step := next(steps)).message.startswith("writing the report"):
            pass
        assert step.done == step.total
        told = [next(steps).message for _ in range(3)]
        assert "joining the tables, 1 of 6" in told
    assert not parts(place)
    assert len(table(place, "summary.csv")) == 3
    assert not (place / "out" / "measurements.csv").exists()
    run_well(job, resume=True)
    check_tables(place, "a0.tif", "a1.tif", "a2.tif")


def test_the_files_of_an_image_are_listed_once(place, monkeypatch):
    original, listed = members.list_members, []

    def list_members(path):
        listed.append(path.name)
        return original(path)

    run_well(make_job(place, format="ome.zarr"))
    for path in (place / "in").glob("*.tif"):  # the results are images, too
        path.unlink()
        name = f"{path.stem}.ome.zarr"
        (place / "out" / name).rename(place / "in" / name)
    monkeypatch.setattr(members, "list_members", list_members)
    job = make_job(place).model_copy(update={"output": place / "second"})
    run_well(job)
    assert listed == [f"a{i}.ome.zarr" for i in range(3)]


# --- what only one file cannot have --------------------------------------------------


@contextmanager
def largest_file(nbytes):
    """No file may be larger, as on a disk with FAT."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_results_that_are_too_large_for_the_disk_are_that_files_failure(place):
    dice = np.random.default_rng(0)
    large = dice.integers(0, 1000, (600, 600)).astype(np.uint16)
    write_image(place / "in" / "a1.tif", large)
    job = make_job(place, probabilities=True)
    with largest_file(150_000):
        report = run(job)
    assert [entry.status for entry in report.entries] == ["done", "failed", "done"]
    assert report.entries[1].reason.endswith(
        "a1_probabilities.tif: the file is too large for this disk or your limits; "
        "choose another folder."
    )
    assert not parts(place)
    run_well(job, resume=True)


@pytest.mark.skipif(os.name != "posix", reason="Windows has other limits")
def test_results_whose_path_is_too_long_are_that_files_failure(place):
    deep = place / "in"
    while len(str(deep)) < 3900:
        deep /= "d" * 100
    write_image(deep / "a.tif", np.zeros((40, 60), np.uint16))
    output = place / ("out" + "o" * 200)
    job = make_job(place, recursive=True).model_copy(update={"output": output})
    report = run(job)
    assert [entry.name for entry in report.failed] == [
        (deep / "a.tif").relative_to(place / "in").as_posix()
    ]
    assert "the name is too long; choose a shorter one" in report.failed[0].reason
    assert len(report.entries) == 4
    assert results(output)["a2.tif"]
