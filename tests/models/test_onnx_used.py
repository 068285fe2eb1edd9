"""ONNX networks where models are used: tiles, memory, cancelling, training."""

import threading
import time

import numpy as np
import psutil
import pytest
import tifffile
import torch
from cli_cases import call, write_image
from onnx_files import unet_file
from ticks import notes_of

from napari_unet.errors import BadInput, BadModel, OutOfMemory
from napari_unet.inference import engine
from napari_unet.inference.backends import Device
from napari_unet.inference.predict import predict, predict_steps
from napari_unet.inference.segment import segment
from napari_unet.models.model import Model
from napari_unet.models.onnx import import_onnx
from napari_unet.network import onnx as onnx_network
from napari_unet.network.unet import UNet
from napari_unet.training.annotations import Annotation
from napari_unet.training.fine_tune import fine_tune
from napari_unet.training.settings import TrainingSettings


@pytest.fixture
def network(trained):
    return trained(depth=2, base_channels=4).network


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).normal(size=(150, 170)).astype(np.float32)


def imported(network, sides=(None, None), **options) -> Model:
    return import_onnx(unet_file(network, sides, **options), "cells")


def test_tiles_agree_with_our_own_network(network, image):
    """Its halo is enough, so that blending changes nothing."""
    expected = predict(image, Model(network), device="cpu", precision="float32")
    model = imported(network)
    for tile in (None, (40, 64)):
        notes, found = notes_of(predict_steps(image, model, tile_shape=tile))
        np.testing.assert_allclose(found, expected, atol=1e-4)
        blended = "The tiles are blended, so that the result depends a little"
        assert [note.startswith(blended) for note in notes] == [True] * (
            tile is not None
        )


@pytest.mark.parametrize("sides", [(128, 128), (96, 160), (512, 512)])
def test_a_network_of_one_shape_takes_any_image(sides, network, image):
    expected = predict(image, Model(network), device="cpu", precision="float32")
    model = imported(network, sides)
    assert model.network.config.fixed_shape == sides
    found = predict(image, model)
    if min(sides) > 170:  # one tile is all
        np.testing.assert_allclose(found, expected, atol=1e-4)
    # What its tiles do not see is a few pixels far away, which hardly count.
    assert np.abs(found - expected).mean() < 1e-3
    np.testing.assert_array_equal(found, predict(image, model, tile_shape=(9, 9)))
    middle = {"Y": slice(60, 90), "X": slice(70, 100)}
    part = predict(image, model, region=middle)
    np.testing.assert_allclose(part, expected[:, 60:90, 70:100], atol=1e-3)
    stack = np.stack([image, image[::-1]])
    found = predict(stack, model)
    np.testing.assert_allclose(found[:, 0], predict(image, model), atol=0.1)


def test_parts_of_an_image_see_what_lies_around(network, image):
    """As pieces of an image that is too large: they fit, but need their context."""
    expected = predict(image, Model(network), device="cpu", precision="float32")
    model = imported(network, (128, 128))
    found = np.zeros_like(expected)
    for rows in (slice(0, 75), slice(75, 150)):
        for columns in (slice(0, 60), slice(60, 170)):
            region = {"Y": rows, "X": columns}
            found[:, rows, columns] = predict(image, model, region=region)
    assert np.abs(found - expected).mean() < 1e-3


def test_turned_tiles_of_one_shape(network, image):
    square = imported(network, (128, 128))
    plain = predict(image, Model(network), device="cpu", test_time_augmentation=True)
    found = predict(image, square, test_time_augmentation=True)
    assert np.abs(found - plain).mean() < 1e-2
    flat = imported(network, (96, 160))
    with pytest.raises(BadInput, match="96 x 160 pixels only"):
        predict(image, flat, test_time_augmentation=True)


def test_volumes(trained):
    network = trained(depth=1, base_channels=3, ndim=3).network
    volume = np.random.default_rng(0).normal(size=(12, 40, 50)).astype(np.float32)
    expected = predict(volume, Model(network), device="cpu", precision="float32")
    found = predict(volume, imported(network, (None,) * 3), tile_shape=(8, 16, 32))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    whole = imported(network, (32, 64, 72))
    np.testing.assert_allclose(predict(volume, whole), expected, atol=1e-4)
    tiles = imported(network, (32, 48, 48))
    assert np.abs(predict(volume, tiles) - expected).mean() < 1e-3


@pytest.mark.parametrize(("last", "classes"), [("Sigmoid", 1), ("Softmax", 3)])
def test_probabilities_stay_as_they_are(last, classes, trained, image):
    network = trained(depth=1, base_channels=3, num_classes=classes).network
    expected = predict(image, imported(network))
    found = predict(image, imported(network, last=last))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_segment(network, image):
    expected = segment(image, Model(network), device="cpu", precision="float32")
    found = segment(image, imported(network))
    assert (found > 0).sum() == pytest.approx((expected > 0).sum(), abs=3)


def test_images_of_other_channels_are_refused(network):
    with pytest.raises(
        BadInput, match="has 3 channels, but the model 'cells' expects 1"
    ):
        predict(np.zeros((3, 40, 40)), imported(network), axes="CYX")


def test_smaller_tiles_when_memory_runs_out(trained, monkeypatch):
    """Onnxruntime itself runs out, because it may take 25 MB only."""
    network = trained(depth=1, base_channels=8).network
    image = np.random.default_rng(0).normal(size=(500, 600)).astype(np.float32)
    expected = predict(image, Model(network), device="cpu", precision="float32")
    model = imported(network)
    share = 25e6 / psutil.virtual_memory().total
    monkeypatch.setattr(onnx_network, "_MEMORY", share)
    notes, found = notes_of(predict_steps(image, model, tile_shape=(512, 512)))
    assert "Memory ran out on cpu; going on with smaller tiles." in notes
    np.testing.assert_allclose(found, expected, atol=1e-4)
    monkeypatch.setattr(onnx_network, "_MEMORY", share / 30)
    other = imported(network, names=("a", "b"))  # no executor is kept for it
    with pytest.raises(OutOfMemory, match="even for the smallest tile"):
        predict(image, other)


def test_a_running_tile_ends_within_a_second():
    torch.manual_seed(0)
    network = UNet(1, 2, depth=2, base_channels=16).eval()
    image = np.zeros((1400, 1400), np.float32)
    steps = predict_steps(image, imported(network), tile_shape=(1400, 1400))
    for _ in range(6):
        next(steps)
    running = [t for t in threading.enumerate() if t.name.startswith("napari-unet")]
    assert running
    start = time.perf_counter()
    steps.close()
    assert time.perf_counter() - start < 0.2
    for thread in running:
        thread.join(timeout=10)
        assert not thread.is_alive()
    assert time.perf_counter() - start < 1


def test_it_runs_again_after_it_was_stopped(network, image):
    model = imported(network)
    steps = predict_steps(image, model, tile_shape=(32, 32))
    next(steps)
    steps.close()
    assert predict(image, model).shape == (2, 150, 170)


def test_a_gpu_that_onnxruntime_does_not_have(network, image, monkeypatch):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has the GPU")
    monkeypatch.setattr(engine, "choose_device", lambda wanted: Device("cuda"))
    notes, found = notes_of(predict_steps(image, imported(network), device="cuda"))
    assert notes == [
        "This model is an ONNX network, which the installed onnxruntime runs on the "
        "CPU only. To use the GPU, install onnxruntime-gpu instead of it."
    ]
    assert found.shape == (2, 150, 170)


@pytest.mark.parametrize(
    ("device", "chosen"), [("cuda", {}), ("cuda:1", {"device_id": "1"})]
)
def test_the_gpu_that_was_named(device, chosen, network, monkeypatch):
    import onnxruntime

    session, asked = onnxruntime.InferenceSession, []

    def watched(*args, providers, **options):
        asked.append(providers)
        return session(*args, providers=["CPUExecutionProvider"], **options)

    program = imported(network).network
    monkeypatch.setattr(onnxruntime, "InferenceSession", watched)
    program.on(torch.device(device))
    cpu = ("CPUExecutionProvider", {})
    assert asked == [[("CUDAExecutionProvider", chosen), cpu]]


def test_it_cannot_be_trained(network, image):
    model = imported(network)
    annotation = Annotation(image, (image > 1).astype(np.int32))
    with pytest.raises(
        BadModel, match="'cells' is an ONNX network, which runs as it is"
    ):
        fine_tune(model, [annotation], TrainingSettings(steps=1))
    with pytest.raises(BadModel, match="its layers cannot be changed"):
        _ = model.unet
    assert Model(network).untrainable_reason == ""


@pytest.mark.usefixtures("own_library")
def test_the_command_line(network, image, tmp_path, capsys):
    file = tmp_path / "theirs.onnx"
    file.write_bytes(unet_file(network, (96, 96)))
    assert call(capsys, "models", "import", file).code == 0
    told = call(capsys, "models", "info", "theirs")
    assert "which runs as it is, in tiles of 96 x 96 pixels" in told.out
    plane = write_image(tmp_path / "images" / "cells.tif", image)
    for model in ("theirs", file):
        out = tmp_path / "out" / str(len(str(model)))
        made = call(capsys, "segment", plane, "-m", model, "-o", out)
        assert made.code == 0
        assert tifffile.imread(out / "cells.tif").shape == image.shape
    painted = (image > 1).astype(np.uint16)
    labels = write_image(tmp_path / "labels" / "cells.tif", painted)
    better = tmp_path / "better.safetensors"
    parts = plane.parent, labels.parent, "-m", "theirs", "-o", better, "--steps", 1
    refused = call(capsys, "train", *parts)
    assert refused.code == 2
    assert "its layers cannot be changed" in refused.err
    assert not better.exists()
    package = call(capsys, "models", "export", "theirs", tmp_path / "theirs.zip")
    assert package.code == 2
    assert "its layers cannot be changed" in package.err
    assert not (tmp_path / "theirs.zip").exists()
