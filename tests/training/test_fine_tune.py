"""A model learns, and only from what is known."""

import copy
import json
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from ticks import collect
from torch.nn.modules.module import register_module_forward_hook

from napari_unet import Annotation, Model, TrainingSettings, UNet, fine_tune
from napari_unet.errors import BadInput, BadModel
from napari_unet.models.checkpoint import model_sha256
from napari_unet.models.model import BorderWeights
from napari_unet.steps import run_to_end
from napari_unet.training import loop
from napari_unet.training.fine_tune import (
    TrainingStep,
    View,
    _start_steps,
    fine_tune_project_steps,
    fine_tune_steps,
)
from napari_unet.training.project import save_project
from napari_unet.training.project_file import BASE_FILE
from napari_unet.training.settings import NO_AUGMENTATION, AugmentationSettings
from napari_unet.training.snapshot import read_snapshot

MILD = AugmentationSettings(
    rotation=0, scale=1, shift=0, elastic_sigma=0, noise=0, blur=0, gamma=1
)
QUICK = TrainingSettings(
    steps=8,
    batch_size=2,
    patch_shape=(32, 32),
    validate_every=4,
    learning_rate=5e-3,
    device="cpu",
    augmentation=MILD,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny networks are faster with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def discs(seed, shape=(64, 64), count=6, touching=False):
    """Bright discs on a noisy background, and their labels."""
    random = np.random.default_rng(seed)
    labels = np.zeros(shape, np.int32)
    places = np.indices(shape)
    for number in range(1, count + 1):
        centre = [random.integers(3, side - 3) for side in shape]
        radius = random.integers(4, 7)
        distance = sum((p - c) ** 2 for p, c in zip(places, centre, strict=True))
        labels[(distance < radius**2) & (labels == 0)] = number
    image = 200 + 600 * (labels > 0) + random.normal(0, 60, shape)
    return image.astype(np.float32), labels


def tiny(in_channels=1, num_classes=2, seed=0, **options):
    torch.manual_seed(seed)
    options = {"depth": 1, "base_channels": 4, **options}
    return Model(UNet(in_channels, num_classes, **options))


def weights_of(model):
    return {k: v.clone() for k, v in model.network.state_dict().items()}


def assert_same(model, other):
    ours, theirs = weights_of(model), weights_of(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_from_scratch_it_learns_and_tells_how():
    model = tiny(depth=2, base_channels=8)
    annotations = [Annotation(*discs(seed, (96, 96), 9)) for seed in range(4)]
    settings = QUICK.model_copy(
        update={"steps": 60, "batch_size": 4, "patch_shape": (64, 64)}
    ).model_copy(update={"validate_every": 30})
    steps, better = collect(fine_tune_steps(model, annotations, settings))
    before = steps[[bool(step.scores) for step in steps].index(True)]
    assert before.done == 0
    record = better.passport.history[-1]
    assert record.scores["old F1@0.5"] == before.scores["F1@0.5"]
    assert record.scores["F1@0.5"] > before.scores["F1@0.5"] + 0.5
    assert record.scores["IoU"] > 0.8
    learnt = [step for step in steps if step.loss is not None]
    assert [step.done for step in learnt] == list(range(1, 61))
    assert all(
        step.total == 60 and math.isfinite(step.loss) for step in steps if step.loss
    )
    assert [step.done for step in learnt if step.scores] == [30, 60]
    assert np.mean([s.loss for s in learnt[-10:]]) < np.mean(
        [s.loss for s in learnt[:10]]
    )
    rates = [step.learning_rate for step in learnt]
    assert rates[0] < rates[5] == settings.learning_rate
    assert rates[-1] < rates[30] < rates[6]


def test_the_base_model_is_not_touched():
    model = tiny()
    model.network.train()
    hash_, random = model_sha256(model), torch.get_rng_state()
    better = fine_tune(model, [Annotation(*discs(0))], QUICK)
    assert model_sha256(model) == hash_
    assert model.network.training
    assert not better.network.training
    assert torch.equal(torch.get_rng_state(), random)
    assert better.passport.history[-1].parent_sha256 == hash_
    assert model_sha256(better) != hash_
    assert all(weight.requires_grad for weight in better.network.parameters())


def test_the_passport_says_what_was_done():
    image, labels = discs(0)
    annotations = [Annotation(image, labels, name="a.tif"), Annotation(*discs(1))]
    border = BorderWeights(preset="falk", w0=50, sigma=6)
    settings = QUICK.model_copy(update={"border_weights": border})
    better = fine_tune(tiny(), annotations, settings, name="mine")
    passport = better.passport
    assert passport.name == "mine"
    assert passport.border_weights == border
    assert passport.object_diameter == pytest.approx(9, abs=3)
    low, high = passport.intensity_range
    assert 0 < low < 200 < 700 < high < 1100
    assert "torch" in passport.library_versions
    (record,) = passport.history
    assert record.data == "2 annotated images: a.tif"
    assert record.images == 2
    assert len(record.data_sha256) == 64
    assert record.steps in (4, 8)
    assert record.settings["steps"] == 8
    assert record.settings["patch_shape"] == [32, 32]
    assert json.loads(json.dumps(record.settings)) == record.settings
    names = {"loss", "IoU", "F1@0.5", "AP@0.5"}
    assert record.scores.keys() == names | {f"old {name}" for name in names}
    again = fine_tune(better, annotations, QUICK)
    assert again.passport.history[0] == record
    assert again.passport.history[1].data_sha256 == record.data_sha256
    assert again.passport.object_diameter == passport.object_diameter


def test_typical_objects_are_those_that_were_annotated():
    """Also where the base's were others, measured or set by hand."""
    model = tiny()
    model.passport = model.passport.model_copy(update={"object_diameter": 40.0})
    better = fine_tune(model, [Annotation(*discs(0))], QUICK)
    assert better.passport.object_diameter == pytest.approx(9, abs=3)
    assert model.passport.object_diameter == 40


@pytest.mark.parametrize("labels_are", ["objects", "classes"])
def test_training_never_depends_on_unknown_pixels(labels_are):
    image, labels = discs(3, (64, 80), 8)
    if labels_are == "classes":
        labels = np.minimum(labels, 1)
    box = np.array([[4, 6], [4, 60], [50, 60], [50, 6]])
    known = np.zeros(labels.shape, bool)
    known[4:51, 6:61] = True
    other = labels.copy()
    other[~known] = np.random.default_rng(0).integers(0, 9, np.sum(~known))
    settings = QUICK.model_copy(update={"augmentation": AugmentationSettings()})
    one, two = (
        fine_tune(
            tiny(), [Annotation(image, painted, [box], labels_are=labels_are)], settings
        )
        for painted in (labels, other)
    )
    assert_same(one, two)
    assert one.passport == two.passport


def test_scribbles_train():
    image, labels = discs(3)
    labels = np.where(labels > 0, labels + 1, 1)
    labels[:, 1::2] = 0
    labels[40:] = 0
    annotation = Annotation(image, labels, unpainted="unknown")
    better = fine_tune(tiny(), [annotation], QUICK)
    assert math.isfinite(better.passport.history[-1].scores["loss"])


def stopped_after(done, steps):
    """Run to a step and close the generator there."""
    for step in steps:
        if step.done == done and step.loss is not None:
            steps.close()
            return


@given(
    stops=st.lists(st.integers(15, 100), min_size=1, max_size=3),  # of some 120
    changes=st.fixed_dictionaries(
        {
            "steps": st.integers(1, 6),
            "validate_every": st.integers(1, 4),
            "preset": st.sampled_from(["default", "paper"]),
            "freeze_encoder": st.booleans(),
            "seed": st.integers(0, 2**32 - 1),
        }
    ),
    dropout=st.sampled_from([0.0, 0.3]),
)
@examples(max_examples=10, deadline=None)
def test_pausing_and_resuming_changes_nothing(stops, changes, dropout):
    """Whatever is learnt how, and wherever it is stopped, also several times."""
    how = QUICK.model_copy(update={**changes, "augmentation": AugmentationSettings()})
    annotations, model = [Annotation(*discs(0))], tiny(dropout=dropout)
    with TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("straight", "stopped")]
        straight = fine_tune(model, annotations, how, snapshot=paths[0])
        options = {"snapshot": paths[1], "resume": True}
        for ticks in stops:
            steps = fine_tune_steps(model, annotations, how, **options)
            for _ in zip(range(ticks), steps, strict=False):
                pass
            steps.close()
            torch.rand(1)  # the state of torch's generator does not matter
        better = fine_tune(model, annotations, how, **options)
        one, other = map(read_snapshot, paths)
    assert_same(straight, better)
    assert straight.passport == better.passport
    # Also what is not the best is the same.
    assert one.snapshot.history == other.snapshot.history
    for name, tensor in one.network.items():
        assert torch.equal(tensor, other.network[name]), name


@pytest.mark.parametrize("done", [4, 6, 13])
def test_a_resumed_training_tells_its_past(tmp_path, done):
    settings = QUICK.model_copy(
        update={"steps": 14, "augmentation": AugmentationSettings()}
    )
    annotations = [Annotation(*discs(seed)) for seed in range(2)]
    model = tiny()
    straight = fine_tune(model, annotations, settings)
    path = tmp_path / "training.snapshot"
    stopped_after(done, fine_tune_steps(model, annotations, settings, snapshot=path))
    resumed = fine_tune_steps(model, annotations, settings, snapshot=path, resume=True)
    steps, better = collect(resumed)
    assert_same(straight, better)
    assert straight.passport == better.passport
    learnt = [step.done for step in steps if step.loss is not None]
    assert learnt[0] == done // 4 * 4 + 1
    past = [(s.done, s.message) for s in steps if s.message == "resuming" and s.scores]
    assert past[0] == (0, "resuming")
    assert len(past) == 1 + done // 4
    # Once it is finished, resuming gives the same again.
    again = fine_tune(model, annotations, settings, snapshot=path, resume=True)
    assert_same(straight, again)


def test_slow_steps_are_saved_more_often(tmp_path, monkeypatch):
    path, annotations = tmp_path / "training.snapshot", [Annotation(*discs(0))]
    stopped_after(3, fine_tune_steps(tiny(), annotations, QUICK, snapshot=path))
    assert not path.exists()
    monkeypatch.setattr(loop, "_UNSAVED", 0.0)
    stopped_after(3, fine_tune_steps(tiny(), annotations, QUICK, snapshot=path))
    resumed = fine_tune_steps(tiny(), annotations, QUICK, snapshot=path, resume=True)
    steps, better = collect(resumed)
    assert next(step.done for step in steps if step.loss is not None) == 4
    assert_same(fine_tune(tiny(), annotations, QUICK), better)


def test_fast_steps_are_not_held_up_by_saving_at_every_look(tmp_path, monkeypatch):
    path, annotations = tmp_path / "training.snapshot", [Annotation(*discs(0))]
    training = run_to_end(_start_steps(tiny(), annotations, QUICK, path, False, None))
    training._device = torch.device("cuda")
    training.save_in_time(has_looked=True)
    assert not path.exists()
    monkeypatch.setattr(loop, "_UNSAVED_ON_GPU", 0.0)
    training.save_in_time(has_looked=False)
    assert not path.exists()
    training.save_in_time(has_looked=True)
    assert read_snapshot(path).snapshot.step == 0


def test_a_snapshot_of_another_training_is_refused(tmp_path):
    path = tmp_path / "training.snapshot"
    annotations = [Annotation(*discs(0))]
    fine_tune(tiny(), annotations, QUICK, snapshot=path)
    other = QUICK.model_copy(update={"steps": 9, "seed": 1})
    for model, images, settings, words in (
        (tiny(), annotations, other, "other settings .seed, steps."),
        (tiny(seed=1), annotations, QUICK, "another model"),
        (tiny(), [Annotation(*discs(1))], QUICK, "annotations have changed"),
    ):
        with pytest.raises(BadInput, match=words):
            fine_tune(model, images, settings, snapshot=path, resume=True)
    for content in (b"", b"nonsense", path.read_bytes()[:-100]):
        path.write_bytes(content)
        with pytest.raises(BadInput, match="damaged or no snapshot"):
            fine_tune(tiny(), annotations, QUICK, snapshot=path, resume=True)
    torch.save({"format": "napari-unet training 1"}, path)
    with pytest.raises(BadInput, match="damaged or no snapshot"):
        fine_tune(tiny(), annotations, QUICK, snapshot=path, resume=True)


def test_cancelling_at_any_yield_leaves_no_half_written_file(tmp_path):
    path = tmp_path / "training.snapshot"
    settings = QUICK.model_copy(update={"steps": 2, "validate_every": 1})
    annotations = [Annotation(*discs(0))]
    steps = fine_tune_steps(tiny(), annotations, settings, snapshot=path)
    count = len(collect(steps)[0])
    path.unlink()
    for stop in range(0, count + 1, 2):
        steps = fine_tune_steps(tiny(), annotations, settings, snapshot=path)
        for _ in islice(steps, stop):  # there may be fewer heartbeats than before
            pass
        steps.close()
        assert list(tmp_path.iterdir()) in ([], [path])
        if path.exists():
            if stop % 8 == 0:  # a whole training each
                fine_tune(tiny(), annotations, settings, snapshot=path, resume=True)
            path.unlink()


def test_a_loss_that_is_not_finite_ends_the_training_in_words():
    settings = QUICK.model_copy(update={"learning_rate": 1e30, "validate_every": 8})
    with pytest.raises(BadModel, match="not a finite number any more"):
        fine_tune(tiny(norm=None), [Annotation(*discs(0))], settings)


@pytest.fixture
def end_after_25_steps(monkeypatch):
    learn_steps = loop.Training.learn_steps

    def learn(self, step, rate):
        loss = yield from learn_steps(self, step, rate)
        return math.nan if step > 25 else loss

    monkeypatch.setattr(loop.Training, "learn_steps", learn)


@pytest.mark.usefixtures("end_after_25_steps")
def test_nothing_is_made_of_what_is_no_better_when_the_loss_is_not_finite():
    annotations = [Annotation(*discs(seed)) for seed in range(2)]
    base = fine_tune(tiny(), annotations, QUICK.model_copy(update={"steps": 24}))
    ruinous = QUICK.model_copy(update={"steps": 40, "learning_rate": 5.0})
    with pytest.raises(BadModel, match=r"step 26.* The model was not changed"):
        fine_tune(base, annotations, ruinous)


@pytest.mark.usefixtures("end_after_25_steps")
def test_what_was_learnt_before_is_kept_when_the_loss_is_not_finite():
    settings = QUICK.model_copy(update={"steps": 40})
    annotations = [Annotation(*discs(seed)) for seed in range(3)]
    steps, better = collect(fine_tune_steps(tiny(), annotations, settings))
    assert any("stopped at step 26" in step.note for step in steps)
    record = better.passport.history[-1]
    assert record.steps <= 24
    assert record.scores["F1@0.5"] > record.scores["old F1@0.5"]


def test_it_stops_early_and_says_so():
    settings = QUICK.model_copy(
        update={"steps": 500, "validate_every": 1, "patience": 2, "learning_rate": 1e-9}
    )
    model = tiny(norm=None)
    steps, better = collect(fine_tune_steps(model, [Annotation(*discs(0))], settings))
    last = max(step.done for step in steps)
    assert last < 500
    best = better.passport.history[-1].steps
    assert last == best + 2
    assert steps[-1].done == last
    assert sum(bool(step.note) for step in steps) == 1


def test_old_and_new_are_judged_alike():
    """What has learnt nothing is no better, and what is said is in the passport."""
    annotations = [Annotation(*discs(seed)) for seed in range(2)]
    learning = QUICK.model_copy(update={"steps": 40})
    base = fine_tune(tiny(norm=None), annotations, learning)
    # So that trying all ways to make objects finds better ones than a few do.
    changes = {"threshold": 0.99, "grow": 2}
    base.passport = base.passport.model_copy(update=changes)
    notes, shown, scores = {}, {}, {}
    for rate in (1e-12, 0.02):
        settings = learning.model_copy(update={"learning_rate": rate})
        steps, better = collect(fine_tune_steps(base, annotations, settings))
        notes[rate] = " ".join(step.note for step in steps)
        shown[rate] = [step.scores["F1@0.5"] for step in steps if step.scores]
        scores[rate] = better.passport.history[-1].scores
        now, before = (scores[rate][f"{old}F1@0.5"] for old in ("", "old "))
        is_said = f"not better than the old one (F1 {now:.2f}, before {before:.2f})"
        losses = [scores[rate][f"{old}loss"] for old in ("", "old ")]
        assert (is_said in notes[rate]) == ((now, -losses[0]) <= (before, -losses[1]))
    assert scores[1e-12]["F1@0.5"] == scores[1e-12]["old F1@0.5"] > 0
    assert scores[1e-12]["AP@0.5"] == scores[1e-12]["old AP@0.5"]
    # On the way, too: what has not changed keeps its scores, from the first on.
    assert set(shown[1e-12]) == {shown[1e-12][0]}
    assert shown[1e-12][0] < scores[1e-12]["F1@0.5"]


def test_more_classes_replace_the_last_layer_and_more_channels_the_first():
    image, labels = discs(0, count=8)
    classes = np.where(labels > 4, 2, np.minimum(labels, 1))
    images = np.stack([image, image / 2, np.zeros_like(image)])
    annotation = Annotation(images, classes, axes="CYX", labels_are="classes")
    base = tiny()
    steps, better = collect(fine_tune_steps(base, [annotation], QUICK))
    notes = " ".join(step.note for step in steps)
    assert "first layer was replaced: it had 1 channel, the images have 3" in notes
    assert "last layer was replaced: it knew 2 classes" in notes
    config = better.network.config
    assert (config.in_channels, config.num_classes) == (3, 3)
    assert len(better.passport.classes) == 3
    assert better.passport.classes[:2] == base.passport.classes
    assert len(better.passport.channels) == 3
    frozen = QUICK.model_copy(update={"freeze_encoder": True})
    with pytest.raises(BadInput, match="do not freeze"):
        fine_tune(base, [annotation], frozen)


def test_objects_for_a_model_of_several_classes_leave_two():
    model = tiny(num_classes=4)
    better = fine_tune(model, [Annotation(*discs(0))], QUICK)
    assert better.network.config.num_classes == 2
    assert len(better.passport.classes) == 2


def test_a_part_of_the_classes_leaves_the_others():
    image, labels = discs(0)
    annotation = Annotation(image, np.minimum(labels, 1), labels_are="classes")
    better = fine_tune(tiny(num_classes=4), [annotation], QUICK)
    assert better.network.config.num_classes == 4


def test_a_frozen_encoder_stays_as_it_was():
    settings = QUICK.model_copy(update={"freeze_encoder": True})
    model = tiny()
    better = fine_tune(model, [Annotation(*discs(0))], settings)
    old, new = weights_of(model), weights_of(better)
    for name, tensor in new.items():
        contracting = name.startswith(("encoder", "bottleneck"))
        assert torch.equal(tensor, old[name]) == contracting, name


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({"num_classes": 1}, {}),
        ({"num_classes": 1}, {"loss": "cross_entropy+dice"}),
        ({"padding": "valid"}, {}),
        (
            {"padding": "valid", "norm": None},
            {"preset": "paper", "learning_rate": 1e-4},
        ),
        ({}, {"loss": "cross_entropy+dice", "border_weights": None}),
        ({}, {"precision": "float32"}),
        ({"norm": "group", "dropout": 0.2}, {"augmentation": NO_AUGMENTATION}),
    ],
    ids=["sigmoid", "sigmoid dice", "valid", "paper", "dice", "float32", "group norm"],
)
def test_variants_train(options, settings):
    settings = QUICK.model_copy(
        update={"batch_size": None, "patch_shape": None, **settings}
    )
    better = fine_tune(tiny(**options), [Annotation(*discs(0))], settings)
    record = better.passport.history[-1]
    assert all(math.isfinite(value) for value in record.scores.values())
    if settings.preset == "paper":
        assert better.network.config.dropout == 0.5
        assert record.settings["batch_size"] == 1


NEEDS_CUDA = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU"
)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
@pytest.mark.parametrize("able", [True, False])
def test_where_bfloat16_is_not_computed_it_learns_in_float32(monkeypatch, device, able):
    """As on GPUs before Ampere, for which no other 16-bit numbers are used."""
    monkeypatch.setattr(loop, "computes_bfloat16", lambda _: able)
    seen = set()

    def look(module, inputs, logits):
        if isinstance(module, UNet) and module.training:
            seen.add(logits.dtype)

    hook = register_module_forward_hook(look)
    try:
        settings = QUICK.model_copy(update={"device": device})
        better = fine_tune(tiny(), [Annotation(*discs(0))], settings)
    finally:
        hook.remove()
    assert seen == {torch.bfloat16 if able else torch.float32}
    assert all(math.isfinite(s) for s in better.passport.history[-1].scores.values())


def test_volumes_train():
    settings = QUICK.model_copy(
        update={"steps": 2, "patch_shape": None, "validate_every": 2}
    )
    image, labels = discs(0, (10, 40, 40), 8)
    annotation = Annotation(image, labels, pixel_size={"Z": 2.0, "Y": 0.5, "X": 0.5})
    better = fine_tune(tiny(ndim=3), [annotation], settings)
    assert better.passport.pixel_size == (2.0, 0.5, 0.5)
    record = better.passport.history[-1]
    assert record.settings["patch_shape"] == [10, 40, 40]
    assert math.isfinite(record.scores["loss"])


def test_stacks_of_planes_train():
    pairs = [discs(seed) for seed in range(4)]
    stack, labels = (np.stack(arrays) for arrays in zip(*pairs, strict=True))
    better = fine_tune(tiny(), [Annotation(stack, labels)], QUICK)
    assert better.passport.history[-1].images == 1


def test_images_are_rescaled_to_the_pixel_size_of_the_model():
    model = tiny()
    model.passport = model.passport.model_copy(update={"pixel_size": (1.0, 1.0)})
    image, labels = discs(0, (128, 128))
    size = {"Y": 0.5, "X": 0.5}
    steps, better = collect(
        fine_tune_steps(model, [Annotation(image, labels, pixel_size=size)], QUICK)
    )
    assert sum("rescaling by 0.50" in step.note for step in steps) == 1
    assert better.passport.pixel_size == (1.0, 1.0)
    assert better.passport.object_diameter == pytest.approx(4.5, abs=2)


def test_previews_follow_what_is_looked_at():
    annotations = [Annotation(*discs(seed)) for seed in range(2)]
    view = View(1, {"Y": slice(0, 20), "X": slice(10, 50)})
    steps = fine_tune_steps(tiny(), annotations, QUICK, view=view)
    previews, sent = {}, None
    while True:
        try:
            step = steps.send(sent)
        except StopIteration:
            break
        sent = None
        if step.preview is not None:
            previews[step.done] = step.preview.shape
        if step.done == 5 and step.loss is not None:
            sent = View(0)
    assert previews == {1: (20, 40), 4: (20, 40), 6: (64, 64), 8: (64, 64)}


def test_what_cannot_be_learnt_from_is_refused_at_once():
    image, labels = discs(0)
    with pytest.raises(BadInput, match="no object is painted"):
        fine_tune(tiny(), [Annotation(image, labels * 0)], QUICK)
    stack = np.stack([image, image])
    both = [Annotation(image, labels), Annotation(stack, labels, axes="CYX")]
    with pytest.raises(BadInput, match="channels"):
        fine_tune(tiny(), both, QUICK)
    wrong = QUICK.model_copy(update={"patch_shape": (32,)})
    with pytest.raises(BadInput, match="patch_shape"):
        fine_tune(tiny(), [Annotation(image, labels)], wrong)


def test_settings_survive_json():
    settings = QUICK.model_copy(update={"border_weights": None})
    text = settings.model_dump_json()
    assert TrainingSettings.model_validate_json(text) == settings
    assert copy.deepcopy(settings) == settings
    assert TrainingStep(1, 2).scores is None


def test_what_got_its_name_meanwhile_stays(tmp_path):
    from napari_unet import load_model, save_model

    annotation = Annotation(*discs(0), regions=[np.array([[0, 0], [0, 63], [63, 63]])])
    project = save_project(tmp_path / "project", [annotation], QUICK, name="mine")
    save_model(tiny(), project / BASE_FILE)
    others = save_model(tiny(), tmp_path / "mine")
    save_model(tiny(), tmp_path / "mine-2")
    before = others.read_bytes()
    path = run_to_end(fine_tune_project_steps(project, others))
    assert path.name == "mine-3.safetensors"
    assert others.read_bytes() == before
    assert load_model(path).passport.name == "mine-3"
    assert load_model(path).passport.history


def test_in_a_process_of_its_own(tmp_path):
    from napari_unet import load_model, save_model
    from napari_unet.steps import in_child

    output = tmp_path / "mine.safetensors"
    annotation = Annotation(*discs(0), regions=[np.array([[0, 0], [0, 63], [63, 63]])])
    project = save_project(tmp_path / "project", [annotation], QUICK)
    base = save_model(tiny(), project / BASE_FILE)
    view = View(0, {"Y": slice(0, 8)})
    steps, path = collect(in_child(fine_tune_project_steps, project, output, view=view))
    assert path == output
    assert [s.done for s in steps if s.loss is not None] == list(range(1, 9))
    assert any(step.preview is not None for step in steps)
    again = fine_tune(load_model(base), [annotation], QUICK)
    record = load_model(path).passport.history[-1]
    assert record.data_sha256 == again.passport.history[-1].data_sha256
