"""Real checkpoints of other people, where they are present."""

import csv
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from originals import Classic, Segmentify
from skimage.io import imread

from napari_unet import load_model, predict


@pytest.fixture(scope="module")
def checkpoints(shared_data: Path) -> Path:
    return shared_data / "checkpoints"


def same_as(network, model, state, *, sigmoid):
    """Whether the original with the file's own weights gives the same."""
    network.load_state_dict(state, strict=True)
    image = torch.rand(1, 1, 64, 48, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        theirs, ours = network.eval()(image), model.network(image)
    assert theirs.std() > 1e-4
    return torch.allclose(ours.sigmoid() if sigmoid else ours, theirs, atol=1e-5)


def test_segmentify_is_its_own_definition_and_finds_nuclei(checkpoints, shared_data):
    path = checkpoints / "segmentify_Nuclei.pth"
    model = load_model(path)
    state = torch.load(path, weights_only=True, map_location="cpu")["model_state"]
    assert same_as(Segmentify(1, 8), model, state, sigmoid=True)
    assert model.inexact_reason is None
    folder = shared_data / "dsb2018" / "val"
    with (folder / "index.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["dark_background"] == "1"]
    scores = []
    for row in [row for row in rows if row["kind"] == "gray"][::20]:
        image = imread(folder / "images" / row["image"])
        image = image if image.ndim == 2 else image[..., 0]
        labels = (folder / "labels" / row["image"]).with_suffix(".tif")
        true = tifffile.imread(labels) > 0
        found = predict(image, model, axes="YX")[-1] > 0.5
        scores.append((found & true).sum() / (found | true).sum())
    assert len(scores) >= 5
    assert np.mean(scores) > 0.75


def test_the_classic_network_is_its_own_definition(checkpoints):
    path = checkpoints / "segmentmytif_flair_toy_ep10_scale0_125.pth"
    model = load_model(path)
    state = torch.load(path, weights_only=True, map_location="cpu")
    assert same_as(Classic(1, 19, 8), model, state, sigmoid=False)
    assert len(model.passport.classes) == 19
    image = np.random.default_rng(0).integers(0, 255, (150, 130), np.uint8)
    # Tiles are exact.
    whole = predict(image, model, axes="YX", precision="float32")
    tiled = predict(image, model, axes="YX", precision="float32", tile_shape=(112, 112))
    assert np.abs(whole - tiled).max() < 1e-4


def test_bioimageio_weights_reproduce_their_test_tensors(checkpoints):
    folder = checkpoints / "bioimageio_unet2d_fixed_shape"
    model = load_model(folder / "weights.pt")
    image = np.load(folder / "test_input.npy")
    image = (image - image.mean()) / (image.std() + 1e-6)
    with torch.inference_mode():
        logits = model.network(torch.from_numpy(image).float()).numpy()
    assert np.abs(logits - np.load(folder / "test_output.npy")).max() < 1e-4
    assert "instance normalisation" in model.inexact_reason
    assert model.passport.normalization.method == "mean_std"
