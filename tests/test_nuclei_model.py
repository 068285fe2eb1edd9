"""The bundled model, through the command line, on real images it has not seen."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from typing import TYPE_CHECKING

from napari_unet.models.library import BUNDLED, load_model

if TYPE_CHECKING:
    from pathlib import Path


def run(*arguments: object) -> str:
    command = [sys.executable, "-m", "napari_unet", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_fluorescence_images(shared_data: Path, tmp_path: Path):
    """AP at IoU 0.5, TP / (TP + FP + FN) over the data set, is at least 0.80."""
    validation = shared_data / "dsb2018" / "val"
    with (validation / "index.csv").open() as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if (row["kind"], row["dark_background"]) == ("gray", "1")
        ]
    true = tmp_path / "true"
    true.mkdir()
    images = []
    for row in rows:
        images.append(validation / "images" / row["image"])
        labels = images[-1].with_suffix(".tif").name
        (true / labels).symlink_to(validation / "labels" / labels)
    run("segment", *images, "-m", "nuclei", "-o", tmp_path / "found", "--quiet")
    scores = json.loads(run("evaluate", tmp_path / "found", true, "--json"))
    assert scores["n_images"] == len(rows) > 50
    at_half = scores["thresholds"][0]
    assert at_half["iou_threshold"] == 0.5
    assert at_half["average_precision"] >= 0.80


def test_passport_says_where_it_comes_from():
    passport = load_model("nuclei").passport
    assert (BUNDLED / "nuclei.safetensors").stat().st_size <= 8_000_000
    assert [info.kind for info in passport.classes] == ["background", "objects"]
    (*_, training) = passport.history
    assert "BBBC038" in training.data
    assert training.steps > 0
    assert training.images > 0
    assert len(training.data_sha256) == 64
    assert passport.citation
    assert passport.object_diameter
    assert passport.border_weights
