import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from napari_unet.training.losses import (
    binary_cross_entropy,
    combined,
    cross_entropy,
    soft_dice,
)

squared_dice = partial(soft_dice, squared=True)
both = combined((1.0, cross_entropy), (0.5, soft_dice))
SOFTMAX = [cross_entropy, soft_dice, squared_dice, both]
SIGMOID = [binary_cross_entropy, soft_dice, squared_dice]
CASES = [(loss, 3) for loss in SOFTMAX] + [(loss, 1) for loss in SIGMOID]
SHAPES = [(2, 5, 6), (1, 3, 4, 5)]


def patch(channels, shape=(2, 5, 6), seed=0, dtype=torch.float32):
    """Logits, target and weights, a third of the weights 0."""
    generator = torch.Generator().manual_seed(seed)
    batch, *spatial = shape
    logits = torch.randn(batch, channels, *spatial, generator=generator) * 3
    target = torch.randint(0, max(channels, 2), shape, generator=generator)
    weights = torch.rand(shape, generator=generator) * 5
    weights[torch.rand(shape, generator=generator) < 1 / 3] = 0
    return logits.to(dtype), target, weights.to(dtype)


def pixels_of(logits, target, weights):
    """Every pixel with its probabilities, in plain Python numbers."""
    classes = logits.shape[1]
    for z, t, w in zip(
        logits.double().movedim(1, -1).reshape(-1, classes).tolist(),
        target.flatten().tolist(),
        weights.double().flatten().tolist(),
        strict=True,
    ):
        if classes == 1:
            p = 1 / (1 + math.exp(-z[0]))
            yield [1 - p, p], int(t > 0), w
        else:
            powers = [math.exp(v) for v in z]
            yield [v / sum(powers) for v in powers], t, w


def brute_entropy(*batch):
    known = [(p, t, w) for p, t, w in pixels_of(*batch) if w]
    return sum(-w * math.log(p[t]) for p, t, w in known) / sum(w for *_, w in known)


def brute_dice(*batch, power=1):
    known = [(p, t) for p, t, w in pixels_of(*batch) if w]
    scores = []
    for number in range(1, len(known[0][0])):
        overlap = sum(p[number] for p, t in known if t == number)
        size = sum(p[number] ** power + (t == number) for p, t in known)
        scores.append((2 * overlap + 1) / (size + 1))
    return 1 - sum(scores) / len(scores)


BRUTE = {
    cross_entropy: brute_entropy,
    binary_cross_entropy: brute_entropy,
    soft_dice: brute_dice,
    squared_dice: partial(brute_dice, power=2),
    both: lambda *batch: brute_entropy(*batch) + 0.5 * brute_dice(*batch),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("loss", "channels"), CASES)
def test_equals_brute_force(loss, channels, shape):
    for seed in range(3):
        batch = patch(channels, shape, seed)
        value = loss(*batch)
        assert (value.shape, value.dtype) == ((), torch.float32)
        assert value.item() == pytest.approx(BRUTE[loss](*batch), rel=1e-5)
        doubles = (batch[0].double(), batch[1], batch[2].double())
        assert loss(*doubles).item() == pytest.approx(BRUTE[loss](*doubles), rel=1e-12)


@pytest.mark.parametrize(("loss", "channels"), CASES)
def test_gradients_are_right(loss, channels):
    logits, target, weights = patch(channels, (1, 3, 4), dtype=torch.float64)
    logits.requires_grad_()
    assert gradcheck(lambda z: loss(z, target, weights), logits)


@pytest.mark.parametrize("nonsense", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize(("loss", "channels"), CASES)
def test_unknown_pixels_change_nothing(loss, channels, nonsense):
    logits, target, weights = patch(channels)
    unknown = weights == 0
    expected = loss(logits, target, weights)
    logits = logits.masked_fill(unknown.unsqueeze(1), nonsense).requires_grad_()
    value = loss(logits, target.masked_fill(unknown, 255).byte(), weights)
    assert torch.equal(value, expected)
    value.backward()
    gradient = logits.grad.movedim(1, -1)
    assert not gradient[unknown].view(torch.int32).any()  # not even -0
    assert gradient.isfinite().all()
    assert gradient[~unknown].count_nonzero() == gradient[~unknown].numel()


@pytest.mark.parametrize(("loss", "channels"), CASES)
def test_all_unknown_is_nothing_to_learn(loss, channels):
    logits, target, weights = patch(channels)
    logits.requires_grad_()
    value = loss(logits, target, torch.zeros_like(weights))
    value.backward()
    assert value.item() == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("loss", "channels"), CASES)
def test_half_precision_logits_are_computed_in_float32(loss, channels, dtype):
    logits, target, weights = patch(channels, (2, 40, 50))
    logits = (logits * 20).to(dtype)
    expected = loss(logits.float(), target, weights)
    logits.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(logits, target, weights)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    value.backward()
    assert logits.grad.dtype == dtype
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(("loss", "channels"), CASES)
def test_confident_logits_stay_finite(loss, channels):
    _, target, weights = patch(channels)
    shape = (2, channels, 5, 6)
    logits = torch.full(shape, -1e4)
    logits[:, -1] = 1e4
    logits.requires_grad_()
    value = loss(logits, target, weights)
    value.backward()
    assert value.isfinite()
    assert logits.grad.isfinite().all()


@given(st.floats(1e-3, 1e3), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_the_scale_of_the_weights_does_not_matter(factor, seed):
    logits, target, weights = patch(3, seed=seed)
    expected = cross_entropy(logits, target, weights)
    value = cross_entropy(logits, target, weights * factor)
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    assert torch.equal(
        soft_dice(logits, target, weights), soft_dice(logits, target, weights > 0)
    )


def test_unknown_surroundings_do_not_dilute():
    logits, target, weights = patch(3)
    expected = both(logits, target, weights)
    pad = (4, 3, 2, 1)
    padded = [torch.nn.functional.pad(t, pad) for t in (logits, target, weights)]
    assert both(*padded).item() == pytest.approx(expected.item(), rel=1e-5)


def test_dice_is_0_when_right_and_near_1_when_wrong():
    target = (torch.arange(10000).view(1, 100, 100) % 3 == 0).long()
    ones = torch.ones(target.shape)
    right = torch.stack([1 - target, target], 1) * 100.0
    for squared in (False, True):
        assert soft_dice(right, target, ones, squared=squared) < 1e-6
        assert soft_dice(-right, target, ones, squared=squared) > 0.999
        one = right[:, 1:] * 2 - 100
        assert soft_dice(one, target, ones, squared=squared) < 1e-6


def test_other_classes_count_as_found_with_one_channel():
    logits, target, weights = patch(1)
    for loss in SIGMOID:
        expected = loss(logits, target, weights)
        assert torch.equal(loss(logits, target * 7, weights), expected)
        assert torch.equal(loss(logits, target.bool(), weights), expected)


def test_shapes_that_would_broadcast_are_refused():
    logits, target, weights = patch(3)
    for loss in SOFTMAX:
        with pytest.raises(ValueError, match="need target and weights of shape"):
            loss(logits, target, weights[:, None])
        with pytest.raises(ValueError, match="need target and weights of shape"):
            loss(logits, target[:1], weights)
    with pytest.raises(ValueError, match="1 channel, not 3"):
        binary_cross_entropy(logits, target, weights)
    with pytest.raises(ValueError, match="one at least"):
        combined()
