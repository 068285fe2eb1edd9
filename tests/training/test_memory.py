"""Where memory runs out, a training goes on with less."""

import gc
import weakref
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from ticks import collect
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

from napari_unet import Annotation, Model, TrainingSettings, UNet, fine_tune
from napari_unet.errors import OutOfMemory
from napari_unet.training.fine_tune import fine_tune_steps

SETTINGS = TrainingSettings(
    steps=6,
    batch_size=6,
    patch_shape=(32, 32),
    validate_every=2,
    device="cpu",
    precision="float32",
)


@contextmanager
def room_for(pixels, error=torch.OutOfMemoryError):
    """Let networks that learn fail, at their end, with more pixels than that."""
    seen = []

    def look(module, inputs, logits):
        if isinstance(module, UNet) and module.training:
            # What an earlier attempt held must be free, without help.
            assert all(reference() is None for reference in seen)
            seen[:] = [weakref.ref(inputs[0]), weakref.ref(logits)]
            if inputs[0].numel() > pixels:
                raise error("CUDA out of memory. Tried to allocate 2.00 GiB.")

    hook = register_module_forward_hook(look)
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        hook.remove()


def tiny():
    torch.manual_seed(0)
    return Model(UNet(1, 2, depth=1, base_channels=4, dropout=0.2))


def annotations(**options):
    random = np.random.default_rng(0)
    labels = np.zeros((80, 70), np.int32)
    for number in range(9):
        top, left = 4 + 26 * (number // 3), 4 + 22 * (number % 3)
        labels[top : top + 12, left : left + 10] = number + 1
    image = 600.0 * (labels > 0) + random.normal(0, 60, labels.shape)
    return [Annotation(image, labels, **options)]


def assert_same(model, other):
    theirs = other.network.state_dict()
    for name, tensor in model.network.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
    assert model.passport == other.passport


@pytest.mark.parametrize(
    ("pixels", "fitting", "words"),
    [
        (3 * 32 * 32, (3, (32, 32)), "3 patches of 32 x 32"),
        (2 * 32 * 32, (1, (32, 32)), "1 patch of 32 x 32"),
        (8 * 8, (1, (8, 8)), "1 patch of 8 x 8"),
    ],
)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, RuntimeError])
def test_it_goes_on_as_if_it_had_begun_with_what_fits(pixels, fitting, words, error):
    with room_for(pixels, error):
        steps, better = collect(fine_tune_steps(tiny(), annotations(), SETTINGS))
    learnt = [step.done for step in steps if step.loss is not None]
    assert learnt == list(range(1, 7))
    notes = [step.note for step in steps if "Memory" in step.note]
    told = f"Memory ran out with 6 patches of 32 x 32: going on with {words}."
    assert notes == [told]
    changes = dict(zip(("batch_size", "patch_shape"), fitting, strict=True))
    fits = SETTINGS.model_copy(update=changes)
    assert_same(better, fine_tune(tiny(), annotations(), fits))


@pytest.mark.parametrize("later", [8 * 8, 10**9], ids=["again", "more memory"])
@pytest.mark.parametrize("done", [2, 3])
def test_resuming_goes_on_with_what_fitted(tmp_path, done, later):
    path = tmp_path / "training.snapshot"
    box = np.array([[20, 20], [20, 50], [60, 50], [60, 20]])
    regions = annotations(regions=[box])
    with room_for(8 * 8):
        straight = fine_tune(tiny(), regions, SETTINGS)
        steps = fine_tune_steps(tiny(), regions, SETTINGS, snapshot=path)
        while next(steps).done < done:
            pass
        steps.close()
    with room_for(later):
        resumed, better = collect(
            fine_tune_steps(tiny(), regions, SETTINGS, snapshot=path, resume=True)
        )
    assert_same(straight, better)
    assert min(step.done for step in resumed if step.loss is not None) == 3
    assert not any("Memory" in step.note for step in resumed)


def test_memory_may_run_out_later():
    steps = fine_tune_steps(tiny(), annotations(), SETTINGS)
    while next(steps).done < 3:
        pass
    with room_for(4 * 32 * 32):
        rest, better = collect(steps)
    assert sum("going on with 3 patches" in step.note for step in rest) == 1
    assert better.passport.history[-1].settings["batch_size"] == 3


def test_where_nothing_fits_it_ends_in_words():
    words = r"on cpu with 1 patch of 4 x 4\. Close other programs"
    with room_for(0), pytest.raises(OutOfMemory, match=words):
        fine_tune(tiny(), annotations(), SETTINGS)


def test_smaller_patches_do_not_help_the_optimiser():
    def fail(optimizer, args, kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    hook = register_optimizer_step_pre_hook(fail)
    try:
        with pytest.raises(OutOfMemory, match="with 6 patches of 32 x 32"):
            fine_tune(tiny(), annotations(), SETTINGS)
    finally:
        hook.remove()


def test_other_errors_are_not_taken_for_it():
    class Odd(RuntimeError):
        def __str__(self):
            return "odd shape"

    with room_for(0, Odd), pytest.raises(Odd):
        fine_tune(tiny(), annotations(), SETTINGS)
