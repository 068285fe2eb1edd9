"""A step of a training: what it tells a device, and what it leaves where it fails."""

import copy
import math
from contextlib import closing

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from napari_unet import Annotation, Model, TrainingSettings, UNet
from napari_unet.steps import run_to_end
from napari_unet.training.fine_tune import _start_steps
from napari_unet.training.loop import Training

NEEDS_CUDA = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU"
)
SETTINGS = TrainingSettings(steps=9, batch_size=2, patch_shape=(32, 32), device="cpu")


def started(**options):
    torch.manual_seed(0)
    model = Model(UNet(1, 2, depth=1, base_channels=4))
    labels = np.zeros((48, 48), np.int32)
    labels[4:20, 6:24], labels[26:44, 8:40] = 1, 2
    image = 600.0 * (labels > 0) + np.random.default_rng(0).normal(0, 60, labels.shape)
    settings = SETTINGS.model_copy(update=options)
    steps = _start_steps(
        model, [Annotation(image, labels)], settings, None, False, None
    )
    return closing(run_to_end(steps))


def state_of(training):
    states = training.network.state_dict(), training.optimizer.state_dict()
    return copy.deepcopy(states)


def assert_same(states, others):
    for one, other in zip(states, others, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


FAILURES = {
    "loss": lambda loss: loss + math.inf,
    "gradient": lambda loss: (loss * 0).sqrt(),
    "norm": lambda loss: (loss - loss.detach()) * 3e38,
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
def test_a_step_that_is_not_finite_changes_nothing(failure, preset, device):
    with started(preset=preset, device=device) as training:
        assert math.isfinite(run_to_end(training.learn_steps(1, 1e-3)))
        before, learnt = state_of(training), training._loss
        training._loss = lambda *batch: FAILURES[failure](learnt(*batch))
        assert math.isnan(run_to_end(training.learn_steps(2, 1e-3)))
        assert_same(state_of(training), before)
        # And the next one is as any other.
        training._loss = learnt
        assert math.isfinite(run_to_end(training.learn_steps(3, 1e-3)))
        (weights, _), (old, _) = state_of(training), before
        assert not any(torch.equal(weights[name], old[name]) for name in old)


def test_where_the_optimiser_cannot_leave_a_step_out_it_is_not_begun(monkeypatch):
    calls = []
    with started() as training:
        run_to_end(training.learn_steps(1, 1e-3))
        monkeypatch.setattr(training.optimizer, "step", lambda: calls.append(1))
        training._device = torch.device("mps")
        assert math.isnan(training._change_weights(torch.tensor([0.5, math.nan]), 1e-3))
        assert not calls
        assert training._change_weights(torch.tensor([0.5, 2.0]), 1e-3) == 0.5
        assert calls


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_a_device_is_not_waited_for_before_it_has_all_commands_of_a_step(preset):
    looks = {"tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__"}
    names = []

    class Look(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            names.append(function.__name__)
            return function(*args, **(kwargs or {}))

    with started(preset=preset) as training:
        run_to_end(training.learn_steps(1, 1e-3))
        batch = training._feed.batch(2)
        training._feed.batch = lambda _: batch
        with Look():
            run_to_end(training.learn_steps(2, 1e-3))
    (step,) = [n for n, name in enumerate(names) if name.startswith("_fused_")]
    (look,) = [n for n, name in enumerate(names) if name in looks]
    assert step < look
    # Nor is it told to copy each of the statistics.
    assert "clone" not in names
    assert "copy_" not in names


@pytest.mark.parametrize(("device", "last"), [("cpu", True), ("meta", False)])
def test_channels_are_last_only_where_that_is_fast(device, last):
    """On "meta", where nothing is computed, they are not, as on Apple's GPUs."""
    with started() as training:
        data, settings = training.data, training._settings
    other = Training(data, [], settings, torch.device(device), None)
    weight = other.network.get_parameter("encoder.0.3.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last) == last


@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_only_float32_goes_without_tf32(precision):
    with started(precision=precision) as training:
        training._device = torch.device("cuda")
        before = torch.backends.cudnn.conv.fp32_precision
        with training._precision():
            within = torch.backends.cudnn.conv.fp32_precision
        assert torch.backends.cudnn.conv.fp32_precision == before
    assert within == ("ieee" if precision == "float32" else before)
