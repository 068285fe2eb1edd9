"""Compiling beside the computation: results never wait, and never change."""

import copy
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from whole_image import random_image, trained_model

from napari_unet import Model, predict
from napari_unet.inference import compiled, executors
from napari_unet.inference.compiled import CompiledLater, can_compile
from napari_unet.inference.executors import TorchExecutor, _Forward
from napari_unet.network.folding import fold, split_first

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def anew(monkeypatch):
    """Compile at the second use, and as if nothing had been compiled before."""
    monkeypatch.setattr(compiled, "USED_SECONDS", 0)
    monkeypatch.setattr(CompiledLater, "_begun", 0)
    yield
    CompiledLater.wait()
    torch.compiler.reset()


def image_of(side: int) -> torch.Tensor:
    return torch.linspace(0, 1, side**2).reshape(1, 1, side, side)


def test_the_first_results_do_not_wait():
    """A compiler that takes forever holds nobody up."""
    go_on, compiling = threading.Event(), threading.Event()

    def slow_compiler(graph, inputs):
        compiling.set()
        go_on.wait(30)
        return graph.forward

    compute = CompiledLater(lambda image, _: image + 1, backend=slow_compiler)
    with torch.inference_mode():
        compute(image_of(4), None)
        assert not compiling.is_set()  # a single image is not worth it
        compute(image_of(4), None)
        assert compiling.wait(30)
        for _ in range(3):
            torch.testing.assert_close(compute(image_of(4), None), image_of(4) + 1)
        assert not compute.is_ready
        go_on.set()
        compute.wait()
        assert compute.is_ready
        torch.testing.assert_close(compute(image_of(4), None), image_of(4) + 1)


def test_nothing_compiled_runs_while_another_shape_is_compiled():
    """torch before 2.13 would raise an error."""
    go_on, compiling, used = threading.Event(), threading.Event(), []

    def compiler(graph, inputs):
        side = inputs[0].shape[-1]
        if side == 5:
            compiling.set()
            go_on.wait(30)

        def run(*arguments):
            used.append(side)
            return graph.forward(*arguments)

        return run

    compute = CompiledLater(lambda image, _: image + 1, backend=compiler)
    with torch.inference_mode():
        for side in [4, 4]:
            compute(image_of(side), None)
        compute.wait()
        for side in [5, 5]:
            compute(image_of(side), None)
        assert compiling.wait(30)
        used.clear()
        torch.testing.assert_close(compute(image_of(4), None), image_of(4) + 1)
        assert not used
        go_on.set()
        compute.wait()
        for side in [4, 5]:
            torch.testing.assert_close(
                compute(image_of(side), None), image_of(side) + 1
            )
    assert used[-2:] == [4, 5]


def test_every_shape_is_compiled_once(monkeypatch):
    """And no more than torch keeps, of all networks together."""
    sides = []

    def compiler(graph, inputs):
        sides.append(inputs[0].shape[-1])
        return graph.forward

    monkeypatch.setattr(compiled, "MOST_RESULTS", 3)
    first, second = (
        CompiledLater(lambda image, _, factor=factor: factor * image, backend=compiler)
        for factor in (2, 3)
    )
    with torch.inference_mode():
        for side in [4, 4, 5, 4, 5, 5, 4, 6, 6, 6, 7, 7, 4]:
            image = image_of(side)
            torch.testing.assert_close(first(image, None), 2 * image)
            first.wait()
        torch.testing.assert_close(second(image, None), 3 * image)
        torch.testing.assert_close(second(image, None), 3 * image)
        second.wait()
    assert sides == [4, 5, 6]
    assert first.is_ready
    assert not second.is_ready


def test_a_shape_that_is_used_briefly_is_not_worth_it(monkeypatch):
    monkeypatch.setattr(compiled, "USED_SECONDS", 0.5)
    compute = CompiledLater(lambda image, _: 2 * image, backend="eager")
    with torch.inference_mode():
        for _ in range(3):
            compute(image_of(4), None)
        assert CompiledLater._begun == 0
        time.sleep(0.6)
        compute(image_of(4), None)
        compute.wait()
    assert compute.is_ready


def test_a_program_may_end_while_it_compiles():
    """torch aborts the process if it does not wait."""
    program = """
import torch
from napari_unet.inference import compiled
compiled.USED_SECONDS = 0
compute = compiled.CompiledLater(lambda image, _: (2 * image).relu().softmax(1))
with torch.inference_mode():
    for _ in range(2):
        compute(torch.ones(1, 2, 64, 64), None)
assert compiled.CompiledLater._thread.is_alive()
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)


def test_without_a_working_compiler_everything_goes_on():
    calls = []

    def broken(graph, inputs):
        calls.append(1)
        raise RuntimeError("no compiler found")

    compute = CompiledLater(lambda image, _: image * 2, backend=broken)
    with torch.inference_mode():
        for _ in range(4):
            torch.testing.assert_close(compute(image_of(3), None), 2 * image_of(3))
            compute.wait()
    assert not compute.is_ready
    assert len(calls) == 1  # nor is it tried again


def test_only_gpus_compile(monkeypatch):
    assert not can_compile(CPU)
    cuda = torch.device("cuda")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert can_compile(cuda)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not can_compile(cuda)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not can_compile(cuda)


@pytest.fixture
def compiling(monkeypatch):
    """Let the CPU compile, as a GPU does, with what traces the network alone."""
    monkeypatch.setattr(executors, "can_execute", lambda config: False)
    monkeypatch.setattr(executors, "can_compile", lambda device: True)
    made = []

    class Traced(CompiledLater):
        def __init__(self, function):
            super().__init__(function, backend=self.trace)
            self.threads = []
            made.append(self)

        def trace(self, graph, inputs):
            self.threads.append(threading.current_thread().name)
            return graph.forward

    monkeypatch.setattr(executors, "CompiledLater", Traced)
    return made


@pytest.mark.parametrize(
    "options", [{}, {"padding": "valid"}, {"upsampling": "bilinear"}]
)
def test_a_compiled_network_predicts_the_same(compiling, options):
    model = trained_model(**options)
    image = random_image((1, 200, 200))[0]
    eager = predict(image, model, tile_shape=(64, 64))
    (compute,) = compiling
    compute.wait()
    assert compute.is_ready
    before = len(compute.threads)
    again = predict(image, model, tile_shape=(64, 64))
    compute.wait()
    assert len(compiling) == 1  # the executor was kept
    assert len(compute.threads) - before <= 3  # other shapes, and none twice
    assert set(compute.threads) == {"compile"}  # never while somebody waits
    np.testing.assert_allclose(again, eager, atol=1e-6)


def test_what_is_exact_is_not_compiled(compiling):
    executor = TorchExecutor(trained_model().network, CPU, reduced=False)
    assert not compiling
    assert executor.title == "torch, float32"


def test_a_network_that_is_being_trained_is_not_compiled(compiling):
    network = copy.deepcopy(trained_model().network)
    model, image = Model(network.train()), random_image((1, 70, 70))[0]
    predict(image, model)
    assert not compiling
    network.eval()  # with the same weights
    predict(image, model)
    assert len(compiling) == 1


def test_what_would_be_compiled_anew_is_not(compute_doubled):
    """Nor if a switch of torch has changed on which what was compiled depends."""
    compute, calls = compute_doubled
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        with torch.inference_mode():
            result = compute(image_of(4), None)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(result, 2 * image_of(4))
    assert len(calls) == 1


def test_what_fails_after_it_was_compiled_is_not_used(compute_doubled):
    compute, _ = compute_doubled
    (key,) = compute._ready

    def fail(image, cropping):
        raise RuntimeError("an illegal instruction")

    compute._ready[key] = fail
    with torch.inference_mode():
        for _ in range(2):
            result = compute(image_of(4), None)
            torch.testing.assert_close(result, 2 * image_of(4))
            assert not compute.is_ready
        compute._ready[key] = lambda image, _: (_ for _ in ()).throw(
            torch.OutOfMemoryError("CUDA out of memory")
        )
        with pytest.raises(torch.OutOfMemoryError):  # smaller tiles help
            compute(image_of(4), None)


@pytest.fixture
def compute_doubled():
    """What has compiled, and what was compiled."""
    calls = []

    def compiler(graph, inputs):
        calls.append(1)
        return graph.forward

    compute = CompiledLater(lambda image, _: image * 2, backend=compiler)
    with torch.inference_mode():
        for _ in range(2):
            compute(image_of(4), None)
            compute.wait()
    assert compute.is_ready
    return compute, calls


def test_other_threads_need_not_wait_for_the_compiler():
    """Which is a Python program: each would wait 5 ms whenever it wants to go on."""
    intervals = []

    def compiler(graph, inputs):
        intervals.append(sys.getswitchinterval())
        return graph.forward

    compute = CompiledLater(lambda image, _: image * 2, backend=compiler)
    before = sys.getswitchinterval()
    with torch.inference_mode():
        for _ in range(2):
            compute(image_of(4), None)
            compute.wait()
    assert intervals[0] < before
    assert sys.getswitchinterval() == before


@pytest.mark.filterwarnings("ignore")
def test_what_is_lost_in_16_bits_is_not_lost_by_compiling():
    """A compiler computes as if nothing were rounded in between."""
    network, image = fold(trained_model().network), image_of(64)
    executor = TorchExecutor(trained_model().network, CPU, reduced=True)
    with torch.inference_mode():
        exact = network(image)
        assert split_first(network, torch.bfloat16)
        forward = _Forward(network.to(torch.bfloat16), torch.bfloat16, True)
        executor._prepare = forward.prepare
        executor._compute = CompiledLater(forward.compute)
        stop = threading.Event()
        first, _ = executor.run(image, None, stop), executor.run(image, None, stop)
        executor._compute.wait()
        again = executor.run(image, None, stop)
    assert executor._compute.is_ready
    error = (first - exact).abs().mean()
    assert 0 < error < 0.01
    assert (again - first).abs().mean() < error / 5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_with_the_real_compiler(monkeypatch):
    """Needs a C++ compiler; takes a minute."""
    monkeypatch.setattr(executors, "can_compile", lambda device: True)
    executor = TorchExecutor(trained_model().network, CPU, reduced=True)
    with torch.inference_mode():  # as what the engine uploads
        image = torch.from_numpy(random_image((1, 64, 64)).astype("f4"))[None] / 1e4
    stop = threading.Event()
    first, _ = executor.run(image, None, stop), executor.run(image, None, stop)
    executor._compute.wait()
    assert executor.title.endswith("compiled")
    again = executor.run(image, None, stop)
    torch.testing.assert_close(again, first, atol=0.05, rtol=0.05)
