"""Imported models are models: their tiles are exact, they can be fine-tuned."""

import numpy as np
import pytest
import torch
from originals import (
    Buda,
    Classic,
    DownConv,
    Milesial,
    Monai,
    OneConvolution,
    Segmentify,
    TorchEM,
    Walkthrough,
)
from test_foreign import randomise

from napari_unet import Annotation, Model, TrainingSettings, fine_tune, predict
from napari_unet.models.foreign import recognise

NETWORKS = {
    "milesial": lambda: Milesial(1, 2),
    "mateuszbuda": lambda: Buda(1),
    "segmentify": Segmentify,
    "classic": Classic,
    "torch-em": lambda: TorchEM(2, "BatchNorm"),
    "monai": lambda: Monai(2, "batch"),
    "walkthrough": Walkthrough,
    "down-conv": DownConv,
    "one-repeat": lambda: OneConvolution(up="repeat"),
    "one-bare": lambda: OneConvolution(up="bare"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_tiles_are_exact(name):
    model = recognise(randomise(NETWORKS[name]()).state_dict())
    assert model.inexact_reason is None
    image = np.random.default_rng(0).random((100, 118), np.float32)
    whole, tiled = (
        predict(
            image, model, axes="YX", device="cpu", precision="float32", tile_shape=shape
        )
        for shape in ((1000, 1000), (64, 80))
    )
    assert np.abs(whole - tiled).max() < 1e-5
    assert whole.std() > 1e-3


def test_aligned_corners_are_blended():
    model = recognise(randomise(Milesial(1, 2, bilinear=True)).state_dict())
    image = np.random.default_rng(0).random((150, 170), np.float32)
    tiled = predict(image, model, axes="YX", device="cpu", tile_shape=(128, 128))
    assert tiled.shape == (2, 150, 170)
    assert np.isfinite(tiled).all()


@pytest.mark.parametrize(
    ("make", "channels"),
    [
        (lambda: Segmentify(1, 2), 1),
        (lambda: Segmentify(1, 2), 2),
        (lambda: TorchEM(2, "BatchNorm", outputs=1, depth=2), 2),
        (lambda: Milesial(1, 1, bilinear=True, width=2), 1),
    ],
    ids=["segmentify", "segmentify of 2", "torch-em of 2", "milesial-bilinear"],
)
def test_fine_tuning(make, channels):
    """Also with other channels, for which the first layer is replaced."""
    generator = np.random.default_rng(0)
    image = generator.integers(0, 255, (channels, 64, 64), np.uint8)
    labels = np.zeros((64, 64), np.uint8)
    labels[8:30, 8:30], labels[40:60, 20:50] = 1, 2
    model = recognise(randomise(make()).state_dict())
    annotation = Annotation(image, labels, axes="CYX")
    better = fine_tune(model, [annotation], TrainingSettings(steps=2, batch_size=1))
    assert isinstance(better, Model)
    assert better.network.config.in_channels == channels
    changed = [
        not torch.equal(old, new)
        for old, new in zip(
            model.network.parameters(), better.network.parameters(), strict=True
        )
    ]
    assert any(changed)


def test_a_frozen_encoder_includes_the_bridge():
    image = np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)
    labels = np.zeros((64, 64), np.uint8)
    labels[8:30, 8:30] = 1
    model = recognise(randomise(Segmentify(1, 2)).state_dict())
    settings = TrainingSettings(steps=2, batch_size=1, freeze_encoder=True)
    better = fine_tune(model, [Annotation(image, labels)], settings).network
    assert torch.equal(better.bridge.weight, model.network.bridge.weight)
    assert not torch.equal(better.head.weight, model.network.head.weight)
