"""Networks that run as they are, in the docks: they segment and do not learn."""

import numpy as np
import torch
from onnx_files import unet_file

from napari_unet.models.onnx import import_onnx
from napari_unet.network.unet import UNet


def test_an_onnx_model_segments_and_cannot_be_trained(tune_desk):
    torch.manual_seed(0)
    network = UNet(1, 2, depth=1, base_channels=4).eval()
    on = tune_desk()
    image = on.add_cells()
    on.annotate()
    on.wait_until(on.job.start.isEnabled)
    on.session.source = "theirs.onnx"
    on.session.model = import_onnx(unet_file(network), "theirs")
    on.wait_until(lambda: not on.job.start.isEnabled())
    reason = on.session.model.untrainable_reason
    assert "'theirs' is an ONNX network, which runs as it is" in reason
    on.wait_until(lambda: reason in on.problem)
    assert on.job.start.toolTip() == reason
    found = on.click_segment()
    assert found.data.shape == image.data.shape
    assert np.issubdtype(found.data.dtype, np.integer)
