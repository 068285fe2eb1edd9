"""The one line that docks show of a model."""

import pytest

from napari_unet.models.library import load_model
from napari_unet.models.model import Model, TrainingRecord, default_passport
from napari_unet.network.unet import UNet

FINE_TUNED = {"loss": 0.3, "IoU": 0.71, "F1@0.5": 0.9, "AP@0.5": 0.82}


def described(**scores: float) -> str:
    network = UNet(depth=1, base_channels=2)
    record = TrainingRecord(date="2026-01-01", data="cells", scores=scores)
    facts = {"history": (record,)} if scores else {}
    return Model(network, default_passport(network).model_copy(update=facts)).describe()


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ({}, "object · 2D"),
        ({"loss": 0.3, "old AP@0.5": 0.5}, "object · 2D"),
        (FINE_TUNED, "object · 2D · AP50\u00a00.82"),
        (FINE_TUNED | {"held_out_ap50": 0.5}, "object · 2D · AP50\u00a00.50"),
        ({"F1@0.5": 0.9, "IoU": 0.71}, "object · 2D · F1\u00a00.90"),
        ({"held_out_mean_ap": 0.54}, "object · 2D · mean AP\u00a00.54"),
        ({"held_out_dice": 0.93}, "object · 2D · Dice\u00a00.93"),
        ({"IoU": 0.71}, "object · 2D · IoU\u00a00.71"),
    ],
)
def test_the_held_out_score_that_there_is(scores, words):
    assert described(**scores) == words


def test_the_bundled_model():
    assert "AP50\u00a00.83" in load_model("nuclei").describe()
