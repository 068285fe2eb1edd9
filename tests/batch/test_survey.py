"""What a batch would do, told before it does."""

import os
import shutil

import pytest
from batch_cases import make_job, results, run

from napari_unet.batch.survey import survey_steps
from napari_unet.errors import BadInput, BadModel, BadOutput
from napari_unet.models.library import load_model
from napari_unet.steps import run_to_end


def survey(job):
    return run_to_end(survey_steps(job, load_model(job.model)))


def statuses(job):
    return [file.status for file in survey(job).files]


def test_before_during_and_after(place):
    job = make_job(place)
    found = survey(job)
    assert [file.status for file in found.files] == ["waiting"] * 3
    assert not found.is_begun
    assert not job.output.exists()  # nothing is written
    (place / "in" / "a1.tif").write_bytes(b"II*\0")
    run(job)
    before = results(job.output)
    found = survey(job)
    assert [file.status for file in found.files] == ["skipped", "failed", "skipped"]
    assert found.files[0].entry.objects == 1
    assert found.files[1].entry.reason
    assert found.is_begun
    assert results(job.output) == before


def test_what_was_made_in_another_way(place):
    job = make_job(place)
    run(job)
    other = make_job(place, settings={"threshold": 0.7})
    assert statuses(other) == ["other"] * 3
    assert statuses(job) == ["skipped"] * 3


def test_what_has_changed_since(place):
    job = make_job(place)
    run(job)
    os.utime(place / "in" / "a0.tif")
    (job.output / "a1.tif").write_bytes(b"corrected by hand")
    (job.output / "a2.tif").unlink()
    assert statuses(job) == ["other", "other", "waiting"]


def test_what_nobody_knows_of(place):
    job = make_job(place)
    job.output.mkdir()
    shutil.copy(place / "in" / "a0.tif", job.output / "a0.tif")
    assert statuses(job) == ["other", "waiting", "waiting"]


def test_tables_of_other_images(place):
    run(make_job(place))
    (place / "others").mkdir()
    shutil.copy(place / "in" / "a0.tif", place / "others" / "b.tif")
    others = make_job(place).model_copy(update={"input": place / "others"})
    found = survey(others)
    assert [file.status for file in found.files] == ["waiting"]
    names = [table.name for table in found.foreign_tables]
    assert names == ["summary.csv", "report.html"]
    assert survey(make_job(place)).foreign_tables == ()


def test_what_was_put_beside_the_results(place):
    job = make_job(place)
    run(job)
    shutil.copy(place / "in" / "a0.tif", place / "in" / "b.tif")
    shutil.copy(place / "in" / "a0.tif", job.output / "b.tif")
    assert statuses(job) == ["skipped"] * 3 + ["other"]


def test_results_of_a_killed_run_are_no_others(place):
    job = make_job(place)
    run(job)
    journal = job.output / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:-1]))  # the last file was on the disk already
    assert statuses(job) == ["skipped", "skipped", "waiting"]


def test_refusals(place):
    with pytest.raises(BadInput):
        survey(make_job(place).model_copy(update={"input": place / "nothing"}))
    with pytest.raises(BadOutput):
        survey(make_job(place).model_copy(update={"output": place / "in"}))
    with pytest.raises(BadModel, match="not the one"):
        survey(make_job(place, model_sha256="0" * 64))


def test_doubt(place):
    found = survey(make_job(place, axes="CYX"))
    assert "a0.tif" in found.doubt
    assert [file.status for file in found.files] == ["waiting"] * 3
    assert survey(make_job(place, pixel_size={"Y": 0.5, "X": 0.5})).pixel_size == {
        "Y": 0.5,
        "X": 0.5,
    }


def test_a_memory_limit_that_is_too_low_is_a_doubt(place):
    found = survey(make_job(place, settings={"memory_limit": 1e-6}))
    assert found.doubt.startswith("A memory limit of 1e-06 GB is too low")
    assert survey(make_job(place, settings={"memory_limit": 1})).doubt == ""
