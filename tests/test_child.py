"""Generators in a process of their own: `steps.in_child` and `napari_unet.child`."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import child_steps
import numpy as np
import psutil
import pytest

from napari_unet import errors
from napari_unet.files.atomic import sweep
from napari_unet.steps import ChildError, Progress, in_child, run_to_end

GUI = {"napari", "qtpy", "magicgui", "superqt", "vispy", "PyQt5", "PyQt6", "PySide6"}
LINUX = sys.platform == "linux"


@contextlib.contextmanager
def running(*args, **kwargs):
    with contextlib.closing(in_child(*args, **kwargs)) as steps:
        yield steps


def is_gone(pid):
    """Zombies count as there: they are what nobody has waited for."""
    return not psutil.pid_exists(pid)


def is_over(pid):
    """Zombies count as gone: an orphan's new parent may take its time."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_for(condition, seconds):
    start = time.perf_counter()
    while not condition():
        assert time.perf_counter() - start < seconds, "too late"
        time.sleep(0.01)
    return time.perf_counter() - start


def count_descriptors():
    me = psutil.Process()
    return me.num_fds() if hasattr(me, "num_fds") else me.num_handles()


@pytest.fixture(autouse=True)
def nothing_left():
    """No process, thread or descriptor outlives a test."""
    me = psutil.Process()
    threads, descriptors = threading.active_count(), count_descriptors()
    children = {child.pid for child in me.children()}
    yield
    gc.collect()
    assert {child.pid for child in me.children()} <= children
    assert threading.active_count() <= threads
    assert count_descriptors() <= descriptors


# ---- what crosses the pipe


def test_progress_and_result():
    steps = in_child(child_steps.count_steps, 3, scale=2)
    assert [next(steps) for _ in range(3)] == [
        Progress(2 * done, 6, f"step {done}") for done in range(3)
    ]
    with pytest.raises(StopIteration) as stop:
        next(steps)
    assert stop.value.value == {"steps": 3}
    with pytest.raises(StopIteration):
        next(steps)


def test_run_to_end_and_yield_from():
    def outer():
        return (yield from in_child(child_steps.count_steps, 2))

    assert run_to_end(in_child(child_steps.count_steps, 2)) == {"steps": 2}
    assert run_to_end(outer()) == {"steps": 2}
    assert run_to_end(in_child(child_steps.return_tuple_steps)) == (1, 2)


ARRAYS = [
    np.arange(24).reshape(2, 3, 4).astype(dtype)
    for dtype in ("u1", "i8", "f2", "f4", ">u2", "c16", "?")
] + [
    np.array(3.5),
    np.empty((0, 5), np.float32),
    np.empty(0),
    np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    np.arange(40.0).reshape(5, 8)[::2, ::-3],
    np.broadcast_to(np.float32(2), (3, 4)),
    np.array(["2026-01-01"], "M8[D]"),
    np.array(["ab", "c"]),
    np.array([(1, 2.5)], [("a", "i4"), ("b", "f8")]),
]


def test_arrays_there_and_back():
    with running(child_steps.echo_steps, *ARRAYS) as steps:
        for there, back in zip(ARRAYS, next(steps), strict=True):
            assert there.dtype == back.dtype
            np.testing.assert_array_equal(there, back, strict=True)
        for there in ARRAYS:
            np.testing.assert_array_equal(there, steps.send(there), strict=True)


def test_arrays_can_be_written_to_unless_the_sent_one_could_not():
    fixed = np.zeros(3)
    fixed.flags.writeable = False
    with running(child_steps.echo_steps, np.zeros(3), fixed) as steps:
        free, still_fixed = next(steps)
    free += 1
    assert not still_fixed.flags.writeable


def test_dataclass_with_array_and_path():
    with running(child_steps.report_steps, (3, 4)) as steps:
        report = next(steps)
    assert report.step == 1
    assert report.path == Path("a") / "b"
    np.testing.assert_array_equal(report.preview, np.full((3, 4), 7, np.uint16))


def test_sent_values_arrive():
    with running(child_steps.echo_steps) as steps:
        assert next(steps) == ()
        for value in ("pause", {"image": 3}, np.float32(2)):
            assert steps.send(value) == value
        with pytest.raises(StopIteration):
            next(steps)


def test_value_sent_before_the_start_is_refused():
    with pytest.raises(ChildError, match="TypeError: can't send non-None"):
        in_child(child_steps.echo_steps).send(1)


@pytest.mark.skipif(not LINUX, reason="needs the peak resident size in KiB")
def test_large_arrays_are_not_copied_more_than_needed():
    size = 200 << 20
    mebibytes = size >> 20
    with running(child_steps.memory_steps, np.zeros(1, np.uint8)) as steps:
        next(steps)
        child_before = next(steps)
    array = np.ones(size, np.uint8)
    peak = Peak()
    with running(child_steps.memory_steps, array) as steps:
        assert next(steps) == 1
        child_peak = next(steps)
        with pytest.raises(StopIteration) as stop:
            next(steps)
    grown = peak.stop()
    assert stop.value.value.nbytes == size
    # One copy each: the child's argument, and what came back here.
    assert child_peak - child_before < 1.3 * mebibytes
    assert grown < 1.3 * mebibytes


class Peak:
    """How much the resident size of this process grows, in MiB."""

    def __init__(self):
        self._process = psutil.Process()
        self._start = self._most = self._process.memory_info().rss
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self):
        while not self._ended.wait(0.002):
            self._most = max(self._most, self._process.memory_info().rss)

    def stop(self):
        self._ended.set()
        self._thread.join()
        return (self._most - self._start) / 2**20


# ---- errors


@pytest.mark.parametrize(
    "name",
    ["BadModel", "BadInput", "BadOutput", "OutOfMemory", "Cancelled", "Partial"],
)
def test_own_errors_come_back_as_they_are(name):
    steps = in_child(child_steps.raise_steps, name, "What, why and what to do.")
    next(steps)
    with pytest.raises(errors.UnetError, match="What, why and what to do") as caught:
        next(steps)
    assert type(caught.value) is getattr(errors, name)
    assert str(caught.value) == "What, why and what to do."
    assert "in raise_steps" in str(caught.value.__cause__)
    with pytest.raises(StopIteration):
        next(steps)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("ValueError", "ValueError: odd shape"),
        ("RuntimeError", "RuntimeError: odd shape"),
        ("SystemExit", "SystemExit: 3"),
    ],
)
def test_unexpected_errors_bring_the_traceback(kind, text):
    steps = in_child(child_steps.fail_steps, kind)
    next(steps)
    with pytest.raises(ChildError, match=text) as caught:
        next(steps)
    assert "in fail_steps" in str(caught.value.__cause__)
    assert not isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize("name", ["unpicklable_steps", "return_unpicklable_steps"])
def test_what_cannot_cross_the_pipe_is_named(name):
    steps = in_child(getattr(child_steps, name))
    next(steps)
    with pytest.raises(ChildError, match="pickle"):
        next(steps)


def test_arguments_that_cannot_cross_the_pipe_are_named():
    with pytest.raises((TypeError, AttributeError), match="pickle"):
        next(in_child(child_steps.echo_steps, lambda: None))


def test_wrong_arguments():
    with pytest.raises(ChildError, match="missing 1 required positional"):
        next(in_child(child_steps.count_steps))


def test_only_importable_functions_named_steps():
    def local_steps():
        yield 1

    with pytest.raises(ValueError, match=r"named \.\.\._steps"):
        in_child(os.system, "true")
    with pytest.raises((AttributeError, TypeError), match="local_steps"):
        next(in_child(local_steps))


def test_exit_of_the_child():
    steps = in_child(child_steps.exit_steps)
    next(steps)
    with pytest.raises(
        ChildError, match=r"ended unexpectedly \(exit code 7\)"
    ) as error:
        next(steps)
    assert "last words" in str(error.value.__cause__)


def test_crash_of_the_child():
    steps = in_child(child_steps.crash_steps)
    next(steps)
    with pytest.raises(ChildError, match=r"\(signal 11\)") as caught:
        next(steps)
    assert "in crash_steps" in str(caught.value.__cause__)
    assert "memory" not in str(caught.value)


def test_killed_child_may_have_had_too_little_memory():
    steps = in_child(child_steps.kill_steps)
    next(steps)
    with pytest.raises(ChildError, match=r"\(signal 9\).* Memory may have run out"):
        next(steps)


def test_child_killed_between_steps():
    steps = in_child(child_steps.busy_steps, "sleep")
    os.kill(next(steps), signal.SIGKILL)
    with pytest.raises(ChildError, match="signal 9"):
        next(steps)


def test_python_that_cannot_start_the_child(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ChildError, match="exit code 1"):
        next(in_child(child_steps.echo_steps, np.zeros(10_000_000)))
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(FileNotFoundError):
        next(in_child(child_steps.echo_steps))


# ---- output


def test_output_does_not_disturb_the_pipe():
    assert list(in_child(child_steps.chatty_steps)) == list(range(20))


def test_input_is_empty():
    assert list(in_child(child_steps.read_input_steps)) == [""]


# ---- lock-step and closing


def test_slow_reader_holds_the_child(tmp_path):
    log = tmp_path / "log"
    with running(child_steps.log_steps, log) as steps:
        assert not log.exists()
        for step in range(4):
            next(steps)
            time.sleep(0.1)
            assert log.read_text().split()[-1] == str(step)
    assert log.read_text().split() == ["0", "1", "2", "3", "closed"]


def test_closing_runs_the_finally_blocks_and_is_quick(tmp_path):
    log = tmp_path / "log"
    steps = in_child(child_steps.log_steps, log)
    next(steps)
    start = time.perf_counter()
    steps.close()
    assert time.perf_counter() - start < 1
    assert log.read_text().split() == ["0", "closed"]
    steps.close()
    with pytest.raises(StopIteration):
        next(steps)


def test_closing_does_not_wait_for_endless_finally_blocks(tmp_path):
    steps = in_child(child_steps.slow_closing_steps, tmp_path / "log")
    pid = next(steps)
    start = time.perf_counter()
    steps.close()
    assert time.perf_counter() - start < 1.5
    assert is_gone(pid)
    assert (tmp_path / "log").read_text() == "closed"


def test_thread_left_behind_does_not_hold_the_child():
    steps = in_child(child_steps.thread_left_steps)
    pid = next(steps)
    start = time.perf_counter()
    steps.close()
    assert time.perf_counter() - start < 1
    assert is_gone(pid)


@pytest.mark.parametrize("end", ["cancelled", "returned", "failed", "closed"])
def test_no_library_holds_the_child(end):
    """Not even one that takes long to unload, as torch does."""
    steps = in_child(child_steps.slow_exit_steps, fails=end == "failed")
    pid = next(steps)
    start = time.perf_counter()
    if end == "cancelled":
        steps.cancel()
    elif end == "closed":
        steps.close()
    else:
        with contextlib.suppress(ChildError):
            assert run_to_end(steps) == "the end"
    wait_for(lambda: is_over(pid), 1)
    assert time.perf_counter() - start < 1


def test_closing_before_the_start():
    steps = in_child(child_steps.count_steps, 3)
    steps.close()
    assert list(steps) == []


def test_throwing_closes():
    steps = in_child(child_steps.busy_steps, "sleep")
    pid = next(steps)
    with pytest.raises(KeyError):
        steps.throw(KeyError("k"))
    assert is_gone(pid)


def test_quit_of_an_outer_generator_closes():
    def outer():
        yield from in_child(child_steps.busy_steps, "sleep")

    steps = outer()
    pid = next(steps)
    steps.close()
    assert is_gone(pid)


def test_garbage_is_closed(tmp_path):
    log = tmp_path / "log"
    steps = in_child(child_steps.log_steps, log)
    next(steps)
    del steps
    gc.collect()
    assert log.read_text().split() == ["0", "closed"]


def next_in_thread(steps):
    caught = []

    def run():
        try:
            caught.append(next(steps))
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, caught


@pytest.mark.parametrize(
    ("function", "arguments", "limit"),
    [
        ("busy_steps", ["numpy"], 1.0),
        ("busy_steps", ["sleep"], 1.0),
        ("busy_steps", ["locked"], 2.0),
        ("stubborn_steps", [], 2.5),
    ],
)
def test_closing_within_a_long_step(function, arguments, limit):
    steps = in_child(getattr(child_steps, function), *arguments)
    pid = next(steps)
    thread, caught = next_in_thread(steps)
    time.sleep(0.2)
    start = time.perf_counter()
    steps.close()
    assert time.perf_counter() - start < limit
    assert is_gone(pid)
    thread.join()
    assert isinstance(caught[0], ChildError)
    assert "was stopped" in str(caught[0])


def test_cancel_does_not_wait():
    steps = in_child(child_steps.busy_steps, "numpy")
    pid = next(steps)
    thread, caught = next_in_thread(steps)
    time.sleep(0.2)
    start = time.perf_counter()
    steps.cancel()
    assert time.perf_counter() - start < 0.1
    assert wait_for(lambda: is_gone(pid), 1)
    thread.join()
    assert isinstance(caught[0], ChildError)


def test_a_file_half_written_when_cancelled_is_swept(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")
    with running(child_steps.write_steps, path) as steps:
        next(steps)
        thread, _ = next_in_thread(steps)
        wait_for(lambda: len(list(tmp_path.iterdir())) > 1, 5)
        steps.cancel()
        thread.join(1)
        assert not thread.is_alive()
    assert path.read_bytes() == b"old"
    assert len(sweep(tmp_path)) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_cancelled_between_steps():
    steps = in_child(child_steps.count_steps, 3)
    next(steps)
    steps.cancel()
    with pytest.raises(ChildError, match="was stopped"):
        next(steps)


@pytest.mark.parametrize("delay", [0, 0.001, 0.01, 0.05, 0.1])
def test_cancel_while_starting(delay):
    steps = in_child(child_steps.echo_steps, np.zeros(20_000_000))
    thread, caught = next_in_thread(steps)
    time.sleep(delay)
    steps.cancel()
    thread.join(3)
    assert not thread.is_alive()
    assert isinstance(caught[0], ChildError | tuple)
    steps.close()


# ---- the parent dies


PARENT = """
    import child_steps, threading
    from napari_unet.steps import in_child
    steps = in_child(child_steps.busy_steps, {how!r})
    print(next(steps), flush=True)
    if {inside}:
        next(steps)
    threading.Event().wait()
"""


def start_script(tmp_path, text, **kwargs):
    """A script without a guard, as users write them."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(text))
    folder = str(Path(__file__).parent)
    return subprocess.Popen(
        [sys.executable, "-W", "error", script],
        env={**os.environ, "PYTHONPATH": folder},
        text=True,
        **kwargs,
    )


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("how", ["numpy", "sleep"])
def test_child_of_a_killed_parent_ends(tmp_path, how, inside):
    text = PARENT.format(how=how, inside=inside)
    with start_script(tmp_path, text, stdout=subprocess.PIPE) as parent:
        pid = int(parent.stdout.readline())
        time.sleep(0.2)
        parent.kill()
    assert wait_for(lambda: is_over(pid), 2) < 2


def test_script_without_a_guard(tmp_path):
    text = """
        import sys
        from pathlib import Path
        import child_steps
        from napari_unet.steps import in_child, run_to_end
        with Path("runs").open("a") as file:
            file.write("x")
        print(run_to_end(in_child(child_steps.count_steps, 2)))
        left_open = in_child(child_steps.busy_steps, "sleep")
        print(next(left_open))
    """
    with start_script(
        tmp_path, text, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
    ) as parent:
        out, err = parent.communicate(timeout=20)
    assert parent.returncode == 0
    assert err == ""
    result, pid = out.splitlines()
    assert result == "{'steps': 2}"
    assert (tmp_path / "runs").read_text() == "x"
    assert is_over(int(pid))


def test_function_of_the_main_script_is_refused(tmp_path):
    text = """
        from napari_unet.steps import in_child
        def own_steps():
            yield 1
        in_child(own_steps)
    """
    with start_script(tmp_path, text, stderr=subprocess.PIPE) as parent:
        _, err = parent.communicate(timeout=20)
    assert "ValueError" in err
    assert "must be of a module" in err


# ---- the child's surroundings


def surroundings(**kwargs):
    with running(child_steps.surroundings_steps, **kwargs) as steps:
        return next(steps)


def test_child_is_light_and_modest():
    there = surroundings()
    assert not there["modules"] & (GUI | {"torch", "multiprocessing"})
    assert there["nice"] == min(os.nice(0) + 10, 19)
    assert there["interrupts"]
    assert there["pid"] != os.getpid()


def test_a_core_is_left_to_the_viewer(monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert surroundings(with_torch=True)["threads"] == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert surroundings()["limit"] == "7"
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert surroundings()["limit"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert surroundings()["limit"] == "2"


@pytest.mark.parametrize("name", ["napari_unet", "numpy", "random"])
def test_files_in_the_current_folder_are_no_libraries(tmp_path, monkeypatch, name):
    (tmp_path / f"{name}.py").write_text("raise SystemExit('not me')")
    monkeypatch.chdir(tmp_path)
    assert list(in_child(child_steps.count_steps, 1)) == [Progress(0, 1, "step 0")]


def test_children_in_sequence_leave_nothing():
    me = psutil.Process()
    run_to_end(in_child(child_steps.count_steps, 1))
    before = count_descriptors()
    for _ in range(10):
        run_to_end(in_child(child_steps.count_steps, 1))
        with running(child_steps.count_steps, 5) as steps:
            next(steps)
    assert count_descriptors() == before
    assert me.children() == []


def test_two_children_at_once_and_one_closed_first():
    first = in_child(child_steps.busy_steps, "sleep")
    pid = next(first)
    with running(child_steps.count_steps, 3) as second:
        next(second)
        # The second child must not hold the first one's pipe open.
        first.close()
        assert is_gone(pid)
        assert next(second).done == 1


def test_from_another_thread():
    results = []

    def run():
        results.append(run_to_end(in_child(child_steps.count_steps, 2)))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [{"steps": 2}] * 3


def test_steps_are_quick():
    """A token there and a progress back cost well under a training step."""
    with running(child_steps.count_steps, 1001) as steps:
        next(steps)
        start = time.perf_counter()
        for _ in range(1000):
            next(steps)
        assert (time.perf_counter() - start) / 1000 < 0.005
