"""Runs a batch again and again, killed each time, in a process of its own.

Everything is imported once; each run is a fork, which a signal ends at a random
moment or a chosen call ends between two system calls.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from napari_unet.batch.folder import batch_steps
from napari_unet.batch.job import BatchJob
from napari_unet.batch.plan import plan_batch


def run(job, log, deadly_call):
    """Run the batch in this process, which may not survive it."""
    torch.set_num_threads(1)
    if deadly_call is not None:
        die_at(deadly_call)
    started = set()
    for step in batch_steps(job, resume=True):
        if step.status == "running" and step.name not in started:
            started.add(step.name)
            with open(log, "a") as file:
                file.write(f"{step.name}\n")


def die_at(number):
    """Die before the system call of that number that makes something durable."""
    calls = [0]

    def deadly(function):
        def counted(*arguments, **options):
            calls[0] += 1
            if calls[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return counted

    for name in ("fsync", "replace", "open", "mkdir"):
        setattr(os, name, deadly(getattr(os, name)))


def fork(function, *arguments):
    """Run a function in a copy of this process; return its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        function(*arguments)
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def snapshot(job):
    """Which results exist, by what changes when they are made again."""
    found = {}
    for item in plan_batch(job):
        for path in item.outputs:
            if path.exists():
                status = path.stat()
                found[str(path)] = (item.name, status.st_ino, status.st_mtime_ns)
    return found


def main(place, kills, by_call):
    place = Path(place)
    job = BatchJob.load(place / "job.yaml")
    log = place / "started.txt"
    dice = random.Random(0)
    started = time.perf_counter()
    undisturbed = job.model_copy(update={"output": place / "timed"})
    os.waitpid(fork(run, undisturbed, os.devnull, None), 0)
    seconds = time.perf_counter() - started
    killed, finished, redone, before = 0, 0, 0, {}
    while True:
        deadly_call = None
        if by_call and killed < kills:
            deadly_call = dice.randrange(1, 60)
        pid = fork(run, job, log, deadly_call)
        if not by_call and killed < kills:
            time.sleep(dice.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        after = snapshot(job)
        changed = {was[0] for path, was in before.items() if after.get(path) != was}
        redone = max(redone, len(changed))
        before = after
        if os.WIFSIGNALED(status):
            killed += 1
            continue
        if os.WEXITSTATUS(status):
            sys.exit("the batch failed")
        finished += 1
        job.output.rename(place / f"finished{finished}")
        before = {}
        if killed >= kills:
            break
    sys.stdout.write(
        json.dumps({"killed": killed, "finished": finished, "redone": redone})
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "call")
