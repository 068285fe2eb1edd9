"""How long one waits: for an import, for help, for napari, for a first result.

    bash .ci/display .venv/bin/python benchmarks/start.py [--rounds 20] [--clicks 3]

Everything runs in processes of its own, in turn with its bare counterpart, so that
what else the machine does befalls both; the least of many rounds is what it takes:

- `import napari_unet` and `napari-unet --help`, against a Python that does nothing;
- napari's start with the plugin, against the same napari that does not find it, in
  seconds of the processor, because a start differs by more than a plugin adds;
- a click on Segment in a real viewer, until objects are drawn, against the network
  alone on as many pixels: no halo, nothing read, found or shown. The dock is opened
  first, in a fresh process: what it imports and the model that it loads count apart.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from napari import Viewer

PYTHON = [sys.executable, "-W", "ignore"]
PATIENCE = 300  # seconds that anything may take


@dataclass(frozen=True)
class Pair:
    """Seconds of something and of its bare counterpart, round after round."""

    ours: list[float]
    bare: list[float]

    @property
    def added(self) -> float:
        """The least that comes on top of the counterpart."""
        return min(self.ours) - min(self.bare)

    def __str__(self) -> str:
        ours, bare = (
            f"{1000 * min(times):.0f} ms (median {1000 * statistics.median(times):.0f})"
            for times in (self.ours, self.bare)
        )
        ratio = min(self.ours) / min(self.bare)
        return (
            f"{ours}, bare {bare}: adds {1000 * self.added:.0f} ms, {ratio:.2f} times"
        )


@dataclass(frozen=True)
class Click:
    """Seconds from opening the dock to objects on the screen."""

    dock: float  # to open it: imports torch
    model: float  # then, until Segment can be clicked
    pixels: float  # from the click until objects are drawn
    processor: float  # of the whole process in the meantime, all cores
    longest_pause: float  # of the event loop after the click
    network: float  # alone, on as many pixels
    objects: int


def seconds_of(command: Sequence[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, timeout=PATIENCE)
    return time.perf_counter() - started


def compare(ours: Callable[[], float], bare: Callable[[], float], rounds: int) -> Pair:
    """Measure both in turn, after one round that does not count."""
    both = [(ours(), bare()) for _ in range(rounds + 1)][1:]
    return Pair([one for one, _ in both], [other for _, other in both])


def in_child(what: str, *arguments: object) -> Any:
    """Run a function of this file in a fresh process; return what it says."""
    command = [*PYTHON, __file__, "--child", what, *map(str, arguments)]
    with tempfile.TemporaryDirectory() as home:
        done = subprocess.run(
            command,
            env=os.environ | {"NAPARI_UNET_HOME": home},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    if done.returncode:
        raise RuntimeError(f"{what} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def start_napari(hidden: str) -> tuple[float, list[str]]:
    """Open a viewer without one distribution; return seconds and the plugins.

    Parameters
    ----------
    hidden : str
        Name of a distribution that napari shall not find.
    """
    from importlib import metadata

    everything = metadata.distributions

    def others(**options: Any) -> Any:
        return (it for it in everything(**options) if it.name != hidden)

    metadata.distributions = others  # type: ignore[assignment]
    import napari
    import napari.viewer
    import npe2
    from napari.qt import get_qapp

    get_qapp()
    started = time.process_time()
    viewer = napari.Viewer(show=False)
    seconds = time.process_time() - started
    plugins = [m.name for m in npe2.PluginManager.instance().iter_manifests()]
    viewer.close()
    return seconds, plugins


def sample(side: int) -> np.ndarray:
    """The nuclei of the sample, repeated."""
    import numpy as np
    import tifffile

    from napari_unet.sample import sample_dir

    tile = tifffile.imread(sample_dir() / "nuclei.tif")
    repeats = -(-side // min(tile.shape))
    return np.tile(tile, (repeats, repeats))[:side, :side].copy()


def wait_until(holds: Callable[[], bool]) -> float:
    """Run the event loop until something holds; return its longest pause."""
    from qtpy.QtWidgets import QApplication

    longest, end = 0.0, time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError("Nothing came.")
        before = time.perf_counter()
        QApplication.processEvents()
        longest = max(longest, time.perf_counter() - before)
        time.sleep(0.002)
    return longest


def click(viewer: Viewer, side: int) -> Click:
    """Open the Segment dock, click as soon as that is possible, wait for objects."""
    from qtpy.QtWidgets import QApplication, QPushButton

    viewer.add_image(
        sample(side), name="nuclei", scale=(0.325, 0.325), units=("um", "um")
    )
    QApplication.processEvents()
    opening = time.perf_counter()
    _, dock = viewer.window.add_plugin_dock_widget("napari-unet", "Segment")
    opened = time.perf_counter()
    button = next(b for b in dock.findChildren(QPushButton) if b.text() == "Segment")
    wait_until(button.isEnabled)
    clicked, spent = time.perf_counter(), time.process_time()
    button.click()
    longest = wait_until(lambda: largest_label(viewer) > 0)
    QApplication.processEvents()  # the canvas is drawn
    pixels, spent = time.perf_counter() - clicked, time.process_time() - spent
    wait_until(button.isEnabled)
    return Click(
        dock=opened - opening,
        model=clicked - opened,
        pixels=pixels,
        processor=spent,
        longest_pause=longest,
        network=network_alone(side),
        objects=largest_label(viewer),
    )


def largest_label(viewer: Viewer) -> int:
    found = [layer for layer in viewer.layers if layer.name == "nuclei objects"]
    return int(found[0].data.max()) if found else 0


def network_alone(side: int) -> float:
    """Seconds of the default model's network for side² pixels."""
    import numpy as np
    import torch

    from napari_unet import load_model
    from napari_unet.inference.executors import make_executor

    window = np.zeros((1, min(side, 1024), min(side, 1024)), np.float32)
    times = -(-(side**2) // window.size)
    executor = make_executor(load_model("nuclei").network, torch.device("cpu"), True)
    stop = threading.Event()
    executor.run(window, None, stop)  # compiled before the clock starts
    started = time.perf_counter()
    for _ in range(times):
        executor.run(window, None, stop)
    return (time.perf_counter() - started) / times / window.size * side**2


def child(what: str, argument: str) -> None:
    """Say in JSON what a function of this file returns."""
    if what == "napari":
        seconds, plugins = start_napari(argument)
        print(json.dumps({"seconds": seconds, "plugins": plugins}))
        return
    import napari

    viewer = napari.Viewer()
    result = click(viewer, int(argument))
    viewer.close()
    print(json.dumps(asdict(result)))


def describe_machine() -> str:
    name = platform.processor() or platform.machine()
    facts = Path("/proc/cpuinfo")
    if facts.exists():
        lines = facts.read_text().splitlines()
        name = next((li.split(": ")[1] for li in lines if "model name" in li), name)
    busy = psutil.getloadavg()[0]
    return (
        f"{name}, {psutil.cpu_count()} cores, {busy:.1f} processes wanted to run, "
        f"{platform.system()}, Python {platform.python_version()}"
    )


def report_click(clicks: Sequence[Click], side: int) -> None:
    """Print the fastest, and what of it is the network."""
    best = min(clicks, key=lambda one: one.model + one.pixels)
    middle = statistics.median(one.model + one.pixels for one in clicks)
    whole = best.model + best.pixels
    print(
        f"first labels, {side}²: {whole:.2f} s (median {middle:.2f}) = model "
        f"{best.model:.2f} + click to pixels {best.pixels:.2f}; the network alone "
        f"{best.network:.2f} s, {whole / best.network:.2f} times; bound 3 s"
    )
    print(
        f"  {best.objects} objects; {best.processor:.2f} s of the processor after the "
        f"click; longest pause of the window {best.longest_pause:.2f} s; before, to "
        f"open the dock, {best.dock:.2f} s"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--starts", type=int, default=8, help="of napari, each")
    parser.add_argument("--clicks", type=int, default=3)
    parser.add_argument("--side", type=int, default=2048)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    told = parser.parse_args(arguments)
    if told.child:
        child(*told.child)
        return
    print(describe_machine())

    def bare() -> float:
        return seconds_of([*PYTHON, "-c", "pass"])

    def imported() -> float:
        return seconds_of([*PYTHON, "-c", "import napari_unet"])

    def helped() -> float:
        return seconds_of([*PYTHON, "-m", "napari_unet", "--help"])

    def napari_without(name: str) -> float:
        return float(in_child("napari", name)["seconds"])

    print(f"import napari_unet:    {compare(imported, bare, told.rounds)}; bound 50")
    print(f"napari-unet --help:    {compare(helped, bare, told.rounds)}; bound 500")
    starts = compare(
        lambda: napari_without("nothing"),
        lambda: napari_without("napari-unet"),
        told.starts,
    )
    print(f"napari's start:        {starts}; bound 50 added")
    clicks = [Click(**in_child("click", told.side)) for _ in range(told.clicks)]
    report_click(clicks, told.side)


if __name__ == "__main__":
    main()
