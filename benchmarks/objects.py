"""Everything around the network: objects, their table and a slider's move.

Usage::

    python benchmarks/objects.py [--side 8192] [--objects 20000] [--split] [--network]
        [--no-peer]

One plane of uint8 probabilities of two classes, background and ellipses that touch
here and there. Measured are the seconds of labels and table, and the memory that is
added at most, each in a process of its own. The peer does the same with whole arrays,
one step after the other, and must give the same labels and sizes: connected components
(cc3d), sizes by ``bincount``, a distance transform of the whole plane for growing,
statistics by cc3d; with ``--split`` (minutes) also splitting of the whole plane at
once. Then each stage is timed by itself, on one core and on all (on Linux), the least
of some rounds. With ``--network``, the bundled model ``nuclei`` predicts 2048 x 2048
pixels, and its time is scaled up to the plane.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cc3d
import numpy as np
from scipy import ndimage

from napari_unet import load_model, predict
from napari_unet.inference.objects import ObjectFinder, find_objects_steps
from napari_unet.inference.runs import bands
from napari_unet.inference.settings import ObjectSettings
from napari_unet.inference.split import components, largest_hole, split_at_necks
from napari_unet.inference.spread import count_cores
from napari_unet.steps import run_to_end

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NOWHERE = np.iinfo(np.int64).max
GPU_SPEED = 275e6  # pixels a second: compiled raw forward of 31 M parameters, one H200
PREDICTED = 2048
ROUNDS = 5  # of stages; one of those that split
STRIP = 1 << 22  # pixels


def draw_probabilities(side: int, count: int, seed: int = 0) -> np.ndarray:
    """Draw soft ellipses on a jittered grid; 255 means 1."""
    rng = np.random.default_rng(seed)
    columns = max(1, round(count**0.5))
    pitch = side / columns
    probability = np.full((side, side), 3, dtype=np.uint8)
    reach = int(np.ceil(0.6 * pitch))
    for i, j in np.ndindex(columns, columns):
        y, x = (np.array([i, j]) + rng.uniform(0.3, 0.7, 2)) * pitch
        long, short = rng.uniform(0.25, 0.45, 2) * pitch
        angle = rng.uniform(0, np.pi)
        rows = np.arange(max(int(y) - reach, 0), min(int(y) + reach, side))
        cols = np.arange(max(int(x) - reach, 0), min(int(x) + reach, side))
        dy, dx = (rows - y)[:, None], cols - x
        along = dx * np.cos(angle) + dy * np.sin(angle)
        across = dy * np.cos(angle) - dx * np.sin(angle)
        inside = (1 - np.hypot(along / long, across / short)) * min(long, short)
        soft = (3 + 249 / (1 + np.exp(-inside))).astype(np.uint8)
        part = probability[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
        np.maximum(part, soft, out=part)
    return probability


# --- the peer ------------------------------------------------------------------


def plain_labels(probability: np.ndarray, settings: ObjectSettings) -> np.ndarray:
    """Label objects with whole arrays."""
    scale = 255 if probability.dtype == np.uint8 else 1
    mask = probability > settings.threshold * scale
    labels = plain_split(mask) if settings.split_touching else components(mask)
    if settings.grow:
        labels = plain_grow(labels, settings.grow)
    certain = probability == 0
    if labels[certain].any():
        labels[certain] = 0
        labels = components(labels)
    sizes = np.bincount(labels.ravel())
    above = np.where(mask, labels, 0).ravel()
    starts = np.append(0, np.flatnonzero(above[1:] != above[:-1]) + 1)[::-1]
    first = np.full(len(sizes), NOWHERE)
    first[above[starts]] = starts
    first[0] = NOWHERE
    kept = np.flatnonzero((sizes >= settings.minimal_size) & (first < NOWHERE))
    number = np.zeros(len(sizes), dtype=np.uint32)
    number[kept[np.argsort(first[kept])]] = np.arange(1, len(kept) + 1)
    return number[labels]


def plain_split(mask: np.ndarray) -> np.ndarray:
    """Fill small holes and split the whole plane or volume."""
    hole = largest_hole(np.bincount(components(mask).ravel())[1:])
    if hole > 1:
        empty = (~mask).astype(np.uint8)
        outside = cc3d.connected_components(
            empty, connectivity=18 if mask.ndim == 3 else 8
        )
        small = np.bincount(outside.ravel()) < hole
        small[0] = False
        for axis in range(mask.ndim):
            small[np.take(outside, [0, -1], axis)] = False
        mask = mask | small[outside]
    return split_at_necks(mask)


def plain_grow(labels: np.ndarray, pixels: int) -> np.ndarray:
    """Grow by a distance transform of the whole."""
    distance, nearest = ndimage.distance_transform_edt(labels == 0, return_indices=True)
    return np.where(distance <= pixels, labels[tuple(nearest)], 0)


def plain_table(labels: np.ndarray, probability: np.ndarray) -> dict[str, np.ndarray]:
    """Measure the objects pixel by pixel."""
    statistics = cc3d.statistics(labels, no_slice_conversion=True)
    scale = 255 if probability.dtype == np.uint8 else 1
    total = np.bincount(
        labels.ravel(), weights=probability.astype(np.float32).ravel() / scale
    )
    sizes = np.asarray(statistics["voxel_counts"], dtype=np.int64)[1:]
    return {
        "size": sizes,
        "mean_probability": total[1:] / sizes,
        "centroid": np.asarray(statistics["centroids"])[1:],
    }


# --- measuring ------------------------------------------------------------------


def find(probability: np.ndarray, settings: ObjectSettings) -> tuple[Any, ...]:
    """Make labels and their table as the package does, with the seconds of both."""
    start = time.perf_counter()
    objects = run_to_end(find_objects_steps(probability[None], ["objects"], settings))
    labels = objects.labels
    middle = time.perf_counter()
    table = objects.describe(probability[None])
    return labels, table, middle - start, time.perf_counter() - middle


def find_plainly(probability: np.ndarray, settings: ObjectSettings) -> tuple[Any, ...]:
    """Do the same as the peer does."""
    start = time.perf_counter()
    labels = plain_labels(probability, settings)
    middle = time.perf_counter()
    table = plain_table(labels, probability)
    return labels, table, middle - start, time.perf_counter() - middle


WAYS = {"ours": find, "peer": find_plainly}


def measure(way: str, file: Path, settings: ObjectSettings) -> dict[str, Any]:
    """Measure one way in this process, which has done nothing else."""
    probability = np.load(file)
    WAYS[way](probability[:64, :64].copy(), settings)  # what is done only once
    before = peak_bytes()
    labels, table, of_labels, of_table = WAYS[way](probability, settings)
    return {
        "labels": of_labels,
        "table": of_table,
        "bytes": peak_bytes() - before,
        "objects": len(table["size"]),
        "digest": digest(labels),
    }


def peak_bytes() -> int:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compare(
    side: int, count: int, wanted: list[ObjectSettings]
) -> Iterator[tuple[ObjectSettings, dict[str, Any], dict[str, Any]]]:
    """Measure both ways for each settings, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "probability.npy"
        np.save(file, draw_probabilities(side, count))
        for settings in wanted:
            ours, peer = (in_child(way, file, settings) for way in WAYS)
            yield settings, ours, peer


def in_child(
    way: str, file: Path, *wanted: ObjectSettings, core: int | None = None
) -> dict[str, Any]:
    """Run `measure`, or `time_stages`, in a process of its own, maybe on one core."""
    arguments = [way, str(file), json.dumps([asdict(settings) for settings in wanted])]
    done = subprocess.run(
        [sys.executable, __file__, "--child", *arguments],
        check=True,
        capture_output=True,
        text=True,
        # Before anything counts the cores that there are.
        preexec_fn=None if core is None else lambda: os.sched_setaffinity(0, {core}),
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


# --- stage by stage ---------------------------------------------------------------


def time_stages(file: Path, wanted: list[ObjectSettings]) -> dict[str, Any]:
    """Time one stage after the other in this process.

    Returns
    -------
    dict
        By stage the least seconds and the least processor seconds; and digests of the
        labels of each settings.
    """
    probability = np.load(file)
    stages: dict[str, list[float]] = {}

    def clock(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter(), time.process_time()
        result = work()
        spent = time.perf_counter() - start[0], time.process_time() - start[1]
        stages[name] = list(map(min, stages.get(name, spent), spent))
        return result

    digests = {}
    for settings in wanted:
        name = describe(settings)
        for _ in range(1 if settings.split_touching else ROUNDS):
            finder = ObjectFinder(probability.shape, ["objects"], settings)
            clock("above the threshold", partial(look_up, finder, probability))
            finding = finder.find_steps()
            objects = clock(name, partial(run_to_end, finding))
            labels = clock("paint", objects.runs.array)
            clock("table", partial(objects.describe, probability[None]))
        digests[name] = digest(labels)
    return {"stages": stages, "digests": digests}


def look_up(finder: ObjectFinder, probability: np.ndarray) -> None:
    """Give it strip by strip, as a network would."""
    for rows in bands(probability.shape, STRIP):
        finder.take(rows, probability[None, rows])


def compare_cores(
    side: int, count: int, wanted: list[ObjectSettings]
) -> dict[str, dict[str, Any]]:
    """Time the stages on one core, where one can be chosen, and on all of them."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "probability.npy"
        np.save(file, draw_probabilities(side, count))
        found = {}
        if hasattr(os, "sched_setaffinity"):
            core = min(os.sched_getaffinity(0))
            found["1 core"] = in_child("stages", file, *wanted, core=core)
        found[f"{count_cores()} cores"] = in_child("stages", file, *wanted)
    return found


def print_stages(found: dict[str, dict[str, Any]]) -> None:
    """Print seconds and processor seconds of each stage side by side."""
    print("  stage: seconds / of the processor on " + ", ".join(found))
    columns = [one["stages"] for one in found.values()]
    for name in columns[0]:
        cells = ["{:.3f} / {:.3f}".format(*stages[name]) for stages in columns]
        print(f"    {name:34} " + "   ".join(cells))
    same = all(
        one["digests"] == found[next(iter(found))]["digests"] for one in found.values()
    )
    print("    labels " + ("equal" if same else "DIFFERENT"))


def describe(settings: ObjectSettings) -> str:
    """Name what is done."""
    name = "connect, number" + ", split" * settings.split_touching
    return name + f", grow by {settings.grow}" * bool(settings.grow)


def digest(labels: np.ndarray) -> int:
    """Return a number that other labels do not have."""
    return zlib.crc32(labels.astype(np.uint32).tobytes())


def network_seconds(pixels: int) -> float:
    """Predict a part, scaled up to some pixels."""
    model = load_model("nuclei")
    image = np.random.default_rng(0).integers(0, 4000, (PREDICTED,) * 2, np.uint16)
    predict(image[:512, :512], model)
    start = time.perf_counter()
    predict(image, model)
    return (time.perf_counter() - start) * pixels / image.size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--side", type=int, default=8192)
    parser.add_argument("--objects", type=int, default=20000)
    parser.add_argument("--split", action="store_true", help="split touching, too")
    parser.add_argument("--network", action="store_true", help="time the network")
    parser.add_argument("--no-peer", action="store_true", help="only the stages")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        way, file, given = options.child
        wanted = [ObjectSettings(**settings) for settings in json.loads(given)]
        if way == "stages":
            print(json.dumps(time_stages(Path(file), wanted)))
        else:
            print(json.dumps(measure(way, Path(file), *wanted)))
        return
    wanted = [ObjectSettings(0.5, 20), ObjectSettings(0.5, 20, grow=1)]
    if options.split:
        wanted.append(ObjectSettings(0.5, 20, split_touching=True, grow=1))
    pixels = options.side**2
    print(
        f"{options.side} x {options.side} pixels; labels + table in seconds, MB added"
    )
    against = [] if options.no_peer else wanted
    for settings, ours, peer in compare(options.side, options.objects, against):
        same = "equal" if ours["digest"] == peer["digest"] else "DIFFERENT"
        print(
            f"  {describe(settings)}: {ours['objects']} objects, labels {same}",
            flush=True,
        )
        seconds = []
        for way, one in (("ours", ours), ("peer", peer)):
            seconds.append(one["labels"] + one["table"])
            print(
                f"    {way} {one['labels']:.2f} + {one['table']:.2f} s, "
                f"{one['bytes'] / 1e6:.0f} MB"
            )
        print(f"    ratio {seconds[1] / seconds[0]:.1f}")
    print_stages(compare_cores(options.side, options.objects, wanted))
    print(f"  31 M parameters on one H200, raw forward: {pixels / GPU_SPEED:.2f} s")
    if options.network:
        print(f"  nuclei on this machine: {network_seconds(pixels):.1f} s")


if __name__ == "__main__":
    main()
