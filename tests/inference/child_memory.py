"""Print the peak memory of one tile, and what is expected (bytes for a pixel).

python child_memory.py openvino|torch auto|float32 side base halo [limit [shapes]]

Of a tile with a halo, what lies within is computed. With a limit in GB, the tile is
as large as that allows, and the limit is expected. Of several shapes, each a little
smaller, one comes after the other.
"""

import math
import sys
from pathlib import Path

import torch

from napari_unet import UNet
from napari_unet.inference import executors
from napari_unet.inference.backends import Backend


def peak() -> int:
    """Return the peak since `forget_peak` in bytes; a child inherits its parent's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main(
    through: str,
    precision: str,
    side: str,
    base_channels: str,
    halo: str,
    limit: str = "",
    shapes: str = "1",
) -> None:
    if through == "torch":
        executors.can_execute = lambda config: False
    network = UNet(1, 2, base_channels=int(base_channels))
    options = {"memory_limit": float(limit)} if limit else {}
    backend = Backend(network, "cpu", precision, **options)
    assert through in backend.title.lower()
    sides, expected = [int(side)] * 2, backend.bytes_per_pixel
    if limit:
        sides[1] = backend.max_input_pixels // int(side) // 16 * 16
        expected = float(limit) * 1e9 / math.prod(sides)
    else:
        backend.run(torch.zeros(1, 1, 64, 64))
    forget_peak()
    before = peak()
    for index in range(int(shapes)):
        shape = sides[0] - 16 * index, sides[1]
        keep = [(int(halo), n - int(halo)) for n in shape]
        backend.run(torch.ones(1, 1, *shape), keep)
    measured = (peak() - before) / math.prod(sides)
    sys.stdout.write(f"{measured} {expected}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
