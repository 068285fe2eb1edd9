"""MONAI's own BasicUNet, where that is installed, not only our copy of it."""

import warnings

import pytest
import torch
from test_foreign import randomise

from napari_unet.errors import BadModel
from napari_unet.models.foreign import recognise
from napari_unet.models.library import load_model


@pytest.fixture(scope="module")
def basic_unet():
    with warnings.catch_warnings(action="ignore"):  # it imports what is deprecated
        nets = pytest.importorskip("monai.networks.nets.basic_unet")
    return nets.BasicUNet


@pytest.mark.parametrize(
    ("ndim", "options"),
    [
        (2, {}),
        (2, {"norm": "batch", "in_channels": 3, "out_channels": 5}),
        (3, {"bias": False}),
    ],
)
def test_basic_unet(basic_unet, ndim, options, tmp_path):
    options = {"features": (4, 4, 8, 16, 32, 4)} | options
    torch.manual_seed(0)
    network = randomise(basic_unet(spatial_dims=ndim, **options))
    torch.save({"state_dict": network.state_dict()}, tmp_path / "monai.pt")
    model = load_model(tmp_path / "monai.pt")
    channels = options.get("in_channels", 1)
    image = torch.randn(1, channels, *(32, 48, 32)[:ndim])
    with torch.inference_mode():
        theirs, ours = network(image), model.network(image)
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert theirs.std() > 1e-3


@pytest.mark.parametrize("upsample", ["pixelshuffle", "nontrainable"])
def test_its_other_upsamplings_are_refused_by_name(basic_unet, upsample):
    state = basic_unet(features=(4, 4, 8, 16, 32, 4), upsample=upsample).state_dict()
    with pytest.raises(
        BadModel, match=r"closest to MONAI BasicUNet.*upcat_4\.upsample"
    ):
        recognise(state)


def test_norms_that_look_alike_are_told_of(basic_unet):
    """A group norm has the tensors of an instance norm."""
    group = ("group", {"num_groups": 4})
    made = basic_unet(features=(4, 4, 8, 16, 32, 4), norm=group)
    model = recognise(made.state_dict())
    assert "does not say whether another activation, or group norms" in (
        model.passport.description
    )
