"""How fast a batch over many small files is, against the engine on the same pixels.

    python benchmarks/batch_throughput.py [--files 200] [--side 512] [--measure]

The engine's own rate is that of `segment` on the images in memory, one after the
other: nothing is read or written. A batch also reads each file, writes a label file, a
picture and a line of the journal, and waits until they are on the disk; it should
reach 90 % of that. With --measure it also measures each object. Both run in turn, in
parts, so that what else the machine does befalls both.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import tifffile

from napari_unet import load_model, segment
from napari_unet.batch.folder import batch_steps
from napari_unet.batch.job import BatchJob
from napari_unet.files.images import read_image
from napari_unet.sample import sample_dir
from napari_unet.steps import run_to_end

ROUNDS = 2


def make_images(folder: Path, files: int, side: int) -> list[np.ndarray]:
    """Write crops of a real image, turned and shifted."""
    image = read_image(sample_dir() / "nuclei.tif").data
    image = np.tile(image, (-(-side // image.shape[0]) + 1,) * 2)
    dice = np.random.default_rng(0)
    images = []
    for number in range(files):
        y, x = dice.integers(0, image.shape[0] - side, 2)
        crop = np.rot90(image[y : y + side, x : x + side], number % 4).copy()
        tifffile.imwrite(folder / f"{number:04}.tif", crop)
        images.append(crop)
    return images


def measure(
    place: Path, files: int, side: int, model: str, *, with_table: bool
) -> tuple[float, float]:
    """Return the seconds of the engine and of the batch."""
    loaded = load_model(model)
    engine = batch = 0.0
    for number in range(ROUNDS):
        folder = place / f"in{number}"
        folder.mkdir()
        images = make_images(folder, -(-files // ROUNDS), side)
        job = BatchJob(
            input=folder, output=place / f"out{number}", model=model, measure=with_table
        )
        if not number:
            segment(images[0], loaded)  # whatever is slow for the first time
        started = time.perf_counter()
        for image in images:
            segment(image, loaded)
        engine += time.perf_counter() - started
        started = time.perf_counter()
        report = run_to_end(batch_steps(job))
        batch += time.perf_counter() - started
        assert report.error is None
    return engine, batch


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=200)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--model", default="nuclei")
    parser.add_argument("--measure", action="store_true")
    told = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        engine, batch = measure(
            Path(place),
            told.files,
            told.side,
            told.model,
            with_table=told.measure,
        )
    files = -(-told.files // ROUNDS) * ROUNDS
    pixels = files * told.side**2 / 1e6
    print(f"{files} files of {told.side} x {told.side} uint16, model {told.model}")
    for name, seconds in (("engine", engine), ("batch", batch)):
        print(
            f"{name:7} {seconds:7.1f} s  {files / seconds:6.2f} files/s  "
            f"{pixels / seconds:6.2f} megapixels/s"
        )
    print(f"the batch reaches {engine / batch:.0%} of the engine's own rate")
    return engine / batch


if __name__ == "__main__":
    main()
