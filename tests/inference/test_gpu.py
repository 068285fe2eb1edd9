"""What only a real GPU can show; skipped where there is none."""

import threading

import numpy as np
import pytest
import torch
from ticks import notes_of
from whole_image import random_image, reference, trained_model

from napari_unet import Model, UNet, load_model, predict, segment
from napari_unet.inference import compiled
from napari_unet.inference.backends import Backend, _idle
from napari_unet.inference.engine import Predictor
from napari_unet.inference.predict import predict_steps
from napari_unet.steps import run_to_end

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
GPU = {"device": "cuda"}


@pytest.fixture
def wide() -> Model:
    """A network as large as those of papers."""
    torch.manual_seed(0)
    return Model(UNet(1, 2, base_channels=32).eval())


@pytest.mark.parametrize("options", [{}, {"padding": "valid"}, {"ndim": 3}])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_float32_is_exact(options, dtype):
    model = trained_model(**options)
    shape = (1, 150, 170) if model.ndim == 2 else (1, 20, 40, 50)
    image = (random_image(shape) // 300).astype(dtype)
    tile = (32,) * model.ndim
    found = predict(image[0], model, tile_shape=tile, precision="float32", **GPU)
    np.testing.assert_allclose(found, reference(model, image), atol=1e-4)


def test_sixteen_bits_find_the_same():
    model = load_model("nuclei")
    image = random_image((1, 1500, 1400))[0]
    exact = predict(image, model, precision="float32", device="cpu")
    quick = predict(image, model, **GPU)
    assert np.mean(quick.argmax(0) == exact.argmax(0)) >= 0.999


@pytest.mark.parametrize("split", [False, True])
def test_objects_are_those_of_the_processor(split):
    model = trained_model()
    image = random_image((1, 3, 200, 150))[0]
    options = {"axes": "ZYX", "tile_shape": (64, 64), "precision": "float32"}
    threshold = float(np.median(predict(image, model, **options, **GPU)[1]))
    options |= {"threshold": threshold, "split_touching": split}
    here = segment(image, model, **options, device="cpu")
    there = segment(image, model, **options, **GPU)
    # Pixels within rounding of the threshold may differ, and their objects with them.
    assert np.mean((here > 0) == (there > 0)) > 0.9999


def test_many_runs_are_the_same(wide):
    """A race of uploads, computation and downloads would show."""
    image = random_image((1, 1200, 1100))[0]
    options = {"tile_shape": (128, 128), "precision": "float32", **GPU}
    first = predict(image, wide, **options)
    for _ in range(5):
        # A transposed convolution may add up in any order.
        again = predict(image, wide, **options)
        np.testing.assert_allclose(again, first, atol=1e-5)


def test_one_thread_starts_all_computations(wide, monkeypatch):
    """For every other one torch would plan the convolutions anew, and keep the plan."""
    image, threads, forward = random_image((1, 500, 500))[0], set(), UNet.forward

    def watched(network, *arguments):
        threads.add(threading.get_ident())
        return forward(network, *arguments)

    monkeypatch.setattr(UNet, "forward", watched)
    for _ in range(3):
        predict(image, wide, tile_shape=(128, 128), **GPU)
    assert len(threads) == 1


@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_what_is_compiled_gives_the_same(wide, monkeypatch):
    monkeypatch.setattr(compiled, "USED_SECONDS", 0)
    image = random_image((1, 1536, 1536))[0]
    options = {"tile_shape": (512, 512), **GPU}
    first = predict(image, wide, **options)
    compiled.CompiledLater.wait()
    predictor = Predictor(image, wide, **options)
    title = predictor.computed_by
    again = run_to_end(predictor.unit_steps(0))
    predictor.close()
    assert "compiled" in title
    assert np.mean(again.argmax(0) == first.argmax(0)) >= 0.999
    np.testing.assert_allclose(again, first, atol=0.05)


@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_a_tile_takes_what_is_expected(wide, precision):
    _idle.take(trained_model().network, torch.device("cpu"), False)  # empty it
    torch.cuda.empty_cache()
    backend = Backend(wide.network, "cuda", precision)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    image = backend.transfers.upload(np.ones((1, 1536, 1536), np.float32), None)
    backend.run(image)
    backend.close()
    measured = (torch.cuda.max_memory_allocated() - before) / 1536**2
    assert 0.5 * backend.bytes_per_pixel < measured < 1.25 * backend.bytes_per_pixel


@pytest.mark.parametrize("limit", [0.5, 2.0])
def test_a_limit_is_kept(wide, limit):
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    predict(random_image((1, 3000, 3000))[0], wide, memory_limit=limit, **GPU)
    assert torch.cuda.max_memory_reserved() - before <= limit * 1e9


def test_many_images_need_the_memory_of_one(wide):
    image = random_image((1, 1500, 1500))[0]
    reserved = []
    for _ in range(10):
        predict(image, wide, **GPU)
        reserved.append(torch.cuda.memory_reserved())
    assert max(reserved) <= 1.1 * reserved[1]


def test_a_full_gpu_takes_smaller_tiles(wide):
    image = random_image((1, 2500, 2500))[0]
    exact = predict(image, wide, **GPU)
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(1.5e9 / total)
    try:
        steps = predict_steps(image, wide, tile_shape=(2560, 2560), **GPU)
        notes, result = notes_of(steps)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "Memory ran out on cuda; going on with smaller tiles." in notes
    np.testing.assert_allclose(result, exact, atol=0.05)
