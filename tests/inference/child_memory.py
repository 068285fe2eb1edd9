"""Print the peak memory of one tile, and what is expected (bytes for a pixel).

python child_memory.py openvino|torch auto|float32 side base_channels
"""

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


def main(through: str, precision: str, side: str, base_channels: str) -> None:
    if through == "torch":
        executors.can_execute = lambda config: False
    network = UNet(1, 2, base_channels=int(base_channels))
    backend = Backend(network, "cpu", precision)
    assert through in backend.title.lower()
    backend.run(torch.zeros(1, 1, 64, 64))
    forget_peak()
    before = peak()
    backend.run(torch.ones(1, 1, int(side), int(side)))
    measured = (peak() - before) / int(side) ** 2
    sys.stdout.write(f"{measured} {backend.bytes_per_pixel}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
