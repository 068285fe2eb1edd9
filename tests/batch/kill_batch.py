"""Runs batches again and again, killed each time, in a process of its own.

Each line of the input is a list of JSON: the arguments of `kill`, whose answer is
a line, too. Everything is imported once; each run is a fork, which a signal ends at a
random moment or a chosen call ends between two system calls.
"""

import importlib
import json
import os
import random
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

import torch

from napari_unet.batch import file as batch_file
from napari_unet.batch import volume
from napari_unet.batch.folder import batch_steps
from napari_unet.batch.job import BatchJob
from napari_unet.batch.plan import plan_batch_steps
from napari_unet.steps import run_to_end


def run(job, log, deadly_call):
    """Run the batch in this process, which may not survive it; return the calls."""
    torch.set_num_threads(1)
    calls = count_calls(deadly_call)
    started = set()
    for step in batch_steps(job, resume=True):
        if step.status == "running" and step.name not in started:
            started.add(step.name)
            with open(log, "a") as file:
                file.write(f"{step.name}\n")
    return calls[0]


def count_calls(deadly_call):
    """Die before the system call of that number that makes something durable."""
    calls = [0]

    def deadly(function):
        def counted(*arguments, **options):
            calls[0] += 1
            if calls[0] == deadly_call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return counted

    for name in ("fsync", "replace", "open", "mkdir", "rmdir", "unlink"):
        setattr(os, name, deadly(getattr(os, name)))
    return calls


def take_for_large():
    """Take every image for a large one: through files, and block by block."""
    batch_file.LAZY_BYTES = batch_file.LAZY_VALUES = 1000
    volume.BLOCK_PIXELS = 1000
    volume.BLOCK_SHAPES[2] = (40, 32)


def fork(function, *arguments):
    """Run a function in a copy of this process; return its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        function(*arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def snapshot(job):
    """Which results exist, by what changes when they are made again.

    Whenever a process died, each of them is complete.
    """
    found = {}
    for item in run_to_end(plan_batch_steps(job)):
        for path in item.outputs:
            if path.exists():
                below = path.relative_to(job.output)
                if contents(path) != contents(job.output.parent / "reference" / below):
                    sys.exit(f"{below} is torn")
                status = path.stat()
                found[str(path)] = (item.name, status.st_ino, status.st_mtime_ns)
    return found


def contents(path):
    """All bytes of a file, or of the files in a folder."""
    if path.is_file():
        return path.read_bytes()
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return [(file.relative_to(path), file.read_bytes()) for file in files]


def measure(job, told):
    """Find out how long an undisturbed run takes, and how many calls it makes.

    What it imports is imported here, too, so that the runs that follow need not.
    """

    def count():
        calls = run(undisturbed, os.devnull, None)
        told.write_text(json.dumps([calls, list(sys.modules)]))

    undisturbed = job.model_copy(update={"output": job.output.parent / "timed"})
    pid, started = fork(count), time.perf_counter()
    os.waitpid(pid, 0)
    seconds = time.perf_counter() - started
    calls, modules = json.loads(told.read_text())
    for name in modules:
        with suppress(ImportError):  # some are made by others
            importlib.import_module(name)
    return seconds, calls


def kill(place, kills, how, size):
    """Let a batch be killed many times; print what each kill has cost."""
    place, by_call = Path(place), how == "call"
    if size == "large":
        take_for_large()
    job = BatchJob.load(place / "job.yaml")
    log = place / "started.txt"
    dice = random.Random(0)
    seconds, calls = measure(job, place / "measured.json")
    killed, finished, redone, in_scratch, before = 0, 0, 0, 0, {}
    while True:
        deadly_call = None
        if by_call and killed < kills:
            deadly_call = dice.randrange(1, calls)
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
            in_scratch += any(job.output.rglob(".scratch.*"))
            continue
        if os.WEXITSTATUS(status):
            sys.exit("the batch failed")
        finished += 1
        job.output.rename(place / f"finished{finished}")
        before = {}
        if killed >= kills:
            break
    told = {"killed": killed, "finished": finished, "redone": redone}
    answer(told | {"in scratch": in_scratch})


def answer(told):
    sys.stdout.write(f"{json.dumps(told)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    for line in sys.stdin:
        _, status = os.waitpid(fork(kill, *json.loads(line)), 0)
        if status:
            answer(None)
