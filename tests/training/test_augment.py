import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from napari_unet.training.augment import augment, source_shape
from napari_unet.training.losses import combined, cross_entropy, soft_dice
from napari_unet.training.settings import NO_AUGMENTATION, AugmentationSettings

DEFAULT = AugmentationSettings()
GREY = {"gain": 1.0, "offset": 0.0, "gamma": 1.0, "noise": 0.0, "blur": 0.0}
GEOMETRY = DEFAULT.model_copy(update=GREY)
PARTS = {
    "flips": True,
    "rotation": 40.0,
    "scale": 1.5,
    "shift": 7.3,
    "elastic_sigma": 4.0,
    "gain": 2.0,
    "offset": 0.5,
    "gamma": 2.0,
    "noise": 0.2,
    "blur": 1.5,
}

shapes = st.sampled_from([(17, 24), (32, 32), (5, 16, 16), (1, 20, 20), (1, 1), (8, 3)])
seeds = st.integers(0, 2**32)


def only(**parts):
    return NO_AUGMENTATION.model_copy(update=parts)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@st.composite
def any_settings(draw):
    """Any of the parts, alone or together."""
    chosen = draw(st.sets(st.sampled_from(sorted(PARTS))))
    grid = draw(st.sampled_from([2, 3, 9]))
    anisotropy = draw(st.sampled_from([0.5, 1.0, 4.0]))
    parts = {name: PARTS[name] for name in chosen}
    return only(**parts, elastic_grid=grid, anisotropy=anisotropy)


def patches(shape, batch=2, channels=2, seed=0):
    g = generator(seed)
    image = torch.rand(batch, channels, *shape, generator=g)
    target = torch.randint(0, 5, (batch, *shape), generator=g, dtype=torch.uint8)
    weights = torch.rand(batch, *shape, generator=g) + 0.1
    weights[torch.rand(batch, *shape, generator=g) < 0.3] = 0
    return image, target, weights


def coordinates(shape, batch=2):
    """An image whose channels are its own coordinates."""
    grids = torch.meshgrid(*[torch.arange(n) for n in shape], indexing="ij")
    return torch.stack(grids).float().repeat(batch, *[1] * (len(shape) + 1))


def numbered(shape, batch=2):
    """A different number for every pixel of a patch."""
    return (
        torch.arange(math.prod(shape)).view(1, *shape).repeat(batch, *[1] * len(shape))
    )


@given(any_settings(), shapes, seeds)
@settings(max_examples=40, deadline=None)
def test_no_label_and_no_weight_is_made_up(how, shape, seed):
    image, target, weights = patches(shape)
    new_image, new_target, new_weights = augment(
        image, target, weights, how, generator(seed)
    )
    assert (new_target.dtype, new_weights.dtype) == (target.dtype, weights.dtype)
    assert new_image.shape == image.shape
    assert new_image.isfinite().all()
    for before, after in ((target, new_target), (weights, new_weights)):
        assert after.shape == before.shape
        for one, other in zip(before, after, strict=True):
            assert set(other.unique().tolist()) <= set(one.unique().tolist())


@given(any_settings(), shapes, seeds)
@settings(max_examples=40, deadline=None)
def test_target_and_weights_move_as_one(how, shape, seed):
    image = torch.zeros(2, 1, *shape)
    numbers = numbered(shape)
    _, target, weights = augment(image, numbers, numbers.double(), how, generator(seed))
    assert torch.equal(target, weights.long())


@given(any_settings(), shapes, seeds)
@settings(max_examples=40, deadline=None)
def test_the_image_moves_with_the_target(how, shape, seed):
    how = how.model_copy(update=GREY)
    numbers = numbered(shape)
    image, target, _ = augment(
        coordinates(shape), numbers, numbers, how, generator(seed)
    )
    places = torch.stack(
        [torch.as_tensor(a) for a in np.unravel_index(target.numpy(), shape)], dim=1
    )
    # Mirroring goes through the same positions, so this holds beyond the edge too.
    assert (image - places).abs().max() <= 0.5 + 1e-3


@given(any_settings(), seeds)
@settings(max_examples=30, deadline=None)
def test_unknown_pixels_contribute_nothing(how, seed):
    image, target, weights = patches((20, 20))
    other = torch.where(weights > 0, target, 4 - target)
    assert not torch.equal(other, target)
    loss = combined((1.0, cross_entropy), (1.0, soft_dice))
    results = []
    for labels in (target, other):
        pixels, classes, known = augment(image, labels, weights, how, generator(seed))
        logits = torch.cat([pixels, pixels.square(), pixels[:, :1]], dim=1)
        logits.requires_grad_()
        value = loss(logits, classes, known)
        value.backward()
        assert not logits.grad.movedim(1, -1)[known == 0].any()
        results += [(value, logits.grad)]
    (value, gradient), (same_value, same_gradient) = results
    assert torch.equal(value, same_value)
    assert torch.equal(gradient, same_gradient)


@given(any_settings(), shapes, seeds)
@settings(max_examples=30, deadline=None)
def test_the_same_state_gives_the_same_result(how, shape, seed):
    g = generator(seed)
    augment(*patches(shape), how, g)
    state = g.get_state()
    first = augment(*patches(shape), how, g)
    g.set_state(state)
    second = augment(*patches(shape), how, g)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@given(any_settings(), shapes, seeds)
@settings(max_examples=30, deadline=None)
def test_the_input_is_not_changed(how, shape, seed):
    before = patches(shape)
    given_ = [t.clone() for t in before]
    augment(*before, how, generator(seed))
    assert all(torch.equal(a, b) for a, b in zip(before, given_, strict=True))


def test_nothing_to_do_returns_the_same_tensors():
    before = patches((9, 12))
    after = augment(*before, NO_AUGMENTATION, generator())
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert not NO_AUGMENTATION.warps


@pytest.mark.parametrize("name", PARTS)
def test_every_part_does_something_alone(name):
    before = patches((32, 32))
    image, target, _ = augment(*before, only(**{name: PARTS[name]}), generator(1))
    assert not torch.equal(image, before[0])
    assert torch.equal(target, before[1]) == (name in GREY)


@pytest.mark.parametrize("shape", [(6, 6), (4, 7), (3, 5, 5)])
def test_flips_are_exactly_the_symmetries(shape):
    batch = 400
    image, target, weights = (t[:1] for t in patches(shape))
    many = [t.repeat(batch, *[1] * (t.ndim - 1)) for t in (image, target, weights)]
    new = augment(*many, only(flips=True), generator())
    plane = [-2, -1]
    turns = range(4) if shape[-1] == shape[-2] else (0, 2)
    symmetries = [
        [t.rot90(turn, plane).flip(dims) for t in (image, target, weights)]
        for turn in turns
        for dims in ([], [-1], *([[-3], [-1, -3]] if len(shape) == 3 else []))
    ]
    seen = set()
    for number in range(batch):
        found = [
            which
            for which, (pixels, classes, known) in enumerate(symmetries)
            if torch.equal(pixels[0], new[0][number])
            and torch.equal(classes[0], new[1][number])
            and torch.equal(known[0], new[2][number])
        ]
        assert len(found) == 1
        seen.update(found)
    assert len(seen) == len(symmetries)


@pytest.mark.parametrize("shape", [(40, 40), (9, 30, 30)])
def test_patches_of_a_batch_differ(shape):
    one = [t[:1].repeat(2, *[1] * (t.ndim - 1)) for t in patches(shape)]
    image, target, _ = augment(*one, DEFAULT, generator())
    assert not torch.equal(image[0], image[1])
    assert not torch.equal(target[0], target[1])


def test_beyond_the_edge_the_patch_is_mirrored_without_its_edge():
    batch = 50
    rows = torch.arange(13).repeat(batch, 1, 1)
    image = rows[:, None].float()
    moved, target, _ = augment(image, rows, rows, only(shift=99.0), generator())
    moved, shifts = moved.squeeze(), moved[:, 0, 0, 6] - 6
    # Not more than a quarter of the side, either way.
    assert -3 <= shifts.min() < -2 < 2 < shifts.max() <= 3
    mirrored = np.pad(np.arange(13.0), 4, mode="reflect")
    for row, shift in zip(moved.numpy(), shifts.numpy(), strict=True):
        expected = np.interp(np.arange(13) + shift, np.arange(-4, 17), mirrored)
        np.testing.assert_allclose(row, expected, atol=1e-4)
    assert (target.squeeze() - moved).abs().max() <= 0.5 + 1e-4


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_rotation_turns_about_the_centre_and_keeps_lengths(seed):
    shape, middle = (3, 41, 41), (1, 20, 20)
    image = coordinates(shape, 1)
    where, *_ = augment(image, numbered(shape, 1), numbered(shape, 1),
                        only(rotation=180.0), generator(seed))  # fmt: skip
    centre = torch.tensor(middle).view(3, 1, 1, 1)
    torch.testing.assert_close(where[0, :, *middle], centre.flatten().float())
    torch.testing.assert_close(where[0, 0], image[0, 0])  # about Z only
    inner = (slice(None), slice(10, 31), slice(10, 31))
    radius = (where[0] - centre)[1:, *inner].norm(dim=0)
    torch.testing.assert_close(radius, (image[0] - centre)[1:, *inner].norm(dim=0))
    # A rotation, not a mirroring.
    y, x = (where[0, 1:, 1, 20, 21] - 20), (where[0, 1:, 1, 21, 20] - 20)
    assert float(x[0] * y[1] - x[1] * y[0]) == pytest.approx(1, abs=1e-4)


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_scale_is_within_its_limits(seed):
    shape = (33, 33)
    where, *_ = augment(coordinates(shape, 1), numbered(shape, 1), numbered(shape, 1),
                        only(scale=1.6), generator(seed))  # fmt: skip
    step = float(where[0, 0, 17, 16] - where[0, 0, 16, 16])
    assert 1 / 1.6 <= step * (1 + 1e-4)
    assert step <= 1.6 * (1 + 1e-4)


def displacements(shape, batch=40, **parts):
    """Displacements of the central part, where nothing is mirrored."""
    image = coordinates(shape, batch)
    numbers = numbered(shape, batch)
    moved, *_ = augment(image, numbers, numbers, only(**parts), generator(3))
    return moved - image


def test_elastic_displacements_are_as_the_paper_says():
    moved = displacements((241, 241), elastic_sigma=10.0)
    # At the nodes, the spread is that asked for.
    spread = moved[:, :, 120, 120].std()
    assert 8 < spread < 12
    # Smooth, without folds.
    inner = moved[..., 60:180, 60:180]
    stretch = 1 + inner.diff(dim=-1)[:, 1]
    assert stretch.min() > 0.2
    assert inner.diff(dim=-1).diff(dim=-1).abs().max() < 0.05
    finer = displacements((241, 241), elastic_sigma=10.0, elastic_grid=9)
    inner = finer[..., 60:180, 60:180]
    # 9 nodes are 30 pixels apart: not more than 5 pixels at each.
    assert 4 < finer[:, :, 120, 120].std() < 6
    assert (1 + inner.diff(dim=-1)[:, 1]).min() > 0


def test_elastic_volumes_follow_the_anisotropy():
    moved = displacements((31, 61, 61), 30, elastic_sigma=4.0, anisotropy=2.0)
    spread = moved[:, :, 15, 30, 30].std(dim=0)
    assert spread[0] == pytest.approx(2, rel=0.4)
    assert spread[1:].mean() == pytest.approx(4, rel=0.4)
    # Neighbouring planes move together: no tearing.
    assert moved[:, 1:].diff(dim=2).abs().max() < 2
    flat = displacements((1, 61, 61), 4, elastic_sigma=4.0)
    assert not flat[:, 0].any()
    assert flat[:, 1:].any()


@pytest.mark.parametrize(
    ("shape", "how"),
    [
        ((64, 64), GEOMETRY),
        ((48, 96), GEOMETRY),
        ((96, 48), only(rotation=20.0)),
        ((9, 40, 40), GEOMETRY.model_copy(update={"anisotropy": 3.0})),
        ((50, 70), only(shift=9.0, scale=1.3)),
    ],
)
def test_large_patches_show_real_pixels_only(shape, how):
    source = source_shape(shape, how)
    assert all(a >= b and (a - b) % 2 == 0 for a, b in zip(source, shape, strict=True))
    inside = torch.zeros(20, *source)
    for axis in range(1, inside.ndim):
        inside.narrow(axis, 1, source[axis - 1] - 2).add_(1)
    inside = (inside == len(shape)).float()
    image = coordinates(source, 20)
    moved, _, seen = augment(image, inside, inside, how, generator(), shape)
    assert moved.shape[2:] == shape
    # Only a displacement of more than 3 sigma meets the outermost pixels.
    assert (seen == 0).float().mean() < 1e-3
    # Nor are they larger than needed.
    assert moved[:, -1].amin() < 0.2 * source[-1]


def test_without_warping_the_centre_is_cut_out():
    image, target, weights = patches((11, 14))
    assert source_shape((11, 14), only(flips=True, noise=1.0)) == (11, 14)
    new = augment(image, target, weights, NO_AUGMENTATION, generator(), (5, 6))
    for before, after in zip((image, target, weights), new, strict=True):
        assert torch.equal(after, before[..., 3:8, 4:10])


def test_gamma_is_defined_everywhere():
    values = torch.tensor([-1e6, -2, -1, -0.3, 0, 0.3, 1, 2, 1e6]).view(1, 1, 1, -1)
    image = values.repeat(50, 1, 1, 1)
    zeros = torch.zeros(50, 1, 9)
    new, *_ = augment(image, zeros, zeros, only(gamma=10.0), generator())
    assert new.isfinite().all()
    assert (new.diff(dim=-1) > 0).all()
    torch.testing.assert_close(new, -new.flip(-1))
    torch.testing.assert_close(new[..., 6], torch.ones(50, 1, 1))
    exponents = new[..., 5].flatten().log() / math.log(0.3)
    assert exponents.min() > 0.1 - 1e-4
    assert exponents.max() < 10 + 1e-3
    assert 10 < (exponents > 1).sum() < 40


def test_gain_and_offset_are_linear_and_differ_by_channel():
    image, target, weights = patches((16, 16), batch=30)
    new, *_ = augment(image, target, weights, only(gain=2.0, offset=0.3), generator())
    dark, bright = image[..., 0, 0], image[..., 0, 1]
    gain = (new[..., 0, 1] - new[..., 0, 0]) / (bright - dark)
    offset = new[..., 0, 0] - gain * dark
    expected = gain[..., None, None] * image + offset[..., None, None]
    torch.testing.assert_close(new, expected, atol=1e-3, rtol=1e-3)
    assert gain.min() > 0.5 - 1e-2
    assert gain.max() < 2 + 1e-2
    assert offset.abs().max() < 0.3 + 1e-2
    assert (gain[:, 0] != gain[:, 1]).all()


def test_noise_is_as_strong_as_asked():
    image = torch.zeros(200, 1, 30, 30)
    labels = image[:, 0]
    new, *_ = augment(image, labels, labels, only(noise=0.5), generator())
    spread = new.flatten(1).std(dim=1)
    assert spread.max() < 0.55
    assert float(spread.mean()) == pytest.approx(0.25, abs=0.03)
    assert new.mean().abs() < 0.01


def test_blur_is_a_gaussian_of_every_width_up_to_the_largest():
    image = torch.zeros(60, 1, 25, 31)
    image[:, :, 12, 15] = 1
    labels = image[:, 0]
    new, *_ = augment(image, labels, labels, only(blur=2.0), generator())
    torch.testing.assert_close(new.sum((2, 3)), torch.ones(60, 1))
    steps = torch.arange(31) - 15.0
    widths = (new[:, 0].sum(1) * steps**2).sum(1).sqrt()
    assert widths.max() < 2.05
    assert 0.6 < widths.mean() < 1.4
    constant = torch.full((2, 1, 1, 9, 3), 0.7)
    labels = constant[:, 0]
    new, *_ = augment(constant, labels, labels, only(blur=5.0), generator())
    torch.testing.assert_close(new, constant)


def test_known_may_be_a_mask():
    image, target, weights = patches((20, 20))
    known = weights > 0
    _, _, first = augment(image, target, known, DEFAULT, generator())
    _, _, second = augment(image, target, weights, DEFAULT, generator())
    assert first.dtype == torch.bool
    assert torch.equal(first, second > 0)


def test_settings_are_json():
    text = DEFAULT.model_dump_json()
    assert AugmentationSettings.model_validate_json(text) == DEFAULT


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": 0.9},
        {"rotation": -1},
        {"noise": math.nan},
        {"elastic_grid": 1},
        {"a": 1},
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValidationError):
        AugmentationSettings(**wrong)


def test_tensors_that_do_not_belong_together_are_refused():
    image, target, weights = patches((8, 8))
    for arguments, message in (
        ((image.double(), target, weights), "must be float32"),
        ((image[0], target, weights), "must be float32"),
        ((image, target[:1], weights), "target has shape"),
        ((image, target, weights[:, None]), "weights has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            augment(*arguments, DEFAULT, generator())
    for shape in ((9, 8), (8,), (0, 8), (8, 8, 8)):
        with pytest.raises(ValueError, match="no part of patches"):
            augment(image, target, weights, DEFAULT, generator(), shape)
