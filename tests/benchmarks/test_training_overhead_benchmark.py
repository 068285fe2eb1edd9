"""The benchmark of the training lets both sides do the same, in small."""

import pytest
import torch

from napari_unet import Annotation, Model, TrainingSettings, UNet
from napari_unet.training import loop
from napari_unet.training.feed import Feed

NEEDS_CUDA = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU"
)


@pytest.fixture(scope="module")
def benchmark(load):
    return load("training_overhead")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
def test_both_learn_the_same_from_the_same_patches(benchmark, device):
    torch.manual_seed(0)
    model = Model(UNet(1, 2, depth=1, base_channels=4))
    annotations = [Annotation(*benchmark.discs(seed, 128)) for seed in range(2)]
    settings = TrainingSettings(
        steps=benchmark.TURNS + 1,
        validate_every=100,
        patch_shape=(32, 32),
        batch_size=2,
        device=device,
    )
    found = benchmark.compare(model, annotations, settings)
    assert (found.plan.batch_size, found.plan.shape) == (2, (32, 32))
    bare, training = found.losses
    assert bare == pytest.approx(training, rel=1e-4)
    assert min(found.bare, found.training, found.patch) > 0
    assert 0 < found.waited < 1
    assert loop.Feed is Feed
