"""How long one waits: for an import, for help, for napari, for a first result.

    bash .ci/display .venv/bin/python benchmarks/start.py [--rounds 20] [--clicks 3]

Everything runs in processes of its own, in turn with its bare counterpart, so that
what else the machine does befalls both; the least of many rounds is what it takes:

- `import napari_unet` and `napari-unet --help`, against a Python that does nothing;
- napari's start with the plugin, against the same napari that does not find it;
- each dock, opened first in a fresh napari: until it is there, and the longest pause
  of the event loop after that, while threads import torch and load a model;
- a click on Segment in a real viewer, until objects are drawn, against the network
  alone on as many pixels: no halo, nothing read, found or shown. The dock is opened
  first, in a fresh process, and the model that it loads counts apart; torch was
  imported before, or, of the last line, is imported meanwhile.

Seconds of the processor are given, too: what others do at the same time adds less to
them, and more than one core can spend them at once.
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
from resource import RUSAGE_CHILDREN, getrusage
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from napari import Viewer

PYTHON = [sys.executable, "-W", "ignore"]
PATIENCE = 300  # seconds that anything may take
DOCKS = ("Segment", "Fine-tune", "Batch", "Models")


@dataclass(frozen=True)
class Spent:
    """Seconds that one waited, and those of the processor in them."""

    waited: float
    processor: float


@dataclass(frozen=True)
class Pair:
    """What something and its bare counterpart took, round after round."""

    ours: list[Spent]
    bare: list[Spent]

    def least(self, of: str) -> tuple[float, float]:
        """The least of both in milliseconds; `of` names a field of `Spent`."""
        ours, bare = (
            1000 * min(getattr(spent, of) for spent in each)
            for each in (self.ours, self.bare)
        )
        return ours, bare

    def __str__(self) -> str:
        parts = []
        for of, words in (("waited", "waited"), ("processor", "of the processor")):
            ours, bare = self.least(of)
            parts.append(
                f"{ours:4.0f} ms {words}, bare {bare:4.0f}: adds {ours - bare:4.0f}, "
                f"{ours / bare:5.2f} times"
            )
        return "; ".join(parts)


@dataclass(frozen=True)
class Opened:
    """Seconds in which the window stood still for a dock."""

    dock: Spent  # to open it; of the processor what the main thread spent
    pause: float  # the longest one after that, while threads load what it needs


@dataclass(frozen=True)
class Click:
    """Seconds from opening the dock to objects on the screen."""

    dock: float  # to open it
    model: float  # then, until Segment can be clicked: torch, and the model
    pixels: Spent  # from the click until objects are drawn
    longest_pause: float  # of the event loop after the click
    network: Spent  # alone, on as many pixels
    objects: int


def spent_on(command: Sequence[str]) -> Spent:
    """Run a program to its end."""
    started, before = time.perf_counter(), getrusage(RUSAGE_CHILDREN)
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, timeout=PATIENCE)
    waited, after = time.perf_counter() - started, getrusage(RUSAGE_CHILDREN)
    user = after.ru_utime - before.ru_utime
    return Spent(waited, user + after.ru_stime - before.ru_stime)


def compare(ours: Callable[[], Spent], bare: Callable[[], Spent], rounds: int) -> Pair:
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


def start_napari(hidden: str) -> tuple[Spent, list[str]]:
    """Open a viewer; return what that took, and the plugins.

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
    started, before = time.perf_counter(), time.process_time()
    viewer = napari.Viewer(show=False)
    spent = Spent(time.perf_counter() - started, time.process_time() - before)
    plugins = [m.name for m in npe2.PluginManager.instance().iter_manifests()]
    viewer.close()
    return spent, plugins


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
    before = time.perf_counter()
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError("Nothing came.")
        QApplication.processEvents()
        time.sleep(0.002)
        now = time.perf_counter()
        longest, before = max(longest, now - before), now
    return longest


def open_dock(viewer: Viewer, name: str) -> Opened:
    """Open one of the plugin's docks, and wait until threads have loaded all."""
    from qtpy.QtCore import QThreadPool

    wait_until(after(1))  # napari has started
    opening, before = time.perf_counter(), time.thread_time()
    viewer.window.add_plugin_dock_widget("napari-unet", name)
    opened = Spent(time.perf_counter() - opening, time.thread_time() - before)
    pool, begun = QThreadPool.globalInstance(), after(1)
    pause = wait_until(lambda: begun() and not pool.activeThreadCount())
    return Opened(opened, pause)


def after(seconds: float) -> Callable[[], bool]:
    """Return what holds after so many seconds."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


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
    clicked, before = time.perf_counter(), time.process_time()
    button.click()
    longest = wait_until(lambda: largest_label(viewer) > 0)
    QApplication.processEvents()  # the canvas is drawn
    pixels = Spent(time.perf_counter() - clicked, time.process_time() - before)
    wait_until(button.isEnabled)
    return Click(
        dock=opened - opening,
        model=clicked - opened,
        pixels=pixels,
        longest_pause=longest,
        network=network_alone(side),
        objects=largest_label(viewer),
    )


def fresh_click(side: int, *, with_torch: bool) -> Click:
    """Do it in a process of its own, into which torch was imported before or not."""
    said = in_child("click with torch" if with_torch else "click", side)
    pixels, network = Spent(**said.pop("pixels")), Spent(**said.pop("network"))
    return Click(**said, pixels=pixels, network=network)


def largest_label(viewer: Viewer) -> int:
    found = [layer for layer in viewer.layers if layer.name == "nuclei objects"]
    return int(found[0].data.max()) if found else 0


def network_alone(side: int) -> Spent:
    """What the default model's network takes for side² pixels."""
    import torch

    from napari_unet import load_model
    from napari_unet.inference.executors import make_executor

    window = torch.zeros(1, 1, min(side, 1024), min(side, 1024))
    times = -(-(side**2) // window.numel())
    executor = make_executor(load_model("nuclei").network, torch.device("cpu"), True)
    stop = threading.Event()
    executor.run(window, None, stop)  # compiled before the clock starts
    started, before = time.perf_counter(), time.process_time()
    for _ in range(times):
        executor.run(window, None, stop)
    waited, processor = time.perf_counter() - started, time.process_time() - before
    scale = side**2 / window.numel() / times
    return Spent(waited * scale, processor * scale)


def child(what: str, argument: str) -> None:
    """Say in JSON what a function of this file returns."""
    if what == "napari":
        spent, plugins = start_napari(argument)
        print(json.dumps({"spent": asdict(spent), "plugins": plugins}))
        return
    import napari

    if what == "click with torch":
        import torch

        del torch
    viewer = napari.Viewer()
    result: Opened | Click
    if what == "dock":
        result = open_dock(viewer, argument)
    else:
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


def report_docks(rounds: int) -> None:
    """Print how long the window stands still for each dock."""
    print("docks, opened first, bound 0.3 s")
    for name in DOCKS:
        said = [in_child("dock", name) for _ in range(rounds)]
        waited = min(one["dock"]["waited"] for one in said)
        processor = min(one["dock"]["processor"] for one in said)
        pause = min(one["pause"] for one in said)
        print(
            f"  {name}: {waited:.2f} s to open, {processor:.2f} of the processor; "
            f"{pause:.2f} s the longest pause after that"
        )


def report_clicks(clicks: Sequence[Click], firsts: Sequence[Click], side: int) -> None:
    """Print the fastest, what of it is the network, and the fastest first click."""
    best = min(clicks, key=lambda one: one.model + one.pixels.waited)
    middle = statistics.median(one.model + one.pixels.waited for one in clicks)
    whole, pixels, network = best.model + best.pixels.waited, best.pixels, best.network
    print(
        f"first labels of {side} x {side}, bound 3 s\n"
        f"  {whole:.2f} s waited (median {middle:.2f}): {best.model:.2f} for the "
        f"model, {pixels.waited:.2f} from the click to {best.objects} objects\n"
        f"  the network alone {network.waited:.2f} s, the click "
        f"{pixels.waited / network.waited:.2f} times; of the processor "
        f"{network.processor:.2f} and {pixels.processor:.2f} s, "
        f"{pixels.processor / network.processor:.2f} times\n"
        f"  longest pause of the window {best.longest_pause:.2f} s; opening the dock "
        f"before {best.dock:.2f} s"
    )
    least = min(one.model + one.pixels.waited for one in firsts)
    print(f"  with the import of torch, from the open dock on: {least:.2f} s")


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

    def python(*arguments: str) -> Callable[[], Spent]:
        return lambda: spent_on([*PYTHON, *arguments])

    def napari_without(name: str) -> Callable[[], Spent]:
        return lambda: Spent(**in_child("napari", name)["spent"])

    bare = python("-c", "pass")
    rounds = told.rounds
    imported = compare(python("-c", "import napari_unet"), bare, rounds)
    print(f"import napari_unet, bound 50 ms\n  {imported}")
    helped = compare(python("-m", "napari_unet", "--help"), bare, rounds)
    print(f"napari-unet --help, bound 500 ms\n  {helped}")
    with_us, without = napari_without("nothing"), napari_without("napari-unet")
    started = compare(with_us, without, told.starts)
    print(f"napari's start, bound 50 ms added\n  {started}")
    report_docks(told.clicks)
    clicks, firsts = (
        [fresh_click(told.side, with_torch=ready) for _ in range(told.clicks)]
        for ready in (True, False)
    )
    report_clicks(clicks, firsts, told.side)


if __name__ == "__main__":
    main()
