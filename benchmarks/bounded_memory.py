"""Show that memory depends on a plane or a block, and not on the size of the image.

python benchmarks/bounded_memory.py [--model nuclei] [--side 2048] [--skip-large]

Each row is a process of its own. "peak" is the most memory that it ever used, as the
system counted (VmHWM); "before" is what that was when the segmentation began: Python,
torch and the model. Labels go to a zarr, the stacks are made when they are read, and
the large plane and volume are zarrs. Without --model a network made by hand finds
bright discs, so that the number of objects is known.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import zarr

DISTANCE = 40  # between the centres of two discs
RADIUS = 13


class Discs:
    """An image that needs neither a file nor memory.

    Parameters
    ----------
    shape : tuple of int
        The discs lie in the last two axes, the same in every plane.
    """

    dtype = np.dtype(np.uint16)

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape
        self.ndim = len(shape)

    def __getitem__(self, index: tuple[int | slice, ...]) -> np.ndarray:
        ranges = [np.arange(n)[part] for part, n in zip(index, self.shape, strict=True)]
        y, x = np.ix_(*ranges[-2:])
        steps = (v % DISTANCE - DISTANCE / 2 for v in (y, x))
        disc = sum(step**2 for step in steps) < RADIUS**2
        noise = (y * 7919 + x * 104729) % 97
        plane = (200 + 3000 * disc + noise).astype(self.dtype)
        return np.broadcast_to(
            plane, [r.size for r in ranges[:-2] if r.ndim] + [*plane.shape]
        )


def small_model(ndim: int):
    """A network made by hand: bright pixels are objects."""
    import torch

    from napari_unet import Model, UNet

    network = UNet(
        1, 1, depth=1, base_channels=1, convs_per_level=1, norm=None, ndim=ndim
    )
    centre = (0, 0, *[1] * ndim)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network.encoder[0][0].weight[centre] = 1
        network.decoder[0][0].weight[centre] = 1  # the skip connection
        network.head.weight.fill_(20)
        network.head.bias.fill_(-10)
    return Model(network.eval())


def peak() -> float:
    """Return the most memory that this process has ever used, in MiB."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def measure(shape: list[int], ndim: int, image: str, labels: str, model: str) -> dict:
    """Segment one image."""
    from napari_unet import load_model
    from napari_unet.batch.volume import segment_into_steps
    from napari_unet.inference.engine import Predictor
    from napari_unet.inference.instances import ObjectSettings
    from napari_unet.steps import run_to_end

    network = load_model(model) if model else small_model(ndim)
    pixels = zarr.open_array(image, mode="r") if image else Discs(tuple(shape))
    into = create(labels, shape, ndim, "uint32")
    settings = ObjectSettings.recommended(network.passport)
    before, started = peak(), time.perf_counter()
    predictor = Predictor(pixels, network, axes="TZYX"[-len(shape) :], device="cpu")
    folder = Path(labels).parent
    found = run_to_end(segment_into_steps(predictor, settings, into, scratch=folder))
    predictor.close()
    seconds = time.perf_counter() - started
    return {
        "before": before,
        "peak": peak(),
        "seconds": seconds,
        "objects": sum(found.objects),
    }


def create(path: str, shape: list[int], ndim: int, dtype: str) -> zarr.Array:
    side = 512 if ndim == 2 else 128
    loop = len(shape) - ndim
    chunks = (1,) * loop + tuple(min(side, n) for n in shape[loop:])
    return zarr.create_array(path, shape=tuple(shape), chunks=chunks, dtype=dtype)


def write(path: str, shape: list[int], ndim: int) -> None:
    """Write an image of discs, band by band."""
    array, discs = create(path, shape, ndim, "uint16"), Discs(tuple(shape))
    rest = (slice(None),) * (len(shape) - 1)
    step = array.chunks[0]
    for start in range(0, shape[0], step):
        band = (slice(start, min(start + step, shape[0])), *rest)
        array[band] = discs[band]


def run(name: str, shape: list[int], ndim: int, model: str, *, stored: bool) -> None:
    """Measure in a process of its own, and print a row."""
    with tempfile.TemporaryDirectory() as folder:
        image = ""
        if stored:
            image = f"{folder}/image"
            write(image, shape, ndim)
        case = json.dumps([shape, ndim, image, f"{folder}/labels", model])
        done = subprocess.run(
            [sys.executable, __file__, "--case", case],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    row = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{name:<28}{row['before']:>9.0f}{row['peak']:>9.0f}{row['seconds']:>9.1f}"
        f"{np.prod(shape) / row['seconds'] / 1e6:>9.1f}{row['objects']:>11}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="a name of the library, or a path")
    parser.add_argument("--side", type=int, default=512, help="of the planes of stacks")
    parser.add_argument("--skip-large", action="store_true", help="only the stacks")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(*json.loads(options.case))))
        return
    heads = ("before", "peak", "seconds", "Mpixel/s", "objects")
    print(f"{'MiB':<28}" + "".join(f"{h:>9}" for h in heads[:-1]) + f"{heads[-1]:>11}")
    side = options.side
    for planes in (50, 500):
        name = f"{planes} planes of {side}²"
        run(name, [planes, side, side], 2, options.model, stored=False)
    if options.skip_large:
        return
    run("a plane of 20,000²", [20_000, 20_000], 2, options.model, stored=True)
    if not options.model:
        run("a volume of 600³", [600, 600, 600], 3, "", stored=True)


if __name__ == "__main__":
    main()
