"""Export of our models as bioimage.io packages, format 0.5."""

from __future__ import annotations

import base64
import copy
import hashlib
import io
import re
import string
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from napari_unet.errors import BadInput, BadModel
from napari_unet.files.atomic import atomic_path
from napari_unet.models.bioimageio import OWN
from napari_unet.models.bioimageio_description import blind_context, import_spec
from napari_unet.models.bioimageio_processing import (
    activation_steps,
    preprocessing_of,
)
from napari_unet.models.bioimageio_readme import readme
from napari_unet.models.bioimageio_source import ENTRY, network_source
from napari_unet.models.bioimageio_test import outputs_of
from napari_unet.models.model import Model
from napari_unet.models.plain_yaml import write_yaml
from napari_unet.network.receptive_field import receptive_field

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import ModuleType

    from numpy.typing import NDArray

_DESCRIPTION = "rdf.yaml"  # also older programs look for this one
_UNET_DOI = "10.1007/978-3-319-24574-4_28"
_DOI = re.compile(r"\b10\.\d{4,9}/[^\s;,<>\"']+")
_NAME = string.ascii_letters + string.digits + "_+- ()"
_TEST_OUTPUT = 64  # pixels that a test shows at least, where padding is "valid"
_COVER = 256  # pixels


def export_package(
    model: Model,
    path: str | Path,
    *,
    authors: Sequence[str] = (),
    license: str = "",
    image: NDArray | None = None,
) -> None:
    """Write a model as a bioimage.io package, which other programs run.

    The package holds the weights, the source code of the network, a test input with
    what it must give, a cover, a documentation, and our passport.

    Parameters
    ----------
    model : Model
        With a network of ours.
    path : path
        Of the zip archive; one that is there is replaced.
    authors : sequence of str
        Their names; "unknown" if there are none.
    license : str
        An SPDX identifier, e.g. "CC-BY-4.0"; none by default.
    image : array of shape (channel, *spatial), optional
        The test input is cut out of its middle; it should show what the model finds.
        By default it is made up.

    Raises
    ------
    BadModel
        If the network runs as it is, so that it cannot be rebuilt elsewhere.
    BadInput
        If the image or the license does not fit, or the library that knows the format
        is not installed.
    BadOutput
        If the file cannot be written.
    """
    # As it is used, whatever is done with it meanwhile.
    network = copy.deepcopy(model.unet).cpu().eval()
    model = Model(network, model.passport)
    spec = import_spec()
    sample = _test_input(model, image)
    outputs = outputs_of(model, model.passport.normalization, sample)
    output = outputs["sigmoid" if network.config.num_classes == 1 else "softmax"]
    files = _files(model, sample, output)
    try:
        content = _describe(spec, model, files, authors, license)
    except ValueError as error:
        reason = " ".join(str(error).split())[:300]
        if reason.startswith("license"):
            raise BadInput(
                f"There is no license {license[:40]!r}. Name one as SPDX does, e.g. "
                "CC-BY-4.0, MIT or BSD-3-Clause."
            ) from error
        raise BadInput(
            f"The package would not be valid: {reason}. Correct the model's facts or "
            "the authors."
        ) from error
    with atomic_path(path) as temporary:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(_DESCRIPTION, write_yaml(content))
            for name, data in files.items():
                archive.writestr(name, data)


# --- the test -----------------------------------------------------------------


def _sides(model: Model) -> tuple[int, int, int]:
    """Return the smallest side, the step to the next one, and the side of the test."""
    field = receptive_field(model.unet.config)
    if field.shrink:
        smallest = field.input_size(1)
        test = field.input_size(2 * field.shrink + _TEST_OUTPUT)
    else:
        smallest = test = 2 * _halo(model) + max(
            field.alignment, model.unet.config.smallest_side
        )
    return smallest, field.alignment, test


def _halo(model: Model) -> int:
    """Return the pixels at each edge of an output that other pixels would change."""
    field = receptive_field(model.unet.config)
    if field.shrink:
        return 0
    return -(-max(field.halo) // field.alignment) * field.alignment


def _test_input(model: Model, image: NDArray | None) -> NDArray[np.float32]:
    side = _sides(model)[2]
    config = model.unet.config
    if image is None:
        return _made_up(model, side)
    if image.ndim != config.ndim + 1 or len(image) != config.in_channels:
        raise BadInput(
            f"The test image has shape {image.shape}; the model takes "
            f"{config.in_channels} channels of {config.ndim} axes. Choose another one."
        )
    pixels = np.nan_to_num(np.asarray(image, dtype=np.float32))
    # What is smaller is continued by mirroring.
    missing = [max(0, side - n) for n in pixels.shape[1:]]
    pixels = np.pad(pixels, [(0, 0), *((0, n) for n in missing)], mode="symmetric")
    starts = [(n - side) // 2 for n in pixels.shape[1:]]
    middle = tuple(slice(start, start + side) for start in starts)
    return np.ascontiguousarray(pixels[(slice(None), *middle)])


def _made_up(model: Model, side: int) -> NDArray[np.float32]:
    """Draw bright discs on a noisy background, in the model's grey values."""
    passport, config = model.passport, model.unet.config
    generator = np.random.default_rng(2015)
    shape = (side,) * config.ndim
    grid = np.indices(shape, dtype=np.float32)
    radius = min((passport.object_diameter or 24) / 2, side / 6)
    bright = np.zeros(shape, dtype=np.float32)
    for _ in range(12 if config.ndim == 2 else 20):
        centre = generator.uniform(0, side, config.ndim).reshape(-1, *[1] * config.ndim)
        distance = np.sqrt(((grid - centre) ** 2).sum(axis=0))
        bright = np.maximum(bright, 1 / (1 + np.exp((distance - radius) / 1.5)))
    low, high = _grey_values(model)
    noise = generator.normal(0, 0.05, (config.in_channels, *shape))
    return (low + (high - low) * (0.1 + 0.8 * bright + noise)).astype(np.float32)


def _grey_values(model: Model) -> tuple[float, float]:
    how = model.passport.normalization
    if how.method == "fixed":
        ranges = how.ranges or ((how.lower, how.upper),)
        return min(low for low, _ in ranges), max(high for _, high in ranges)
    return model.passport.intensity_range or (0.0, 255.0)


# --- files --------------------------------------------------------------------


def _files(model: Model, sample: NDArray, output: NDArray) -> dict[str, bytes]:
    """Return the content of the files beside the description."""
    state = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.unet.state_dict().items()
    }
    return {
        "weights.pt": _bytes(lambda target: torch.save(state, target)),
        "unet.py": network_source().encode(),
        "test_input.npy": _bytes(lambda target: np.save(target, sample[None])),
        "test_output.npy": _bytes(lambda target: np.save(target, output[None])),
        "cover.png": _cover(model, sample, output),
        "README.md": readme(model.passport, model.unet.config).encode(),
    }


def _bytes(write: Any) -> bytes:
    target = io.BytesIO()
    write(target)
    return target.getvalue()


def _cover(model: Model, sample: NDArray, output: NDArray) -> bytes:
    """Return a PNG: the thumbnail, or the test input beside what is found in it."""
    from PIL import Image

    if model.passport.thumbnail:
        try:
            data = io.BytesIO(base64.b64decode(model.passport.thumbnail))
            with Image.open(data, formats=("PNG",)) as picture:
                picture.thumbnail((_COVER, _COVER))
                return _bytes(lambda target: picture.save(target, "PNG"))
        except (OSError, ValueError, SyntaxError) as error:
            raise BadModel(
                "The thumbnail in the model's passport is damaged. Get the file again."
            ) from error
    halves = []
    for plane in (sample[0], output[-1]):
        plane = plane if plane.ndim == 2 else plane[len(plane) // 2]
        low, high = np.percentile(plane, [1, 99.8])
        grey = 255 * np.clip((plane - low) / max(high - low, 1e-6), 0, 1)
        half = Image.fromarray(grey.astype(np.uint8)).resize((_COVER, _COVER))
        halves.append(np.asarray(half))
    both = Image.fromarray(np.concatenate(halves, axis=1))
    return _bytes(lambda target: both.save(target, "PNG"))


# --- the description ----------------------------------------------------------


def _describe(
    spec: ModuleType,
    model: Model,
    files: dict[str, bytes],
    authors: Sequence[str],
    license: str,
) -> dict[str, Any]:
    """Write the description and let the library look at it."""
    passport, config = model.passport, model.unet.config
    ndim = f"{config.ndim}d"
    content: dict[str, Any] = {
        "type": "model",
        "format_version": spec.model.ModelDescr.implemented_format_version,
        "name": _plain_name(passport.name),
        "description": (passport.description or "A U-Net.")[:1000],
        "authors": [
            {"name": name.replace("/", " ")} for name in authors or ("unknown",)
        ],
        "cite": _citations(passport.citation),
        "license": license or None,
        "tags": ["unet", f"unet{ndim}", "segmentation", ndim, "pytorch", "napari"],
        "covers": [_file(files, "cover.png")],
        "documentation": _file(files, "README.md"),
        "inputs": [_input(model, files)],
        "outputs": [_output(model, files)],
        "weights": {"pytorch_state_dict": _weights(model, files)},
        "config": {
            OWN: {
                "config": config.to_dict(),
                "passport": passport.model_dump(mode="json"),
            }
        },
    }
    if re.fullmatch(r"\d+(\.\d+){0,3}", passport.version):
        content["version"] = passport.version
    with blind_context(spec):
        descr = spec.build_description(_plain(content))
        if isinstance(descr, spec.InvalidDescr):
            raise ValueError(descr.get_reason())
        described: dict[str, Any] = spec.dump_description(descr)
    return described


def _plain(value: Any) -> Any:
    """Make lists of tuples, which YAML does not have."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(map(_plain, value)) if isinstance(value, list | tuple) else value


def _plain_name(name: str) -> str:
    plain = "".join(c if c in _NAME else " " for c in name).strip()[:100]
    return plain if len(plain) >= 5 else f"U-Net {plain}".strip()


def _citations(citation: str) -> list[dict[str, str]]:
    found = [doi.rstrip(".)]") for doi in _DOI.findall(citation)]
    entries = [{"text": citation[:500], "doi": doi} for doi in dict.fromkeys(found)]
    if _UNET_DOI not in found:
        text = "Ronneberger, Fischer & Brox, U-Net, MICCAI 2015"
        entries.append({"text": text, "doi": _UNET_DOI})
    return entries


def _file(files: dict[str, bytes], name: str) -> dict[str, str]:
    return {"source": name, "sha256": hashlib.sha256(files[name]).hexdigest()}


def _input(model: Model, files: dict[str, bytes]) -> dict[str, Any]:
    smallest, step, _ = _sides(model)
    axes: list[dict[str, Any]] = [
        {"type": "batch"},
        {"type": "channel", "channel_names": model.passport.channels},
    ]
    for axis in _space(model):
        axes.append(axis | {"size": {"min": smallest, "step": step}})
    how = preprocessing_of(model.passport.normalization, model.ndim)
    return {
        "id": "input",
        "axes": axes,
        "test_tensor": _file(files, "test_input.npy"),
        "data": {"type": "float32"},
        "preprocessing": [_step(*step) for step in how],
    }


def _output(model: Model, files: dict[str, bytes]) -> dict[str, Any]:
    config, halo = model.unet.config, _halo(model)
    shrink = receptive_field(config).shrink
    # A sigmoid has no background.
    classes = model.passport.classes[1 if config.num_classes == 1 else 0 :]
    axes: list[dict[str, Any]] = [
        {"type": "batch"},
        {"type": "channel", "channel_names": [info.name for info in classes]},
    ]
    for axis in _space(model):
        size = {"tensor_id": "input", "axis_id": axis["id"], "offset": -2 * shrink}
        axes.append(axis | {"size": size} | ({"halo": halo} if halo else {}))
    return {
        "id": "probability",
        "axes": axes,
        "test_tensor": _file(files, "test_output.npy"),
        "data": {"type": "float32", "range": [0.0, 1.0]},
        "postprocessing": [_step(*step) for step in activation_steps(len(classes))],
    }


def _space(model: Model) -> list[dict[str, Any]]:
    """Return the spatial axes with their pixel sizes."""
    axes: list[dict[str, Any]] = [
        {"type": "space", "id": letter} for letter in "zyx"[-model.ndim :]
    ]
    for axis, size in zip(axes, model.passport.pixel_size or (), strict=False):
        axis |= {"scale": size, "unit": "micrometer"}
    return axes


def _step(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"id": name, "kwargs": arguments} if arguments else {"id": name}


def _weights(model: Model, files: dict[str, bytes]) -> dict[str, Any]:
    return _file(files, "weights.pt") | {
        "pytorch_version": torch.__version__.partition("+")[0],
        "architecture": _file(files, "unet.py")
        | {"callable": ENTRY, "kwargs": model.unet.config.to_dict()},
    }
