"""Steps per second of a training against a bare loop on the same batches.

Usage::

    python benchmarks/training_overhead.py [--steps N] [--base-channels N] [--device D]

The bare loop does forward, loss, backward and step on batches that are there already.
The training draws, cuts and augments the same batches, checks the loss, clips the
gradient, sets the learning rate and yields; scoring and snapshots, which come at
intervals, are left out. Both take turns, ten steps each, so that the batch that is cut
while a step is computed burdens the training and not its peer. Printed are the
medians over the turns and their ratio, which should be 1.15 at most.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import numpy as np
import torch

from napari_unet import Annotation, Model, TrainingSettings, UNet
from napari_unet.inference.backends import choose_device
from napari_unet.inference.executors import computes_bfloat16
from napari_unet.training.data import prepare_steps
from napari_unet.training.fine_tune import fine_tune_steps
from napari_unet.training.losses import cross_entropy
from napari_unet.training.patches import Patches

BLOCK = 10  # steps of each in turn


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


def result_of(steps):
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


class BareLoop:
    """Forward, loss, backward, step."""

    def __init__(self, network, device):
        network = copy.deepcopy(network).to(device, memory_format=torch.channels_last)
        self.network = network.train()
        self.device = device
        self.half = computes_bfloat16(device)
        self.optimizer = torch.optim.AdamW(network.parameters())

    def step(self, image, target, weights) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            logits = self.network(image)
        loss = cross_entropy(logits, target, weights)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def until(steps, wanted) -> None:
    while not wanted(next(steps)):
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--base-channels", type=int, default=16)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    device = torch.device(choose_device(arguments.device).name)
    torch.manual_seed(0)
    model = Model(UNet(1, 2, base_channels=arguments.base_channels))
    annotations = [Annotation(*discs(seed)) for seed in range(4)]
    settings = TrainingSettings(
        steps=arguments.steps + 1, validate_every=10**6, device=str(device)
    )
    data = result_of(prepare_steps(model, annotations, settings, device))
    patches = Patches(data.images, data.plan, settings.seed)
    batches = []
    for step in range(1, arguments.steps + 1):
        image, target, weights = patches.batch(step, device)
        image = image.contiguous(memory_format=torch.channels_last)
        batches.append((image, target, weights))
    bare_loop = BareLoop(model.network, device)
    training = fine_tune_steps(model, annotations, settings)
    until(training, lambda step: step.message == "before training")
    bare, full = [], []
    for first in range(0, arguments.steps, BLOCK):
        block = batches[first : first + BLOCK]
        start = time.perf_counter()
        for _ in block:
            until(training, lambda step: step.loss is not None)
        middle = time.perf_counter()
        for batch in block:
            bare_loop.step(*batch)
        full.append((middle - start) / len(block))
        bare.append((time.perf_counter() - middle) / len(block))
    training.close()
    slow, fast = statistics.median(full), statistics.median(bare)
    print(f"{device}, batches of {data.plan.batch_size} x {data.plan.shape}")
    print(f"bare loop  {1 / fast:.2f} steps/s")
    print(f"training   {1 / slow:.2f} steps/s")
    print(f"ratio      {slow / fast:.3f} (target: at most 1.15)")


if __name__ == "__main__":
    main()
