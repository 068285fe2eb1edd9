"""Megapixels per second from an integer image to a class map, against MONAI.

    python benchmarks/inference.py [--side 4096] [--base-channels 32] [--device auto]

All run the same network on the same image, one after the other in this process:

- MONAI's `sliding_window_inference` with windows of 1024² (512² on a GPU) and its
  default overlap of 0.25, in float32 and with 16-bit autocast;
- napari-unet's engine, whose tiles have the whole halo and are exact, in float32
  and with its default precision;
- the raw forward: what runs the network here, on windows as large as a tile, without
  halo, normalisation or anything else: the most that any tiling could reach.

The network is trained on a sample for some steps, so that its class maps mean
something. Printed are ratios, and how many pixels have the class that float32 gives.
"""

from __future__ import annotations

import argparse
import platform
import threading
import time
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from monai.inferers import sliding_window_inference

from napari_unet import (
    Annotation,
    Model,
    TrainingSettings,
    UNet,
    fine_tune,
    load_model,
)
from napari_unet.files.images import read_image
from napari_unet.inference import compiled
from napari_unet.inference.backends import choose_device
from napari_unet.inference.compiled import CompiledLater
from napari_unet.inference.engine import Predictor
from napari_unet.inference.executors import Executor, make_executor
from napari_unet.sample import sample_dir
from napari_unet.steps import run_to_end

if TYPE_CHECKING:
    from collections.abc import Callable


class Row(NamedTuple):
    """One way to run the network."""

    name: str
    seconds: float
    classes: np.ndarray | None = None


def sample(side: int) -> np.ndarray:
    """A plane of real nuclei with camera noise, uint16."""
    tile = read_image(sample_dir() / "nuclei.tif").data.astype(np.uint16)
    repeats = -(-side // min(tile.shape))
    image = np.tile(tile, (repeats, repeats))[:side, :side] * np.uint16(200)
    return image + np.random.default_rng(0).integers(0, 200, image.shape, np.uint16)


def trained(base_channels: int, depth: int, steps: int) -> Model:
    torch.manual_seed(0)
    labels = read_image(sample_dir() / "nuclei_labels.tif").data
    image = read_image(sample_dir() / "nuclei.tif").data
    network = UNet(1, 2, base_channels=base_channels, depth=depth)
    settings = TrainingSettings(steps=steps, patch_shape=(128, 128))
    return fine_tune(Model(network), [Annotation(image, labels)], settings)


def likelier(two: torch.Tensor) -> torch.Tensor:
    """Of two classes, for MONAI as for us: argmax is many times slower on a CPU."""
    return (two[1:] > two[:1]).to(torch.uint8)


def monai_classes(
    image: np.ndarray, model: Model, device: str, *, reduced: bool
) -> np.ndarray:
    """What MONAI's users run: normalised once, windows, argmax."""
    scaling = model.passport.normalization.fit(image[None])
    tensor = torch.from_numpy(scaling.apply(image[None]))[None].to(device)
    network = model.network.to(device).eval()
    window = min(image.shape[0], 1024 if device == "cpu" else 512)
    half = torch.bfloat16 if device == "cpu" else torch.float16
    with torch.inference_mode(), torch.autocast(device, half, enabled=reduced):
        logits = sliding_window_inference(
            tensor, (window, window), 1 if device == "cpu" else 8, network, overlap=0.25
        )
    assert isinstance(logits, torch.Tensor)
    classes: np.ndarray = likelier(logits[0])[0].cpu().numpy()
    network.cpu()
    return classes


def our_classes(
    image: np.ndarray, model: Model, device: str, *, reduced: bool
) -> np.ndarray:
    predictor = Predictor(
        image, model, device=device, precision="auto" if reduced else "float32"
    )
    with closing(predictor):
        classes: np.ndarray = run_to_end(predictor.unit_steps(0, likelier))
    return classes[0]


@torch.inference_mode()  # as the windows that are compiled for
def raw_seconds(image: np.ndarray, executor: Executor, device: str) -> float:
    """Seconds of the bare network for as many pixels, on windows of a tile's size."""
    side = min(1376 if device == "cpu" else 2048, image.shape[0] // 16 * 16)
    window = torch.rand(1, 1, side, side, device=device)  # of zeros a GPU is faster
    stop = threading.Event()
    warm_up(partial(executor.run, window, None, stop), device)
    times = max(1, round(image.size / side**2))
    synchronize(device)
    started = time.perf_counter()
    for _ in range(times):
        executor.run(window, None, stop)
    synchronize(device)
    return (time.perf_counter() - started) / times / side**2 * image.size


def warm_up(run: Callable[[], object], device: str) -> None:
    """Do before the clock starts what is slow at first: a GPU compiles, too."""
    for _ in range(3 if device == "cuda" else 1):
        run()
        CompiledLater.wait()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(image: np.ndarray, model: Model, device: str) -> list[Row]:
    """Run everything once, the slowest first."""
    ways: list[tuple[str, Callable[..., np.ndarray], bool]] = [
        ("MONAI, float32", monai_classes, False),
        ("MONAI, 16-bit autocast", monai_classes, True),
        ("napari-unet, float32", our_classes, False),
        ("napari-unet", our_classes, True),
    ]
    rows = []
    for name, run, reduced in ways:
        first = image if device == "cuda" else image[:256, :256]
        warm_up(partial(run, first, model, device, reduced=reduced), device)
        started = time.perf_counter()
        classes = run(image, model, device, reduced=reduced)
        rows.append(Row(name, time.perf_counter() - started, classes))
    for reduced in (False, True):
        executor = make_executor(model.network, torch.device(device), reduced)
        seconds = raw_seconds(image, executor, device)
        rows.append(Row(f"raw forward ({executor.title})", seconds))
    return rows


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=4096)
    parser.add_argument("--base-channels", type=int, default=32)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=60, help="of the training")
    parser.add_argument("--model", help="a trained one, instead of training")
    told = parser.parse_args(arguments)
    device = choose_device(told.device).name
    compiled.USED_SECONDS = 0
    if told.model:
        model = load_model(told.model)
    else:
        model = trained(told.base_channels, told.depth, told.steps)
    image = sample(told.side)
    rows = measure(image, model, device)
    weights = sum(p.numel() for p in model.network.parameters())
    print(f"{told.side} x {told.side} uint16, {weights / 1e6:.1f} M weights, {device}")
    print(f"{platform.processor() or platform.machine()}, {describe_cores()}")
    monai, monai16, exact, ours, *_, best = rows
    assert exact.classes is not None
    for row in rows:
        line = (
            f"{row.name:34} {row.seconds:7.1f} s {image.size / row.seconds / 1e6:8.2f}"
        )
        line += f" megapixels/s  {row.seconds / ours.seconds:6.2f} x"
        if row.classes is not None:
            line += f"  {np.mean(row.classes == exact.classes):.4%} as float32"
        print(line)
    print(
        f"napari-unet is {monai.seconds / ours.seconds:.1f} times as fast as MONAI and "
        f"{monai16.seconds / ours.seconds:.1f} times as fast as MONAI with 16 bits; it "
        f"reaches {best.seconds / ours.seconds:.0%} of the raw forward."
    )
    return rows


def describe_cores() -> str:
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{torch.get_num_threads()} threads, torch {torch.__version__}, {where}"


if __name__ == "__main__":
    main()
