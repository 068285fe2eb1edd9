"""The human's loop: how much better a model becomes with each corrected image.

Usage::

    python benchmarks/human_loop.py dic_hela [--steps N] [--rounds 1,2,4,8]
    python benchmarks/human_loop.py histology [--data DIR] [--test-limit N]

Starting from the bundled model ``nuclei``, which has never seen such images, the true
labels of 1, 2, 4, 8 images are revealed, as if someone had corrected them. Each round
trains the bundled model anew on all images that are revealed so far, with the default
settings of the Fine-tune dock: once with border weights (the default) and once with
all pixels alike. Then the test images, none of which is ever revealed, are segmented
as the Segment dock does it, with what the new model recommends.

``dic_hela`` reveals frames of sequence 01 and tests on all of sequence 02.
``histology`` reveals the stained tissue (``rgb`` in ``index.csv``) of
``dsb2018/train`` and tests on that of ``dsb2018/val``; the bundled model converts the
colours to gray. The order in which images are revealed is random with a fixed seed.

``DIR`` defaults to the environment variable ``NAPARI_UNET_DATA``, else to
``shared/data`` beside the checkout.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from skimage.io import imread

from napari_unet import Annotation, TrainingSettings, fine_tune, load_model, segment
from napari_unet.training.scores import score_images

if TYPE_CHECKING:
    from collections.abc import Sequence

    from napari_unet import Model

SEED = 0
DEFAULT = TrainingSettings(seed=SEED)


def default_data() -> Path:
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(os.environ.get("NAPARI_UNET_DATA", beside))


def read_dic_hela(data: Path) -> tuple[list[Annotation], list[Annotation]]:
    """What can be revealed, and what is tested on."""

    def read(sequence: str) -> list[Annotation]:
        folder = data / "dic_hela" / sequence
        names = sorted(path.stem for path in (folder / "images").glob("*.tif"))
        return [read_pair(folder, f"{name}.tif", axes="YX") for name in names]

    return read("01"), read("02")


def read_histology(data: Path) -> tuple[list[Annotation], list[Annotation]]:
    """What can be revealed, and what is tested on."""

    def read(part: str) -> list[Annotation]:
        folder = data / "dsb2018" / part
        with (folder / "index.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["kind"] == "rgb"]
        return [read_pair(folder, row["image"], axes="YXS") for row in rows]

    return read("train"), read("val")


def read_pair(folder: Path, image: str, axes: str) -> Annotation:
    """An image with all of its true labels."""
    name = Path(image).stem
    return Annotation(
        imread(folder / "images" / image),
        imread(folder / "labels" / f"{name}.tif").astype(np.int32),
        axes=axes,
        name=name,
    )


READERS = {"dic_hela": read_dic_hela, "histology": read_histology}


def average_precision(model: Model, test: Sequence[Annotation]) -> float:
    """AP at IoU 0.5, pooled over the images."""
    pairs = ((one.labels, segment(one.image, model, axes=one.axes)) for one in test)
    return score_images(pairs).at(0.5).average_precision


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("images", choices=READERS)
    parser.add_argument("--steps", type=int, default=DEFAULT.steps)
    parser.add_argument("--rounds", default="1,2,4,8", help="how many are revealed")
    parser.add_argument("--data", type=Path, default=default_data())
    parser.add_argument("--test-limit", type=int, help="test on so many images only")
    chosen = parser.parse_args(arguments)
    annotated, test = READERS[chosen.images](chosen.data)
    order = np.random.default_rng(SEED).permutation(len(annotated))
    test = test[: chosen.test_limit]
    base = load_model("nuclei")
    with_weights = DEFAULT.model_copy(update={"steps": chosen.steps})
    without = with_weights.model_copy(update={"border_weights": None})
    print(f"{chosen.images}: AP at IoU 0.5 on {len(test)} images never revealed")
    print("             border weights           all pixels alike")
    print("images     AP   steps  minutes      AP   steps  minutes")
    ap = average_precision(base, test)
    print(f"{0:6}  {ap:.3f}                      {ap:.3f}", flush=True)
    for count in map(int, chosen.rounds.split(",")):
        revealed = [annotated[number] for number in order[:count]]
        row = f"{count:6}"
        for settings in (with_weights, without):
            start = time.perf_counter()
            better = fine_tune(base, revealed, settings)
            minutes = (time.perf_counter() - start) / 60
            steps = better.passport.history[-1].steps
            ap = average_precision(better, test)
            row += f"  {ap:.3f}   {steps:5}  {minutes:7.1f}    "
        print(row.rstrip(), flush=True)


if __name__ == "__main__":
    main()
