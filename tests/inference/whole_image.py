"""The reference that tiles must agree with, made without the engine.

Sizes and margins are worked out here anew, from the paper's figure 1, so that a
mistake in `receptive_field` cannot hide itself.
"""

import os
from functools import cache

import numpy as np
import torch
from hypothesis import strategies as st

from napari_unet.models.model import Model
from napari_unet.models.normalize import Normalization
from napari_unet.network.unet import UNet

TOLERANCE = 1e-4
# For a long search: NAPARI_UNET_EXAMPLES=20 pytest tests/inference
EXAMPLES = int(os.environ.get("NAPARI_UNET_EXAMPLES", "1"))


@cache
def trained_network(**options) -> UNet:
    """A network with uneven weights and batch statistics: trained on noise."""
    torch.manual_seed(0)
    network = UNet(**({"base_channels": 2, "depth": 2} | options)).train()
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
    config = network.config
    side = legal_side(config, 1 + 2 * shrink_of(config) + (2 << config.depth))
    for _ in range(3):
        noise = 0.5 + 2 * torch.randn(2, config.in_channels, *[side] * config.ndim)
        loss = -network(noise).std()  # away from a constant answer
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
    return network.eval()


def trained_model(normalization: Normalization | None = None, **options) -> Model:
    model = Model(trained_network(**options))
    if normalization:
        passport = model.passport.model_copy(update={"normalization": normalization})
        model = Model(model.network, passport)
    return model


def context_of(config) -> int:
    """Pixels that the convolutions of a network look aside, all levels together."""
    return config.convs_per_level * (3 * 2**config.depth - 2)


def shrink_of(config) -> int:
    """Pixels that a network loses on each side."""
    return context_of(config) if config.padding == "valid" else 0


def legal_side(config, at_least: int) -> int:
    """The next side that can be halved at every level."""
    step = 2**config.depth
    rest = -2 * config.convs_per_level if config.padding == "valid" else 0
    return at_least + (rest - at_least) % step


def run_once(network: UNet, image: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        logits = network(torch.from_numpy(np.ascontiguousarray(image))[None])[0]
        one = len(logits) == 1
        return (logits.sigmoid() if one else logits.softmax(0)).numpy()


def run_turned(network: UNet, image: np.ndarray) -> np.ndarray:
    """The mean over the eight turns and flips of a square."""
    results = []
    for quarters in range(4):
        for flip in (False, True):
            turned = np.rot90(image, quarters, (-2, -1))
            turned = np.flip(turned, -1) if flip else turned
            result = run_once(network, turned)
            result = np.flip(result, -1) if flip else result
            results.append(np.rot90(result, -quarters, (-2, -1)))
    return np.mean(results, axis=0)


def mirrored_prediction(
    network: UNet, normalised: np.ndarray, turns: bool = False
) -> np.ndarray:
    """Mirror the whole image far beyond the halo, run once, crop.

    ``normalised`` has the shape (channel, *spatial).
    """
    config = network.config
    shrink = shrink_of(config)
    # Upsampling looks up to two pixels of the bottom further than the convolutions.
    step = 2**config.depth
    margin = shrink + 2 * step - (shrink - context_of(config)) // step * step
    pads = [(0, 0)]
    for side in normalised.shape[1:]:
        total = legal_side(config, margin + side + margin)
        pads.append((margin, total - margin - side))
    whole = np.pad(normalised, pads, mode="reflect")
    result = (run_turned if turns else run_once)(network, whole)
    first = margin - shrink
    inner = [slice(first, first + side) for side in normalised.shape[1:]]
    return result[(slice(None), *inner)]


def reference(model: Model, image: np.ndarray, turns: bool = False) -> np.ndarray:
    """Predict without the engine; ``image`` is (channel, *spatial)."""
    normalised = model.passport.normalization.fit(image).apply(image)
    return mirrored_prediction(model.network, normalised, turns)


def random_image(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Noise with structure at every scale, (channel, *spatial) uint16."""
    rng = np.random.default_rng(seed)
    image = rng.normal(size=shape)
    for axis in range(1, len(shape)):
        image += 2 * np.cumsum(rng.normal(size=shape), axis=axis) / shape[axis] ** 0.5
    return (10_000 + 1000 * image).clip(0, 65535).astype(np.uint16)


def exact_options(ndim: int) -> st.SearchStrategy[dict]:
    """Every variant whose tiles must be exact."""
    return st.fixed_dictionaries(
        {
            "in_channels": st.integers(1, 2),
            "num_classes": st.integers(1, 3),
            "depth": st.integers(1, 3 if ndim == 2 else 2),
            "convs_per_level": st.integers(1, 2),
            "padding": st.sampled_from(["same", "valid"]),
            "upsampling": st.sampled_from(
                ["transposed", "nearest", "bilinear", "unpool", "pixel_shuffle"]
            ),
            "norm": st.sampled_from(["batch", None]),
            "skip_connections": st.booleans(),
            "ndim": st.just(ndim),
        }
    ).filter(lambda o: (o["padding"], o["upsampling"]) != ("valid", "unpool"))


@st.composite
def shapes_and_tiles(draw, options: dict, largest: int, tiles: int = 4):
    """Sides of an image and of tiles: up to about that many along an axis."""
    sides = st.integers(1, largest)
    shape = draw(st.tuples(*[sides] * options["ndim"]), "shape")
    tile = [draw(st.integers(max(1, side // tiles), side + 20)) for side in shape]
    return shape, tuple(tile)


@st.composite
def parts(draw, side: int) -> slice:
    start = draw(st.integers(0, side - 1))
    return slice(start, draw(st.integers(start + 1, side)))
