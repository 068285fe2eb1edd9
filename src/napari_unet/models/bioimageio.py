"""Import of bioimage.io packages: what they say, their weights, their own test."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any, BinaryIO

from napari_unet.errors import BadModel, NeedsTrust
from napari_unet.files.tiff_metadata import micrometres
from napari_unet.models.bioimageio_description import Description, describe_package
from napari_unet.models.bioimageio_package import open_steps, scratch
from napari_unet.models.bioimageio_processing import (
    normalization_of,
    postprocessing_of,
)
from napari_unet.models.bioimageio_test import read_array, reproduce
from napari_unet.models.checkpoint import build_unet
from napari_unet.models.foreign import import_checked
from napari_unet.models.heads import (
    classes_named,
    joint_classes,
    with_background_first,
)
from napari_unet.models.model import Model, Passport
from napari_unet.models.safety import read_checked
from napari_unet.network.config import UNetConfig
from napari_unet.steps import Progress, run_to_end

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from numpy.typing import NDArray

    from napari_unet.models.bioimageio_description import File, TensorInfo
    from napari_unet.models.bioimageio_package import Package
    from napari_unet.models.bioimageio_processing import Postprocessing
    from napari_unet.models.normalize import Normalization
    from napari_unet.models.safety import CheckedFile
    from napari_unet.network.program import Program
    from napari_unet.network.unet import UNet

OWN = "napari_unet"  # under "config" of the packages that we write
_KINDS = ("pytorch_state_dict", "onnx", "torchscript")  # the preferred first
_MAX_ONNX = 2 << 30  # bytes
_MAX_COVER = 20 << 20
_MAX_COVER_PIXELS = 16_000_000
_THUMBNAIL = 128  # pixels


def import_package(source: str | Path, *, trust: bool = False) -> Model:
    """Import a bioimage.io package: `import_package_steps` to its end."""
    return run_to_end(import_package_steps(source, trust=trust))


def import_package_steps(
    source: str | Path, *, trust: bool = False
) -> Generator[Progress, None, Model]:
    """Make a model of a bioimage.io package, and try it with the package's own test.

    No code of the package is run. The model must reproduce the package's test output,
    with our normalisation and our network, to 1e-4.

    Parameters
    ----------
    source : str or path
        Of a zip archive, an unpacked folder or the YAML file in it; or the address of
        a zip archive or YAML file on the web, the only ones for which the network is
        used.
    trust : bool
        Whether weights that are a program (TorchScript, a pickled network) may be
        converted, as by `napari_unet.models.trust`.

    Yields
    ------
    Progress
        While something is downloaded or converted.

    Returns
    -------
    Model
        Its description says what is not quite as in the package.

    Raises
    ------
    NeedsTrust
        If only a program is in it, and ``trust`` is not given.
    BadModel
        If the package is damaged, does what napari-unet cannot do exactly, or its
        test output is not reproduced.
    BadInput
        If the address cannot be reached, or the library that knows the format is not
        installed: ``pip install "napari-unet[bioimageio]"``.
    """
    with scratch() as folder:
        opened = yield from open_steps(source, folder)
        try:
            with opened() as package:
                info = describe_package(package)
                return (yield from _model_steps(package, info, folder, trust))
        except BadModel as error:
            name = str(source).rstrip("/\\").replace("\\", "/").rpartition("/")[2]
            message = f"{name[:80]} cannot be imported. {error}"
            raise type(error)(message) from (error.__cause__ or error)


def _model_steps(
    package: Package, info: Description, folder: Path, trust: bool
) -> Generator[Progress, None, Model]:
    """Take the first weights that can be used and pass the test."""
    source, result = _check_tensors(info)
    after = postprocessing_of(result)
    problems: list[BadModel] = []
    for kind in _KINDS:
        if kind not in info.weights:
            continue
        try:
            network = yield from _network_steps(package, info, kind, folder, trust)
            how, note = normalization_of(source, network.config.in_channels)
            yield Progress(0, 1, "trying the package's own test")
            return _tested(package, info, Model(network), how, after, note)
        except BadModel as error:
            problems.append(error)
    if not problems:
        found = ", ".join(sorted(info.weights)) or "none"
        raise BadModel(
            f"It has no weights that napari-unet can read ({found}). Ask its authors "
            "for PyTorch or ONNX weights."
        )
    for problem in problems:  # consent would help
        if isinstance(problem, NeedsTrust):
            raise problem
    if len(problems) == 1:
        raise problems[0]
    tried = [kind for kind in _KINDS if kind in info.weights]
    said = [f"{kind}: {error}" for kind, error in zip(tried, problems, strict=True)]
    raise BadModel(" ".join(said)) from problems[0]


def _check_tensors(info: Description) -> tuple[TensorInfo, TensorInfo]:
    """Return the input and the output, or say that there are others."""
    for what, tensors in (("inputs", info.inputs), ("outputs", info.outputs)):
        if len(tensors) != 1:
            names = ", ".join(tensor.name for tensor in tensors)
            raise BadModel(
                f"It has {len(tensors)} {what} ({names[:200]}), and napari-unet runs "
                "networks from one image to one image. Choose another model."
            )
        axes = [axis.name for axis in tensors[0].axes]
        if axes not in (["batch", "channel", *"yx"], ["batch", "channel", *"zyx"]):
            raise _other_axes(what, axes)
    if len(info.inputs[0].axes) != len(info.outputs[0].axes):
        raise _other_axes("outputs", [axis.name for axis in info.outputs[0].axes])
    return info.inputs[0], info.outputs[0]


def _other_axes(what: str, axes: list[str]) -> BadModel:
    return BadModel(
        f"The axes of its {what} are {', '.join(axes)[:100]}; napari-unet runs "
        "networks with batch, channel, (z,) y, x in this order. Choose another model."
    )


# --- weights ------------------------------------------------------------------


def _network_steps(
    package: Package, info: Description, kind: str, folder: Path, trust: bool
) -> Generator[Progress, None, UNet | Program]:
    """Make a network of one kind of weights."""
    weights = info.weights[kind]
    if kind == "onnx":
        from napari_unet.models.onnx import import_onnx

        halo = max(axis.halo for axis in info.outputs[0].axes) or None
        data = package.read(weights.source, weights.sha256, _MAX_ONNX)
        return import_onnx(data, info.name, halo=halo, combine=False).network
    path = folder / f"weights-{kind}.pt"
    with path.open("wb") as file:
        package.copy(weights.source, weights.sha256, file)
    checked = yield from _checked_steps(path, trust)
    own = info.config.get(OWN)
    if isinstance(own, dict) and isinstance(own.get("config"), dict):
        return _own_network(own["config"], checked)
    return import_checked(path, checked).network


def _checked_steps(path: Path, trust: bool) -> Generator[Progress, None, CheckedFile]:
    try:
        return read_checked(path)
    except NeedsTrust:
        if not trust:
            raise
    from napari_unet.models.trust import convert_steps

    return (yield from convert_steps(path))


def _own_network(config: dict[str, Any], checked: CheckedFile) -> UNet:
    """Rebuild a network that we have exported."""
    try:
        known = UNetConfig.from_dict(config)
    except (TypeError, ValueError) as error:
        raise BadModel(
            "What it says of our network is damaged. Get the package again."
        ) from error
    return build_unet(known, checked.tensors, "the package")


# --- the test, and what the passport says --------------------------------------


def _tested(
    package: Package,
    info: Description,
    model: Model,
    how: Normalization,
    after: Postprocessing,
    note: str,
) -> Model:
    """Try a model with the package's test; give it its passport."""
    passport = _own_passport(info)
    if passport is not None:
        how = passport.normalization
    source, result = info.inputs[0], info.outputs[0]
    notes = [note] if note else []
    pair = _test_pair(package, source, result)
    if pair is None:
        notes.append(
            "The package has no test images: whether it gives the same here "
            "is not known."
        )
    activation = reproduce(model, how, after, pair)
    if passport is not None:
        return Model(model.network, passport)
    names = _names(result, model.network.config.num_classes)
    if activation == "sigmoid" and len(names) > 1:
        model, names, said = joint_classes(model, names)
        notes.append(said)
    elif len(names) > 1:
        model, names, said = with_background_first(model, names)
        notes += [said] if said else []
    threshold = 0.5 if after.threshold is None else after.threshold
    if activation == "none":
        threshold, said = _of_bare_outputs(after, pair, len(names))
        notes.append(said)
    return _with_passport(package, info, model, how, names, threshold, notes)


def _own_passport(info: Description) -> Passport | None:
    """Return the passport of a model that we have exported."""
    own = info.config.get(OWN)
    if not isinstance(own, dict) or "passport" not in own:
        return None
    try:
        return Passport.model_validate(own["passport"])
    except ValueError as error:
        raise BadModel(
            "Its passport is damaged or was written by a newer napari-unet. Get the "
            "package again, or update."
        ) from error


def _test_pair(
    package: Package, source: TensorInfo, result: TensorInfo
) -> tuple[NDArray, NDArray] | None:
    if source.test is None or result.test is None:
        return None
    image, expected = (
        read_array(package, file, tensor.name, len(tensor.axes))
        for file, tensor in ((source.test, source), (result.test, result))
    )
    return image, expected


def _of_bare_outputs(
    after: Postprocessing, pair: tuple[NDArray, NDArray] | None, outputs: int
) -> tuple[float, str]:
    """Say what outputs without an activation mean here, and the threshold for them."""
    import math

    if outputs > 1:
        return 0.5, (
            "The package gives bare outputs; here a softmax makes probabilities of "
            "classes that exclude each other of them."
        )
    level = 0.0 if after.threshold is None else after.threshold
    if after.threshold is None and pair is not None:
        # Trained to be 0 or 1, not to be the argument of a sigmoid.
        low, high = float(pair[1].min()), float(pair[1].max())
        level = 0.5 if low > -0.5 and high < 1.5 else 0.0
    threshold = min(max(1 / (1 + math.exp(-level)), 0.01), 0.99)
    return threshold, (
        "The package gives a bare output; here it is shown through a sigmoid, where "
        f"its {level:g} becomes {threshold:.2f}, the recommended threshold."
    )


def _names(tensor: TensorInfo, count: int) -> list[str]:
    """Return the names of the outputs."""
    names = next((a.channels for a in tensor.axes if a.kind == "channel"), ())
    if len(names) != count:
        return [f"channel {i + 1}" for i in range(count)]
    return list(names)


def _with_passport(
    package: Package,
    info: Description,
    model: Model,
    how: Normalization,
    names: list[str],
    threshold: float,
    notes: list[str],
) -> Model:
    passport, config = model.passport, model.network.config
    classes = classes_named(passport.classes, names)
    axes = [axis for axis in info.inputs[0].axes if axis.kind == "space"]
    sizes = tuple(axis.scale * (micrometres(axis.unit) or 0) for axis in axes)
    by = f"By {', '.join(info.authors)}." if info.authors else ""
    under = f"License: {info.license}." if info.license else ""
    first = info.description.strip()
    first += "." * bool(first and first[-1] not in ".!?")
    about = [first, "Imported from bioimage.io.", by, under, *notes]
    update = {
        "name": info.name.strip()[:100] or passport.name,
        "version": info.version or passport.version,
        "description": " ".join(part for part in about if part)[:4000],
        "citation": info.citation[:4000],
        "classes": [info.model_dump() for info in classes],
        "channels": tuple(_names(info.inputs[0], config.in_channels)),
        "pixel_size": sizes if all(sizes) else None,
        "normalization": how.model_dump(),
        "threshold": min(max(threshold, 0.01), 0.99),
        "thumbnail": _thumbnail(package, info.covers),
    }
    known = Passport.model_validate(passport.model_dump() | update)
    return Model(model.network, known)


def _thumbnail(package: Package, covers: tuple[File, ...]) -> str:
    """Return the first cover that is a picture, small; "" if there is none."""
    from PIL import Image

    for cover in covers:
        try:
            data: BinaryIO = io.BytesIO(
                package.read(cover.source, cover.sha256, _MAX_COVER)
            )
            with Image.open(data, formats=("PNG", "JPEG", "GIF")) as picture:
                if picture.width * picture.height > _MAX_COVER_PIXELS:
                    continue
                small = picture.convert("RGB")
        except (
            BadModel,
            OSError,
            ValueError,
            SyntaxError,
            Image.DecompressionBombError,
        ):
            continue  # a model without a picture is a model
        small.thumbnail((_THUMBNAIL, _THUMBNAIL))
        target = io.BytesIO()
        small.save(target, "PNG", optimize=True)
        return base64.b64encode(target.getvalue()).decode()
    return ""
