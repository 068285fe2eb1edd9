"""A batch does all files, goes on after whatever happens, and does nothing twice."""

import json
import os
import shutil
import subprocess
import sys
import unicodedata
from contextlib import closing
from importlib.metadata import version

import numpy as np
import pytest
from batch_cases import (
    label_count,
    make_images,
    make_job,
    parts,
    results,
    run,
    run_well,
    unchanged,
)
from cli_cases import hashes, squares, threshold_model, write_image
from onnx_files import unet_file

from napari_unet.batch import file as batch_file
from napari_unet.batch import folder
from napari_unet.batch import results as batch_results
from napari_unet.batch.folder import batch_steps
from napari_unet.batch.job import BatchJob, SegmentSettings, program_versions
from napari_unet.errors import BadInput, BadModel, BadOutput, Partial
from napari_unet.files.images import read_image
from napari_unet.models.model import Model
from napari_unet.network.unet import UNet
from napari_unet.steps import run_to_end


def statuses(report):
    return {entry.name: entry.status for entry in report.entries}


def journal(place):
    """What the journal tells of files that are finished."""
    lines = (place / "out" / "journal.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    return [line for line in told if line["status"] != "waiting"]


def done_again(job, **options):
    """Names of the files that a run segments."""
    steps = batch_steps(job, **options)
    return list(dict.fromkeys(step.name for step in steps if step.status == "running"))


def test_a_folder_becomes_a_folder(place):
    make_images(place / "in" / "deep" / "er", 1)
    job = make_job(place, recursive=True, probabilities=True)
    steps = list(batch_steps(job))
    assert [
        p.relative_to(place / "out").as_posix() for p in (place / "out").rglob("*.tif")
    ]
    for name, count in (("a0", 1), ("a1", 2), ("a2", 3), ("deep/er/a0", 1)):
        assert label_count(place / "out" / f"{name}.tif") == count
        probabilities = read_image(place / "out" / f"{name}_probabilities.tif")
        assert probabilities.axes == "CYX"
    first = [step.status for step in steps[:4]]
    assert first == ["waiting"] * 4
    ends = [(step.index, step.status) for step in steps if step.status == "done"]
    assert ends == [(i, "done") for i in range(4)]
    assert {step.files for step in steps} == {4}
    dones = [step.done for step in steps]
    assert dones == sorted(dones)
    assert steps[-1].done == steps[-1].total
    assert not parts(place)


def test_the_summary_and_the_journal(place):
    report = run_well(make_job(place))
    assert report.skipped == 0
    assert [entry.objects for entry in report.entries] == [1, 2, 3]
    lines = (place / "out" / "summary.csv").read_text().splitlines()
    assert lines[0] == (
        "file,status,objects,covered_fraction,mean_area_px,mean_area_um2,outlier,"
        "reason,notes"
    )
    assert lines[2] == f"a1.tif,done,2,{128 / 2400!r},64.0,16.0,,,"
    told = journal(place)
    assert [line["name"] for line in told] == ["a0.tif", "a1.tif", "a2.tif"]
    assert told[1]["size"] == (place / "in" / "a1.tif").stat().st_size
    assert told[1]["outputs"] == {"a1.tif": (place / "out" / "a1.tif").stat().st_size}


@pytest.mark.parametrize("kind", ["tif", "ome.tif", "ome.zarr"])
def test_formats(place, kind):
    run_well(make_job(place, format=kind, probabilities=True))
    for i in range(3):
        labels = place / "out" / f"a{i}.{kind}"
        assert label_count(labels) == i + 1
        assert read_image(labels).pixel_size == pytest.approx({"Y": 0.5, "X": 0.5})
        assert (place / "out" / f"a{i}_probabilities.{kind}").exists()
    assert (
        done_again(make_job(place, format=kind, probabilities=True), resume=True) == []
    )


NAMES = [
    "plain.tif",
    unicodedata.normalize("NFC", "Zürich é.tif"),
    unicodedata.normalize("NFD", "Čapek é.tif"),
    "🔬🧫.tif",
    "=cmd|x.tif",
    'a,b;"c".tif',
    " leading and trailing .tif",
    "<script>alert(1)</script>.tif".replace("/", "∕"),
    "%2e%2e.tif",
    "-rf.tif",
    "n" * 251 + ".tif",
    "é" * 125 + "n.tif",
]


def test_odd_names(place):
    shutil.rmtree(place / "in")
    for name in NAMES:
        write_image(place / "in" / name, squares(2))
    if os.name == "posix":
        write_image(place / "in" / os.fsdecode(b"not text \xff.tif"), squares(1))
    run_well(make_job(place))
    names = {path.name for path in (place / "in").iterdir()}
    assert {path.name for path in (place / "out").glob("*.tif")} == names
    assert done_again(make_job(place), resume=True) == []


# --- one bad file ------------------------------------------------------------------


def spoil(path):
    write_image(path, np.stack([squares(2)] * 9), "ZYX")
    with open(path, "rb+") as file:
        file.truncate(20_000)


def test_one_bad_file_is_recorded_and_the_rest_goes_on(place):
    spoil(place / "in" / "a1b.tif")
    (place / "in" / "a0.png").write_bytes(b"no image")
    (place / "in" / "a0.tif").rename(place / "in" / "b.tif")
    report = run(make_job(place))
    assert statuses(report) == {
        "a0.png": "failed",
        "a1.tif": "done",
        "a1b.tif": "failed",
        "a2.tif": "done",
        "b.tif": "done",
    }
    assert isinstance(report.error, Partial)
    assert "2 of 5 images could not be segmented: a0.png, a1b.tif." in str(report.error)
    assert [line["name"] for line in journal(place)] == list(statuses(report))
    assert "is not a readable image" in (place / "out" / "summary.csv").read_text()
    assert "is not a readable image" in report.report.read_text()
    # It is tried again, and only it.
    assert done_again(make_job(place), resume=True) == ["a0.png", "a1b.tif"]
    write_image(place / "in" / "a1b.tif", squares(4))
    assert run(make_job(place), resume=True).skipped == 3
    assert label_count(place / "out" / "a1b.tif") == 4


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "Memory ran out"),
        (ZeroDivisionError("a bug"), "An unexpected error, please report it: Zero"),
        (BadOutput("There are more objects than"), "There are more objects than"),
    ],
)
@pytest.mark.parametrize(
    ("module", "part"),
    [
        (batch_file, "read_image"),
        (batch_file, "segment_into_steps"),
        (batch_results, "write_labels"),
        (batch_results, "make_thumbnail"),
    ],
)
def test_whatever_happens_to_one_file(place, monkeypatch, error, reason, module, part):
    original = getattr(module, part)
    calls = []

    def fails_once(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise error
        return original(*arguments, **options)

    monkeypatch.setattr(module, part, fails_once)
    report = run(make_job(place))
    assert list(statuses(report).values()) == ["done", "failed", "done"]
    assert report.entries[1].reason.startswith(reason)
    assert ("Traceback" in report.entries[1].details) == ("unexpected" in reason)
    assert not parts(place)


def test_all_files_are_bad(place):
    for path in (place / "in").iterdir():
        path.write_bytes(b"no image")
    report = run(make_job(place))
    assert len(report.failed) == 3
    assert "The others" not in str(report.error)


# --- resuming ----------------------------------------------------------------------


def test_resume_does_nothing_when_all_is_done(place):
    first = run(make_job(place))
    before = results(place / "out")
    steps = list(batch_steps(make_job(place), resume=True))
    assert {step.status for step in steps} == {"skipped"}
    assert [step.entry.objects for step in steps] == [1, 2, 3]
    assert results(place / "out") == before
    assert run(make_job(place), resume=True).entries == first.entries


def change_image(place):
    write_image(place / "in" / "a1.tif", squares(4))


def touch_image(place):
    path = place / "in" / "a1.tif"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def remove_result(place):
    (place / "out" / "a1.tif").unlink()


def tear_journal(place):
    path = place / "out" / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-2]) + lines[-1] + lines[-2][:-20])


@pytest.mark.parametrize(
    "change", [change_image, touch_image, remove_result, tear_journal]
)
def test_resume_does_again_what_has_changed(place, change):
    run_well(make_job(place))
    change(place)
    assert done_again(make_job(place), resume=True) == ["a1.tif"]
    expected = 4 if change is change_image else 2
    assert label_count(place / "out" / "a1.tif") == expected
    assert done_again(make_job(place), resume=True) == []


def correct_result(place):
    (place / "out" / "a1.tif").write_bytes(b"corrected by hand")


def add_image_of_a_result(place):
    write_image(place / "in" / "b.tif", squares(1))
    shutil.copy(place / "in" / "b.tif", place / "out" / "b.tif")


@pytest.mark.parametrize("change", [correct_result, add_image_of_a_result])
def test_resume_replaces_nothing_that_is_not_its_own(place, change):
    run_well(make_job(place))
    change(place)
    before = results(place / "out")
    name = "a1.tif" if change is correct_result else "b.tif"
    told = f"{name} exists and was not made by this batch, or was changed since; use"
    with pytest.raises(BadOutput, match=told):
        run(make_job(place), resume=True)
    assert results(place / "out") == before
    assert done_again(make_job(place), resume=True, overwrite=True) == [name]


def test_resume_with_another_format_replaces_nothing_of_others(place):
    run_well(make_job(place))
    shutil.copy(place / "in" / "a0.tif", place / "out" / "a0.ome.tif")
    with pytest.raises(BadOutput, match=r"a0.ome.tif exists and was not made by"):
        run(make_job(place, format="ome.tif"), resume=True)


def test_resume_replaces_no_results_of_other_images(place):
    run_well(make_job(place))
    (place / "in").rename(place / "first")
    make_images(place / "in", 4)
    told = BatchJob.load(place / "out" / "job.yaml")
    told.model_copy(update={"input": place / "first"}).save(place / "out" / "job.yaml")
    before = results(place / "out")
    with pytest.raises(
        BadOutput, match=r"out holds the results of the images in .*st;"
    ):
        run(make_job(place), resume=True)
    assert results(place / "out") == before


def test_tables_of_others_are_not_replaced(place):
    out = place / "out"
    out.mkdir()
    (out / "measurements.csv").write_text("mine")
    with pytest.raises(BadOutput, match=r"measurements.csv exists and was not made"):
        run(make_job(place, measure=True))
    assert results(out).keys() == {"measurements.csv"}
    run_well(make_job(place, measure=True), overwrite=True)
    before = results(out)
    (place / "others").mkdir()
    write_image(place / "others" / "b.tif", squares(1))
    others = make_job(place, measure=True).model_copy(
        update={"input": place / "others"}
    )
    for resume in False, True:
        with pytest.raises(BadOutput, match="holds the results of the images in"):
            run(others, resume=resume)
    assert results(out) == before
    (place / "in").rename(place / "moved")  # the same images
    moved = others.model_copy(update={"input": place / "moved"})
    write_image(place / "moved" / "b.tif", squares(1))
    assert done_again(moved, resume=True) == ["b.tif"]


def test_a_table_of_an_earlier_run_is_told(place):
    run_well(make_job(place, measure=True))
    notes = [step.note for step in batch_steps(make_job(place), resume=True)]
    assert any("measurements.csv is of an earlier run" in note for note in notes)


def test_what_a_run_has_begun_is_its_own(place):
    """A kill between a first result and its line in the journal."""
    with closing(batch_steps(make_job(place))) as steps:
        while next(steps).status != "running":
            pass
        shutil.copytree(place / "out", place / "copy")  # as a kill would leave it
    shutil.rmtree(place / "out")
    (place / "copy").rename(place / "out")
    (place / "out" / "a0.tif").write_bytes(b"written by the run that was killed")
    run_well(make_job(place), resume=True)
    assert label_count(place / "out" / "a0.tif") == 1


def test_resume_does_all_again_with_another_model_or_other_settings(place):
    run_well(make_job(place))
    everything = ["a0.tif", "a1.tif", "a2.tif"]
    other = make_job(place, settings=SegmentSettings(threshold=0.9))
    notes = [step.note for step in batch_steps(other, resume=True)]
    assert (
        sum("3 files were done with another model, other set" in n for n in notes) == 1
    )
    assert done_again(other, resume=True) == []
    # The first settings are not done any more.
    assert done_again(make_job(place), resume=True) == everything
    device = make_job(place, settings=SegmentSettings(device="cpu", tile=16))
    assert done_again(device, resume=True) == []
    threshold_model(place / "m.safetensors", pixel_size=(1.0, 1.0))
    assert done_again(make_job(place), resume=True) == everything


def test_what_is_about_to_be_replaced_is_not_done(place, monkeypatch):
    """A kill while another model replaces results leaves nothing that passes."""
    run_well(make_job(place))
    other = make_job(place, settings=SegmentSettings(threshold=0.9))
    with closing(batch_steps(other, overwrite=True)) as steps:
        while next(steps).status != "running":
            pass
        shutil.copytree(place / "out", place / "copy")  # as a kill would leave it
    shutil.rmtree(place / "out")
    (place / "copy").rename(place / "out")
    assert len(done_again(make_job(place), resume=True)) == 3


def test_a_new_image_is_done_and_one_that_is_gone_is_forgotten(place):
    run_well(make_job(place))
    (place / "in" / "a0.tif").unlink()
    write_image(place / "in" / "b.tif", squares(1))
    report = run(make_job(place), resume=True)
    assert statuses(report) == {"a1.tif": "done", "a2.tif": "done", "b.tif": "done"}
    assert report.skipped == 2


def test_results_are_only_replaced_when_told(place):
    run_well(make_job(place))
    with pytest.raises(BadOutput, match="exist already; use --overwrite"):
        run(make_job(place))
    assert len(done_again(make_job(place), overwrite=True)) == 3


def test_a_journal_of_a_newer_version_is_not_touched(place):
    run_well(make_job(place))
    path = place / "out" / "journal.jsonl"
    text = path.read_text().replace('"journal": 1', '"journal": 2')
    path.write_text(text.replace('"status"', '"state"'))  # as it may be then
    before = hashes(place / "out")
    with pytest.raises(BadInput, match="another version of napari-unet"):
        run(make_job(place), resume=True)
    assert hashes(place / "out") == before


# --- the job -----------------------------------------------------------------------


def test_the_job_file_repeats_the_batch(place):
    settings = SegmentSettings(threshold=0.6, minimal_size=3)
    first = run(make_job(place, settings=settings, probabilities=True))
    told = BatchJob.load(place / "out" / "job.yaml")
    assert told == first.job
    assert told.model_sha256
    assert told.versions["torch"]
    assert done_again(told, resume=True) == []
    again = told.model_copy(update={"output": place / "again"})
    run_well(again)
    assert results(place / "again") == results(place / "out")


def test_another_model_of_that_name_is_refused(place):
    run_well(make_job(place))
    told = BatchJob.load(place / "out" / "job.yaml")
    threshold_model(place / "m.safetensors", pixel_size=(1.0, 1.0))
    with pytest.raises(BadModel, match="is not the one that the job was made with"):
        run(told, resume=True)


def test_results_of_other_programs_are_made_again(place, monkeypatch):
    """OpenVINO, where it is installed, computes a little differently from torch."""
    run_well(make_job(place))
    told = BatchJob.load(place / "out" / "job.yaml")
    versions = {**told.versions, "openvino": "1.0"}
    monkeypatch.setattr(folder, "program_versions", lambda model: versions)
    assert run_well(make_job(place), resume=True).skipped == 0


def test_what_the_processor_runs_networks_with_is_in_the_job(place):
    pytest.importorskip("openvino")
    run_well(make_job(place))
    job = BatchJob.load(place / "out" / "job.yaml")
    assert job.versions["openvino"] == version("openvino")


def test_what_runs_a_network_as_it_is_is_in_the_job(place):
    onnxruntime = pytest.importorskip("onnxruntime")
    network = UNet(1, 2, depth=1, base_channels=4).eval()
    (place / "m.onnx").write_bytes(unet_file(network))
    assert "onnxruntime" not in program_versions(Model(network))
    job = make_job(place).model_copy(update={"model": str(place / "m.onnx")})
    run_well(job)
    told = BatchJob.load(place / "out" / "job.yaml")
    assert told.versions["onnxruntime"] == onnxruntime.__version__


def test_a_memory_limit_that_is_too_low_is_refused_once(place, monkeypatch):
    monkeypatch.setattr(batch_file, "read_image", None)  # no file is read
    with pytest.raises(BadInput, match="is too low for this network; allow"):
        run(make_job(place, settings={"memory_limit": 1e-6}))
    assert not (place / "out").exists()


def test_nothing_is_made_for_a_model_that_is_not_there(place):
    for model in ("nothing", str(place / "nothing.safetensors")):
        with pytest.raises(BadModel):
            run(make_job(place).model_copy(update={"model": model}))
    assert not (place / "out").exists()


def test_an_image_whose_link_leads_nowhere_fails(place):
    (place / "in" / "b.tif").symlink_to(place / "gone.tif")
    report = run(make_job(place))
    assert statuses(report)["b.tif"] == "failed"
    assert "does not exist" in report.failed[0].reason


def test_other_programs_are_told(place):
    run_well(make_job(place))
    told = BatchJob.load(place / "out" / "job.yaml")
    told = told.model_copy(update={"versions": {**told.versions, "torch": "1.0"}})
    notes = [step.note for step in batch_steps(told, resume=True)]
    assert any("The job was made with torch 1.0 (now " in note for note in notes)


# --- stopping ----------------------------------------------------------------------


@pytest.mark.parametrize("ticks", range(3, 30, 2))
def test_cancel_keeps_what_is_finished(place, ticks):
    reference = place / "reference"
    run_well(make_job(place).model_copy(update={"output": reference}))
    with unchanged(place / "in"):
        steps = batch_steps(make_job(place))
        for _ in zip(range(ticks), steps, strict=False):
            pass
        steps.close()
    assert not parts(place)
    finished = {line["name"] for line in journal(place)}
    written = {path.name for path in (place / "out").glob("*.tif")}
    assert finished == written
    if (place / "out" / "summary.csv").exists():  # if it had begun at all
        told = (place / "out" / "summary.csv").read_text().splitlines()[1:]
        assert {line.split(",")[0] for line in told} == finished
    again = done_again(make_job(place), resume=True)
    assert sorted(again) == sorted({"a0.tif", "a1.tif", "a2.tif"} - finished)
    assert results(place / "out") == results(reference)


def test_two_runs_on_one_folder(place):
    first = batch_steps(make_job(place))
    next(first)
    with pytest.raises(BadOutput, match="Another batch is writing into"):
        run(make_job(place), resume=True)
    script = (
        "import sys; from pathlib import Path; from napari_unet.cli import main\n"
        "sys.exit(main(['batch', *sys.argv[1:], '--resume']))"
    )
    arguments = [place / "in", place / "out", "-m", place / "m.safetensors"]
    other = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True
    )
    assert other.returncode == 4
    assert other.stderr.startswith("Error: Another batch is writing into ")
    assert run_to_end(first).error is None
    assert run(make_job(place), resume=True).skipped == 3


# --- large images ------------------------------------------------------------------


@pytest.fixture
def small_limits(monkeypatch):
    """Take every image of more than 4,000 bytes for one that does not fit."""
    monkeypatch.setattr(batch_file, "LAZY_BYTES", 4_000)
    monkeypatch.setattr(batch_file, "LAZY_VALUES", 4_000)


def test_large_images_give_the_same_results(place, monkeypatch):
    stack = np.stack([squares(i % 4 + 1) for i in range(7)])
    write_image(place / "in" / "stack.tif", stack, "TYX")
    job = make_job(place, probabilities=True)
    run_well(job.model_copy(update={"output": place / "reference"}))
    monkeypatch.setattr(batch_file, "LAZY_BYTES", 4_000)
    monkeypatch.setattr(batch_file, "LAZY_VALUES", 4_000)
    run_well(job)
    assert results(place / "out") == results(place / "reference")
    assert not parts(place)


@pytest.mark.parametrize("ticks", [9, 14, 20, 26])
def test_cancel_removes_the_temporary_files_of_large_images(place, small_limits, ticks):
    for i in range(3):
        write_image(place / "in" / f"a{i}.tif", np.stack([squares(2)] * 7), "TYX")
    steps = batch_steps(make_job(place, probabilities=True))
    for _ in zip(range(ticks), steps, strict=False):
        pass
    steps.close()
    assert not parts(place)
    run_well(make_job(place, probabilities=True), resume=True)
    assert label_count(place / "out" / "a2.tif") == 14


def test_what_a_killed_run_has_left_is_swept(place):
    run_well(make_job(place))
    from napari_unet.files import atomic

    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"],
        capture_output=True,
        text=True,
    )
    tail = f"{atomic._host()}-{dead.stdout.strip()}.{'0' * 32}.part"
    (place / "out" / f".a0.tif.{tail}").write_bytes(b"half")
    scratch = place / "out" / ".napari-unet" / f".scratch.{tail}"
    scratch.mkdir()
    (scratch / "labels").write_bytes(b"half")
    run_well(make_job(place), resume=True)
    assert not parts(place)
