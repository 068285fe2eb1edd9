"""Training on membranes from scratch, on small parts of the real slices."""

import re

import numpy as np
import pytest
from skimage.io import imread, imsave
from skimage.measure import label
from skimage.metrics import adapted_rand_error
from skimage.segmentation import expand_labels

from napari_unet import load_model


@pytest.fixture(scope="module")
def isbi2012(load):
    return load("isbi2012")


@pytest.fixture(scope="module")
def crops(shared_data, tmp_path_factory):
    """All slices, cut small."""
    folder = tmp_path_factory.mktemp("data")
    for kind in ("images", "labels"):
        (folder / "isbi2012_em" / kind).mkdir(parents=True)
        for path in sorted((shared_data / "isbi2012_em" / kind).glob("*.png")):
            target = folder / "isbi2012_em" / kind / path.name
            imsave(target, imread(path)[:32, :32], check_contrast=False)
    return folder


def test_it_trains_and_prints_both_errors(isbi2012, crops, tmp_path, capsys):
    output = tmp_path / "membranes.safetensors"
    options = ["--steps", "2", "--data", str(crops), "--output", str(output)]
    isbi2012.main(options)
    first, _, *rows = capsys.readouterr().out.splitlines()
    assert first.startswith("2 steps, the best network of step 2")
    for row, name in zip(rows, ("pixel error", "Rand error"), strict=True):
        found = re.fullmatch(rf"{name} +([\d.]+) +([\d.]+) \(at ([\d.]+)\)", row)
        assert found, row
        assert all(0 <= float(number) <= 1 for number in found.groups())
    model = load_model(output)
    assert model.network.config.base_channels == 32
    assert model.passport.history[-1].images == 1


def test_slices_kept_back_are_not_trained_on(isbi2012, crops):
    learnt, truth = isbi2012.read_stack(crops, isbi2012.TRAINING)
    kept, _ = isbi2012.read_stack(crops, isbi2012.KEPT)
    assert (len(learnt), len(kept)) == (20, 4)
    assert not any(np.array_equal(a, b) for a in learnt for b in kept)
    # Most of the tissue is interior, and membranes are dark.
    assert truth.mean() > 0.5
    assert learnt[truth].mean() > learnt[~truth].mean()


def test_errors_are_as_defined(isbi2012, shared_data):
    _, truth = isbi2012.read_stack(shared_data, slice(0, 2))
    random = np.random.default_rng(0)
    for one in truth:
        assert isbi2012.rand_error(one[None], one[None].astype(np.float32), 0.5) == 0
    interior = (0.3 + 0.4 * truth + random.normal(0, 0.15, truth.shape)).clip(0.01, 1)
    interior = interior.astype(np.float32)
    wrong = (truth != (interior > 0.4)).mean()
    assert isbi2012.pixel_error(truth, interior, 0.4) == pytest.approx(wrong)
    expected = [
        adapted_rand_error(
            label(a, connectivity=1), expand_labels(label(b > 0.4, connectivity=1), 512)
        )[0]
        for a, b in zip(truth, interior, strict=True)
    ]
    found = isbi2012.rand_error(truth, interior, 0.4)
    assert found == pytest.approx(np.mean(expected))


def test_the_width_of_predicted_membranes_does_not_count(isbi2012):
    y, x = (abs((side + 10) % 20 - 10) for side in np.mgrid[:61, :61])
    truth = (np.minimum(y, x) > 0)[None]
    wide = (np.minimum(y, x) > 3)[None].astype(np.float32)
    assert isbi2012.rand_error(truth, wide, 0.5) < 0.01
    assert isbi2012.pixel_error(truth, wide, 0.5) > 0.2
    merged = wide.copy()
    merged[0, :, :45] = 1
    assert isbi2012.rand_error(truth, merged, 0.5) > 0.4
