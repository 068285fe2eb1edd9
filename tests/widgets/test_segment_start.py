"""What is made ready before the click, and what is not drawn again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from desk import intensity_model, spots

from napari_unet.inference import executors
from napari_unet.models.checkpoint import save_model


@pytest.fixture
def made(monkeypatch) -> list[torch.device]:
    """The devices of all executors, as they are made."""
    devices: list[torch.device] = []
    make = executors.make_executor

    def make_and_note(network, device, reduced):
        devices.append(device)
        return make(network, device, reduced)

    monkeypatch.setattr(executors, "make_executor", make_and_note)
    return devices


@pytest.mark.skipif(torch.accelerator.is_available(), reason="of the CPU")
def test_a_click_uses_what_was_made_when_the_model_was_loaded(desk, tmp_path, made):
    on = desk()
    on.viewer.add_image(spots(64, 64), name="cells")
    save_model(intensity_model(threshold=0.4), tmp_path / "mine.safetensors")
    on.dock._chooser.open_checkpoint(str(tmp_path / "mine.safetensors"))
    on.wait_until(lambda: not on.dock._chooser.loading)
    assert made == [torch.device("cpu")]
    on.segment()
    assert on.labels.data.max() == 16
    assert made == [torch.device("cpu")]


def test_labels_that_stay_in_place_are_drawn_once(desk):
    on = desk()
    place = {
        "scale": (0.5, 0.25),
        "translate": (1, 2),
        "rotate": 30,
        "units": ("um", "um"),
        "affine": np.array([[1, 0.1, 5], [0, 1.2, 6], [0, 0, 1]]),
        "axis_labels": ("y", "x"),
    }
    image = on.viewer.add_image(spots(64, 64), name="cells", **place)
    on.segment()
    drawn = []
    on.labels.events.set_data.connect(drawn.append)
    on.labels.data[:] = 0
    on.segment()
    assert on.labels.data.max() == 16
    assert len(drawn) == 1
    image.scale = (0.25, 0.5)
    on.segment()
    np.testing.assert_allclose(on.labels.scale, (0.25, 0.5))
    np.testing.assert_allclose(on.labels.translate, (1, 2))
