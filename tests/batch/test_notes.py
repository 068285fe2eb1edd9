"""What the user should know of a file is kept with that file."""

import csv
import json
import struct

import numpy as np
import pytest
import tifffile
from batch_cases import make_job, results, run, run_well
from cli_cases import squares, write_image

from napari_unet.batch.folder import batch_steps
from napari_unet.batch.survey import survey_steps
from napari_unet.files.images import read_image
from napari_unet.inference import backends
from napari_unet.inference.predict import predict
from napari_unet.models.checkpoint import save_model
from napari_unet.models.library import load_model
from napari_unet.models.model import Model
from napari_unet.models.normalize import Normalization
from napari_unet.network.unet import UNet
from napari_unet.steps import run_to_end


def write_damaged_tag(path):
    """A valid image, but the name of the program that made it lies nowhere."""
    tifffile.imwrite(path, squares(1), metadata=None, software="some program or other")
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tag = tiff.pages.first.tags["Software"]
        tiff.filehandle.seek(tag.offset + 8)
        tiff.filehandle.write(struct.pack("<I", 2**31))


def write_odd_images(folder):
    write_damaged_tag(folder / "b_tag.tif")
    with_nan = squares(2).astype(np.float32)
    with_nan[-1, :5] = np.nan
    for name in ("b_nan.tif", "c_nan.tif"):
        tifffile.imwrite(folder / name, with_nan)
    pages = np.stack([squares(1)] * 3)
    tifffile.imwrite(
        folder / "d_pages.tif", pages, metadata=None, photometric="minisblack"
    )


NOTES = {
    "b_tag.tif": "Some metadata of b_tag.tif could not be read and was ignored (tag",
    "b_nan.tif": "5 pixels are NaN or infinite; they are background.",
    "c_nan.tif": "5 pixels are NaN or infinite; they are background.",
    "d_pages.tif": "d_pages.tif does not name all its axes; 3×40×60 is read as ZYX.",
}


def check_notes(entries):
    found = {entry.name: entry.notes for entry in entries if entry.notes}
    assert found.keys() == NOTES.keys()
    for name, note in NOTES.items():
        assert found[name][0].startswith(note)


def test_every_file_keeps_its_notes(place):
    write_odd_images(place / "in")
    report = run_well(make_job(place))
    check_notes(report.entries)
    with open(place / "out" / "summary.csv", newline="", encoding="utf-8") as file:
        rows = {row["file"]: row["notes"] for row in csv.DictReader(file)}
    html = report.report.read_text(encoding="utf-8")
    assert "<b>4</b>with notes" in html
    assert "<details open>" in html
    for entry in report.entries:
        assert rows[entry.name] == " ".join(entry.notes)
        assert all(note in html for note in entry.notes)
    # A run that skips them still knows, and so does who looks before it.
    check_notes(run(make_job(place), resume=True).entries)
    survey = run_to_end(survey_steps(make_job(place), load_model(report.job.model)))
    check_notes([file.entry for file in survey.files])


def test_a_file_that_failed_keeps_the_notes_of_its_reading(place):
    pages = np.stack([squares(1)] * 3)
    path = place / "in" / "odd.tif"
    tifffile.imwrite(path, pages, metadata=None, photometric="minisblack")
    report = run(make_job(place, settings={"channels": (1,)}))
    entry = next(entry for entry in report.failed if entry.name == "odd.tif")
    assert "does not name all its axes" in entry.notes[0]
    assert entry.notes[0] in report.report.read_text(encoding="utf-8")


def test_a_note_is_told_once_while_it_runs(place):
    write_odd_images(place / "in")
    told = [step.note for step in batch_steps(make_job(place)) if step.note]
    assert sum("5 pixels are NaN" in note for note in told) == 1
    assert len(told) == len(set(told)) == 3


def test_a_journal_from_before_there_were_notes(place):
    first = run_well(make_job(place))
    path = place / "out" / "journal.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        del line["notes"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = run(make_job(place), resume=True)
    assert report.skipped == 3
    assert report.entries == first.entries


# --- models whose result depends on the tile size ------------------------------------


@pytest.fixture
def blended(place):
    """A folder with a model that cannot be tiled exactly, and a larger image."""
    model = Model(UNet(1, 2, depth=1, base_channels=2, norm="instance").eval())
    assert model.inexact_reason
    passport = model.passport.model_copy(
        update={"normalization": Normalization(method="fixed", lower=0, upper=1000)}
    )
    save_model(Model(model.network, passport), place / "m.safetensors")
    for path in (place / "in").iterdir():
        path.unlink()
    dice = np.random.default_rng(0)
    image = dice.integers(0, 1000, (600, 40)).astype(np.uint16)
    image[:300] //= 4  # statistics differ from place to place
    write_image(place / "in" / "a.tif", image)
    return place


def with_budget(monkeypatch, pixels):
    monkeypatch.setattr(backends.Backend, "max_input_pixels", pixels)


def test_where_the_tile_size_matters_it_does_not_depend_on_the_memory(
    blended, monkeypatch
):
    job = make_job(blended, probabilities=True)
    report = run_well(job)
    assert "tile: 512" in (blended / "out" / "job.yaml").read_text()
    assert "tiles are blended" in report.entries[0].notes[0]
    other = job.model_copy(update={"output": blended / "other"})
    image, model = read_image(blended / "in" / "a.tif").data, load_model(job.model)
    much = predict(image, model)
    with_budget(monkeypatch, 100 * 100)  # as another computer may have
    assert not np.allclose(predict(image, model), much, atol=1e-3)
    run_well(other)
    assert results(blended / "other") == results(blended / "out")


def test_where_the_tile_size_matters_another_one_is_another_batch(blended):
    run_well(make_job(blended))
    steps = batch_steps(make_job(blended, settings={"tile": 64}), resume=True)
    assert "other settings" in "".join(step.note for step in steps)
    assert run(make_job(blended, settings={"tile": 64}), resume=True).skipped == 1
    assert run(make_job(blended, settings={"tile": 512}), resume=True).skipped == 0
    assert run(make_job(blended), resume=True).skipped == 1
