"""``napari-unet batch``: lines, exit codes, signals."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tifffile
from batch_cases import label_count, make_images, results, unchanged
from cli_cases import call, hashes, squares, threshold_model, write_image


@pytest.fixture
def command(place, capsys, monkeypatch):
    """Run the command in the folder of the test, whose images it must not change."""
    monkeypatch.chdir(place)

    def run(*arguments):
        with unchanged("in"):
            return call(capsys, "batch", *arguments)

    return run


MODEL = ("-m", "m.safetensors")


def test_a_line_for_each_image(command):
    result = command("in", "out", *MODEL, "--measure", "--probabilities")
    assert result.code == 0
    lines = result.out.splitlines()
    assert [line.split(", ")[0] for line in lines[:3]] == [
        "a0.tif: 1 object",
        "a1.tif: 2 objects",
        "a2.tif: 3 objects",
    ]
    assert lines[3] == "3 images: out/report.html"
    assert result.err == ""
    assert sorted(os.listdir("out")) == [
        ".napari-unet",
        *(f"a{i}{kind}.tif" for i in range(3) for kind in ("", "_probabilities")),
        "job.yaml",
        "journal.jsonl",
        "measurements.csv",
        "report.html",
        "summary.csv",
    ]


def test_failures_are_listed(command, place):
    (place / "in" / "a1.tif").write_bytes(b"no image")
    result = command("in", "out", *MODEL)
    assert result.code == 3
    assert [line.split(":")[0] for line in result.out.splitlines()] == [
        "a0.tif",
        "a2.tif",
    ]
    lines = result.err.splitlines()
    assert lines[0].startswith("Failed: a1.tif: a1.tif is not a readable image")
    assert lines[1] == (
        "Error: 1 of 3 images could not be segmented: a1.tif. The others are done. The "
        "reasons are in out/report.html."
    )
    assert len(lines) == 2


def test_options_reach_the_job(command, place):
    stack = np.stack([np.zeros((40, 60), np.uint16), squares(2)])
    write_image(place / "in" / "sub" / "x_two.tif", stack, "CYX")
    result = command(
        *("in", "out", *MODEL, "-r", "--pattern", "x_*", "--format", "ome.tif"),
        *("--channel", 1, "--threshold", 0.7, "--minimal-size", 5, "--tile", 64),
        *("--split-touching", "--precision", "float32", "--pixel-size", "0.25"),
        *("--device", "cpu", "--test-time-augmentation", "--axes", "CYX"),
    )
    assert result.code == 0, result.err
    assert label_count(place / "out" / "sub" / "x_two.ome.tif") == 2
    told = (place / "out" / "job.yaml").read_text()
    for line in (
        "pattern: x_*",
        "recursive: true",
        "format: ome.tif",
        "axes: CYX",
        "threshold: 0.7",
        "minimal_size: 5",
        "split_touching: true",
        "precision: float32",
        "test_time_augmentation: true",
        "device: cpu",
        "tile: 64",
    ):
        assert line in told, line


def test_a_job_is_repeated_and_overridden(command, place):
    assert command("in", "out", *MODEL, "--threshold", 0.6).code == 0
    again = command("--job", "out/job.yaml", "--resume")
    assert again.code == 0
    assert again.out == "3 images: out/report.html\n".replace("out/", f"{place}/out/")
    assert command("--job", "out/job.yaml").code == 4  # the results are there
    assert command("in", "two", "--job", "out/job.yaml").code == 0
    assert results("two") == results("out")
    assert command("in", "three", "--job", "out/job.yaml", "--threshold", 0.9).code == 0
    assert "threshold: 0.9" in (place / "three" / "job.yaml").read_text()
    threshold_model("m.safetensors", pixel_size=(1.0, 1.0))
    refused = command("in", "four", "--job", "out/job.yaml")
    assert refused.code == 2
    assert "is not the one that the job was made with" in refused.err
    assert command("in", "four", "--job", "out/job.yaml", *MODEL).code == 0


def test_what_a_job_switches_on_can_be_switched_off(command, place):
    for path in (place / "in").glob("a[12].tif"):
        path.unlink()
    make_images(place / "in" / "sub", 1)
    on = ("-r", "--measure", "--probabilities", "--test-time-augmentation")
    assert command("in", "out", *MODEL, *on, "--split-touching").code == 0
    job = ("--job", "out/job.yaml")
    off = [f"--no{option[1:]}" for option in ("--recursive", *on[1:])]
    told = {}
    for name, options in (("same", []), ("off", off)):
        assert command("in", name, *job, *options).code == 0
        text = (place / name / "job.yaml").read_text()
        told[name] = text.replace(f"{place / name}\n", f"{place / 'out'}\n")
    assert told["same"] == (place / "out" / "job.yaml").read_text()
    names = [path.name for path in (place / "off").rglob("*.tif")]
    assert names == ["a0.tif"]
    assert not (place / "off" / "measurements.csv").exists()
    for line in ("measure", "recursive", "probabilities", "test_time_augmentation"):
        assert f"{line}: false" in told["off"]
    assert "split_touching: true" in told["off"]


def test_notes_are_told_with_the_file_that_they_are_of(command, place):
    image = squares(1).astype(np.float32)
    image[-1, -1] = np.nan
    for name in ("b.tif", "c.tif"):
        tifffile.imwrite(place / "in" / name, image)
    result = command("in", "out", *MODEL)
    assert result.err == "Note: b.tif: 1 pixel is NaN or infinite; it is background.\n"
    assert result.out.splitlines()[-1] == "5 images, 2 with notes: out/report.html"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 1, "IN_DIR and OUT_DIR and --model missing; or give a job with --job."),
        (["in", "out"], 1, "--model missing"),
        (["in", "out", *MODEL, "--format", "png"], 1, "--format"),
        (["in", "out", *MODEL, "--pattern", "a/b"], 1, "pattern: it is compared with"),
        (["--job", "none.yaml"], 1, "Cannot read the job none.yaml: No such file"),
        (["none", "out", *MODEL], 1, "none does not exist; check the name"),
        (["in", "in", *MODEL], 4, "would lie in the same folder"),
        (["in", "m.safetensors", *MODEL], 4, "is not a folder"),
        (["in", "out", "-m", "nothing"], 2, "There is no model 'nothing'"),
        (["in", "out", *MODEL, "--device", "tpu"], 1, "There is no device 'tpu'"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(command, arguments, code, words):
    result = command(*arguments)
    assert result.code == code
    assert words in result.err
    assert result.out == ""
    assert "Traceback" not in result.err
    assert not [path for path in hashes(".") if path.endswith("a0.tif")][1:]


def test_quiet_tells_only_failures(command, place):
    (place / "in" / "a1.tif").write_bytes(b"no image")
    result = command("in", "out", *MODEL, "-q")
    assert result.out == ""
    assert len(result.err.splitlines()) == 2


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(place):
    make_images(place / "in", 40)
    arguments = ["batch", "in", "out", *MODEL]
    process = subprocess.Popen(
        [sys.executable, "-m", "napari_unet", *arguments],
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    first = process.stdout.readline()
    assert first.startswith("a0.tif: 1 object, ")
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == (
        "Error: Stopped by Ctrl-C. What is finished is kept; the same command with "
        "--resume goes on.\n"
    )
    written = {path.name for path in (place / "out").glob("*.tif")}
    told = (place / "out" / "summary.csv").read_text().splitlines()[1:]
    assert {line.split(",")[0] for line in told} == written
    assert 1 <= len(written) < 40
    assert not list((place / "out").rglob("*.part"))
