"""Steps per second of a training against a bare loop on the same batches.

Usage::

    python benchmarks/training_overhead.py [--steps N] [--base-channels N] [--device D]

The bare loop does forward, loss, backward and step, with the same optimiser and without
waiting for a GPU in between, on batches that are there already. The training draws,
cuts and augments such batches, checks the loss, clips the gradient, sets the learning
rate and yields; scoring and snapshots, which come at intervals, are left out. Both take
turns, so that what is prepared meanwhile burdens the training and not its peer: six
turns each, long enough on a GPU that hardly any batch of a turn was made before it.
Printed are the medians over the turns and their ratio, which should be 1.11 at most (90
% of the bare loop); which part of the time the training waited for patches; and how
many of them a single thread makes.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from napari_unet import Annotation, Model, TrainingSettings, UNet
from napari_unet.inference.backends import choose_device
from napari_unet.inference.executors import computes_bfloat16
from napari_unet.steps import run_to_end
from napari_unet.training import loop
from napari_unet.training.data import prepare_steps
from napari_unet.training.feed import Feed
from napari_unet.training.fine_tune import fine_tune_steps
from napari_unet.training.losses import cross_entropy
from napari_unet.training.patches import Patches

if TYPE_CHECKING:
    from napari_unet.training.plan import PatchPlan
    from napari_unet.training.settings import TrainingStep

TURNS = 6  # of each
KEPT = 10  # batches of the bare loop


def discs(seed: int, side: int = 512) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = np.zeros((side, side), np.int32)
    y, x = np.mgrid[:side, :side]
    for number in range(1, 61):
        top, left = random.integers(0, side, 2)
        inside = (y - top) ** 2 + (x - left) ** 2 < random.integers(8, 20) ** 2
        labels[inside & (labels == 0)] = number
    image = 200 + 600 * (labels > 0) + random.normal(0, 60, labels.shape)
    return image.astype(np.float32), labels


class BareLoop:
    """Forward, loss, backward, step."""

    def __init__(self, network, device):
        network = copy.deepcopy(network).to(device, memory_format=torch.channels_last)
        self.network = network.train()
        self.device = device
        self.half = computes_bfloat16(device)
        self.optimizer = torch.optim.AdamW(network.parameters(), fused=True)

    def step(self, image, target, weights) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            logits = self.network(image)
        loss = cross_entropy(logits, target, weights)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class WatchedFeed(Feed):
    """A feed that notes how long it was waited for."""

    waited = 0.0

    def batch(self, step):
        start = time.perf_counter()
        batch = super().batch(step)
        WatchedFeed.waited += time.perf_counter() - start
        return batch


class Overhead(NamedTuple):
    """Seconds for a step; part of them waiting; seconds for a patch; first losses."""

    plan: PatchPlan
    bare: float
    training: float
    waited: float
    patch: float
    losses: tuple[float, float]


def until(steps, wanted) -> TrainingStep:
    while not wanted(step := next(steps)):
        pass
    return step


def finish(device: torch.device) -> float:
    """Wait for the device; return the time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def learnt(step: TrainingStep) -> bool:
    return step.loss is not None


def compare(model, annotations, settings: TrainingSettings) -> Overhead:
    """Let a training and a bare loop take turns, but for one step the first."""
    device, turn = torch.device(settings.device), (settings.steps - 1) // TURNS
    data = run_to_end(prepare_steps(model, annotations, settings, device))
    patches = Patches(data.images, settings.seed)
    patches.batch(0, data.plan, device)  # what is only slow once
    batches, start = [], finish(device)
    for step in range(1, KEPT + 1):
        batches.append(patches.batch(step, data.plan, device))
    patch = (finish(device) - start) / (KEPT * data.plan.batch_size)
    batches = [
        (image.contiguous(memory_format=torch.channels_last), *others)
        for image, *others in batches
    ]
    bare_loop = BareLoop(model.network, device)
    loop.Feed = WatchedFeed
    try:
        training = fine_tune_steps(model, annotations, settings)
        losses = float(bare_loop.step(*batches[0])), until(training, learnt).loss
        WatchedFeed.waited = 0.0
        bare, full = [], []
        for _ in range(TURNS):
            start = finish(device)
            for _ in range(turn):
                until(training, learnt)
            middle = finish(device)
            for number in range(turn):
                bare_loop.step(*batches[number % KEPT])
            full.append((middle - start) / turn)
            bare.append((finish(device) - middle) / turn)
        training.close()
    finally:
        loop.Feed = Feed
    waited = WatchedFeed.waited / (sum(full) * turn)
    middles = statistics.median(bare), statistics.median(full)
    return Overhead(data.plan, *middles, waited, patch, losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, help="60, on a GPU 600, by default")
    parser.add_argument("--base-channels", type=int, default=16)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    device = choose_device(arguments.device).name
    steps = arguments.steps or (60 if device == "cpu" else 600)
    torch.manual_seed(0)
    model = Model(UNet(1, 2, base_channels=arguments.base_channels))
    annotations = [Annotation(*discs(seed)) for seed in range(4)]
    settings = TrainingSettings(steps=steps + 1, validate_every=10**6, device=device)
    found = compare(model, annotations, settings)
    print(f"{device}, {found.plan}, {arguments.base_channels} channels at first")
    print(f"bare loop  {1 / found.bare:.2f} steps/s")
    print(f"training   {1 / found.training:.2f} steps/s", end=", ")
    print(f"{found.waited:.1%} of the time waiting for patches")
    print(f"ratio      {found.training / found.bare:.3f} (target: at most 1.11)")
    print(f"one thread makes {1 / found.patch:.0f} patches/s")


if __name__ == "__main__":
    main()
