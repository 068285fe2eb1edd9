"""A package's own test: its test input through our model must give its test output."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from napari_unet.errors import BadInput, BadModel
from napari_unet.network.program import Program

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from napari_unet.models.bioimageio_description import File
    from napari_unet.models.bioimageio_package import Package
    from napari_unet.models.bioimageio_processing import Activation, Postprocessing
    from napari_unet.models.model import Model
    from napari_unet.models.normalize import Normalization

TOLERANCE = 1e-4
_MAX_ARRAY = 1 << 28  # bytes
_MAX_PIXELS = 1 << 23  # of a test image, which the network gets as a whole


def read_array(package: Package, file: File, name: str, ndim: int) -> NDArray:
    """Read a test tensor, which may come from anyone.

    Parameters
    ----------
    package : Package
        That it is in.
    file : File
        In numpy's format, of numbers.
    name : str
        Of the tensor, for messages.
    ndim : int
        Axes that it must have.

    Raises
    ------
    BadModel
        If it is missing, damaged, too large or not of such an array.
    """
    data = package.read(file.source, file.sha256, _MAX_ARRAY)
    stream = io.BytesIO(data)
    damaged = BadModel(
        f"The test image of its {name[:40]!r} is damaged. Get the package again."
    )
    try:
        version = np.lib.format.read_magic(stream)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read is None:
            raise damaged
        shape, _, dtype = read(stream)
        # Before numpy believes the header and takes the memory.
        claimed = math.prod(shape) * dtype.itemsize
        plain = dtype.kind in "buif" and len(shape) == ndim and 0 not in shape
        if not plain or claimed != len(data) - stream.tell():
            raise damaged
        stream.seek(0)
        array: NDArray = np.load(stream, allow_pickle=False)
    except (ValueError, EOFError, OSError, OverflowError, SyntaxError) as error:
        raise damaged from error
    return array


def outputs_of(
    model: Model, how: Normalization, image: NDArray
) -> dict[Activation, NDArray[np.float32]]:
    """Run the network on a whole image.

    Parameters
    ----------
    model : Model
        Of which only the network is used.
    how : Normalization
        Of the image.
    image : array of shape (channel, *spatial)
        Raw, of sides that the network takes.

    Returns
    -------
    dict of str to float32 array of shape (class, *spatial)
        What the network gives, without and with each activation that fits. Of a
        network that has one inside, there is that alone.
    """
    pixels = how.fit(image).apply(image)
    with torch.inference_mode():
        bare = model.network(torch.from_numpy(pixels)[None])[0].float()
        if isinstance(model.network, Program):
            if model.network.config.outputs == "probabilities":
                exclusive = len(bare) > 1 and _sums_to_1(bare.numpy())
                return {"softmax" if exclusive else "sigmoid": bare.numpy()}
        found: dict[Activation, NDArray[np.float32]] = {
            "none": bare.numpy(),
            "sigmoid": bare.sigmoid().numpy(),
        }
        if len(bare) > 1:
            found["softmax"] = bare.softmax(dim=0).numpy()
    return found


def _sums_to_1(values: NDArray) -> bool:
    return bool(np.allclose(values.sum(axis=0), 1, atol=1e-3))


def reproduce(
    model: Model,
    how: Normalization,
    after: Postprocessing,
    pair: tuple[NDArray, NDArray] | None,
) -> Activation:
    """Compare a model's results with those of a package's test.

    Parameters
    ----------
    model : Model
        Of which only the network is used.
    how : Normalization
        Of the test input.
    after : Postprocessing
        What the package does with the output of its network, which may have an
        activation inside, too.
    pair : tuple of array of shape (batch, channel, *spatial), or None
        Input and expected output; None if the package has none.

    Returns
    -------
    str
        The activation behind our network with which they agree.

    Raises
    ------
    BadModel
        If they do not agree with any: by how much.
    """
    count = model.network.config.num_classes
    if after.activation == "softmax" and count == 1:
        raise BadModel(
            "It has a softmax over a single output, which is 1 everywhere. Ask its "
            "authors."
        )
    if pair is None:
        return after.activation
    image, expected = pair
    channels = model.network.config.in_channels
    if image.shape[1] != channels or len(image) != len(expected):
        raise BadModel(
            f"Its test image has {image.shape[1]} channels in {len(image)} images, its "
            f"network takes {channels}, and {len(expected)} results are expected. Get "
            "the package again."
        )
    if math.prod(image.shape[2:]) > _MAX_PIXELS:
        raise BadModel(
            f"Its test image has {math.prod(image.shape[2:]) >> 20} million pixels "
            f"({_MAX_PIXELS >> 20} at most), too many to try. Ask its authors for a "
            "smaller one."
        )
    errors: dict[Activation, float] = {}
    for sample, wanted in zip(image, expected, strict=True):
        try:
            outputs = outputs_of(model, how, sample)
        except (BadInput, RuntimeError, MemoryError) as error:
            reason = str(error).strip().partition("\n")[0][:200]
            raise BadModel(
                f"Its test image cannot be run ({reason}), so that its results could "
                "not be trusted. Use the package in its own program."
            ) from error
        for activation, got in outputs.items():
            if after.activation in ("none", activation):
                off = _difference(got, wanted.astype(np.float32), after)
                errors[activation] = max(errors.get(activation, 0.0), off)
    best = min(errors, key=lambda activation: errors[activation], default=None)
    if best is None:
        raise BadModel(
            f"Its network has an activation inside and a {after.activation} behind it. "
            "Use the package in its own program, or choose another model."
        )
    if not errors[best] <= TOLERANCE:
        raise _not_reproduced(errors[best])
    return best


def _difference(got: NDArray, wanted: NDArray, after: Postprocessing) -> float:
    """Return the largest difference; relative, where values are large."""
    if got.shape != wanted.shape:
        return math.inf
    if after.threshold is None:
        return float(np.max(np.abs(got - wanted) / np.maximum(1, np.abs(wanted))))
    # What is as close to the threshold as rounding may fall on either side.
    clear = np.abs(got - after.threshold) > TOLERANCE
    return float(np.max(np.abs(after.apply(got) - wanted)[clear], initial=0.0))


def _not_reproduced(error: float) -> BadModel:
    much = "has another shape" if math.isinf(error) else f"differs by up to {error:.2g}"
    return BadModel(
        f"Its test image gives another result here: it {much}, and {TOLERANCE:g} is "
        "allowed. So its network or its normalisation is not what it seems, and "
        "results could not be trusted. Use the package in its own program."
    )
