"""Train a new U-Net on the membranes of ISBI 2012, and score it on slices kept back.

Usage::

    python benchmarks/isbi2012.py [--steps N] [--data DIR] [--output MODEL]

The recipe of the U-Net paper (Ronneberger et al. 2015), made affordable for a CPU:
a padded network with batch norm and 32 instead of 64 channels at first, AdamW in
place of SGD; elastic deformation, rotation, flips and grey values are the defaults of
the trainer, and so is what it costs. Slices 00 to 19 are learnt from, of which the
trainer holds out the last four (16 to 19) to keep the best network; slices 20 to 23
are seen only at the end. The prediction is averaged over flips and quarter turns.

Printed are, at the threshold 0.5 and at the ones that are best on slices 16 to 19:

- the pixel error, the part of the pixels on the wrong side of the threshold: the
  "pixel error" of the challenge for a binary result;
- the Rand error, as in the final rules of the challenge (Arganda-Carreras et al. 2015:
  1 - maximal foreground-restricted Rand score after border thinning): 1 - F-score of
  the pairs of pixels, both in true interior, that are in one object. Objects are the
  connected components (of 4 neighbours) of the interior; the predicted ones grow until
  they meet, so that the width of predicted membranes does not count. Once nothing is
  left between them this is scikit-image's ``adapted_rand_error``; its mean over slices.

``DIR`` holds ``isbi2012_em/images`` and ``labels`` (0 membrane, 255 interior); it
defaults to the environment variable ``NAPARI_UNET_DATA``, else to ``shared/data``
beside the checkout.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from skimage.io import imread
from skimage.segmentation import expand_labels

from napari_unet import Annotation, TrainingSettings, predict, save_model
from napari_unet.inference.instances import label_objects
from napari_unet.inference.settings import ObjectSettings
from napari_unet.training.adapt import untrained_model
from napari_unet.training.fine_tune import fine_tune_steps
from napari_unet.training.scores import score_images

if TYPE_CHECKING:
    from collections.abc import Sequence

    from napari_unet import Model

SEED = 0
TRAINING, KEPT = slice(0, 20), slice(20, 24)
HELD_OUT = 0.2  # of the training slices: the trainer takes the last planes of a stack
THRESHOLDS = tuple(round(0.05 * n, 2) for n in range(2, 19))


def default_data() -> Path:
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(os.environ.get("NAPARI_UNET_DATA", beside))


def read_stack(data: Path, part: slice) -> tuple[np.ndarray, np.ndarray]:
    """Images and where the interior of cells is, both (Z, Y, X)."""
    folder = data / "isbi2012_em"
    names = sorted(path.name for path in (folder / "images").glob("*.png"))[part]
    images = np.stack([imread(folder / "images" / name) for name in names])
    truth = np.stack([imread(folder / "labels" / name) for name in names])
    return images, truth > 127


def pixel_error(truth: np.ndarray, interior: np.ndarray, threshold: float) -> float:
    return float(np.mean(truth != (interior > threshold)))


def rand_error(truth: np.ndarray, interior: np.ndarray, threshold: float) -> float:
    pairs = (
        (
            label_objects(true.astype(np.float32), ObjectSettings()),
            expand_labels(
                label_objects(found, ObjectSettings(threshold)), max(found.shape)
            ),
        )
        for true, found in zip(truth, interior, strict=True)
    )
    error = score_images(pairs).adapted_rand_error
    assert error is not None  # there is true interior
    return error


ERRORS = {"pixel error": pixel_error, "Rand error": rand_error}


def predict_interior(model: Model, images: np.ndarray) -> np.ndarray:
    """Probability of cell interior of each pixel of a stack."""
    return predict(images, model, axes="ZYX", test_time_augmentation=True)[1]


def train(images: np.ndarray, truth: np.ndarray, settings: TrainingSettings) -> Model:
    """Train from scratch, and tell how it goes."""
    annotation = Annotation(
        images, truth.astype(np.uint8), axes="ZYX", labels_are="classes"
    )
    model = untrained_model([annotation], seed=settings.seed)
    steps = fine_tune_steps(model, [annotation], settings, name="isbi2012")
    start, losses = time.perf_counter(), []
    while True:
        try:
            step = next(steps)
        except StopIteration as stop:
            return stop.value
        if step.loss is not None:
            losses.append(step.loss)
        if step.scores is not None and losses:
            minutes = (time.perf_counter() - start) / 60
            words = ", ".join(
                f"{key} {value:.3f}" for key, value in step.scores.items()
            )
            print(
                f"step {step.done}, {minutes:.1f} min: training loss "
                f"{np.mean(losses):.3f}, held out {words}",
                file=sys.stderr,
                flush=True,
            )
            losses.clear()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--data", type=Path, default=default_data())
    parser.add_argument("--output", type=Path, help="save the model there")
    chosen = parser.parse_args(arguments)
    settings = TrainingSettings(
        steps=chosen.steps,
        validate_every=min(chosen.steps, 250),
        patience=100,
        held_out=HELD_OUT,
        seed=SEED,
    )
    start = time.perf_counter()
    images, truth = read_stack(chosen.data, TRAINING)
    model = train(images, truth, settings)
    minutes = (time.perf_counter() - start) / 60
    best = model.passport.history[-1].steps
    print(f"{chosen.steps} steps, the best network of step {best}, {minutes:.1f} min")
    if chosen.output is not None:
        save_model(model, chosen.output)
    held = slice(len(images) - round(HELD_OUT * len(images)), None)
    known = truth[held], predict_interior(model, images[held])
    images, truth = read_stack(chosen.data, KEPT)
    interior = predict_interior(model, images)
    print("slices 20 to 23   at 0.5   best threshold of slices 16 to 19")
    for name, error in ERRORS.items():
        threshold = min(THRESHOLDS, key=lambda one: error(*known, one))
        half, best = (error(truth, interior, at) for at in (0.5, threshold))
        print(f"{name:16}  {half:.4f}   {best:.4f} (at {threshold})")


if __name__ == "__main__":
    main()
