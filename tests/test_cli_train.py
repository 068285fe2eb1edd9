"""The command ``train``: from folders of images and labels to a model that segments."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tifffile
from cli_cases import call, hashes, squares, threshold_model, write_image

from napari_unet import Annotation, TrainingSettings, load_model, save_model
from napari_unet.cli import train as cli_train
from napari_unet.models.checkpoint import model_sha256
from napari_unet.models.model import Model
from napari_unet.network.unet import UNet
from napari_unet.training.project import load_project, save_project

pytestmark = pytest.mark.usefixtures("own_library")


@pytest.fixture
def run(capsys):
    return lambda *arguments: call(capsys, *arguments)


@pytest.fixture
def folder(tmp_path):
    """Two images with their labels, and a tiny model."""
    for number in (3, 4):
        image = squares(number, (48, 64))
        noise = np.random.default_rng(number).integers(0, 200, image.shape)
        labels = image // 1000 * (1 + np.arange(64) // 12)
        write_image(tmp_path / "images" / f"{number}.tif", (image + noise).astype("u2"))
        write_image(tmp_path / "labels" / f"{number}.tif", labels.astype("u2"))
    network = UNet(1, 2, depth=1, base_channels=4)
    save_model(Model(network), tmp_path / "base.safetensors")
    return tmp_path


SHORT = TrainingSettings(
    steps=30,
    batch_size=2,
    patch_shape=(32, 32),
    validate_every=10,
    border_weights=None,
    device="cpu",
)


@pytest.fixture
def project(folder):
    """The same two images in a project that starts from the tiny model."""
    annotations = [
        Annotation(
            tifffile.imread(folder / "images" / f"{number}.tif"),
            tifffile.imread(folder / "labels" / f"{number}.tif"),
            name=f"{number}.tif",
        )
        for number in (3, 4)
    ]
    base = str(folder / "base.safetensors")
    return save_project(folder / "cells.project", annotations, SHORT, base=base)


def arguments(folder, *more):
    return [
        *["train", folder / "images", folder / "labels", "-o", folder / "mine"],
        *["--device", "cpu", *more],
    ]


def program(command):
    return [sys.executable, "-m", "napari_unet", *map(str, command)]


def test_train_and_segment_with_the_result(folder):
    base = hashes(folder)
    options = ["-m", folder / "base.safetensors", "--steps", "30"]

    train = subprocess.run(
        program(arguments(folder, *options)),
        capture_output=True,
        text=True,
        check=False,
    )

    assert train.returncode == 0, train.stderr
    mine = folder / "mine.safetensors"
    assert train.stdout.startswith(f"{mine}: on the held-out part loss ")
    assert "before: loss " in train.stderr
    assert "step 30: loss " in train.stderr
    after = hashes(folder)
    assert after.keys() - base.keys() == {"mine.safetensors"}
    assert all(after[name] == base[name] for name in base)
    model = load_model(mine)
    assert model.passport.name == "mine"
    assert model.passport.history[-1].data == "2 annotated images: 3.tif, 4.tif"
    assert model.passport.history[-1].settings["steps"] == 30
    segment = subprocess.run(
        program(["segment", folder / "images", "-m", mine, "-o", folder / "out"]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert segment.returncode == 0, segment.stderr
    assert tifffile.imread(folder / "out" / "3.tif").shape == (48, 64)


@pytest.mark.usefixtures("small_new_models")
def test_a_new_model_with_classes_from_scribbles(run, folder):
    for path in (folder / "labels").iterdir():
        labels = tifffile.imread(path)
        painted = np.where(labels > 2, 3, np.where(labels > 0, 2, 1))
        painted[:, ::3] = 0
        tifffile.imwrite(path, painted.astype("u1"))

    result = run(
        *arguments(folder, "--new", "--steps", 2, "--unpainted", "unknown"),
        *["--labels-are", "classes", "--quiet", "--seed", 3],
    )

    assert result == (0, "", "")
    model = load_model(folder / "mine.safetensors")
    assert model.network.config.num_classes == 3
    assert model.passport.history[-1].settings["seed"] == 3


def test_a_killed_training_is_resumed(folder):
    options = ["-m", folder / "base.safetensors", "--steps", "100000"]
    process = subprocess.Popen(program(arguments(folder, *options)), text=True)
    snapshot = folder / "mine.snapshot"
    deadline = time.monotonic() + 60
    while not snapshot.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not (folder / "mine.safetensors").exists()
    again = subprocess.run(
        program(arguments(folder, *options)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 4
    assert "go on with --resume, or start anew with --overwrite" in again.stderr
    other = ["-m", folder / "base.safetensors", "--steps", "60", "--resume"]
    refused = subprocess.run(
        program(arguments(folder, *other)), capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1
    assert "other settings (steps)" in refused.stderr
    resumed = subprocess.Popen(
        program(arguments(folder, *options, "--resume")),
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = [resumed.stderr.readline() for _ in range(2)]
    assert lines[0].startswith("before: ")
    assert lines[1].startswith("step 50: ")
    if os.name == "posix":
        resumed.send_signal(signal.SIGINT)
        _, rest = resumed.communicate(timeout=60)
        assert resumed.returncode == 130
        assert "Ctrl-C. The same command with --resume goes on." in rest
        assert snapshot.exists()
        assert not [name for name in os.listdir(folder) if name.endswith(".part")]
    resumed.kill()
    resumed.wait()


@pytest.mark.usefixtures("small_new_models")
@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        ([], 1, "Give either a model to start from with -m, or --new."),
        (["-m", "base.safetensors", "--new"], 1, "Give either a model"),
        (["-m", "base.safetensors", "--ndim", "3"], 1, "--ndim is for a new model"),
        (["-m", "nothing"], 2, "There is no model 'nothing' in the library"),
        (["-m", "base.safetensors", "--device", "abacus"], 1, "no device 'abacus'"),
        (["--new", "--unpainted", "unknown"], 0, ""),
    ],
)
def test_wrong_options(run, folder, monkeypatch, more, code, words):
    monkeypatch.chdir(folder)
    result = run(*arguments(folder, "--steps", 1, *more))
    assert result.code == code
    assert words in result.err
    assert (folder / "mine.safetensors").exists() == (code == 0)


def test_nothing_is_overwritten_without_being_told(run, folder):
    base = folder / "base.safetensors"
    mine = folder / "mine.safetensors"
    mine.write_bytes(b"precious")
    result = run(*arguments(folder, "-m", base, "--steps", 1))
    assert result.code == 4
    assert "exists already; use --overwrite" in result.err
    assert mine.read_bytes() == b"precious"
    content = base.read_bytes()
    result = run(*arguments(folder, "-m", base, "-o", base, "--overwrite"))
    assert result.code == 4
    assert "never overwritten" in result.err
    assert base.read_bytes() == content
    result = run(*arguments(folder, "-m", base, "--steps", 1, "--overwrite"))
    assert result.code == 0
    assert load_model(mine).passport.name == "mine"


@pytest.mark.parametrize("saves", [False, True])
def test_ctrl_c_promises_only_what_this_training_has_saved(
    run, folder, monkeypatch, saves
):
    snapshot = folder / "mine.snapshot"

    def interrupted(steps, *_, **__):
        next(steps)
        if saves:
            snapshot.write_bytes(b"of this one")
        raise KeyboardInterrupt

    snapshot.write_bytes(b"of another one")
    monkeypatch.setattr(cli_train, "_follow", interrupted)
    base = folder / "base.safetensors"
    result = run(*arguments(folder, "-m", base, "--overwrite"))
    assert result.code == 130
    assert ("with --resume goes on" in result.err) == saves


def test_what_cannot_be_used_is_said_in_words(run, folder):
    model = threshold_model(folder / "threshold.safetensors")
    label = folder / "labels" / "3.tif"
    painted = tifffile.imread(label)
    tifffile.imwrite(label, painted[:40])
    result = run(*arguments(folder, "-m", model))
    assert result.code == 1
    assert "3.tif: The sizes differ: the labels are 40 x 64" in result.err
    label.unlink()
    result = run(*arguments(folder, "-m", model))
    assert result.code == 1
    assert "no counterpart of" in result.err
    (folder / "images" / "3.tif").unlink()
    (folder / "images" / "4.tif").unlink()
    result = run(*arguments(folder, "-m", model))
    assert "There are no images in" in result.err


def test_a_killed_training_of_a_project_ends_as_if_it_had_not_been(project):
    command = program(["train", project, "-o", project / "mine", "--quiet"])
    output, snapshot = project / "mine.safetensors", project / "training.snapshot"
    subprocess.run(command, check=True)
    whole = load_model(output)
    assert not snapshot.exists()
    output.unlink()
    process = subprocess.Popen(command)
    while not snapshot.exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not output.exists()
    subprocess.run([*command, "--resume"], check=True)
    assert not snapshot.exists()
    resumed = load_model(output)
    assert model_sha256(resumed) == model_sha256(whole)  # weights and passport
    assert resumed.passport.history[-1].settings["steps"] == 30


@pytest.mark.usefixtures("small_new_models")
def test_options_override_what_a_project_says(run, project):
    options = ["--steps", 2, "--seed", 5, "--border-weights", "falk"]
    options += ["--new", "--labels-are", "classes", "--quiet"]
    result = run("train", project, "-o", project / "new", *options)
    assert result == (0, "", "")
    model = load_model(project / "new.safetensors")
    assert model.network.config.num_classes == 5  # the labels are classes now
    record = model.passport.history[-1]
    expected = SHORT.model_dump(mode="json") | {"steps": 2, "seed": 5}
    expected["border_weights"] = {"preset": "falk", "w0": 50.0, "sigma": 6.0}
    for key in expected.keys() - {"patch_shape", "batch_size"}:
        assert record.settings[key] == expected[key]
    assert load_project(project).settings == SHORT


@pytest.mark.usefixtures("small_new_models")
def test_a_new_model_of_volumes(run, folder):
    for kind in ("images", "labels"):
        plane = tifffile.imread(folder / kind / "3.tif")
        for path in (folder / kind).iterdir():
            path.unlink()
        volume = np.stack([plane] * 6)
        write_image(folder / kind / "a.tif", volume, "ZYX", spacing=1.0)
    options = ["--new", "--ndim", 3, "--steps", 1, "--border-weights", "none"]
    assert run(*arguments(folder, *options)).code == 0
    model = load_model(folder / "mine.safetensors")
    assert model.ndim == 3
    assert model.passport.pixel_size == (1.0, 0.5, 0.5)
    assert model.passport.history[-1].settings["border_weights"] is None


def test_wrong_projects(run, project, folder):
    result = run("train", folder / "images", "-o", folder / "mine")
    assert result.code == 1
    assert "is no annotation project. Give the folder of the images and" in result.err
    base = folder / "base.safetensors"
    result = run("train", project, "-o", base, "--overwrite")
    assert result.code == 4
    assert "never overwritten" in result.err
    (project / "training.snapshot").write_bytes(b"")
    result = run("train", project, "-o", folder / "mine")
    assert result.code == 4
    assert "training.snapshot holds a training that was stopped" in result.err
    result = run("train", project, "-o", folder / "mine", "--resume")
    assert result.code == 1
    assert "training.snapshot is damaged" in result.err
    next((project / "labels").iterdir()).unlink()
    result = run("train", project, "-o", folder / "mine", "--overwrite")
    assert result.code == 1
    assert "is missing" in result.err
    assert not (folder / "mine.safetensors").exists()


def test_help(run):
    result = run("train", "--help")
    assert result.code == 0
    assert "--resume" in result.out
    assert "Example: napari-unet train" in result.out


ENDLESS = """
import ctypes, signal, sys
from torch.nn.modules.module import register_module_forward_pre_hook
from napari_unet.cli import main
from napari_unet.network.unet import UNet

def compute(module, inputs):
    if isinstance(module, UNet) and module.training:
        # As a library that computes: Python goes on when it has come to its end.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        print("computing", file=sys.stderr, flush=True)
        ctypes.CDLL(None).sleep(60)

register_module_forward_pre_hook(compute)
sys.exit(main())
"""


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_ends_a_long_step_at_once(folder):
    """Python itself would wait for the end of what a library computes."""
    options = arguments(folder, "-m", folder / "base.safetensors", "--steps", "5")
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, *map(str, options)],
        stderr=subprocess.PIPE,
        text=True,
    )
    while (line := process.stderr.readline()) and line != "computing\n":
        pass
    time.sleep(0.2)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert time.monotonic() - start < 4
    assert process.returncode == 130
    assert rest == "Error: Stopped by Ctrl-C. The files written so far are complete.\n"
    assert not [name for name in os.listdir(folder) if "mine" in name]
