"""What generators of steps have in common."""

import itertools
import time

import pytest

from napari_unet.steps import (
    Progress,
    describe_seconds,
    mapped_steps,
    run_to_end,
    seldom_steps,
)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0.0 s"),
        (0.44, "0.4 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1:00"),
        (190, "3:10"),
        (3599.6, "1:00:00"),
        (3730, "1:02:10"),
    ],
)
def test_times_in_words(seconds, words):
    assert describe_seconds(seconds) == words


def counting_steps(count, pause, closed):
    try:
        for number in range(count):
            time.sleep(pause)
            yield Progress(number, count)
        return "result"
    finally:
        closed.append(True)


def test_few_of_many_ticks():
    closed = []
    ticks = []

    def passed_on():
        result = yield from seldom_steps(counting_steps(50, 0.01, closed), 0.1)
        assert result == "result"

    started = time.monotonic()
    for tick in passed_on():
        ticks.append((time.monotonic() - started, tick.done))
    assert closed == [True]
    assert 1 <= len(ticks) <= (time.monotonic() - started) / 0.1
    times = [0, *(at for at, _ in ticks)]
    assert min(b - a for a, b in itertools.pairwise(times)) >= 0.099


def test_what_is_fast_tells_nothing_but_its_result():
    steps = seldom_steps(counting_steps(50, 0, []), 60)
    with pytest.raises(StopIteration) as stop:
        next(steps)
    assert stop.value.value == "result"
    assert run_to_end(seldom_steps(counting_steps(3, 0, []))) == "result"


def test_none_one_or_several_ticks_for_each():
    steps = mapped_steps(counting_steps(4, 0, []), lambda tick: "abc"[: tick.done])
    assert list(steps) == ["a", "a", "b", "a", "b", "c"]


def test_what_is_sent_goes_to_the_ticks():
    sent = []

    def ask(tick):
        sent.append((yield tick.done))

    steps = mapped_steps(counting_steps(2, 0, []), ask)
    assert [next(steps), steps.send("first")] == [0, 1]
    with pytest.raises(StopIteration) as stop:
        steps.send("second")
    assert sent == ["first", "second"]
    assert stop.value.value == "result"


def test_whoever_fails_at_a_tick_closes_the_steps():
    closed = []
    steps = counting_steps(2, 0, closed)
    with pytest.raises(ZeroDivisionError):
        run_to_end(steps, lambda tick: 1 // tick.done)
    assert closed == [True]


def test_closing_closes_what_it_goes_through():
    closed = []
    steps = seldom_steps(counting_steps(50, 0.01, closed), 0)
    next(steps)
    steps.close()
    assert closed == [True]
