"""A killed batch goes on as if it had not been killed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from batch_cases import make_images, make_job, parts, results, run_well, unchanged

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
SCRIPT = Path(__file__).with_name("kill_batch.py")


@pytest.fixture(scope="module")
def killer():
    """A process that lets batches be killed."""
    with subprocess.Popen(
        [sys.executable, SCRIPT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.stdin.close()


def kill(killer, place, job, *options):
    """Let a batch be killed many times; return what each kill has cost."""
    job.save(place / "job.yaml")
    with unchanged(place / "in"):
        killer.stdin.write(f"{json.dumps([str(place), *options])}\n")
        killer.stdin.flush()
        told = json.loads(killer.stdout.readline())
    assert told, "the standard error says why it has failed"
    return told


@pytest.mark.parametrize(
    ("how", "size", "kind", "files", "kills"),
    [
        ("call", "small", "tif", 6, 12),
        ("time", "small", "ome.zarr", 4, 8),
        ("call", "large", "ome.zarr", 2, 6),
        ("time", "large", "ome.tif", 2, 6),
        pytest.param("call", "small", "tif", 60, 300, marks=pytest.mark.slow),
        pytest.param("time", "small", "tif", 60, 100, marks=pytest.mark.slow),
        pytest.param("call", "large", "ome.zarr", 20, 200, marks=pytest.mark.slow),
        pytest.param("time", "large", "ome.zarr", 20, 100, marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_is_the_same_as_undisturbed(
    killer, place, how, size, kind, files, kills
):
    shutil.rmtree(place / "in")
    make_images(place / "in", files)
    job = make_job(place, format=kind, probabilities=True, measure=True)
    run_well(job.model_copy(update={"output": place / "reference"}))

    told = kill(killer, place, job, kills, how, size)

    assert told["killed"] >= kills
    # Some kills came while there were temporary arrays.
    assert (told["in scratch"] > 0) == (size == "large")
    # Of a file whose results were there when the kill came.
    assert told["redone"] <= 1
    # Of all: the one that was written, and what the network had begun on the next.
    begun = (place / "started.txt").read_text().splitlines()
    assert len(begun) <= files * told["finished"] + 2 * told["killed"]
    for number in range(told["finished"]):
        finished = place / f"finished{number + 1}"
        assert results(finished) == results(place / "reference")
        assert not parts(finished)
