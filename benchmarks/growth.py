"""How time and memory grow with the pixels of a plane.

Usage::

    python benchmarks/growth.py [--largest 4096] [--model nuclei] [--arrays 8192]

Planes from 1024 x 1024 pixels on, each side twice that before, are segmented by the
bundled model ``nuclei``, each in a process of its own: from an OME-Zarr, read lazily,
into one ("file"); and, up to ``--arrays``, as an array that becomes an array
("array"). "added" is the most memory that this ever took beyond Python, torch, the
model and a first small image; of arrays, what the image and its labels themselves have
is said as well. The exponent is that of time against pixels, the time of an image of
64 x 64 pixels subtracted: 1 is linear. With ``--largest 16384`` it takes minutes, and
2 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

SMALLEST = 1024
CHUNK = 512
NOTHING = 64  # side of an image whose time is that of everything but pixels


@dataclass(frozen=True)
class Row:
    """Seconds, of which some do not depend on the pixels, MiB, and objects."""

    seconds: float
    constant: float
    added: float
    objects: int


def draw_band(start: int, stop: int, side: int) -> np.ndarray:
    """Draw rows of discs of 20 pixels on a grid, with some noise."""
    y, x = np.ogrid[start:stop, :side]
    inside = (y % 50 - 25) ** 2 + (x % 50 - 25) ** 2 < 400
    noise = (y * 7919 + x * 104729) * 2654435761 >> 16
    return (200 + 3000 * inside + noise % 397).astype(np.uint16)


def new_array(path: Path, side: int, dtype: type[np.generic]) -> zarr.Array:
    """Make a zarr array of a plane on the disk."""
    shape, chunks = (side, side), (min(CHUNK, side),) * 2
    return zarr.create_array(store=path, shape=shape, chunks=chunks, dtype=dtype)


def peak() -> float:
    """Return the most memory that this process has ever used, in MiB."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def measure(way: str, side: int, model_name: str, folder: Path) -> Row:
    """Segment the plane in a folder in this process, after a first small image."""
    from napari_unet import load_model, segment
    from napari_unet.batch.volume import segment_into_steps
    from napari_unet.inference.engine import Predictor
    from napari_unet.inference.settings import ObjectSettings
    from napari_unet.steps import run_to_end

    model = load_model(model_name)
    settings = ObjectSettings.recommended(model.passport)

    def run(image: Any, labels: Any) -> Any:
        if way == "array":
            return segment(np.asarray(image), model)
        predictor = Predictor(image, model)
        try:
            run_to_end(segment_into_steps(predictor, settings, labels, scratch=folder))
        finally:
            predictor.close()
        return labels

    small = draw_band(0, SMALLEST // 2, SMALLEST // 2)
    run(small, np.zeros(small.shape, np.uint32))
    nothing = small[:NOTHING, :NOTHING]
    started = time.perf_counter()
    run(nothing, np.zeros(nothing.shape, np.uint32))
    constant = time.perf_counter() - started
    image = zarr.open_array(folder / f"{side}.zarr", mode="r")
    target = new_array(folder / f"labels-{side}.zarr", side, np.uint32)
    before, started = peak(), time.perf_counter()
    labels = run(image, target)
    seconds, added = time.perf_counter() - started, peak() - before
    bands = range(0, side, CHUNK)
    objects = max(int(np.max(labels[start : start + CHUNK])) for start in bands)
    return Row(seconds, constant, added, objects)


def in_child(way: str, side: int, model: str, folder: Path) -> Row:
    """Run `measure` in a process of its own."""
    arguments = [way, str(side), model, str(folder)]
    done = subprocess.run(
        [sys.executable, __file__, "--child", *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def compare(
    sides: list[int], model: str, largest_array: int
) -> dict[str, dict[int, Row]]:
    """Measure all sides both ways, those of arrays as far as they go."""
    rows: dict[str, dict[int, Row]] = {"file": {}, "array": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for side in sides:
            image = new_array(folder / f"{side}.zarr", side, np.uint16)
            for start in range(0, side, CHUNK):
                stop = min(start + CHUNK, side)
                image[start:stop] = draw_band(start, stop, side)
            for way, found in rows.items():
                if way == "file" or side <= largest_array:
                    with tempfile.TemporaryDirectory(dir=folder) as own:
                        (Path(own) / f"{side}.zarr").symlink_to(folder / f"{side}.zarr")
                        found[side] = in_child(way, side, model, Path(own))
    return rows


def exponent(rows: dict[int, Row]) -> float:
    """Fit time = a * pixels ** exponent, without what no pixel costs."""
    pixels = np.log([side**2 for side in rows])
    seconds = np.log([row.seconds - row.constant for row in rows.values()])
    return float(np.polyfit(pixels, seconds, 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--largest", type=int, default=4096)
    parser.add_argument("--arrays", type=int, default=8192)
    parser.add_argument("--model", default="nuclei")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        way, side, model, folder = options.child
        print(json.dumps(asdict(measure(way, int(side), model, Path(folder)))))
        return
    sides = [SMALLEST]
    while sides[-1] * 2 <= options.largest:
        sides.append(sides[-1] * 2)
    for way, rows in compare(sides, options.model, options.arrays).items():
        for side, row in rows.items():
            pixels = side**2
            own = pixels * (2 + 4) / 2**20  # uint16 in, uint32 out
            said = f", of which {own:.0f} are image and labels" * (way == "array")
            print(
                f"{way:5} {side:6}²  {row.seconds:7.1f} s  "
                f"{pixels / row.seconds / 1e6:5.2f} MP/s  {row.objects:7} objects  "
                f"{row.added:6.0f} MiB added{said}"
            )
        if len(rows) > 1:
            print(f"{way:5} time grows with pixels ** {exponent(rows):.2f}")


if __name__ == "__main__":
    main()
