"""Batches are ready in time, and the same however they are made."""

import math
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from napari_unet.training.feed import Feed
from napari_unet.training.patches import Patches, TrainingImage
from napari_unet.training.plan import PatchPlan
from napari_unet.training.settings import AugmentationSettings

CPU = torch.device("cpu")
PLAN = PatchPlan(3, (16, 16), 0, AugmentationSettings())
# Without noise, which a GPU draws itself.
QUIET = replace(PLAN, augmentation=AugmentationSettings(noise=0))


def patches(seed=5):
    target = np.zeros((64, 64), np.uint8)
    target[10:20, 10:20] = 1
    pixels = np.random.default_rng(0).random((2, 64, 64)).astype(np.float32)
    weights = np.ones(target.shape, np.float32)
    return Patches([TrainingImage(pixels, target, weights)], seed)


def assert_same(batch, other):
    assert len(batch) == len(other)
    for ours, theirs in zip(batch, other, strict=True):
        assert torch.equal(ours.cpu(), theirs.cpu())


class Watched:
    """Patches that note who makes which step, and fail or wait where told."""

    def __init__(self, fails_at=None, waits_from=math.inf):
        self.started, self.threads = [], set()
        self.may_end = threading.Event()
        self._fails_at, self._waits_from = fails_at, waits_from
        self._patches = patches()

    def batch(self, step, plan, device):
        self.started.append(step)
        self.threads.add(threading.current_thread())
        if step >= self._waits_from:
            assert self.may_end.wait(60)
        if step == self._fails_at:
            raise OSError(f"step {step} cannot be read")
        return self._patches.batch(step, plan, device)

    def has_started(self, count):
        """Wait until as many steps were begun."""
        end = time.monotonic() + 60
        while len(self.started) < count and time.monotonic() < end:
            time.sleep(0.001)
        return sorted(self.started) == list(range(1, count + 1))


@pytest.fixture
def feed_of():
    """Make feeds that are closed, and their threads gone, at the end."""
    feeds = []

    def make(watched, workers):
        feeds.append((Feed(watched, PLAN, CPU, workers), watched))
        return feeds[-1][0]

    yield make
    for feed, watched in feeds:
        watched.may_end.set()
        feed.close()
        for thread in watched.threads - {threading.current_thread()}:
            thread.join(60)
            assert not thread.is_alive()


@given(
    workers=st.integers(0, 4),
    order=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    smaller_from=st.integers(0, 8),
)
@settings(max_examples=25, deadline=None)
def test_batches_are_the_same_for_any_number_of_workers(workers, order, smaller_from):
    """In whatever order they are asked for, and when their shape changes."""
    straight, feed = patches(), Feed(patches(), PLAN, CPU, workers)
    plan = PLAN
    for number, step in enumerate(order):
        if number == smaller_from:
            plan = replace(PLAN, batch_size=1)
            feed.use(plan)
        assert_same(feed.batch(step), straight.batch(step, plan, CPU))
    feed.close()


def test_a_batch_depends_only_on_seed_and_step():
    first, second = (patches().batch(step, PLAN, CPU)[0] for step in (1, 2))
    assert not torch.equal(first, second)
    assert not torch.equal(first, patches(seed=6).batch(1, PLAN, CPU)[0])


@pytest.mark.parametrize("workers", [1, 3])
def test_a_few_are_made_ahead_and_each_only_once(feed_of, workers):
    watched = Watched()
    feed = feed_of(watched, workers)
    for step in range(1, 5):
        feed.batch(step)
        assert watched.has_started(step + 2 * workers)
    assert len(watched.threads) <= workers
    assert threading.current_thread() not in watched.threads


def test_several_are_made_at_once(feed_of):
    watched = Watched(waits_from=2)
    feed_of(watched, 3).batch(1)
    assert watched.has_started(4)  # and none of the last three has ended


def test_on_a_cpu_a_batch_is_made_when_it_is_asked_for(feed_of):
    watched = Watched()
    feed = feed_of(watched, None)
    feed.batch(1)
    assert watched.started == [1]
    assert watched.threads == {threading.current_thread()}


@pytest.mark.parametrize("workers", [0, 2])
def test_what_goes_wrong_is_told_with_its_step(feed_of, workers):
    feed = feed_of(Watched(fails_at=3), workers)
    feed.batch(1)
    feed.batch(2)
    for _ in range(2):
        with pytest.raises(OSError, match="step 3 cannot be read"):
            feed.batch(3)
    assert_same(feed.batch(4), patches().batch(4, PLAN, CPU))


def test_closing_does_not_wait_and_nothing_more_is_made(feed_of):
    watched = Watched(waits_from=2)
    feed = feed_of(watched, 1)
    feed.batch(1)
    assert watched.has_started(2)
    feed.close()
    watched.may_end.set()
    for thread in watched.threads:
        thread.join(60)
    assert watched.started == [1, 2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_gets_the_same_batches():
    """From pinned memory, on streams of their own, as without; nearly as a CPU."""
    device, feed = torch.device("cuda"), Feed(patches(), QUIET, torch.device("cuda"))
    for step in range(1, 20):
        batch = feed.batch(step)
        assert {tensor.device.type for tensor in batch} == {"cuda"}
        assert_same(batch, patches().batch(step, QUIET, device))
        expected = patches().batch(step, QUIET, CPU)
        torch.testing.assert_close(batch[0].cpu(), expected[0], atol=1e-4, rtol=1e-4)
        # Between two pixels rounding decides which of them is the nearest.
        for ours, theirs in zip(batch[1:], expected[1:], strict=True):
            assert (ours.cpu() == theirs).float().mean() > 0.99
    feed.close()
