"""What OpenVINO is given to run."""

import pytest
from whole_image import trained_model

from napari_unet.inference.openvino_executor import _Graph, _joint
from napari_unet.network.cropping import cropping
from napari_unet.network.receptive_field import receptive_field


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_no_maps_are_joined_in_a_tile(ndim, padding):
    """As the engine cuts one, with the whole halo, so that fewer are multiplied."""
    network = trained_model(ndim=ndim, padding=padding).network
    field = receptive_field(network.config)
    before, after = field.halo
    side, crop = field.input_size(before + 16 + after), None
    if padding == "same":
        keep = [(before, before + 16)] * ndim
        crop = cropping(network.config, keep, [side] * ndim)
    shape = (1, 1, *[side] * ndim)
    joints = [_joint(network, step) for step in range(network.config.depth)]
    graph = _Graph(network, joints, shape, crop).build()
    assert "Concat" not in {layer.get_type_name() for layer in graph.get_ops()}
