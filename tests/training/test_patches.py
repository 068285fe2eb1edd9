"""Patches come from where something is known; a part is held out."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view

from napari_unet import Annotation, Model, TrainingSettings, UNet, predict
from napari_unet.errors import BadInput
from napari_unet.inference.backends import Backend
from napari_unet.inference.settings import ObjectSettings
from napari_unet.models.model import BorderWeights
from napari_unet.network.config import UNetConfig
from napari_unet.steps import run_to_end
from napari_unet.training.annotations import Truth, derive_truths
from napari_unet.training.data import prepare_steps
from napari_unet.training.patches import Patches, TrainingImage
from napari_unet.training.plan import PatchPlan, choose_plan, smaller_plan
from napari_unet.training.settings import NO_AUGMENTATION
from napari_unet.training.split import AnnotatedUnit, hold_out
from napari_unet.training.validation import Predicted, held_out_part, score, tune_steps
from napari_unet.training.weight_map import border_weight_map

CPU = torch.device("cpu")


def prepare(model, annotations, **changes):
    options = {"augmentation": NO_AUGMENTATION, "batch_size": 2, **changes}
    chosen = TrainingSettings(**options)
    return run_to_end(prepare_steps(model, annotations, chosen, CPU))


def tiny(**options):
    return Model(UNet(**{"depth": 1, "base_channels": 2, **options}))


def squares(shape=(40, 50)):
    labels = np.zeros(shape, np.int32)
    labels[..., 4:10, 4:10] = 1
    labels[..., 4:10, 10:16] = 2  # touching
    labels[..., 22:30, 30:40] = 3
    return labels


# --- images ------------------------------------------------------------------------


def test_images_are_normalised_as_the_engine_does(monkeypatch):
    seen, run = [], Backend.run

    def spy(self, image, keep, **options):
        seen.append(image[0].numpy().copy())
        return run(self, image, keep, **options)

    monkeypatch.setattr(Backend, "run", spy)
    model = tiny()
    image = np.random.default_rng(0).integers(0, 4000, (40, 48)).astype("u2")
    (learnt,) = prepare(model, [Annotation(image, squares((40, 48)))]).images
    predict(image, model, device="cpu")
    before = (seen[0].shape[1] - 40) // 2, (seen[0].shape[2] - 48) // 2
    tile = seen[0]
    found = any(
        np.array_equal(tile[:, y : y + 40, x : x + 48], learnt.pixels)
        for y in range(2 * before[0] + 1)
        for x in range(2 * before[1] + 1)
    )
    assert found
    assert learnt.pixels.dtype == np.float32


def test_weights_are_those_of_the_known_and_not_held_out_pixels():
    labels = squares()
    border = BorderWeights(preset="paper", w0=7, sigma=3)
    annotation = Annotation(labels.astype(float), labels)
    data = prepare(tiny(), [annotation], border_weights=border)
    (image,), (part,) = data.images, data.held_out
    (_, truth), *_ = derive_truths(annotation, 2)
    held = np.zeros(labels.shape, bool)
    held[part.region["Y"], part.region["X"]] = part.known
    assert held.any()
    weights = border_weight_map(truth.objects, 7, 3, known=~held)
    assert np.array_equal(image.weights > 0, ~held)
    far = np.ones(labels.shape, bool)  # from objects that are held out
    far[:, max(part.region["X"].start - 9, 0) :] = False
    np.testing.assert_allclose(image.weights[far], weights[far], atol=1e-4)
    assert image.target[4:10, 10].sum() == 0  # the gap
    plain = prepare(tiny(), [annotation], border_weights=None).images[0]
    assert set(np.unique(plain.weights)) == {0, 1}


def test_only_the_surroundings_of_the_known_part_are_kept():
    labels = np.zeros((400, 300), np.int32)
    labels[100:120, 100:110] = 1
    box = np.array([[90, 90], [90, 130], [130, 130], [130, 90]])
    data = prepare(
        tiny(), [Annotation(labels * 9.0, labels, [box])], patch_shape=(16, 16)
    )
    (image,) = data.images
    assert max(image.target.shape) <= 41 + 2 * 9
    assert np.count_nonzero(image.weights) + data.held_out[0].known.sum() == 41 * 41


def test_on_a_coarser_grid_gaps_are_cut_again():
    labels = squares((80, 100))
    model = tiny()
    model.passport = model.passport.model_copy(update={"pixel_size": (1.0, 1.0)})
    half = {"Y": 0.5, "X": 0.5}
    annotations = [Annotation(labels * 1.0, labels, pixel_size=half)] * 2
    (image,) = prepare(model, annotations).images
    assert image.target.shape == (40, 50)
    assert image.pixels.shape == (1, 40, 50)
    row = image.target[3, 2:8]
    assert row.tolist() in ([1, 1, 1, 0, 1, 1], [1, 1, 0, 1, 1, 1])


def test_what_vanishes_on_a_coarser_grid_is_said():
    labels = np.zeros((64, 64), np.int32)
    labels[0, 0], labels[0, 62] = 2, 1
    model = tiny()
    model.passport = model.passport.model_copy(update={"pixel_size": (8.0, 8.0)})
    size = {"Y": 1.0, "X": 1.0}
    annotation = Annotation(labels * 1.0, labels, pixel_size=size, unpainted="unknown")
    data = prepare(model, [annotation])
    if not data.images:
        with pytest.raises(BadInput, match="nothing is left of what is painted"):
            Patches(data.images, 0)


# --- drawing -----------------------------------------------------------------------


def numbered_image(known, target=None):
    pixels = np.arange(known.size, dtype=np.float32).reshape(1, *known.shape)
    target = np.zeros(known.shape, np.uint8) if target is None else target
    return TrainingImage(pixels, target, known.astype(np.float32))


def plan_of(shape, shrink=0, batch=1, augmentation=NO_AUGMENTATION):
    return PatchPlan(batch, shape, shrink, augmentation)


@given(
    seed=st.integers(0, 1000),
    sides=st.tuples(st.integers(5, 30), st.integers(5, 30)),
    step=st.integers(1, 50),
)
@settings(max_examples=50, deadline=None)
def test_every_patch_contains_known_pixels_and_belongs_together(seed, sides, step):
    random = np.random.default_rng(seed)
    known = random.random(sides) < 0.02
    known[random.integers(sides[0]), random.integers(sides[1])] = True
    target = (random.integers(0, 3, sides) * known).astype(np.uint8)
    image = numbered_image(known, target)
    patches = Patches([image], seed)
    pixels, classes, weights = patches.batch(step, plan_of((8, 8)), CPU)
    assert weights.any()
    index = pixels[0, 0].long().numpy()
    assert np.array_equal(classes[0].numpy(), target.ravel()[index])
    assert np.array_equal(weights[0].numpy(), known.ravel()[index])


@given(
    sides=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    place=st.integers(0, 143),
)
@settings(max_examples=50, deadline=None)
def test_beyond_the_edge_an_image_is_mirrored(sides, shape, place):
    known = np.zeros(sides, bool)
    known.flat[place % known.size] = True
    image = numbered_image(known)
    pixels, _, weights = Patches([image], 0).batch(1, plan_of(shape), CPU)
    around = [(side, side) for side in shape]
    mirrored = [np.pad(a, around, mode="reflect") for a in (image.pixels[0], known)]
    windows = [sliding_window_view(array, shape) for array in mirrored]
    same = (windows[0] == pixels.numpy()[0]) & (windows[1] == weights.numpy()[0])
    assert same.all((-1, -2)).any()


def test_rare_classes_and_borders_are_favoured():
    known = np.ones((100, 100), bool)
    target = np.zeros((100, 100), np.uint8)
    target[50, 50] = 2
    target[:10] = 1
    patches, plan = Patches([numbered_image(known, target)], 0), plan_of((4, 4))
    classes = [patches.batch(step, plan, CPU)[1] for step in range(1, 301)]
    rare = np.mean([bool((c == 2).any()) for c in classes])
    assert 0.1 < rare < 0.4
    border = np.mean([len(c.unique()) > 1 for c in classes])
    assert border > 0.2
    anywhere = np.mean([bool((c == 0).all()) for c in classes])
    assert anywhere > 0.3


def test_a_valid_network_gets_context():
    known = np.zeros((60, 60), bool)
    known[30, 30] = True
    patches = Patches([numbered_image(known)], 0)
    plan = plan_of((28, 28), shrink=8)
    pixels, target, weights = patches.batch(1, plan, CPU)
    assert pixels.shape == (1, 1, 28, 28)
    assert target.shape == weights.shape == (1, 12, 12)
    assert weights.sum() == 1
    y, x = np.argwhere(weights[0].numpy())[0]
    assert pixels[0, 0, y + 8, x + 8] == 30 * 60 + 30


def test_volumes_are_cut():
    known = np.ones((6, 20, 20), bool)
    patches = Patches([numbered_image(known)], 0)
    pixels, target, _ = patches.batch(1, plan_of((8, 16, 16), batch=2), CPU)
    assert pixels.shape == (2, 1, 8, 16, 16)
    assert target.shape == (2, 8, 16, 16)


# --- the plan ----------------------------------------------------------------------


@given(
    depth=st.integers(1, 4),
    valid=st.booleans(),
    ndim=st.sampled_from([2, 3]),
    sides=st.lists(st.integers(1, 700), min_size=3, max_size=3),
    preset=st.sampled_from(["default", "paper"]),
    given_shape=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_patches_are_of_legal_sides(depth, valid, ndim, sides, preset, given_shape):
    config = UNetConfig(
        depth=depth, base_channels=4, ndim=ndim, padding="valid" if valid else "same"
    )
    sides = sides[-ndim:]
    chosen = TrainingSettings(
        preset=preset, patch_shape=tuple(sides) if given_shape else None
    )
    plan = choose_plan(config, sides, chosen, NO_AUGMENTATION, CPU)
    assert min(plan.output_shape) >= 2
    assert plan.batch_size >= 1
    assert preset == "default" or plan.batch_size == 1
    with torch.device("meta"):
        logits = UNet.from_config(config)(torch.zeros(1, 1, *plan.shape))
    assert tuple(logits.shape[2:]) == plan.output_shape
    if given_shape:
        assert all(a >= b for a, b in zip(plan.shape, sides, strict=True))
    if not valid:
        assert all(side % 2**depth == 0 for side in plan.shape)


def test_small_memory_makes_patches_small(monkeypatch):
    from napari_unet.training import plan as module

    monkeypatch.setattr(module, "_affordable_pixels", lambda *_: 100 * 100)
    config = UNetConfig()
    plan = choose_plan(config, (999, 999), TrainingSettings(), NO_AUGMENTATION, CPU)
    assert plan.batch_size == 2
    assert plan.shape == (64, 64)


@given(
    depth=st.integers(1, 4),
    valid=st.booleans(),
    sides=st.lists(st.integers(1, 700), min_size=2, max_size=3),
    batch_size=st.integers(1, 9),
)
@settings(max_examples=25, deadline=None)
def test_smaller_plans_are_legal_and_come_to_an_end(depth, valid, sides, batch_size):
    config = UNetConfig(
        depth=depth,
        base_channels=2,
        ndim=len(sides),
        padding="valid" if valid else "same",
    )
    chosen = TrainingSettings(patch_shape=tuple(sides), batch_size=batch_size)
    plan = choose_plan(config, sides, chosen, NO_AUGMENTATION, CPU)
    with torch.device("meta"):
        network = UNet.from_config(config)
        while smaller := smaller_plan(config, plan):
            before = plan.batch_size * np.prod(plan.shape)
            assert smaller.batch_size * np.prod(smaller.shape) < before
            assert smaller.batch_size == max(plan.batch_size // 2, 1)
            logits = network(torch.zeros(1, 1, *smaller.shape))
            assert tuple(logits.shape[2:]) == smaller.output_shape
            plan = smaller
    assert plan.batch_size == 1
    assert max(plan.output_shape) <= 3 * 2**depth


# --- what is held out --------------------------------------------------------------


def unit_of(known, target, annotation=0, has_regions=False):
    target = np.where(known, target, 0).astype(np.uint8)
    truth = Truth(target, target.astype(np.int32), known)
    return AnnotatedUnit(annotation, {}, truth, has_regions)


@st.composite
def annotated_units(draw):
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    count = draw(st.integers(1, 5))
    images = draw(st.integers(1, count))
    density = draw(st.sampled_from([0.02, 0.3, 1.0]))
    units = []
    for number in range(count):
        shape = tuple(random.integers(2, 14, 2))
        known = random.random(shape) < density
        known.flat[0] = True
        target = random.random(shape) < draw(st.sampled_from([0.1, 0.5]))
        has_regions = draw(st.booleans())
        units.append(unit_of(known, target, min(number, images - 1), has_regions))
    units[0].truth.known.flat[-1] = True
    return units


@given(units=annotated_units(), fraction=st.floats(0.01, 0.5), seed=st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_something_is_held_out_and_something_left(units, fraction, seed):
    masks = hold_out(units, fraction, seed)
    held = sum(np.count_nonzero(mask) for mask in masks)
    known = sum(np.count_nonzero(unit.truth.known) for unit in units)
    assert 0 < held < known
    for unit, mask in zip(units, masks, strict=True):
        assert mask.shape == unit.truth.known.shape
        assert not (mask & ~unit.truth.known).any()
    again = hold_out(units, fraction, seed)
    assert all(np.array_equal(a, b) for a, b in zip(masks, again, strict=True))


@given(
    fraction=st.floats(0.05, 0.5),
    seed=st.integers(0, 99),
    place=st.tuples(st.integers(0, 25), st.integers(0, 25)),
)
@example(fraction=0.2, seed=0, place=(0, 0))
@settings(max_examples=50, deadline=None)
def test_of_one_image_a_strip_with_objects_on_both_sides(fraction, seed, place):
    target = np.zeros((30, 30), bool)
    target[place[0] : place[0] + 4, place[1] : place[1] + 4] = True
    unit = unit_of(np.ones((30, 30), bool), target)
    (mask,) = hold_out([unit], fraction, seed)
    assert (mask & target).any()
    assert (~mask & target).any()
    assert (~mask & ~target).any()
    sides = np.ptp(np.argwhere(mask), axis=0) + 1
    assert np.count_nonzero(mask) == np.prod(sides)  # a box ...
    assert max(sides) == 30  # ... that is a whole strip


def test_whole_images_are_held_out():
    target = np.eye(8, dtype=bool)
    units = [unit_of(np.ones((8, 8), bool), target, number) for number in range(10)]
    masks = hold_out(units, 0.2, 0)
    assert sorted(mask.sum() for mask in masks) == [0] * 8 + [64, 64]
    chosen = {tuple(m.any() for m in hold_out(units, 0.2, s)) for s in range(20)}
    assert len(chosen) > 5


def test_the_held_out_images_have_their_share_of_the_objects():
    full = np.ones((10, 10), bool)
    rows = (10, 1, 1, 1, 1, 10, 1, 1, 1, 3)  # of 30
    units = [
        unit_of(full, np.arange(10)[:, None] < np.full(10, count), number)
        for number, count in enumerate(rows)
    ]
    for seed in range(10):
        masks = hold_out(units, 0.2, seed)
        held = [count for count, mask in zip(rows, masks, strict=True) if mask.any()]
        assert sum(held) == 4
        assert len(held) == 2


def test_images_without_objects_do_not_decide():
    target = np.eye(8, dtype=bool)
    full = np.ones((8, 8), bool)
    units = [unit_of(full, target & (number == 0), number) for number in range(3)]
    masks = hold_out(units, 0.2, 0)
    assert (masks[0] & target).any()
    assert (~masks[0] & target).any()
    assert not masks[1].any()


def test_of_a_stack_neighbouring_planes_and_of_an_image_whole_regions():
    target = np.eye(8, dtype=bool)
    planes = [unit_of(np.ones((8, 8), bool), target) for _ in range(10)]
    masks = hold_out(planes, 0.2, 0)
    assert [bool(mask.any()) for mask in masks] == [False] * 8 + [True] * 2
    known = np.zeros((20, 20), bool)
    known[1:9, 1:9] = known[11:19, 1:9] = known[5:12, 12:19] = True
    target = np.arange(20) % 3 == np.zeros((20, 1))
    (mask,) = hold_out([unit_of(known, target, has_regions=True)], 0.2, 1)
    assert mask.sum() in (64, 49)


# --- scores ------------------------------------------------------------------------


def predicted(foreground, known, labels):
    annotation = Annotation(np.zeros(known.shape), labels)
    target = (labels > 0).astype(np.uint8)
    part = held_out_part(annotation, {}, known, target, labels)
    box = part.region["Y"], part.region["X"]
    return Predicted(part, foreground[(slice(None), *box)], 0.0)


def test_only_known_pixels_count():
    labels = squares((40, 100))
    labels[:, 60:] = 5
    known = np.zeros(labels.shape, bool)
    known[:, :35] = True  # cuts object 3
    truth = (labels > 0)[None].astype(np.float32)
    passport = tiny().passport
    perfect = score([predicted(truth, known, labels)], passport)
    assert perfect["IoU"] == 1
    # Touching objects stay one without a gap.
    assert perfect["F1@0.5"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 0), abs=0.2)
    elsewhere = truth.copy()
    elsewhere[:, 10:20, 40:] = 1
    assert score([predicted(elsewhere, known, labels)], passport) == perfect
    invented = truth.copy()
    invented[:, 35:39, 2:6] = 1
    worse = score([predicted(invented, known, labels)], passport)
    assert worse["F1@0.5"] < perfect["F1@0.5"]


def test_the_threshold_is_kept_unless_another_is_better():
    labels = squares()
    known = np.ones(labels.shape, bool)
    labels[labels == 2] = 0
    truth = (labels > 0)[None].astype(np.float32)
    passport = tiny().passport
    recommended = ObjectSettings.recommended(passport)
    sure = [predicted(truth, known, labels)]
    assert (
        run_to_end(tune_steps(sure, passport, (0.3, 0.7), (0, 1), (0, 9)))
        == recommended
    )
    low = [predicted(0.4 * truth, known, labels)]
    chosen = run_to_end(tune_steps(low, passport, (0.3, 0.7), (0, 1), (0,)))
    assert chosen == replace(recommended, threshold=0.3)
    truth[:, 35, 2::2] = 0.9  # crumbs
    crumbs = [predicted(truth, known, labels)]
    chosen = run_to_end(tune_steps(crumbs, passport, (0.7,), (0,), (0, 9)))
    assert chosen == replace(recommended, threshold=0.7, minimal_size=9)


def test_objects_are_split_where_that_finds_more_of_them():
    y, x = np.mgrid[:40, :40]
    labels = np.zeros((40, 40), np.int32)
    for number, left in enumerate((11, 27), start=1):
        labels[(y - 20) ** 2 + (x - left) ** 2 < 9**2] = number
    known = np.ones(labels.shape, bool)
    touching = predicted((labels > 0)[None].astype(np.float32), known, labels)
    passport = tiny().passport
    chosen = run_to_end(tune_steps([touching], passport, (0.5,), (0,), (0,)))
    assert chosen == replace(ObjectSettings.recommended(passport), split_touching=True)


def test_classes_do_not_match_each_other():
    labels = squares()
    target = np.where(labels == 3, 2, np.minimum(labels, 1))
    probability = np.stack([target == 1, target == 2]).astype(np.float32)
    passport = tiny(num_classes=3).passport
    annotation = Annotation(labels, target, labels_are="classes")
    (_, truth), *_ = derive_truths(annotation, 2)
    known = np.ones(labels.shape, bool)
    part = held_out_part(annotation, {}, known, truth.target, truth.objects)
    assert score([Predicted(part, probability, 0.0)], passport)["F1@0.5"] == 1
    swapped = score([Predicted(part, probability[::-1], 0.0)], passport)
    assert swapped["F1@0.5"] == swapped["IoU"] == 0
