"""Train the bundled model ``nuclei``: fluorescent nuclei on a dark background.

Usage::

    python benchmarks/train_nuclei.py train nuclei.pt [--steps N] [--minutes M]
    python benchmarks/train_nuclei.py train better.pt --start nuclei.pt [--rate R]
    python benchmarks/train_nuclei.py tune nuclei.pt [--data DIR]
    python benchmarks/train_nuclei.py export nuclei.pt nuclei.safetensors [--data DIR]
    python benchmarks/train_nuclei.py test nuclei.safetensors [--data DIR]

``train`` keeps the averaged weights, every 250 steps, and can start another cycle of
the learning rate from those of an earlier call; ``tune`` scores settings of
the object separation on the held-out images; ``export`` writes the checkpoint with
its passport; ``test`` scores a checkpoint on the fluorescence images of
``dsb2018/val``.

``DIR`` holds ``dsb2018/train`` with ``images/``, ``labels/`` and ``index.csv`` (Data
Science Bowl 2018 stage1_train = BBBC038, CC0); it defaults to the environment
variable ``NAPARI_UNET_DATA``, else to ``shared/data`` beside the checkout. Of its
gray images with dark background every eighth is held out to choose settings with;
``dsb2018/val`` is never read for training or choosing.

The loop: whole images are normalised as for inference; patches are drawn with random
rotation, scale, flips and elastic deformation, their labels by nearest neighbour;
the gaps are cut and the border weights computed on the deformed labels, so that gaps
are one pixel wide at every scale; then grey values are varied. Loss: weighted
softmax cross-entropy. Pixels of objects weigh 3 against 1 for background (to which
the border term adds up to 10): with 1, the network saw borders where nuclei are
merely textured. AdamW, warm-up and cosine, bfloat16 autocast, and an
exponential moving average of the weights, which is what is kept. Patch *i* depends
only on the seed and *i*.
"""

from __future__ import annotations

import argparse
import base64
import copy
import csv
import datetime
import hashlib
import io
import math
import os
import time
from importlib.metadata import version
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from skimage.io import imread
from skimage.measure import label
from skimage.segmentation import find_boundaries
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from napari_unet.inference.instances import label_objects
from napari_unet.inference.settings import ObjectSettings
from napari_unet.models.checkpoint import read_model, save_model
from napari_unet.models.model import (
    BorderWeights,
    ClassInfo,
    Model,
    Passport,
    TrainingRecord,
)
from napari_unet.models.normalize import Normalization
from napari_unet.network.unet import UNet
from napari_unet.training.scores import Scores, score_images
from napari_unet.training.weight_map import border_weight_map, cut_gaps

PATCH = 192
BATCH = 10
LEARNING_RATE = 2e-3
WARM_UP = 150
W0, SIGMA = 10.0, 5.0
EMA = 0.998
SEED = 1
NORMALIZATION = Normalization()
# Chosen with "tune".
OBJECTS = ObjectSettings(threshold=0.55, minimal_size=25)
THRESHOLDS = (0.4, 0.5, 0.55, 0.6, 0.7, 0.8)
SIZES = (1, 10, 20, 25, 30, 40)
LIBRARIES = ("napari-unet", "torch", "numpy", "scipy", "scikit-image")
CITATION = (
    "Caicedo, J. C. et al. Nucleus segmentation across imaging experiments: the 2018 "
    "Data Science Bowl. Nature Methods 16, 1247-1253 (2019). "
    "https://doi.org/10.1038/s41592-019-0612-7"
)
SMALLEST_DIAMETER = 7.0  # no image is scaled so far down that its nuclei vanish


def default_data() -> Path:
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(os.environ.get("NAPARI_UNET_DATA", beside))


def read_images(folder: Path) -> list[dict]:
    """The gray images with dark background, normalised, sorted by size and name."""
    with (folder / "index.csv").open() as file:
        rows = [r for r in csv.DictReader(file) if r["kind"] == "gray"]
    rows = [r for r in rows if r["dark_background"] == "1"]
    rows.sort(key=lambda r: (int(r["height"]) * int(r["width"]), r["image"]))
    images = []
    for row in rows:
        image = imread(folder / "images" / row["image"])
        labels = imread(folder / "labels" / f"{Path(row['image']).stem}.tif")
        images.append(
            {
                "name": row["image"],
                "raw": image,
                "pixels": NORMALIZATION.fit(image[None]).apply(image[None])[0],
                "labels": labels.astype(np.int32),
                "diameter": float(np.median(diameters(labels))),
            }
        )
    return images


def diameters(labels: np.ndarray) -> np.ndarray:
    """Diameter of the circle of equal area of every object; one value at least."""
    areas = np.bincount(labels.ravel())[1:]
    return np.sqrt(4 / np.pi * areas[areas > 0]) if areas.any() else np.array([20.0])


def split(images: list[dict]) -> tuple[list[dict], list[dict]]:
    """Training and held-out images, the same mixture of sizes in both."""
    held_out = images[4::8]
    return [i for k, i in enumerate(images) if k % 8 != 4], held_out


class Patches(Dataset):
    """Augmented patches: ``(1, y, x)`` image, target, weights."""

    def __init__(self, images: list[dict], first: int, count: int):
        self.images = images
        self.first = first
        self.count = count
        # A compromise between "every image" and "every pixel" equally often.
        size = np.sqrt([image["pixels"].size for image in images])
        self.chance = size / size.sum()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        rng = np.random.default_rng((SEED, self.first + index))
        image = self.images[rng.choice(len(self.images), p=self.chance)]
        pixels, labels = deform(image, rng)
        # A mirrored copy of an object beyond the image's edge is another object.
        labels = cut_gaps(label(labels, connectivity=2))
        weights = border_weight_map(labels, W0, SIGMA, balance_classes=False)
        pixels = vary_grey_values(pixels, rng)
        return (
            torch.from_numpy(pixels)[None],
            torch.from_numpy((labels > 0).astype(np.int64)),
            torch.from_numpy(weights),
        )


def deform(image: dict, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw a patch around a random centre: rotated, scaled, flipped, bent."""
    shape = image["pixels"].shape
    zoom = float(np.clip(np.exp(rng.normal(0, 0.35)), 0.5, 2))
    zoom = max(zoom, min(1.0, SMALLEST_DIAMETER / image["diameter"]))
    angle = rng.uniform(0, 2 * math.pi) if rng.random() < 0.7 else 0.0
    angle += rng.integers(4) * math.pi / 2
    turn = np.array(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    )
    stretch = np.exp(rng.normal(0, 0.06, 2)) * rng.choice([-1, 1], 2) / zoom
    places = np.mgrid[:PATCH, :PATCH].reshape(2, -1) - (PATCH - 1) / 2
    places = (turn * stretch) @ places
    if rng.random() < 0.5:
        coarse = rng.normal(0, rng.uniform(0, 3), (1, 2, 7, 7)).astype(np.float32)
        bend = functional.interpolate(
            torch.from_numpy(coarse), (PATCH, PATCH), mode="bicubic"
        )
        places += bend.numpy().reshape(2, -1) / zoom
    # Centres keep the patch inside the image where that is possible.
    reach = min(PATCH / 2 / zoom, min(shape) / 2)
    centre = [rng.uniform(reach, side - reach) for side in shape]
    places += np.array(centre)[:, None]
    scaled = 2 * places / (np.array(shape)[:, None] - 1) - 1
    grid = torch.from_numpy(scaled[::-1].T.astype(np.float32).copy())
    grid = grid.reshape(1, PATCH, PATCH, 2)

    def sample(values: np.ndarray, mode: str) -> np.ndarray:
        tensor = torch.from_numpy(values.astype(np.float32))[None, None]
        options = {"padding_mode": "reflection", "align_corners": True}
        return functional.grid_sample(tensor, grid, mode, **options)[0, 0].numpy()

    pixels = image["pixels"]
    if zoom < 0.8:  # what a lens of lower magnification would have averaged
        pixels = ndimage.gaussian_filter(pixels, 0.4 / zoom)
    return sample(pixels, "bilinear"), sample(image["labels"], "nearest").astype(int)


def vary_grey_values(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gamma, gain, offset, blur, lower resolution, uneven light, noise."""
    if rng.random() < 0.5:
        low = min(0.0, float(pixels.min()))
        pixels = (pixels - low) ** math.exp(rng.normal(0, 0.3)) + low
    pixels = pixels * math.exp(rng.normal(0, 0.2)) + rng.normal(0, 0.05)
    kind = rng.random()
    if kind < 0.2:
        pixels = ndimage.gaussian_filter(pixels, rng.uniform(0.3, 1.5))
    elif kind < 0.3:
        small = torch.from_numpy(pixels.astype(np.float32))[None, None]
        small = functional.avg_pool2d(small, 2)
        pixels = functional.interpolate(small, (PATCH, PATCH), mode="bilinear")
        pixels = pixels[0, 0].numpy()
    if rng.random() < 0.2:
        coarse = torch.from_numpy(rng.normal(0, 0.1, (1, 1, 3, 3)))
        pixels = pixels + functional.interpolate(
            coarse, (PATCH, PATCH), mode="bicubic"
        )[0, 0].numpy().clip(-0.2, 0.3)
    if rng.random() < 0.5:
        pixels = pixels + rng.normal(0, rng.uniform(0, 0.08), pixels.shape)
    return np.ascontiguousarray(pixels, np.float32)


def predict(network: torch.nn.Module, pixels: np.ndarray) -> np.ndarray:
    """Foreground probability of a whole image, mirrored beyond its edges."""
    pads = [(96, 96 + -side % 16) for side in pixels.shape]
    padded = np.pad(pixels, pads, mode="reflect")
    with torch.inference_mode():
        logits = network(torch.from_numpy(padded)[None, None])
        foreground = logits.softmax(1)[0, 1].numpy()
    inside = tuple(slice(96, 96 + side) for side in pixels.shape)
    return foreground[inside]


def score(network: UNet, images: list[dict]) -> float:
    """AP at IoU 0.5 pooled over the images, at the best of the thresholds."""
    predictions = [predict(network, image["pixels"]) for image in images]
    return max(
        score_settings(predictions, images, ObjectSettings(threshold, 25))
        .at(0.5)
        .average_precision
        for threshold in THRESHOLDS
    )


def save_atomically(state: dict, path: Path) -> None:
    temporary = path.with_suffix(".partial")
    torch.save(state, temporary)
    temporary.replace(path)


def train(arguments: argparse.Namespace) -> None:
    torch.manual_seed(SEED)
    images, held_out = split(read_images(arguments.data / "dsb2018" / "train"))
    print(f"{len(images)} images to train on, {len(held_out)} held out", flush=True)
    network = UNet(1, 2, depth=4, base_channels=16)
    network = network.to(memory_format=torch.channels_last)
    before, cycles = 0, []
    if arguments.start is not None:
        state = torch.load(arguments.start)
        network.load_state_dict(state["network"])
        before, cycles = state["step"], state["cycles"]
    average = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-2)
    patches = Patches(images, before * BATCH, arguments.steps * BATCH)
    losses, start = [], time.perf_counter()
    for step, (pixels, target, weights) in enumerate(
        DataLoader(patches, BATCH, num_workers=1, prefetch_factor=4), start=1
    ):
        seconds = time.perf_counter() - start
        # Either limit ends the training with the full schedule behind it.
        done = max(step / arguments.steps, seconds / 60 / arguments.minutes)
        done = min(done, 1.0)
        rate = arguments.rate * min(step / WARM_UP, (1 + math.cos(math.pi * done)) / 2)
        optimizer.param_groups[0]["lr"] = rate
        network.train()
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = network(pixels)
        loss = functional.cross_entropy(logits.float(), target, reduction="none")
        weights = torch.where(target > 0, arguments.foreground, weights)
        loss = (loss * weights).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        update_average(average, network, min(EMA, step / (step + 10)))
        losses.append(loss.item())
        if step % 50 == 0:
            print(f"{step} {np.mean(losses):.4f} {seconds:.0f} s", flush=True)
            losses.clear()
        if step % 250 == 0 or done >= 1:
            cycle = {
                "steps": step,
                "rate": arguments.rate,
                "foreground_weight": arguments.foreground,
            }
            state = {
                "network": average.state_dict(),
                "step": before + step,
                "cycles": [*cycles, cycle],
            }
            save_atomically(state, arguments.state)
        if done >= 1:
            break
    print("AP 0.5 on held-out images", score(average.eval(), held_out))


@torch.no_grad()
def update_average(average: UNet, network: UNet, decay: float) -> None:
    for old, new in zip(
        average.state_dict().values(), network.state_dict().values(), strict=True
    ):
        if old.is_floating_point():
            old.lerp_(new, 1 - decay)
        else:
            old.copy_(new)


def read_network(path: Path) -> tuple[UNet, dict]:
    """The network and all that is known about its training."""
    state = torch.load(path)
    network = UNet(1, 2, depth=4, base_channels=16)
    network.load_state_dict(state["network"])
    return network.eval(), state


def score_settings(
    predictions: list[np.ndarray], images: list[dict], settings: ObjectSettings
) -> Scores:
    return score_images(
        (image["labels"], label_objects(probability, settings))
        for probability, image in zip(predictions, images, strict=True)
    )


def tune(arguments: argparse.Namespace) -> None:
    _, held_out = split(read_images(arguments.data / "dsb2018" / "train"))
    network, _ = read_network(arguments.state)
    predictions = [predict(network, image["pixels"]) for image in held_out]
    for grow, threshold, size in product((0, 1), THRESHOLDS, SIZES):
        settings = ObjectSettings(threshold, size, grow=grow)
        scores = score_settings(predictions, held_out, settings)
        values = [scores.at(iou).average_precision for iou in (0.5, 0.7, 0.9)]
        print(settings, *(f"{value:.4f}" for value in values), flush=True)


def export(arguments: argparse.Namespace) -> None:
    folder = arguments.data / "dsb2018" / "train"
    images, held_out = split(read_images(folder))
    network, state = read_network(arguments.state)
    predictions = [predict(network, image["pixels"]) for image in held_out]
    scores = score_settings(predictions, held_out, OBJECTS)
    raw = np.concatenate([image["raw"].ravel() for image in images])
    typical = np.median(np.concatenate([diameters(i["labels"]) for i in images]))
    record = TrainingRecord(
        date=datetime.date.today().isoformat(),
        data="Data Science Bowl 2018 stage1_train (BBBC038, CC0): the gray images "
        "with dark background, less every eighth, which is held out",
        data_sha256=hash_files(folder, images),
        images=len(images),
        steps=state["step"],
        settings={
            "script": "benchmarks/train_nuclei.py",
            "seed": SEED,
            "patch": PATCH,
            "batch": BATCH,
            "cycles": state["cycles"],
            "optimizer": "AdamW, weight decay 0.01, warm-up and cosine in each cycle",
            "precision": "bfloat16 autocast",
            "weights_average": EMA,
            "held_out_images": len(held_out),
        },
        scores={
            "held_out_ap50": round(scores.at(0.5).average_precision, 4),
            "held_out_f1_50": round(scores.at(0.5).f1, 4),
            "held_out_mean_ap": round(scores.mean_average_precision, 4),
            "held_out_dice": round(scores.foreground_dice, 4),
        },
    )
    passport = Passport(
        name="nuclei",
        version="1",
        description="Fluorescent nuclei of many sizes, bright on a dark background.",
        citation=CITATION,
        classes=(
            ClassInfo(name="background", kind="background", color="#000000"),
            ClassInfo(name="nucleus", kind="objects", color="#4daf4a"),
        ),
        channels=("nuclei",),
        object_diameter=round(float(typical), 1),
        normalization=NORMALIZATION,
        intensity_range=tuple(float(v) for v in np.percentile(raw, [1, 99.8])),
        threshold=OBJECTS.threshold,
        minimal_size=OBJECTS.minimal_size,
        split_touching=OBJECTS.split_touching,
        grow=OBJECTS.grow,
        border_weights=BorderWeights(preset="paper", w0=W0, sigma=SIGMA),
        history=(record,),
        library_versions={name: version(name) for name in LIBRARIES},
        thumbnail=thumbnail(held_out[len(held_out) // 2]),
    )
    path = save_model(Model(network, passport), arguments.output)
    print(path, path.stat().st_size, "bytes", record.scores)


def hash_files(folder: Path, images: list[dict]) -> str:
    """One sha256 over the image and label files, by name."""
    digest = hashlib.sha256()
    for name in sorted(image["name"] for image in images):
        digest.update((folder / "images" / name).read_bytes())
        digest.update((folder / "labels" / name).with_suffix(".tif").read_bytes())
    return digest.hexdigest()


def thumbnail(image: dict) -> str:
    """A corner of the image with the true outlines in the colour of the class."""
    pixels = (image["pixels"][:96, :96].clip(0, 1) * 255).astype(np.uint8)
    rgb = np.repeat(pixels[..., None], 3, axis=2)
    rgb[find_boundaries(image["labels"], mode="inner")[:96, :96]] = (77, 175, 74)
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def test(arguments: argparse.Namespace) -> None:
    model = read_model(arguments.model)
    settings = ObjectSettings.recommended(model.passport)
    images = read_images(arguments.data / "dsb2018" / "val")
    predictions = [predict(model.network, image["pixels"]) for image in images]
    print(settings)
    print(score_settings(predictions, images, settings).to_table())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    commands = parser.add_subparsers(required=True)
    for run, files in (
        (train, ["state"]),
        (tune, ["state"]),
        (export, ["state", "output"]),
        (test, ["model"]),
    ):
        command = commands.add_parser(run.__name__)
        for file in files:
            command.add_argument(file, type=Path)
        command.add_argument("--data", type=Path, default=default_data())
        if run is train:
            command.add_argument("--steps", type=int, default=6000)
            command.add_argument("--minutes", type=float, default=math.inf)
            command.add_argument("--start", type=Path)
            command.add_argument("--rate", type=float, default=LEARNING_RATE)
            command.add_argument("--foreground", type=float, default=3.0)
        command.set_defaults(run=run)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
