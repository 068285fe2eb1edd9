"""Whichever attempt to write fails: nothing is lost, and one sentence says why."""

import errno
import shutil

import pytest
import tifffile
from batch_cases import (
    label_count,
    make_images,
    make_job,
    parts,
    results,
    run,
    run_well,
)
from failing_disk import failing_disk

from napari_unet.errors import BadOutput
from napari_unet.files.images import read_image

WORDS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "disk quota is used up",
    errno.EACCES: "not allowed to write",
}


def check_what_is_there(job):
    """Every result is complete."""
    for path in job.output.rglob("*.tif"):
        if "probabilities" not in path.name:
            assert label_count(path) == 1 + int(path.name[1])
        read_image(path)


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        ("tif", 3),
        pytest.param("tif", 1, marks=pytest.mark.slow),
        ("ome.zarr", 40),
        pytest.param("ome.zarr", 1, marks=pytest.mark.slow),
    ],
)
def test_each_write_fails_once(place, monkeypatch, kind, step):
    shutil.rmtree(place / "in")
    make_images(place / "in", 2)
    job = make_job(place, format=kind, probabilities=True, measure=True)
    run_well(job.model_copy(update={"output": place / "reference"}))
    kept = set()
    numbers = [*WORDS]
    for n in range(1, 10_000, step):
        shutil.rmtree(place / "out", ignore_errors=True)
        number = numbers[n // step % len(numbers)]
        error = None
        with failing_disk(monkeypatch, n, number) as disk:
            try:
                report = run(job)
            except BadOutput as caught:
                error = caught
        if not disk.has_failed:
            break
        assert not parts(place), n
        check_what_is_there(job)
        if error is None:
            # What only makes a power cut less harmful may fail: a folder's sync.
            assert report.error is None, (n, report.failed)
        else:
            text = str(error)
            assert WORDS[number] in text
            assert text.startswith("Cannot write ")
            assert text.endswith(".")
            assert "\n" not in text
        kept.add(len(list((place / "out").glob("a?." + kind))))
        if n // step % 8 == 0:
            run_well(job, resume=True)
            assert results(place / "out") == results(place / "reference")
    assert n > 50
    assert kept == {0, 1, 2}
    assert run(job, resume=True).skipped == 2


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
