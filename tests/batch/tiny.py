"""Tiny models with lively answers, and noise to run them on."""

from functools import cache

import numpy as np
import torch

from napari_unet.models.model import ClassInfo, Model, Passport
from napari_unet.network.unet import UNet


def passport_of(*kinds: str) -> Passport:
    """A passport with a background and classes of these kinds."""
    found = [ClassInfo(name=f"{k} {i}", kind=k) for i, k in enumerate(kinds, 1)]
    return Passport(classes=(ClassInfo(name="background", kind="background"), *found))


@cache
def tiny_model(*kinds: str, ndim: int = 2, **passport) -> Model:
    """A model whose classes after the background are of these kinds."""
    kinds = kinds or ("objects",)
    torch.manual_seed(1)
    network = UNet(1, len(kinds) + 1, base_channels=4, depth=1, norm=None, ndim=ndim)
    weight, bias = network.head.weight, network.head.bias
    with torch.no_grad():  # no class wins everywhere
        weight.normal_()
        logits = network(torch.rand(1, 1, *[16] * ndim))[0].flatten(1)
        scale = 2 / logits.std(dim=1)
        weight *= scale.reshape(-1, *[1] * (ndim + 1))
        bias.copy_((bias - logits.mean(dim=1)) * scale)
    model = Model(network.eval())
    update = {"classes": passport_of(*kinds).classes, **passport}
    return Model(network, model.passport.model_copy(update=update))


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.integers(0, 4000, shape).astype(np.uint16)
