"""Every variant learns: ellipses among rectangles and triangles, in a few steps."""

import itertools

import numpy as np
import pytest
import torch
from skimage import draw
from torch.nn import functional

from napari_unet.network.receptive_field import receptive_field
from napari_unet.network.unet import UNet

UPSAMPLINGS = ("transposed", "nearest", "bilinear", "unpool", "pixel_shuffle")


def shapes(rng: np.random.Generator, side: int) -> tuple[np.ndarray, np.ndarray]:
    """An image of bright shapes in noise, and where its ellipses are."""
    image = rng.normal(0, 0.1, (side, side)).astype(np.float32)
    truth = np.zeros((side, side), dtype=np.int64)
    for _ in range(side * side // 300):
        y, x = rng.uniform(0, side, 2)
        a, b = rng.uniform(3, 7, 2)
        kind = rng.integers(3)
        if kind == 0:
            place = draw.ellipse(y, x, a, b, (side, side), rng.uniform(0, np.pi))
        elif kind == 1:
            place = draw.rectangle((y - a, x - b), (y + a, x + b), shape=(side, side))
            place = tuple(p.astype(int) for p in place)
        else:
            place = draw.polygon([y - a, y + a, y + a], [x, x - b, x + b], (side, side))
        image[place] = rng.uniform(0.7, 1.3)
        truth[place] = kind == 0
    return image, truth


def batches(ndim: int, side: int, margin: int, steps: int):
    """Yield training batches; the eight planes of a volume are the same."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        pairs = [shapes(rng, side) for _ in range(2)]
        images = torch.from_numpy(np.stack([image for image, _ in pairs]))[:, None]
        truths = torch.from_numpy(np.stack([truth for _, truth in pairs]))
        inner = slice(margin, side - margin)
        truths = truths[:, inner, inner]
        if ndim == 3:  # columns
            images = images[:, :, None].expand(-1, -1, 8, -1, -1)
            truths = truths[:, None].expand(-1, 8, -1, -1)
        yield images, truths


def loss_of(logits: torch.Tensor, truths: torch.Tensor) -> torch.Tensor:
    if logits.shape[1] == 1:
        return functional.binary_cross_entropy_with_logits(logits[:, 0], truths.float())
    return functional.cross_entropy(logits, truths)


def relative_loss(steps: int = 60, side: int = 48, **options) -> float:
    """Train; compare the last loss with that of guessing the frequency of ellipses."""
    torch.manual_seed(0)
    network = UNet(1, **({"base_channels": 6, "depth": 2} | options)).train()
    field = receptive_field(network.config)
    side = field.input_size(side + 2 * field.shrink)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    losses, shares = [], []
    for images, truths in batches(network.config.ndim, side, field.shrink, steps):
        loss = loss_of(network(images), truths)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        shares.append(truths.float().mean().item())
    share = np.mean(shares)
    guess = -share * np.log(share) - (1 - share) * np.log(1 - share)
    last = np.mean(losses[-steps // 4 :])
    assert last < 0.8 * losses[0]
    return last / guess


@pytest.mark.parametrize(
    ("padding", "upsampling"),
    [
        pair
        for pair in itertools.product(("same", "valid"), UPSAMPLINGS)
        if pair != ("valid", "unpool")
    ],
)
@pytest.mark.parametrize("skip_connections", [True, False])
def test_learns_in_2d(padding, upsampling, skip_connections):
    loss = relative_loss(
        padding=padding, upsampling=upsampling, skip_connections=skip_connections
    )
    assert loss < 0.75


@pytest.mark.parametrize("norm", ["group", "instance", None])
def test_learns_with_other_norms(norm):
    loss = relative_loss(norm=norm)
    assert loss < 0.75


def test_learns_with_one_output_and_one_convolution():
    loss = relative_loss(num_classes=1, convs_per_level=1)
    assert loss < 0.75


@pytest.mark.parametrize("upsampling", ["transposed", "pixel_shuffle"])
def test_learns_in_3d(upsampling):
    loss = relative_loss(
        ndim=3, base_channels=4, upsampling=upsampling, convs_per_level=1
    )
    assert loss < 0.75
