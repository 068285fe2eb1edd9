"""Workers of Dask do what this process would do, whatever happens to them."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError

import numpy as np
import psutil
import pytest
import torch
from batch_cases import (
    make_images,
    make_job,
    parts,
    plan_batch,
    results,
    run_well,
    unchanged,
)
from cli_cases import call, squares, write_image
from distributed import Client
from faulty_cluster import HERE

from napari_unet.batch import cluster, scheduler, worker
from napari_unet.batch import job as batch_job
from napari_unet.batch.folder import batch_steps
from napari_unet.errors import BadCluster, BadInput, BadOutput
from napari_unet.steps import run_to_end

INTERNAL = ".napari-unet"


@pytest.fixture
def reference(place):
    """What this process makes of the images."""
    make_images(place / "in", 12)
    run_well(reference_job(place))
    return results(place / "reference")


def reference_job(place):
    return the_job(place).model_copy(update={"output": place / "reference"})


def the_job(place):
    return make_job(place, measure=True, probabilities=True)


@contextmanager
def running_cluster(workers=2):
    process = subprocess.Popen(
        [sys.executable, HERE, str(workers)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        process.address = process.stdout.readline().strip()
        yield process
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


@pytest.fixture(scope="module")
def address():
    """The address of a scheduler with two faulty workers."""
    with running_cluster() as process:
        yield process.address


def run(job, address, **options):
    with unchanged(job.input):
        return run_to_end(batch_steps(job, scheduler=address, **options))


def assert_tidy(place):
    assert not parts(place)
    assert not list((place / "out" / INTERNAL).glob("model-*"))


def worker_processes():
    """The processes of the workers that this process has started."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it was killed
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child)
    return found


def test_a_local_cluster_gives_the_same_bytes(place, reference, capsys):
    job = the_job(place)
    arguments = (job.input, job.output, "-m", job.model, "--measure", "--probabilities")
    done = call(capsys, "batch", *arguments, "--scheduler", "local:2")
    assert done.code == 0
    assert len(done.out.splitlines()) == 13
    assert results(place / "out") == reference
    assert_tidy(place)
    assert not worker_processes()


def test_killed_workers_change_nothing(place, reference):
    random.seed(4)
    kills, begun = 0, []
    with closing(batch_steps(the_job(place), scheduler="local:2")) as steps:
        for step in steps:
            if "reading" in step.message:
                begun.append(step.name)
            if kills and step.status != "done":  # to look costs more than to segment
                continue
            processes = worker_processes()
            if begun and not kills and len(processes) == 2:
                # Those that have begun: one has yet to load the model.
                for process in processes:
                    process.kill()
                kills = 2
            if step.status == "done" and kills == 2 and len(processes) == 2:
                random.choice(processes).kill()
                kills = 3
            if processes:
                listening = {
                    connection.laddr.ip
                    for process in (psutil.Process(), *processes)
                    for connection in connections(process)
                }
                assert listening <= {"127.0.0.1"}
    assert kills == 3
    assert len(begun) > len(set(begun))  # what was lost was begun anew
    assert results(place / "out") == reference
    lines = (place / "out" / "journal.jsonl").read_text().splitlines()
    assert sum('"status": "done"' in line for line in lines) == 12
    assert_tidy(place)


@pytest.mark.parametrize("kind", ["tif", "ome.zarr"])
def test_workers_killed_at_work_change_nothing(place, address, kind):
    """All of them die while each is segmenting; both images are begun anew."""
    job = make_job(place, format=kind, measure=True, probabilities=True)
    run_well(job.model_copy(update={"output": place / "reference"}))
    (place / "in" / "slow").touch()
    steps = batch_steps(job, scheduler=address)
    begun = wait_until_slow(steps)
    with Client(address, set_as_default=False) as client:
        for pid in client.run(os.getpid).values():
            psutil.Process(pid).kill()
    (place / "in" / "slow").unlink()
    again = {step.name for step in steps if "reading" in step.message}
    assert begun <= again
    assert results(place / "out") == results(place / "reference")
    lines = (place / "out" / "journal.jsonl").read_text().splitlines()
    assert sum('"status": "done"' in line for line in lines) == 3
    assert_tidy(place)


def connections(process):
    try:
        found = process.net_connections("inet")
    except psutil.Error:  # it was killed
        return []
    return [one for one in found if one.status == psutil.CONN_LISTEN]


def test_a_running_scheduler(place, reference, address):
    stack = np.stack([squares(i % 4 + 1) for i in range(7)])
    write_image(place / "in" / "stack.tif", stack, "TYX")
    expected = run_well(reference_job(place), overwrite=True)
    report = run(the_job(place), address)
    assert not report.failed
    names = [[entry.name for entry in r.entries] for r in (report, expected)]
    assert names[0] == names[1]
    assert results(place / "out") == results(place / "reference")
    assert_tidy(place)
    assert run(the_job(place), address, resume=True).skipped == 13


def test_relative_paths(place, address, monkeypatch):
    monkeypatch.chdir(place)
    job = make_job(place.relative_to(place))
    assert not run(job, address).failed
    assert run(job, address, resume=True).skipped == 3


def test_a_file_that_kills_workers(place, address):
    write_image(place / "in" / "deadly.tif", squares())
    write_image(place / "in" / "a9.tif", squares())
    report = run(make_job(place), address)
    assert [entry.name for entry in report.failed] == ["deadly.tif"]
    assert report.failed[0].reason.startswith("The workers that segmented it died")
    assert len(report.entries) == 5
    assert "deadly.tif" in str(report.error)
    assert_tidy(place)


def test_a_full_disk_on_a_worker_stops_the_batch(place, address):
    write_image(place / "in" / "a1full.tif", squares())
    make_images(place / "in", 10)
    with pytest.raises(BadOutput, match="the disk is full"):
        run(make_job(place), address)
    written = {path.name for path in (place / "out").glob("*.tif")}
    assert len(written) < 10
    # The other worker may be in the middle of a file, which it finishes or removes.
    deadline = time.monotonic() + 20
    while parts(place) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert_tidy(place)
    (place / "in" / "a1full.tif").unlink()
    report = run(make_job(place), address, resume=True)
    assert not report.failed


def test_a_worker_that_does_not_see_the_folder(place, address):
    job = make_job(place).model_copy(update={"output": place / "elsewhere"})
    with pytest.raises(BadCluster, match=r"The worker at tcp://\S+ does not see /"):
        run(job, address)
    (place / "in").rename(place / "elsewhere-in")
    job = make_job(place).model_copy(update={"input": place / "elsewhere-in"})
    with pytest.raises(BadCluster, match="under the same path"):
        run(job, address)


def test_other_versions_are_refused(place, address, monkeypatch):
    versions = {"napari-unet": "9.9"}
    monkeypatch.setattr(cluster, "program_versions", lambda model: versions)
    with pytest.raises(BadCluster, match=r"has napari-unet \S+ instead of 9.9"):
        run(make_job(place), address)


def test_what_only_some_computers_have_is_compared_where_it_computes(monkeypatch):
    programs = {"torch": "2+cpu", "openvino": "7"}
    monkeypatch.setattr(worker, "version_of", lambda name: programs.get(name, ""))
    differ = worker._different_versions
    assert differ({"torch": "2+cu130", "openvino": "7"}, "cpu") == ""
    assert differ({"torch": "2"}, "cpu") == "openvino 7 instead of none"
    assert differ({"torch": "2", "openvino": "6"}, "cpu") == "openvino 7 instead of 6"
    assert differ({"torch": "2"}, "cuda") == ""
    assert differ({"torch": "3"}, "cuda") == "torch 2 instead of 3"
    wanted = {"torch": "2", "onnxruntime": "1"}
    assert differ(wanted, "cuda") == "onnxruntime none instead of 1"


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime-gpu"])
def test_onnxruntime_is_the_same_program_under_either_name(monkeypatch, name):
    def version(distribution):
        if distribution != name:
            raise PackageNotFoundError(distribution)
        return "1.31.1"

    monkeypatch.setattr(batch_job, "version", version)
    version_of = batch_job.version_of.__wrapped__  # which remembers nothing
    monkeypatch.setattr(worker, "version_of", version_of)
    assert version_of("onnxruntime") == "1.31.1"
    assert worker._different_versions({"onnxruntime": "1.31.1"}, "cuda") == ""


def test_a_memory_limit_that_is_too_low_ends_the_batch(place, address):
    with pytest.raises(BadInput, match="is too low for this network"):
        run(make_job(place, settings={"memory_limit": 1e-6}), address)
    assert "failed" not in (place / "out" / "journal.jsonl").read_text()
    enough = make_job(place, settings={"memory_limit": 1})
    assert not run(enough, address, resume=True).failed


def wait_until_slow(steps):
    """Let two images be in work; return their names."""
    names = set()
    deadline = time.monotonic() + 120
    while len(names) < 2:
        assert time.monotonic() < deadline
        if "slowly" in (step := next(steps)).message:
            names.add(step.name)
    return names


def test_cancel(place, address):
    (place / "in" / "slow").touch()
    steps = batch_steps(make_job(place), scheduler=address)
    wait_until_slow(steps)
    started = time.monotonic()
    steps.close()
    assert time.monotonic() - started < 5
    assert_tidy(place)
    # The workers have stopped, although the images are still slow.
    time.sleep(2)
    write_image(place / "other" / "a.tif", squares(2))
    other = {"input": place / "other", "output": place / "other-out"}
    assert not run(make_job(place).model_copy(update=other), address).failed
    assert not list((place / "out").glob("*.tif"))
    (place / "in" / "slow").unlink()
    assert not run(make_job(place), address, resume=True).failed


@pytest.mark.skipif(os.name != "posix", reason="sends what a terminal sends")
def test_ctrl_c(place):
    """It reaches the workers on this computer, too."""
    make_images(place / "in", 40)
    job = make_job(place)
    command = [sys.executable, "-m", "napari_unet", "batch", job.input, job.output]
    options = ["-m", job.model, "--scheduler", "local:1"]
    with subprocess.Popen(
        [*command, *options], start_new_session=True, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 60
        journal = place / "out" / "journal.jsonl"
        while not (journal.exists() and '"status": "done"' in journal.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        told = process.stderr.read()
    assert process.returncode == 130
    assert told.startswith("Error: Stopped by Ctrl-C.")
    assert len(list((place / "out").glob("*.tif"))) < 40
    report = run_well(job, resume=True)
    assert report.skipped > 0
    assert_tidy(place)


def test_a_killed_client_leaves_nothing_that_writes(place, address):
    (place / "in" / "slow").touch()
    script = (
        "import sys; from napari_unet.cli import main\nmain(['batch', *sys.argv[1:]])"
    )
    job = make_job(place)
    arguments = [job.input, job.output, "-m", job.model, "--scheduler", address]
    with subprocess.Popen([sys.executable, "-c", script, *arguments]) as process:
        deadline = time.monotonic() + 60
        while not list((place / "out" / INTERNAL).glob("model-*")):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(1)
        process.kill()
    steps = batch_steps(job, resume=True)
    next(steps)
    assert not list((place / "out" / INTERNAL).glob("model-*"))
    assert not run_to_end(steps).failed
    (place / "in" / "slow").unlink()
    assert_tidy(place)


def test_two_runs_on_one_folder(place, address):
    """The workers write, and the process that leads them holds the lock."""
    (place / "in" / "slow").touch()
    job = make_job(place)
    with closing(batch_steps(job, scheduler=address)) as first:
        wait_until_slow(first)
        told = f"Another batch is writing into {job.output}; wait until it has ended"
        for second in (None, address):
            with pytest.raises(BadOutput, match=told):
                run_to_end(batch_steps(job, resume=True, scheduler=second))
        (place / "in" / "slow").unlink()
        run_to_end(first)
    assert run(job, address, resume=True).skipped == 3


def test_a_killed_run_with_its_own_workers_does_not_block_the_next(place):
    make_images(place / "in", 40)
    job = make_job(place, format="ome.zarr")
    command = [sys.executable, "-m", "napari_unet", "batch", job.input, job.output]
    options = ["-m", job.model, "--format", job.format, "--scheduler", "local:1"]
    with subprocess.Popen([*command, *options]) as process:
        journal = place / "out" / "journal.jsonl"
        deadline = time.monotonic() + 120
        while not (journal.exists() and '"status": "done"' in journal.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
    report = run_well(job, resume=True)
    assert 0 < report.skipped < 40
    run_well(job, resume=True)  # sweeps what its workers left when they ended
    assert_tidy(place)


def test_a_lost_scheduler(place, reference):
    with running_cluster() as process:
        (place / "in" / "slow").touch()
        steps = batch_steps(the_job(place), scheduler=process.address)
        wait_until_slow(steps)
        (place / "in" / "slow").unlink()
        while next(steps).status != "done":
            pass
        (place / "in" / "slow").touch()
        processes = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        started = time.monotonic()
        with pytest.raises(BadCluster) as caught:
            run_to_end(steps)
    assert time.monotonic() - started < 60
    assert "to the Dask scheduler at tcp://" in str(caught.value)
    assert "of 12 images are done and kept; resume the batch" in str(caught.value)
    assert caught.value.exit_code == 5
    psutil.wait_procs(processes, 10)  # so that what they left can be swept
    (place / "in" / "slow").unlink()
    report = run_to_end(batch_steps(the_job(place), resume=True))
    assert report.skipped >= 1
    assert results(place / "out") == reference
    assert_tidy(place)


def test_a_cluster_without_workers(place, monkeypatch):
    monkeypatch.setattr(cluster, "PATIENCE", 0.5)
    with running_cluster(workers=0) as process:
        steps = batch_steps(make_job(place), scheduler=process.address)
        with pytest.raises(BadCluster, match="no workers for"):
            run_to_end(steps)


def test_no_scheduler_there(place, monkeypatch):
    monkeypatch.setattr(scheduler, "CONNECT", 0.5)
    with pytest.raises(BadCluster, match="There is no Dask scheduler at tcp://127"):
        run(make_job(place), "tcp://127.0.0.1:9")
    assert_tidy(place)


@pytest.mark.parametrize("text", ["lokal", "local:0", "local:x", "8786"])
def test_what_is_no_scheduler(place, text):
    with pytest.raises(BadInput, match="is no Dask scheduler: write its address like"):
        run(make_job(place), text)
    assert not (place / "out").exists()


def test_without_distributed(place):
    script = (
        "import sys; sys.modules['distributed'] = None\n"
        "from napari_unet.cli import main; told = ['batch', *sys.argv[1:]]\n"
        "sys.exit(10 * main([*told, '--scheduler', 'local']) + main(told))"
    )
    job = make_job(place)
    command = [sys.executable, "-c", script, job.input, job.output, "-m", job.model]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 10
    assert 'pip install "napari-unet[cluster]"' in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_each_gpu_has_a_process(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def seen(count=None, device="auto"):
        found = scheduler._environments(count, device)
        return [environment.get("CUDA_VISIBLE_DEVICES") for environment in found]

    assert seen() == ["0", "1"]
    assert seen(3) == ["0", "1", "0"]
    assert seen(3, "cpu") == [None] * 3
    assert seen(device="cuda:1") == [None]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-ab")
    assert seen() == ["5", "GPU-ab"]


@pytest.mark.parametrize("kind", ["tif", "ome.zarr"])
def test_a_file_that_runs_twice_is_written_twice(place, address, kind):
    """As when a worker is taken for dead."""
    from napari_unet.batch.folder import complete_job
    from napari_unet.batch.worker import segment_on_worker
    from napari_unet.models.library import load_model

    job = make_job(place, format=kind)
    run_well(job)
    before = results(place / "out")
    model = load_model(job.model)
    task = task_of(complete_job(job, model), model)
    item = plan_batch(job)[2]
    with (
        Client(address, set_as_default=False) as client,
        cluster._ordered(model, task) as order,
    ):
        twice = [
            client.submit(
                segment_on_worker, 0, item, order, pure=False, key=f"twice{i}"
            )
            for i in range(12)
        ]
        entries = [replace(f.result(), seconds=0) for f in twice]
    assert len(set(map(repr, entries))) == 1
    assert results(place / "out") == before
    assert_tidy(place)


def task_of(job, model):
    from napari_unet.batch.file import Task

    return Task(
        output=job.output,
        internal=job.output / INTERNAL,
        options=job.settings.options(model.ndim),
        overwrite=True,
    )
