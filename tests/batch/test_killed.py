"""A killed batch goes on as if it had not been killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from batch_cases import make_images, make_job, parts, results, run_well, unchanged

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
SCRIPT = Path(__file__).with_name("kill_batch.py")


def kill(place, job, kills, how):
    """Let a batch be killed many times; return what each kill has cost."""
    job.save(place / "job.yaml")
    with unchanged(place / "in"):
        done = subprocess.run(
            [sys.executable, SCRIPT, place, str(kills), how],
            capture_output=True,
            text=True,
            timeout=500,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("how", "files", "kills"),
    [
        ("call", 6, 20),
        ("time", 6, 20),
        pytest.param("call", 60, 300, marks=pytest.mark.slow),
        pytest.param("time", 60, 100, marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_is_the_same_as_undisturbed(place, how, files, kills):
    make_images(place / "in", files)
    job = make_job(place, probabilities=True, measure=True)
    run_well(job.model_copy(update={"output": place / "reference"}))

    told = kill(place, job, kills, how)

    assert told["killed"] >= kills
    # Of a file whose results were there when the kill came.
    assert told["redone"] <= 1
    # Of all: the one that was written, and what the network had begun on the next.
    begun = (place / "started.txt").read_text().splitlines()
    assert len(begun) <= files * told["finished"] + 2 * told["killed"]
    for number in range(told["finished"]):
        finished = place / f"finished{number + 1}"
        assert results(finished) == results(place / "reference")
        assert not parts(finished)
