"""The same work for many parts, on several threads."""

import threading

import pytest

from napari_unet.inference import spread
from napari_unet.inference.spread import FEWEST, spread_steps
from napari_unet.steps import run_to_end

PATIENCE = 30  # seconds, of what fails only if it never comes


@pytest.fixture(autouse=True)
def cores(monkeypatch) -> int:
    monkeypatch.setattr(spread, "count_cores", lambda: 3)
    return 3


def finish() -> None:
    """Wait for what goes on in the background."""
    for thread in threading.enumerate():
        if thread.name.startswith("napari-unet-parts"):
            thread.join(PATIENCE)


def test_parts_run_at_once_and_come_in_order(cores):
    together = threading.Barrier(cores, timeout=PATIENCE)

    def work(part: int) -> tuple[int, int]:
        together.wait()
        return 2 * part, threading.get_ident()

    results = run_to_end(spread_steps(work, range(4 * cores)))
    assert [twice for twice, _ in results] == list(range(0, 8 * cores, 2))
    assert len({thread for _, thread in results}) == cores


@pytest.mark.parametrize("count", [0, 1, FEWEST - 1])
def test_few_parts_need_no_threads(count):
    steps = spread_steps(lambda _: threading.get_ident(), range(count))
    assert run_to_end(steps) == [threading.get_ident()] * count
    assert len(list(spread_steps(str, range(count)))) == count


def test_one_core_needs_no_threads(monkeypatch):
    monkeypatch.setattr(spread, "count_cores", lambda: 1)
    steps = spread_steps(lambda _: threading.get_ident(), range(9))
    assert run_to_end(steps) == [threading.get_ident()] * 9


def test_it_ticks_while_parts_are_at_work():
    go_on = threading.Event()
    steps = spread_steps(lambda part: go_on.wait(PATIENCE), range(FEWEST))
    for _ in range(3):
        next(steps)
    go_on.set()
    assert run_to_end(steps) == [True] * FEWEST


def test_closed_it_begins_no_other_part(cores):
    begun, go_on = [], threading.Event()

    def work(part: int) -> None:
        begun.append(part)
        go_on.wait(PATIENCE)

    steps = spread_steps(work, range(5 * cores))
    next(steps)
    steps.close()  # does not wait either
    go_on.set()
    finish()
    assert len(begun) <= cores


def test_an_error_is_raised_at_once(cores):
    begun, go_on = [], threading.Event()

    def work(part: int) -> None:
        begun.append(part)
        if part == 1:
            raise ValueError("part 1")
        go_on.wait(PATIENCE)

    with pytest.raises(ValueError, match="part 1"):
        run_to_end(spread_steps(work, range(5 * cores)))
    assert not go_on.is_set()
    go_on.set()
    finish()
    assert len(begun) <= cores + 1


def test_parts_spread_their_own_work(cores):
    def work(part: int) -> list[int]:
        return run_to_end(spread_steps(lambda i: part * i, range(2 * cores)))

    results = run_to_end(spread_steps(work, range(2 * cores)))
    assert results == [[p * i for i in range(2 * cores)] for p in range(2 * cores)]
