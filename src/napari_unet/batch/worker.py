"""What runs on a Dask worker: one image, from its file to the files made of it."""

from __future__ import annotations

import os
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from napari_unet.batch.checks import check_memory
from napari_unet.batch.failure import failed
from napari_unet.batch.file import Task, compute_steps, finish, read
from napari_unet.batch.job import OF_PROCESSORS, version_of
from napari_unet.errors import BadCluster, BadModel, Cancelled
from napari_unet.files.atomic import sweep
from napari_unet.steps import run_to_end

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from napari_unet.batch.file import Opened, Segmented
    from napari_unet.batch.journal import Entry
    from napari_unet.batch.plan import Item
    from napari_unet.inference.backends import Device, Precision
    from napari_unet.models.model import Model
    from napari_unet.steps import Progress

CHECK = 1.0  # seconds between two looks whether the work is still wanted
TELL = 0.5  # seconds between two messages about progress
PATIENCE = 5.0  # seconds that a new file may need to be seen on a shared disk

# A worker may run several tasks at once. One of them computes, with all the threads
# of the worker; the others read, measure and write meanwhile.
_COMPUTING = threading.Lock()


class Unseen(BadCluster):
    """A worker does not see a file."""


@dataclass(frozen=True)
class Order:
    """What the tasks of a run have in common; plain data.

    Parameters
    ----------
    task : Task
        With absolute paths.
    model : Path
        A copy in the output folder, which is there as long as the run lasts.
    sha256 : str
        Of the model.
    topic : str
        Of the messages about progress; unique.
    versions : dict of str to str
        Of the programs that the results depend on.
    """

    task: Task
    model: Path
    sha256: str
    topic: str
    versions: Mapping[str, str]


def segment_on_worker(number: int, item: Item, order: Order) -> Entry:
    """Segment one image and write the results.

    It may run more than once, even at the same time: every file is written under a
    name of its own, and renamed.

    Parameters
    ----------
    number : int
        Of the item, for the messages.
    item : Item
        With absolute paths.
    order : Order
        All else.

    Returns
    -------
    Entry
        Not in the journal yet.

    Raises
    ------
    BadCluster
        If this worker is not fit for the work.
    BadInput, BadModel, BadOutput
        If going on with other images would make no sense.
    Cancelled
        If the run has ended.
    """
    from distributed import get_worker

    worker = get_worker()
    device = _set_up_process(worker.state.nthreads, order.task.options["device"])
    _check_fit(worker, item, order, device)
    options: Any = {**order.task.options, "device": device.name}
    if limit := options["memory_limit"]:
        what = order.model, order.sha256
        _check_memory(*what, device, options["precision"], limit)
    task = replace(order.task, options=options)
    for folder in {item.labels.parent, order.model.parent}:
        _sweep_once(folder, order.topic)
    check = _check_of(order)
    told = 0.0

    def tell(part: float, message: str, note: str = "") -> None:
        nonlocal told
        if note or time.monotonic() > told + TELL:
            told = time.monotonic()
            step = {"number": number, "part": part, "message": message, "note": note}
            worker.log_event(order.topic, step)

    opened = None
    try:
        tell(0.0, "reading", device.note)
        opened = read(item, task.axes)
        with _alone(check):
            model = _load(order.model, order.sha256)
            segmented = _compute(opened, model, task, check, tell)
        return finish(segmented, model, task, check)
    except Cancelled:
        raise
    except Exception as error:
        return failed(item, error, opened)


def _check_fit(worker: Any, item: Item, order: Order, device: Device) -> None:
    for path in (order.model, item.image):
        if not _sees(path):
            raise Unseen(
                f"The worker at {worker.address} does not see {path}. All workers "
                "need the images and the results under the same path as this "
                "computer; mount the folder there, or run without --scheduler."
            )
    if different := _different_versions(order.versions, device.name):
        raise BadCluster(
            f"The worker at {worker.address} has {different}: its results would "
            "differ. Install the same versions there."
        )


def _sees(path: Path) -> bool:
    """Tell whether a file is there; on a network drive it may come a little late."""
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.25)
    return True


def _different_versions(wanted: Mapping[str, str], device: str) -> str:
    differ = []
    for name in {**wanted, OF_PROCESSORS: ""}:
        if name == OF_PROCESSORS and device != "cpu":
            continue
        # "+cu130" and the like only says for which device torch is.
        has, needs = (
            (number or "none").split("+")[0]
            for number in (version_of(name), wanted.get(name))
        )
        if has != needs:
            differ.append(f"{name} {has} instead of {needs}")
    return ", ".join(differ)


@lru_cache(maxsize=4096)
def _sweep_once(folder: Path, _topic: str) -> None:
    """Remove what workers have left that died on this computer, once a run."""
    sweep_folders([folder])


def sweep_folders(folders: Iterable[Path]) -> None:
    """Remove what processes have left that died on this computer."""
    for folder in folders:
        sweep(folder)


@lru_cache(maxsize=1)
def _set_up_process(threads: int, device: str) -> Device:
    import dask
    import torch

    from napari_unet.inference.backends import choose_device

    # Dask's nanny allows one thread; the worker may have more cores.
    torch.set_num_threads(threads)
    # An image that is read lazily would send its pieces to other workers, and wait
    # for one that is free.
    dask.config.set(scheduler="threads", num_workers=threads)
    return choose_device(device)


def _check_of(order: Order) -> Callable[[], None]:
    """Make a function that raises when the run has ended."""
    looked = time.monotonic()

    def check() -> None:
        nonlocal looked
        if time.monotonic() > looked + CHECK:
            looked = time.monotonic()
            if not os.path.lexists(order.model):
                raise Cancelled("The batch was stopped.")

    return check


@contextmanager
def _alone(check: Callable[[], None]) -> Iterator[None]:
    """Wait until no other task of this process computes."""
    while not _COMPUTING.acquire(timeout=CHECK):
        check()
    try:
        yield
    finally:
        _COMPUTING.release()


@lru_cache(maxsize=1)
def _load(path: Path, sha256: str) -> Model:
    """Read the model, once for each process and run."""
    from napari_unet.models.checkpoint import model_sha256, read_model

    model = read_model(path)
    if model_sha256(model) != sha256:
        raise BadModel(f"{path} was changed while a batch used it; start it again.")
    return model


@lru_cache(maxsize=1)
def _check_memory(
    path: Path, sha256: str, device: Device, precision: Precision, limit: float
) -> None:
    """Do what `check_memory` does, once for each process and run."""
    with _COMPUTING:
        check_memory(_load(path, sha256), device, precision, limit)


def _compute(
    opened: Opened,
    model: Model,
    task: Task,
    check: Callable[[], None],
    tell: Callable[[float, str, str], None],
) -> Segmented:
    def follow(step: Progress) -> None:
        tell(step.done / max(step.total, 1), step.message, step.note)
        check()

    return run_to_end(compute_steps(opened, model, task), follow)


def with_absolute_paths(item: Item) -> Item:
    """Return an item that means the same in any folder."""
    probabilities = item.probabilities and item.probabilities.absolute()
    return replace(
        item,
        image=item.image.absolute(),
        labels=item.labels.absolute(),
        probabilities=probabilities,
    )
