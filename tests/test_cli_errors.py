"""What the command line says when it cannot do what it is asked to.

One sentence, the right exit code, and no file that was there before is changed.
"""

import os
import shutil
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import tifffile
from cli_cases import call, hashes, squares, threshold_model, write_image

from napari_unet.batch import file as batch_file
from napari_unet.batch import results
from napari_unet.errors import BadOutput
from napari_unet.inference.backends import Backend


@pytest.fixture(autouse=True)
def place(own_library, tmp_path, monkeypatch):
    """A folder to work in, with a model and some images; names are relative to it."""
    monkeypatch.chdir(tmp_path)
    threshold_model("m.safetensors")
    write_image("good.tif", squares(2))
    return tmp_path


@pytest.fixture
def fails(capsys, place):
    """Run a command that must fail in one sentence and change nothing."""

    def run(code, *arguments):
        before = hashes(place)
        result = call(capsys, *arguments)
        assert hashes(place) == before
        assert result.code == code, result
        assert result.out == ""
        assert result.err.startswith("Error: ")
        assert result.err.endswith(".\n")
        assert result.err.count("\n") == 1
        return result.err.removeprefix("Error: ").rstrip("\n")

    return run


def truncated(path):
    write_image(path, np.stack([squares(2)] * 9), "ZYX")
    with open(path, "rb+") as file:
        file.truncate(20_000)


def write_bytes(path):
    with open(path, "wb") as file:
        file.write(b"no image at all")


def two_channels(path):
    write_image(path, np.stack([squares(1)] * 2), "CYX")


def infinite(path):
    tifffile.imwrite(path, np.full((40, 40), np.nan, np.float32))


def not_finite_model(path):
    threshold_model(path)
    with open(path, "rb+") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\xff\xff\xff\xff")


BAD_IMAGES = [
    (write_bytes, "a.tif is not a readable image; TIFF, OME-TIFF"),
    (truncated, "a.tif"),
    (two_channels, "The image has 2 channels, but the model 'threshold' expects 1"),
    (infinite, "The image has no finite pixels"),
]


@pytest.mark.parametrize(("make", "sentence"), BAD_IMAGES)
def test_bad_image(fails, make, sentence):
    make("a.tif")
    said = fails(1, "segment", "a.tif", "-m", "m.safetensors", "-o", "out")
    assert said.startswith(sentence)
    assert not os.path.exists("out")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["none.tif"], "none.tif does not exist; check the name."),
        (["empty"], "There are no images in the folder empty."),
        (["good.tif", "--axes", "Q"], "The axes 'Q' cannot be used"),
        (["good.tif", "--axes", "ZYX"], "good.tif has 2 dimensions"),
        (["good.tif", "--channel", "1"], "The image has no channel 1"),
        (["good.tif", "--device", "tpu"], "There is no device 'tpu'; choose one of"),
    ],
)
def test_bad_request(fails, arguments, sentence):
    os.mkdir("empty")
    said = fails(1, "segment", *arguments, "-m", "m.safetensors", "-o", "out")
    assert said.startswith(sentence)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nothing", "There is no model 'nothing' in the library"),
        ("none.pt", "Cannot read the checkpoint none.pt: No such file"),
        ("bytes.pt", "bytes.pt cannot be used. It is not a napari-unet checkpoint"),
        ("cut.safetensors", "cut.safetensors cannot be used. It is incomplete ("),
        (
            "nan.safetensors",
            "nan.safetensors cannot be used. It has 1 non-finite values in ",
        ),
        ("good.tif", "good.tif cannot be used. It is not a napari-unet checkpoint"),
    ],
)
def test_bad_model(fails, name, sentence):
    write_bytes("bytes.pt")
    not_finite_model("nan.safetensors")
    shutil.copy("m.safetensors", "cut.safetensors")
    os.truncate("cut.safetensors", os.path.getsize("m.safetensors") - 4)
    for arguments in (
        ["segment", "good.tif", "-m", name, "-o", "out"],
        ["models", "info", name],
    ):
        assert fails(2, *arguments).startswith(sentence)
    assert not os.path.exists("out")


def prepare_outputs():
    write_image("in/a.tif", squares(1))
    write_image("in/b.png.tif", squares(1))
    write_image("out/a.tif", squares(1))
    write_image("out/b_probabilities.tif", squares(1))
    write_image("b.tif", squares(1))
    os.mkdir("taken")
    os.mkdir("taken/good.tif")
    os.symlink("nowhere", "dangling")
    os.mkdir("image.zarr")
    os.link("good.tif", "hard.tif")
    os.symlink("good.tif", "soft.tif")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("in -o out", "out/a.tif exists already; use --overwrite to replace it, or"),
        ("in/a.tif -o out/a.tif", "out/a.tif exists already; use --overwrite"),
        ("b.tif -o out --probabilities", "out/b_probabilities.tif exists already"),
        ("in -o in", "in/a.tif is one of the images, which are never overwritten"),
        ("in -o in --overwrite", "in/a.tif is one of the images, which are never"),
        ("good.tif -o good.tif --overwrite", "good.tif is one of the images"),
        ("good.tif -o hard.tif --overwrite", "hard.tif is one of the images"),
        ("good.tif -o soft.tif --overwrite", "soft.tif is one of the images"),
        ("good.tif -o m.safetensors", "Cannot write into m.safetensors: "),
        ("good.tif -o m.safetensors/deep", "Cannot write into m.safetensors/deep: "),
        ("good.tif -o good.tif/x.tif", "Cannot write into good.tif: "),
        ("good.tif -o dangling", "Cannot write into dangling: "),
        ("good.tif -o taken", "Cannot write taken/good.tif: there is a folder of"),
        (f"good.tif -o {'x' * 250}.tif --probabilities", "Cannot write xxx"),
    ],
)
def test_bad_output(fails, arguments, sentence, monkeypatch):
    prepare_outputs()
    # It is refused before the model is loaded.
    monkeypatch.setattr("napari_unet.models.library.load_model", None)
    said = fails(4, "segment", *arguments.split(), "-m", "m.safetensors")
    assert said.startswith(sentence)


def test_output_folder_that_cannot_be_written(fails, monkeypatch):
    # Tests may run as root, whom no permission stops.
    def refuse(path):
        raise BadOutput(f"Cannot write {path}: you are not allowed to write there.")

    monkeypatch.setattr("napari_unet.files.atomic.check_writable", refuse)
    monkeypatch.setattr("napari_unet.models.library.load_model", None)
    said = fails(4, "segment", "good.tif", "-m", "m.safetensors", "-o", "out/deep")
    assert said == f"Cannot write {os.getcwd()}: you are not allowed to write there."


@pytest.mark.parametrize(
    ("names", "output", "sentence"),
    [
        (["x/a.tif", "y/a.tif"], "out", "The results of x/a.tif and y/a.tif would"),
        (["x/a.tif", "x/a.tiff"], "out", "The results of x/a.tif and x/a.tiff would"),
        (["x/a.tif", "x/a.ome.tif"], "out", "The results of x/a.tif and x/a.ome.tif"),
        (["x/a.tif", "x/A.tif"], "out", "The results of x/a.tif and x/A.tif would"),
        (
            ["x/a.tif", "x/a_probabilities.tif"],
            "out",
            "The results of x/a.tif and x/a_probabilities.tif would both be named "
            "a_probabilities.tif; rename one",
        ),
        (["x/a.tif", "x/b.tif"], "c.tif", "c.tif is one file, but there are 2 images"),
        (["x/a.tif"], "c.png", "Labels cannot be written as c.png; give a .tif file"),
        (["x/a.tif"], "c.ome.zarr", "Labels cannot be written as c.ome.zarr; give a"),
    ],
)
def test_names_that_cannot_be(fails, names, output, sentence):
    for name in names:
        write_image(name, squares(1))
    said = fails(
        *(1, "segment", *names, "-m", "m.safetensors", "-o", output),
        "--probabilities",
    )
    assert said.startswith(sentence)


def test_names_that_differ_only_in_unicode_form(fails):
    composed = unicodedata.normalize("NFC", "x/é.tif")
    decomposed = unicodedata.normalize("NFD", "y/É.tif")
    assert composed.casefold()[2:] != decomposed.casefold()[2:]
    for name in (composed, decomposed):
        write_image(name, squares(1))
    said = fails(1, "segment", "x", "y", "-m", "m.safetensors", "-o", "out")
    assert "would both be named" in said


def test_results_inside_an_image_are_refused(fails):
    import zarr

    group = zarr.open_group("in.zarr", mode="w", zarr_format=2)
    group.create_array("0", data=squares(1))
    axes = [{"name": "y", "type": "space"}, {"name": "x", "type": "space"}]
    scale = [{"type": "scale", "scale": [1, 1]}]
    datasets = [{"path": "0", "coordinateTransformations": scale}]
    group.attrs["multiscales"] = [
        {"version": "0.4", "axes": axes, "datasets": datasets}
    ]
    said = fails(4, "segment", "in.zarr", "-m", "m.safetensors", "-o", "in.zarr/out")
    assert said.startswith("The output lies inside the image in.zarr")


def test_one_bad_image_does_not_stop_the_others(capsys):
    for name in ("a", "c"):
        write_image(f"in/{name}.tif", squares(2))
    truncated("in/b.tif")
    two_channels("in/d.tif")
    before = hashes("in")

    result = call(capsys, "segment", "in", "-m", "m.safetensors", "-o", "out")

    assert result.code == 3
    assert [line.split(":")[0] for line in result.out.splitlines()] == [
        "in/a.tif -> out/a.tif",
        "in/c.tif -> out/c.tif",
    ]
    lines = result.err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("Failed: in/b.tif: b.tif ")
    assert lines[1].startswith("Failed: in/d.tif: The image has 2 channels, but")
    assert lines[2] == (
        "Error: 2 of 4 images could not be segmented: in/b.tif, in/d.tif. The others "
        "are done."
    )
    assert sorted(os.listdir("out")) == ["a.tif", "c.tif"]
    assert hashes("in") == before


@pytest.mark.parametrize("command", ["segment", "batch"])
def test_a_memory_limit_that_is_too_low(fails, monkeypatch, command):
    for name in "ab":
        write_image(f"in/{name}.tif", squares(2))
    monkeypatch.setattr(Backend, "_fixed_bytes", 10**9)
    output = ["-o", "out"] if command == "segment" else ["out"]
    model = ["-m", "m.safetensors", "--memory-limit", 0.5]
    said = fails(1, command, "in", *output, *model)
    assert said.startswith("A memory limit of 0.5 GB is too low for this network")


def test_all_bad_images(capsys):
    truncated("in/a.tif")
    two_channels("in/b.tif")
    result = call(capsys, "segment", "in", "-m", "m.safetensors", "-o", "out")
    assert result.code == 3
    assert result.err.endswith("could not be segmented: in/a.tif, in/b.tif.\n")
    assert not os.path.exists("out")


@pytest.mark.parametrize("existing", [False, True])
def test_ctrl_c_while_writing_leaves_no_file(fails, monkeypatch, existing):
    def interrupted(writer, *arguments, **options):
        writer._fh.write(b"half")
        raise KeyboardInterrupt

    os.mkdir("out")
    if existing:
        write_image("out/good.tif", squares(0))
    monkeypatch.setattr(tifffile.TiffWriter, "write", interrupted)
    arguments = ["good.tif", "-m", "m.safetensors", "-o", "out", "--overwrite"]
    said = fails(130, "segment", *arguments)
    assert said == "Stopped by Ctrl-C. The files written so far are complete."


def test_a_full_disk_stops_the_run_and_keeps_what_is_done(capsys, monkeypatch):
    for name in "abc":
        write_image(f"in/{name}.tif", squares(2))
    original = results.write_labels
    calls = []

    def full(path, *arguments, **options):
        calls.append(path)
        if len(calls) == 2:
            raise BadOutput(f"Cannot write {path}: the disk is full.")
        return original(path, *arguments, **options)

    monkeypatch.setattr(results, "write_labels", full)
    result = call(capsys, "segment", "in", "-m", "m.safetensors", "-o", "out")
    assert result.code == 4
    assert result.err == "Error: Cannot write out/b.tif: the disk is full.\n"
    assert result.out.startswith("in/a.tif -> out/a.tif: 2 objects, ")
    assert os.listdir("out") == ["a.tif"]


def test_a_result_that_appears_during_the_run_is_kept(capsys, monkeypatch):
    original = results.write_labels

    def late(path, *arguments, **options):
        write_bytes(path)
        original(path, *arguments, **options)

    os.mkdir("out")
    monkeypatch.setattr(results, "write_labels", late)
    result = call(capsys, "segment", "good.tif", "-m", "m.safetensors", "-o", "out")
    assert result.code == 4
    assert result.err.startswith("Error: out/good.tif exists already; use --overwrite")
    with open("out/good.tif", "rb") as file:
        assert file.read() == b"no image at all"


def test_overwrite_replaces_results_only(capsys):
    write_image("out/good.tif", squares(0))
    before = hashes(".")
    result = call(
        capsys,
        *("segment", "good.tif", "-m", "m.safetensors", "-o", "out", "--overwrite"),
    )
    assert result.code == 0
    after = hashes(".")
    assert {name for name in after if after[name] != before.get(name)} == {
        "out/good.tif"
    }
    assert tifffile.imread("out/good.tif").max() == 2


def test_memory_that_runs_out(fails, monkeypatch):
    def too_much(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(batch_file, "segment_into_steps", too_much)
    said = fails(5, "segment", "good.tif", "-m", "m.safetensors", "-o", "out")
    assert said.startswith("Memory ran out.")


def test_a_bug_shows_where_it_is(capsys, monkeypatch):
    def bug(*arguments, **options):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(batch_file, "segment_into_steps", bug)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        call(capsys, "segment", "good.tif", "-m", "m.safetensors", "-o", "out")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("", "Usage"),
        ("no-such-command", "No such command"),
        ("segment", "Missing"),
        ("segment good.tif", "Missing option"),
        ("segment good.tif -m m", "Missing option"),
        ("segment good.tif -m m -o o --no-such-option", "No such option"),
        ("segment good.tif -m m -o o --precision half", "--precision"),
        ("segment good.tif -m m -o o --threshold 2", "--threshold"),
        ("segment good.tif -m m -o o --tile 0", "--tile"),
        ("segment good.tif -m m -o o --minimal-size -1", "--minimal-size"),
        ("segment good.tif -m m -o o --channel -1", "--channel"),
        ("segment good.tif -m m -o o --pixel-size 0", "--pixel-size"),
        ("segment good.tif -m m -o o --pixel-size nan", "--pixel-size"),
        ("segment good.tif -m m -o o --pixel-size 1,2,3,4", "--pixel-size"),
        ("segment good.tif -m m -o o --pixel-size big", "--pixel-size"),
        ("evaluate one", "Missing argument"),
        ("models", "Usage"),
        ("models no-such-command", "No such command"),
        ("models info", "Missing argument"),
    ],
)
def test_usage_errors_end_with_1_and_the_usage(capsys, arguments, sentence):
    result = call(capsys, *arguments.split())
    assert result.code == 1
    assert "Usage: napari-unet" in result.err + result.out
    assert sentence in result.err + result.out


def test_the_program_says_one_line_and_its_code(place):
    for arguments, code in (
        (["good.tif", "-m", "none.pt", "-o", "out"], 2),
        (["none.tif", "-m", "m.safetensors", "-o", "out"], 1),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "napari_unet", "segment", *arguments],
            capture_output=True,
            text=True,
        )
        assert done.returncode == code
        assert done.stdout == ""
        assert done.stderr.startswith("Error: ")
        assert done.stderr.count("\n") == 1


# --- evaluate ----------------------------------------------------------------------


def labels(path, shape=(8, 8)):
    write_image(path, np.ones(shape, np.uint16), "ZYX"[-len(shape) :])


def colours(path):
    tifffile.imwrite(path, np.ones((8, 8, 3), np.uint8), photometric="rgb")


def fractions(path):
    tifffile.imwrite(path, np.ones((8, 8), np.float32))


@pytest.mark.parametrize(
    ("predicted", "true", "sentence"),
    [
        (
            "a",
            "abcde",
            "predicted has no counterpart of true/b.tif, true/c.tif, true/d.tif and 1 "
            "more; the names must be the same up to the suffix.",
        ),
        ("ab", "a", "true has no counterpart of predicted/b.tif; the"),
        ("a", "", "There are no label images in true."),
        ("", "a", "There are no label images in predicted."),
    ],
)
def test_labels_without_counterpart(fails, predicted, true, sentence):
    for folder, names in (("predicted", predicted), ("true", true)):
        os.mkdir(folder)
        for name in names:
            labels(f"{folder}/{name}.tif")
    assert fails(1, "evaluate", "predicted", "true").startswith(sentence)


def test_two_labels_of_one_name(fails):
    labels("predicted/a.tif")
    labels("true/a.tif")
    labels("true/a.tiff")
    said = fails(1, "evaluate", "predicted", "true")
    assert said.startswith("a.tif and a.tiff in true have the same name up to the")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: labels(path, (8, 9)), "a: The true labels have the shape (8, 8)"),
        (lambda path: labels(path, (2, 8, 8)), "a: The true labels have the shape"),
        (colours, "a.tif is a colour image; label images have one whole number"),
        (fractions, "a: The predicted labels are of type float32"),
        (write_bytes, "a.tif is not a readable image"),
        (truncated, "a.tif"),
    ],
)
def test_labels_that_cannot_be_compared(fails, make, sentence):
    labels("true/a.tif")
    os.mkdir("predicted")
    make("predicted/a.tif")
    assert fails(1, "evaluate", "predicted", "true", "--json").startswith(sentence)


def test_folders_that_do_not_exist(fails):
    labels("true/a.tif")
    assert (
        fails(1, "evaluate", "none", "true") == "none does not exist; check the name."
    )
