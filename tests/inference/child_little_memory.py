"""Predict a plane by OpenVINO with less memory than the tile takes that is chosen.

python child_little_memory.py image.npy result.npy megabytes
"""

import resource
import sys
from pathlib import Path

import numpy as np
from whole_image import trained_model

from napari_unet.inference.predict import predict, predict_steps


def limit(megabytes: int) -> None:
    """Allow the process only so much memory more than it has now."""
    used = int(Path("/proc/self/statm").read_text().split()[0])
    most = used * resource.getpagesize() + (megabytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main(image: str, result: str, megabytes: str) -> None:
    model, pixels = trained_model(base_channels=32), np.load(image)
    options = {"device": "cpu", "precision": "float32"}
    predict(pixels[:64, :64], model, **options)  # the threads are there
    limit(int(megabytes))
    steps = predict_steps(pixels, model, **options)
    while True:
        try:
            progress = next(steps)
        except StopIteration as end:
            np.save(result, end.value)
            return
        if progress.note:
            sys.stdout.write(f"{progress.note}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
