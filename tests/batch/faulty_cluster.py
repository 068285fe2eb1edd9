"""A Dask cluster in processes of its own, whose workers do as images are named.

Run as a program with the number of workers, it prints the scheduler's address and
runs until its input ends. Each worker loads this file, too.
"""

import errno
import os
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

HERE = Path(__file__)


def main(count):
    import dask
    from distributed import LocalCluster

    # Each worker is a copy of a process that has imported all before.
    forkserver.set_forkserver_preload(["distributed", "napari_unet.batch.worker"])
    forkserver.ensure_running()
    dask.config.set(
        {
            "distributed.worker.multiprocessing-method": "forkserver",
            "distributed.scheduler.allowed-failures": 0,
            # A busy computer may take long to start a killed worker again.
            "distributed.deploy.lost-worker-timeout": 600,
        }
    )
    with LocalCluster(
        n_workers=count,
        threads_per_worker=2,
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
        silence_logs=50,
        preload=str(HERE),
    ) as cluster:
        sys.stdout.write(f"{cluster.scheduler_address}\n")
        sys.stdout.flush()
        sys.stdin.read()


def dask_setup(worker):
    """Prepare a worker for faults."""
    from napari_unet.batch import file
    from napari_unet.batch import worker as ours
    from napari_unet.errors import BadOutput
    from napari_unet.steps import Progress

    # Small enough for a stack to be read and kept in pieces.
    file.LAZY_BYTES = file.LAZY_VALUES = 4_000
    read, compute_steps, sees = ours.read, ours.compute_steps, ours._sees
    ours.PATIENCE = 0.0

    def faulty_read(item, axes):
        if "deadly" in item.name:
            os._exit(1)
        if "full" in item.name:
            cause = OSError(errno.ENOSPC, "No space left on device")
            raise BadOutput("Cannot write it: the disk is full.") from cause
        return read(item, axes)

    def slow_compute_steps(opened, model, task):
        while (opened.item.image.parent / "slow").exists():
            time.sleep(0.1)
            yield Progress(1, 2, "slowly")
        return (yield from compute_steps(opened, model, task))

    ours.read, ours.compute_steps = faulty_read, slow_compute_steps
    ours._sees = lambda path: sees(path) and "elsewhere" not in str(path)


if __name__ == "__main__":
    main(int(sys.argv[1]))
