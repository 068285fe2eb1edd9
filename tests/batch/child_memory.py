"""Segment an image that is made when it is read; tell the peak memory in MiB.

python child_memory.py FOLDER BLOCK_SIDE SIDES...
"""

import sys
from pathlib import Path

import numpy as np
import torch
import zarr
from tiny import bright_model

from napari_unet.batch.volume import segment_into_steps
from napari_unet.inference import source
from napari_unet.inference.engine import Predictor
from napari_unet.inference.instances import ObjectSettings
from napari_unet.steps import run_to_end


class Noise:
    """Has no pixels until they are asked for."""

    dtype = np.dtype(np.uint16)

    def __init__(self, shape):
        self.shape = shape
        self.ndim = len(shape)

    def __getitem__(self, index):
        ranges = [np.arange(n)[i] for n, i in zip(self.shape, index, strict=True)]
        grids = np.ix_(*map(np.atleast_1d, ranges))
        sums = sum(r * k for r, k in zip(grids, PRIMES, strict=True))
        dropped = tuple(i for i, r in enumerate(ranges) if not r.ndim)
        return (sums % 4093).astype(self.dtype).squeeze(dropped)


PRIMES = (7919, 104729, 1299709)


def main(folder: str, block_side: int, *shape: int) -> None:
    torch.set_num_threads(1)
    source.SAMPLE_PIXELS = 1 << 18  # so that it is the same for small and large
    is_stack = not block_side
    labels = zarr.create_array(
        f"{folder}/labels",
        shape=shape,
        chunks=(1, 256, 256) if is_stack else (64, 64, 64),
        dtype="uint32",
    )
    model = bright_model(2 if is_stack else 3, threshold=0.95)
    predictor = Predictor(
        Noise(shape),
        model,
        axes="TYX" if is_stack else "ZYX",
        device="cpu",
        tile_shape=(256, 256) if is_stack else (64, 64, 64),
    )
    steps = segment_into_steps(
        predictor,
        ObjectSettings(),
        labels,
        scratch=Path(folder),
        block_shape=None if is_stack else (block_side,) * 3,
    )
    found = run_to_end(steps)
    predictor.close()
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    sys.stdout.write(f"{int(line.split()[1]) / 1024} {sum(found.objects)}")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
