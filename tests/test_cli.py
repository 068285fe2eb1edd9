"""The command line does its work: segment, evaluate, models, help, signals."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from importlib.metadata import entry_points, version
from pathlib import Path

import numpy as np
import pytest
import tifffile
from cli_cases import call, hashes, squares, threshold_model, write_image

from napari_unet.cli.progress import Console
from napari_unet.files.images import read_image
from napari_unet.models.checkpoint import save_model
from napari_unet.models.library import BUNDLED
from napari_unet.models.model import Model
from napari_unet.network.unet import UNet
from napari_unet.sample import sample_dir
from napari_unet.steps import Progress

pytestmark = pytest.mark.usefixtures("own_library")

COMMANDS = ["", "segment", "evaluate", "models", "models list", "models info"]


@pytest.fixture
def model(own_library):
    own_library.mkdir(parents=True)
    return threshold_model(own_library / "threshold.safetensors")


@pytest.fixture
def run(capsys):
    return lambda *arguments: call(capsys, *arguments)


# --- segment ---------------------------------------------------------------------


def test_segment_one_image_into_a_file(run, model, tmp_path):
    image = write_image(tmp_path / "cells.tif", squares(3), pixel_size=0.25)
    out = tmp_path / "labels.tif"

    result = run("segment", image, "-m", "threshold", "-o", out)

    assert result.code == 0
    assert result.out.startswith(f"{image} -> {out}: 3 objects, ")
    assert result.out.endswith(" s\n")
    assert result.err == ""
    labels = tifffile.imread(out)
    assert labels.dtype == np.uint16
    np.testing.assert_array_equal(labels > 0, squares(3) > 0)
    assert labels.max() == 3
    assert read_image(out).pixel_size == {"Y": 0.25, "X": 0.25}
    assert read_image(out).axes == "YX"


def test_segment_a_stack_keeps_axes_and_pixel_size(run, model, tmp_path):
    stack = np.stack([squares(2), squares(1), squares(0)])
    image = write_image(tmp_path / "stack.tif", stack, "ZYX", 0.5, spacing=2.0)
    out = tmp_path / "labels.tif"

    result = run("segment", image, "-m", model, "-o", out)

    assert result.code == 0
    assert ": 3 objects in 3 planes, " in result.out
    with tifffile.TiffFile(out) as tiff:
        assert tiff.series[0].axes == "ZYX"
        assert tiff.series[0].shape == (3, 40, 60)
    read = read_image(out)
    assert read.pixel_size == pytest.approx({"Z": 2.0, "Y": 0.5, "X": 0.5})
    np.testing.assert_array_equal(read.data > 0, stack > 0)


def test_segment_folders_and_files_into_a_folder(run, model, tmp_path):
    folder = tmp_path / "in"
    for name, count in (("a10", 1), ("a2", 2)):
        write_image(folder / f"{name}.tif", squares(count))
    other = write_image(tmp_path / "b.ome.tif", squares(3))
    before = hashes(folder)
    out = tmp_path / "deep" / "out"

    result = run("segment", folder, other, folder / "a2.tif", "-m", model, "-o", out)

    assert result.code == 0
    lines = result.out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        f"{folder / 'a2.tif'} -> {out / 'a2.tif'}",
        f"{folder / 'a10.tif'} -> {out / 'a10.tif'}",
        f"{other} -> {out / 'b.tif'}",
    ]
    assert [tifffile.imread(out / f"{n}.tif").max() for n in ("a2", "a10", "b")] == [
        2,
        1,
        3,
    ]
    assert sorted(p.name for p in out.iterdir()) == ["a10.tif", "a2.tif", "b.tif"]
    assert hashes(folder) == before


@pytest.mark.parametrize("classes", [1, 2])
def test_probabilities_come_from_the_same_pass(run, tmp_path, monkeypatch, classes):
    from napari_unet.inference.backends import Backend

    passes = []
    original = Backend.run

    def counted(self, image, keep, **options):
        passes.append(image.shape)
        return original(self, image, keep, **options)

    monkeypatch.setattr(Backend, "run", counted)
    model = threshold_model(tmp_path / "m.safetensors", num_classes=classes)
    stack = np.stack([squares(1), squares(2)])
    image = write_image(tmp_path / "t.tif", stack, "TYX")
    out = tmp_path / "out"

    result = run("segment", image, "-m", model, "-o", out, "--probabilities")

    assert result.code == 0
    assert len(passes) == 2  # one a plane
    probabilities = read_image(out / "t_probabilities.tif")
    assert probabilities.axes == ("TCYX" if classes == 2 else "TYX")
    assert probabilities.data.dtype == np.float32
    found = probabilities.data[:, 1] if classes == 2 else probabilities.data
    np.testing.assert_array_equal(found > 0.5, stack > 0)
    assert tifffile.imread(out / "t.tif").max() == 3


def test_options_reach_the_engine(run, model, tmp_path):
    image = squares(3)
    image[20:23, 20:23] = 700  # small, and sure only to 0.98
    stack = np.stack([np.zeros_like(image), image])
    path = write_image(tmp_path / "two.tif", stack, "CYX")

    def objects(*options):
        out = tmp_path / "out.tif"
        result = run("segment", path, "-m", model, "-o", out, "--overwrite", *options)
        assert result.code == 0, result.err
        return int(tifffile.imread(out).max())

    assert objects("--channel", 0) == 0
    assert objects("--channel", 1) == 4
    assert objects("--channel", 1, "--threshold", 0.99) == 3
    assert objects("--channel", 1, "--minimal-size", 10) == 3
    assert objects("--channel", 1, "--split-touching", "--tile", 16) == 4
    everything = ["--test-time-augmentation", "--precision", "float32"]
    assert objects("--channel", 1, "--device", "cpu", *everything) == 4


def test_axes_and_pixel_size_can_be_said(run, tmp_path):
    model = threshold_model(tmp_path / "m.safetensors", pixel_size=(1.0, 1.0))
    image = tmp_path / "plain.tif"
    tifffile.imwrite(
        image, np.stack([squares(2), squares(1)]), photometric="minisblack"
    )
    out = tmp_path / "out.tif"

    result = run(
        *("segment", image, "-m", model, "-o", out),
        *("--axes", "TYX", "--pixel-size", "0.5"),
    )

    assert result.code == 0
    assert result.err == (
        "Note: Your pixels are 0.5 µm, the model was trained at 1 µm: rescaling by "
        "0.50.\n"
    )
    labels = read_image(out)
    assert labels.axes == "TYX"
    assert labels.pixel_size == {"Y": 0.5, "X": 0.5}
    assert labels.data.shape == (2, 40, 60)
    assert labels.data.max() == 3


def test_pixel_size_in_three_numbers(run, tmp_path):
    model = threshold_model(tmp_path / "m.safetensors", ndim=3)
    image = write_image(tmp_path / "z.tif", np.stack([squares(1)] * 8), "ZYX")
    out = tmp_path / "out.tif"
    run("segment", image, "-m", model, "-o", out, "--pixel-size", "3,.2,.1")
    labels = read_image(out)
    assert labels.pixel_size == pytest.approx({"Z": 3, "Y": 0.2, "X": 0.1})
    assert labels.data.max() == 1  # one object through all planes


def test_regions_are_told_as_a_share(run, tmp_path):
    model = threshold_model(tmp_path / "m.safetensors", kind="region")
    image = np.zeros((40, 60), np.uint16)
    image[:20] = 1000
    path = write_image(tmp_path / "a.tif", image)
    result = run("segment", path, "-m", model, "-o", tmp_path / "out.tif")
    assert ": 50.0% cell, " in result.out


def test_notes_are_told_once_and_quiet_tells_nothing(run, model, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in "ab":
        colours = np.stack([squares(1)] * 3, axis=-1)
        tifffile.imwrite(folder / f"{name}.tif", colours, photometric="rgb")
    arguments = ["segment", folder, "-m", model, "-o", tmp_path / "out"]

    result = run(*arguments)
    assert result.code == 0
    assert result.err == (
        "Note: The colour image is converted to gray for this model.\n"
    )
    result = run(*arguments, "--overwrite", "--quiet")
    assert result == (0, "", "")


def test_progress_is_determinate_and_heartbeats_do_not_advance(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    from tqdm import tqdm

    monkeypatch.setattr(tqdm, "monitor_interval", 0)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)

    def steps():
        yield Progress(0, 4)
        yield Progress(1, 4, note="Something.")
        yield Progress(1, 4)
        yield Progress(2, 8)
        return "found"

    assert Console(quiet=False).follow(steps(), "cells.tif") == "found"
    counts = re.findall(r"(\d+/\d+) ", terminal.getvalue())
    assert list(dict.fromkeys(counts)) == ["0/4", "1/4", "2/8"]
    assert "Note: Something.\n" in terminal.getvalue()


def test_the_same_run_writes_the_same_bytes(run, model, tmp_path):
    image = write_image(tmp_path / "a.tif", squares(2))
    for name in ("one", "two"):
        out = tmp_path / name
        run("segment", image, "-m", model, "-o", out, "--probabilities")
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


# --- evaluate --------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    """One image with known scores, one that is perfect."""
    true = np.zeros((10, 10), np.uint16)
    true[0:4, 0:4] = 1  # found: 12 of 16 pixels
    true[8:10, 8:10] = 2  # missed
    predicted = np.zeros((10, 10), np.uint16)
    predicted[0:3, 0:4] = 7
    predicted[0:2, 8:10] = 9  # invented
    perfect = np.stack([true, true])
    write_image(tmp_path / "predicted" / "a.tif", predicted)
    write_image(tmp_path / "predicted" / "B.ome.tif", perfect, "TYX")
    probabilities = np.zeros((10, 10), np.float32)
    write_image(tmp_path / "predicted" / "a_probabilities.tif", probabilities)
    write_image(tmp_path / "true" / "b.tiff", perfect[:, None], "ZCYX")
    from PIL import Image

    Image.fromarray(true).save(tmp_path / "true" / "a.png")
    return tmp_path / "predicted", tmp_path / "true"


def test_evaluate_scores_as_computed_by_hand(run, folders):
    result = run("evaluate", *folders, "--json")

    assert result.code == 0
    scores = json.loads(result.out)
    assert scores["n_images"] == 2
    by_name = {image["name"]: image for image in scores["images"]}
    assert set(by_name) == {"a", "b"}
    half = by_name["a"]["thresholds"][0]
    assert (half["tp"], half["fp"], half["fn"]) == (1, 1, 1)
    assert half["average_precision"] == pytest.approx(1 / 3)
    assert half["f1"] == pytest.approx(1 / 2)
    assert half["mean_matched_iou"] == pytest.approx(12 / 16)
    # 0.5, 0.55 ... 0.75 are reached: 6 of 10.
    assert by_name["a"]["mean_average_precision"] == pytest.approx(6 / 10 / 3)
    assert by_name["a"]["foreground_iou"] == pytest.approx(12 / (20 + 16 - 12))
    assert by_name["a"]["foreground_dice"] == pytest.approx(24 / (20 + 16))
    assert by_name["b"]["mean_average_precision"] == 1
    # b has the two objects 1 and 2, both in each of its two planes.
    assert scores["thresholds"][0]["tp"] == 3
    assert scores["thresholds"][0]["average_precision"] == pytest.approx(3 / 5)
    assert scores["foreground_iou"] == pytest.approx((12 + 40) / (24 + 40))


def test_evaluate_prints_a_table(run, folders):
    short = run("evaluate", *folders)
    assert short.code == 0
    assert "Images: 2   true objects: 4   predicted objects: 4" in short.out
    assert "0.50  0.600" in short.out
    assert not any(line.startswith("b ") for line in short.out.splitlines())
    long = run("evaluate", *folders, "--per-image")
    assert any(line.startswith("b ") for line in long.out.splitlines())


def test_evaluate_two_files_of_any_name(run, folders):
    predicted, true = folders
    result = run("evaluate", predicted / "a.tif", true / "a.png", "--json")
    assert result.code == 0
    assert json.loads(result.out)["thresholds"][0]["tp"] == 1


def test_evaluate_tells_what_it_leaves_out_beside_the_json(run, tmp_path):
    for name in ("predicted", "true"):
        (tmp_path / name).mkdir()
        with tifffile.TiffWriter(tmp_path / name / "a.tif") as writer:
            writer.write(squares(1), photometric="minisblack")
            writer.write(squares(1, (20, 20)), photometric="minisblack")
    result = run("evaluate", tmp_path / "predicted", tmp_path / "true", "--json")
    assert json.loads(result.out)["n_true"] == 1
    assert result.err.startswith("Note: a.tif: The file holds 2 images; only the")


# --- models, help, version ---------------------------------------------------------


def test_models_are_listed_and_described(run, model):
    library = model.parent
    (library / "broken.safetensors").write_bytes(b"nothing")
    threshold_model(library / "volumes.safetensors", (2.0, 0.5, 0.5), ndim=3)

    listed = run("models", "list")
    assert listed.code == 0
    lines = {
        line.split()[0]: line.split(maxsplit=2)[1:] for line in listed.out.splitlines()
    }
    assert lines["threshold"] == ["yours", "2D  cell (objects)"]
    assert lines["volumes"] == ["yours", "3D  cell (objects)  2 x 0.5 x 0.5 µm"]
    assert lines["broken"][1].startswith("cannot be used: broken.safetensors is not")

    told = run("models", "info", "threshold")
    assert told.code == 0
    assert "Finds           cell (objects)" in told.out
    assert "Channels        dye 1" in told.out
    assert "2D U-Net" in told.out
    assert run("models", "info", library / "volumes.safetensors").code == 0


def test_an_empty_library_says_where_it_is(run, own_library, monkeypatch, tmp_path):
    monkeypatch.setattr("napari_unet.models.library.BUNDLED", tmp_path / "none")
    result = run("models", "list")
    where = f"There are no models; your own would be in {own_library}.\n"
    assert result == (0, where, "")


def test_version(run):
    assert run("--version") == (0, f"napari-unet {version('napari-unet')}\n", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_quick_and_has_an_example(command):
    code = f"""if True:
        import sys
        from napari_unet.cli import main
        code = main({[*command.split(), "--help"]!r})
        slow = {{"torch", "napari", "qtpy", "PyQt6", "numpy"}} & set(sys.modules)
        assert code == 0 and not slow, (code, slow)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage: napari-unet" in done.stdout
    assert "Example: napari-unet" in done.stdout


# --- the real program --------------------------------------------------------------


def program(*arguments, **options):
    """Start the program as a user does."""
    return subprocess.Popen(
        [sys.executable, "-m", "napari_unet", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def test_console_script_is_main():
    (script,) = entry_points(group="console_scripts", name="napari-unet")
    assert script.value == "napari_unet.cli:main"
    installed = Path(sys.executable).with_name("napari-unet")
    done = subprocess.run([installed, "--version"], capture_output=True, text=True)
    assert done.stdout == f"napari-unet {version('napari-unet')}\n"
    done = subprocess.run([installed, "segment"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""


def test_program_segments_a_file_whose_name_is_not_text(model, tmp_path):
    folder = tmp_path / "in"
    write_image(folder / "a.tif", squares(2)).rename(
        Path(str(folder / "z\udcffürich 🔬.tif"))
    )
    out = tmp_path / "out"
    process = program("segment", folder, "-m", model, "-o", out)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, b"")
    assert b": 2 objects, " in stdout
    assert [p.name for p in out.iterdir()] == ["z\udcffürich 🔬.tif"]


@pytest.fixture
def endless(tmp_path):
    """Two images, of which a large network finishes the first one only."""
    network = UNet(1, 2, depth=4, base_channels=48)
    save_model(Model(network), tmp_path / "large.safetensors")
    write_image(tmp_path / "in" / "1.tif", squares(3, (32, 32)))
    write_image(tmp_path / "in" / "2.tif", squares(3, (6000, 6000)))
    arguments = [tmp_path / "in", "-m", tmp_path / "large.safetensors"]
    process = program(
        *("segment", *arguments, "-o", tmp_path / "out", "--device", "cpu"),
        "--probabilities",
    )
    assert b"1.tif" in process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


def test_ctrl_c_ends_with_130_and_nothing_half_written(endless, tmp_path):
    before = hashes(tmp_path / "in")
    endless.send_signal(signal.SIGINT)
    _, stderr = endless.communicate(timeout=30)
    assert endless.returncode == 130
    assert stderr == (
        b"Error: Stopped by Ctrl-C. The files written so far are complete.\n"
    )
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "1.tif",
        "1_probabilities.tif",
    ]
    assert tifffile.imread(tmp_path / "out" / "1.tif").shape == (32, 32)
    assert hashes(tmp_path / "in") == before


def test_a_killed_run_leaves_only_complete_files(endless, model, tmp_path, run):
    endless.kill()
    endless.communicate()
    out = tmp_path / "out"
    finished = hashes(out)
    assert set(finished) == {"1.tif", "1_probabilities.tif"}
    assert tifffile.imread(out / "1.tif").shape == (32, 32)
    # What a process killed while writing leaves behind goes with the next run.
    from napari_unet.files.atomic import _part_path

    part = _part_path(out / "2.tif")
    dead = str(part).replace(f"-{os.getpid()}.", f"-{endless.pid}.")
    Path(dead).write_bytes(b"half")
    image = write_image(tmp_path / "other.tif", squares(1))
    assert run("segment", image, "-m", model, "-o", out).code == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "1.tif",
        "1_probabilities.tif",
        "other.tif",
    ]


# --- the bundled model -------------------------------------------------------------


def test_the_bundled_model_segments_the_sample(run, tmp_path):
    assert (BUNDLED / "nuclei.safetensors").is_file()
    out = tmp_path / "predicted.tif"
    result = run("segment", sample_dir() / "nuclei.tif", "-m", "nuclei", "-o", out)
    assert result.code == 0, result.err
    result = run("evaluate", out, sample_dir() / "nuclei_labels.tif", "--json")
    assert json.loads(result.out)["thresholds"][0]["average_precision"] >= 0.7
