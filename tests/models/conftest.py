import pytest
import torch

from napari_unet.models.checkpoint import save_model
from napari_unet.models.model import Model
from napari_unet.network.unet import UNet


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny networks run faster without handing work to threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def trained():
    """Return a function: a model after a few steps of training on noise."""

    def train(**options) -> Model:
        torch.manual_seed(0)
        network = UNet(**({"base_channels": 2, "depth": 1} | options)).train()
        optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
        side = 32 if network.config.padding == "same" else 204
        for _ in range(2):
            shape = (2, network.config.in_channels, *[side] * network.config.ndim)
            loss = network(torch.randn(shape)).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return Model(network.eval())

    return train


@pytest.fixture
def model(trained) -> Model:
    return trained()


@pytest.fixture
def file(model, tmp_path):
    """A small checkpoint."""
    return save_model(model, tmp_path / "small.safetensors")
