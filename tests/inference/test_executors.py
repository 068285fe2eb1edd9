"""What runs the networks: the same answers, by torch and by OpenVINO."""

import copy
import gc
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from whole_image import exact_options, random_image, reference, trained_model

from napari_unet import load_model, predict
from napari_unet.errors import Cancelled
from napari_unet.inference import backends, executors
from napari_unet.inference.backends import Backend
from napari_unet.inference.executors import (
    TorchExecutor,
    make_executor,
    without_tf32,
)
from napari_unet.inference.openvino_executor import OpenVinoExecutor, can_execute
from napari_unet.models.model import Model
from napari_unet.network.cropping import can_crop, cropping

CPU = torch.device("cpu")
SAMPLE = Path(__file__).parents[2] / "sample_data" / "nuclei.tif"


@pytest.fixture
def by_torch(monkeypatch):
    monkeypatch.setattr(executors, "can_execute", lambda config: False)


@given(options=exact_options(2) | exact_options(3), data=st.data())
@settings(deadline=None, max_examples=15)
def test_both_compute_what_the_network_does(options, data):
    network = trained_model(**options).network
    config = network.config
    step = 2**config.depth
    side = 64 + (12 * step if config.padding == "valid" else 0)
    side = next(n for n in range(side, 2 * side) if _is_legal(network, n))
    image = random_image((config.in_channels, *[side] * config.ndim)).astype("f4")
    image = (image - image.mean()) / image.std()
    crop, box = None, ()
    if can_crop(config) and data.draw(st.booleans()):
        keep = [(step + 1, side - step - 2)] * config.ndim
        crop = cropping(config, keep, image.shape[1:])
        box = tuple(slice(*span) for span in keep)
    with torch.inference_mode():
        expected = network(torch.from_numpy(image)[None]).numpy()[(..., *box)]
    for executor in [
        TorchExecutor(network, CPU, reduced=False),
        *([OpenVinoExecutor(network, 1, reduced=False)] if can_execute(config) else []),
    ]:
        assert executor.precision == "float32"
        tensor = torch.from_numpy(image)[None]
        found = executor.run(tensor, crop, threading.Event()).numpy()
        np.testing.assert_allclose(found, expected, atol=2e-4, rtol=1e-4)


def _is_legal(network, side: int) -> bool:
    return backends.receptive_field(network.config).input_size(side) == side


def test_openvino_runs_what_it_can_and_torch_the_rest():
    assert isinstance(
        make_executor(trained_model().network, CPU, True), OpenVinoExecutor
    )
    for options in ({"norm": "group"}, {"upsampling": "unpool"}):
        network = trained_model(**options).network
        assert isinstance(make_executor(network, CPU, True), TorchExecutor)


def test_torch_runs_everything_without_openvino(monkeypatch):
    monkeypatch.setattr(executors.importlib.util, "find_spec", lambda name: None)
    executor = make_executor(trained_model().network, CPU, reduced=False)
    assert executor.title == "torch, float32"


@pytest.mark.parametrize("through", ["openvino", "torch"])
def test_sixteen_bits_find_the_same(through, request):
    """DESIGN: at least 99.9 % of the pixels are of the same class."""
    if through == "torch":
        request.getfixturevalue("by_torch")
    model = load_model("nuclei")
    image = tifffile.imread(SAMPLE)
    exact = predict(image, model, device="cpu", precision="float32")
    quick = predict(image, model, device="cpu")
    assert np.abs(quick - exact).max() < 0.05
    assert np.mean(quick.argmax(0) == exact.argmax(0)) >= 0.999


@pytest.mark.parametrize("through", ["openvino", "torch"])
@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_tiles_change_nothing_in_any_precision(through, precision, request):
    if through == "torch":
        request.getfixturevalue("by_torch")
    model = load_model("nuclei")
    image = tifffile.imread(SAMPLE)[:300, :260]
    options = {"device": "cpu", "precision": precision}
    whole = predict(image, model, tile_shape=(512, 512), **options)
    tiled = predict(image, model, tile_shape=(96, 160), **options)
    # Of 16 bits, rounding may fall otherwise; with OpenVINO not even that was seen.
    np.testing.assert_allclose(tiled, whole, atol=1e-4 if precision != "auto" else 0.02)


def test_turned_tiles_are_cropped_where_they_lie(image):
    """An uneven part of a tile, averaged over all turns and flips."""
    model = trained_model()
    options = {"precision": "float32", "test_time_augmentation": True}
    region = {"Y": slice(9, 40), "X": slice(22, 81)}
    part = predict(image, model, region=region, tile_shape=(16, 32), **options)
    whole = reference(model, image[None], turns=True)
    np.testing.assert_allclose(part, whole[:, 9:40, 22:81], atol=1e-4)


def test_an_executor_is_kept_for_the_next_image(model, image):
    first = Backend(model.network, "cpu")
    executor = first._executor
    first.close()
    second = Backend(model.network, "cpu")
    assert second._executor is executor
    # One that is in use is not given to another, however often the first is closed.
    first.close()
    third = Backend(model.network, "cpu")
    assert third._executor is not executor
    for backend in (second, third):
        backend.close()


def test_memory_is_given_back_when_no_image_comes(model, image, monkeypatch):
    monkeypatch.setattr(executors, "KEPT_SECONDS", 0.1)
    released = threading.Event()
    monkeypatch.setattr(OpenVinoExecutor, "release", lambda self: released.set())
    predict(image, model)
    assert released.wait(5)


def test_numbers_too_large_for_half_floats_are_computed_with_more(
    model, monkeypatch, by_torch
):
    """GPUs without bfloat16 have float16, which ends at 65504."""
    monkeypatch.setattr(executors, "_reduced_type", lambda *_: torch.float16)
    monkeypatch.setattr(backends, "_idle", executors.Idle())
    image = random_image((1, 90, 80))
    wanted = reference(model, image)
    backend = Backend(model.network, "cpu")
    assert backend.title == "torch, float16"
    backend.close()
    quick = predict(image[0], model)
    np.testing.assert_allclose(quick, wanted, atol=0.05)
    assert np.abs(quick - wanted).max() > 1e-5
    steep = copy.deepcopy(model.network)
    with torch.no_grad():
        for scaled, factor in [(steep.encoder[0][0], 1e7), (steep.head, 1e-7)]:
            scaled.weight *= factor
        for norm in steep.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                norm.running_var.fill_(1)
    large = Model(steep)
    np.testing.assert_allclose(
        predict(image[0], large), reference(large, image), atol=1e-4
    )
    # From then on at once, and all along with memory for it.
    again = Backend(steep, "cpu")
    assert again.title == "torch, float32"
    assert again.bytes_per_pixel == backend.bytes_per_pixel
    again.close()


def test_convolutions_take_all_bits_whatever_was_chosen():
    convolutions = torch.backends.cudnn.conv
    before = torch.backends.fp32_precision, convolutions.fp32_precision
    try:
        for everywhere in ("none", "tf32"):
            torch.backends.fp32_precision = everywhere
            for chosen in ("tf32", "ieee"):
                convolutions.fp32_precision = chosen
                with without_tf32(), without_tf32():
                    assert convolutions.fp32_precision == "ieee"
                assert convolutions.fp32_precision == chosen
    finally:
        torch.backends.fp32_precision, convolutions.fp32_precision = before


@pytest.mark.parametrize("compiles", [False, True])
def test_memory_is_given_back_with_an_executor(compiles, monkeypatch):
    """Not only when Python next looks for objects that know each other."""
    monkeypatch.setattr(executors, "can_compile", lambda device: compiles)
    executor = TorchExecutor(trained_model().network, CPU, reduced=True)
    executor.run(torch.ones(1, 1, 64, 64), None, threading.Event())
    layer = weakref.ref(executor._network.head)
    gc.disable()
    try:
        del executor
        assert layer() is None
    finally:
        gc.enable()


def test_changed_weights_need_another_executor(image):
    model = trained_model()
    network = type(model.network).from_config(model.network.config)
    network.load_state_dict(model.network.state_dict())
    changing = Model(network.eval())
    before = predict(image, changing, precision="float32")
    with torch.no_grad():
        network.head.bias[1] += 1.0
    after = predict(image, changing, precision="float32")
    np.testing.assert_allclose(after, reference(changing, image[None]), atol=1e-4)
    assert np.abs(after - before).max() > 0.1
    with torch.no_grad():
        kernels = network.bottleneck[0].weight
        kernels[[0, 1]] = kernels[[1, 0]]
    exchanged = predict(image, changing, precision="float32")
    np.testing.assert_allclose(exchanged, reference(changing, image[None]), atol=1e-4)
    assert np.abs(exchanged - after).max() > 1e-3


@pytest.mark.parametrize("through", ["openvino", "torch"])
def test_what_runs_ends_soon_after_closing(through, request):
    if through == "torch":
        request.getfixturevalue("by_torch")
    network = trained_model(base_channels=32, depth=4).network
    backend = Backend(network, "cpu")
    executor, small = backend._executor, torch.ones(1, 1, 64, 64)
    expected, ended = backend.run(small), []

    def run():
        try:
            backend.run(torch.zeros(1, 1, 1600, 1600))
        except Cancelled:
            ended.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(0.7)
    assert thread.is_alive()
    backend.close()
    thread.join(2)
    assert ended == [True]
    with pytest.raises(Cancelled):
        backend.run(small)
    # What was stopped serves the next image.
    after = Backend(network, "cpu")
    assert after._executor is executor
    np.testing.assert_array_equal(after.run(small), expected)
    after.close()
