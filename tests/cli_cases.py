"""What the tests of the command line share: a model that works, images, a call."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile
import torch

from napari_unet.cli import main
from napari_unet.models.checkpoint import save_model
from napari_unet.models.model import ClassInfo, Model, Passport
from napari_unet.models.normalize import Normalization
from napari_unet.network.unet import UNet

FIXED = Normalization(method="fixed", lower=0, upper=1000)


class Run(NamedTuple):
    code: int
    out: str
    err: str


def threshold_network(**options):
    """A U-Net whose weights are set by hand: foreground is where the image is > 0.5.

    Its skip connection carries the image to the end; what comes from below is 0.
    """
    network = UNet(depth=1, base_channels=1, norm=None, **options).eval()
    centre = (1,) * network.config.ndim
    with torch.no_grad():
        for weight in network.parameters():
            weight.zero_()
        for block in (network.encoder[0], network.decoder[0]):
            for layer in block:
                if hasattr(layer, "weight"):
                    layer.weight[(0, 0, *centre)] = 1
        # The last class is the foreground; a single class is a sigmoid.
        network.head.weight[-1, 0] = 20
        network.head.bias[-1] = -10
    return network


def threshold_model(path, pixel_size=None, kind="objects", **options):
    """Save a model that finds what is brighter than 500."""
    network = threshold_network(**options)
    passport = Passport(
        name="threshold",
        classes=(
            ClassInfo(name="background", kind="background"),
            ClassInfo(name="cell", kind=kind),
        ),
        channels=tuple(f"dye {i + 1}" for i in range(network.config.in_channels)),
        normalization=FIXED,
        pixel_size=pixel_size,
    )
    return save_model(Model(network, passport), path)


def squares(count=3, shape=(40, 60)):
    """Draw bright squares of 8 x 8 pixels that do not touch."""
    image = np.zeros(shape, np.uint16)
    for i in range(count):
        image[..., 4:12, 4 + 12 * i : 12 + 12 * i] = 1000
    return image


def write_image(path, image, axes="YX", pixel_size=0.5, spacing=None):
    """Write an image as Fiji does."""
    metadata = {"axes": axes, "unit": "micron"}
    if spacing:
        metadata["spacing"] = spacing
    resolution = (1 / pixel_size, 1 / pixel_size)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, image, imagej=True, resolution=resolution, metadata=metadata)
    return Path(path)


def hashes(folder):
    """Return what is in a folder, to compare it later."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def call(capsys, *arguments):
    """Run the command line in this process."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    return Run(code, *capsys.readouterr())
