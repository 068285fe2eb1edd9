"""A Dask scheduler: one that runs already, or one with workers on this computer."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from napari_unet.errors import BadCluster, BadInput
from napari_unet.files.source import one_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from napari_unet.batch.file import Task

CONNECT = 30.0  # seconds to reach a scheduler
GRACE = 0.5  # seconds for a worker process to end by itself
PATIENCE = 600.0  # seconds without any worker

_LOCAL = re.compile(r"local(?::([1-9]\d*))?")
# For schedulers and workers that are started here.
_CONFIG = {
    # A busy computer may take long to start a worker again.
    "distributed.deploy.lost-worker-timeout": PATIENCE,
    # Workers keep nothing that could be moved to a disk when memory is short.
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
}


def check_scheduler(scheduler: str) -> None:
    """Refuse early what cannot be used.

    Parameters
    ----------
    scheduler : str
        "local", "local:4" (processes on this computer), or the address of a running
        scheduler like "tcp://host:8786".

    Raises
    ------
    BadInput
        If it is something else, or Dask's distributed is not installed.
    """
    if not _LOCAL.fullmatch(scheduler) and "://" not in scheduler:
        raise BadInput(
            f"{scheduler!r} is no Dask scheduler: write its address like "
            "tcp://host:8786, or local, or local:4 for 4 processes on this computer."
        )
    try:
        import distributed  # noqa: F401
    except ImportError as error:
        raise BadInput(
            "A scheduler needs Dask's package distributed. Install it with: "
            'pip install "napari-unet[cluster]"'
        ) from error


@contextmanager
def connected(scheduler: str, task: Task) -> Iterator[Any]:
    """Connect to a scheduler, which is started here if it is to be a local one."""
    from distributed import Client
    from distributed.utils import silence_logging_cmgr

    with silence_logging_cmgr(logging.CRITICAL):  # what matters is told in one sentence
        if match := _LOCAL.fullmatch(scheduler):
            with _local_cluster(match[1], task.options["device"]) as cluster:
                with Client(cluster, set_as_default=False) as client:
                    yield client
            return
        try:
            client = Client(scheduler, timeout=CONNECT, set_as_default=False)
        except (OSError, ValueError, ImportError) as error:
            raise BadCluster(
                f"There is no Dask scheduler at {scheduler} ({one_line(error, 200)}). "
                "Check the address and that it is running with the same versions of "
                "Dask."
            ) from error
        with client:
            yield client


@contextmanager
def _local_cluster(count: str | None, device: str) -> Iterator[Any]:
    """Start a process for each GPU, or some that share the cores, on this computer."""
    import dask
    import psutil
    from distributed import Nanny, Scheduler, SpecCluster

    environments = _environments(int(count) if count else None, device)
    cores = os.cpu_count() or 1
    options = {
        # Whoever reaches a worker can run programs on it.
        "host": "127.0.0.1",
        "protocol": "tcp://",
        "dashboard": False,
        "dashboard_address": "127.0.0.1:0",  # where it says that it is well
    }
    worker_options = {
        **options,
        "nthreads": max(1, cores // len(environments)),
        "memory_limit": psutil.virtual_memory().total // len(environments),
        "silence_logs": logging.CRITICAL,
        "preload": [__name__],
    }
    workers = {
        number: {"cls": Nanny, "options": {**worker_options, "env": environment}}
        for number, environment in enumerate(environments)
    }
    scheduler = {"cls": Scheduler, "options": {**options, "port": 0}}
    with dask.config.set(_CONFIG):
        try:
            cluster = SpecCluster(workers, scheduler, silence_logs=logging.CRITICAL)
        except (RuntimeError, OSError) as error:
            raise BadCluster(
                f"Dask cannot start workers on this computer ({one_line(error, 200)}). "
                "Start fewer, or run without --scheduler."
            ) from error
        with cluster:
            try:
                yield cluster
            finally:
                cluster.sync(_end_workers, cluster)


async def _end_workers(cluster: Any) -> None:
    """End the processes within a second, even if they are at work."""
    closing = [nanny.close(timeout=GRACE) for nanny in cluster.workers.values()]
    await asyncio.gather(*closing, return_exceptions=True)


def _environments(count: int | None, device: str) -> list[dict[str, str]]:
    """Return the variables of each worker process: which GPU it sees."""
    import torch

    gpus = []
    if device in ("auto", "cuda") and torch.cuda.is_available():
        told = os.environ.get("CUDA_VISIBLE_DEVICES")
        numbers = map(str, range(torch.cuda.device_count()))
        gpus = told.split(",") if told else list(numbers)
    if gpus:
        chosen = [gpus[i % len(gpus)] for i in range(count or len(gpus))]
        return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in chosen]
    if device not in ("auto", "cpu"):  # a single GPU
        count = count or 1
    cores = os.cpu_count() or 1
    return [{} for _ in range(count or max(min(2, cores), cores // 4))]


def dask_setup(_worker: Any) -> None:
    """Let Ctrl-C be the matter of the process that has started this worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
