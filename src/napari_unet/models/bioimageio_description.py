"""What a bioimage.io package says of its model, the same for formats 0.4 and 0.5."""

from __future__ import annotations

import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from napari_unet.errors import BadInput, BadModel

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    from napari_unet.models.bioimageio_package import Package

MAX_CHANNELS = 4096  # of our networks, too
_LETTERS = {"b": "batch", "c": "channel", "t": "time", "i": "index"}


@dataclass(frozen=True)
class File:
    """A file of the package; its hash is None where none is named."""

    source: str
    sha256: str | None = None


@dataclass(frozen=True)
class Axis:
    """An axis of a tensor.

    Parameters
    ----------
    kind : str
        "batch", "channel", "space", "time" or "index".
    name : str
        "batch" and "channel", else its own: "z", "y", "x".
    channels : tuple of str
        Their names, on a channel axis.
    scale : float
        Pixel size in ``unit``.
    unit : str or None
        In words: "micrometer".
    halo : int
        Pixels at each edge of an output that are not to be used.
    """

    kind: Literal["batch", "channel", "space", "time", "index"]
    name: str
    channels: tuple[str, ...] = ()
    scale: float = 1.0
    unit: str | None = None
    halo: int = 0


@dataclass(frozen=True)
class Step:
    """A step before or after the network, with its keyword arguments."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class TensorInfo:
    """An input or output.

    Parameters
    ----------
    name : str
    axes : tuple of Axis
    dtype : str
        Of its values before the first or after the last step.
    steps : tuple of Step
        Preprocessing of an input, postprocessing of an output.
    test : File or None
        An example in numpy's format.
    """

    name: str
    axes: tuple[Axis, ...]
    dtype: str
    steps: tuple[Step, ...]
    test: File | None


@dataclass(frozen=True)
class Description:
    """What a package says of its model.

    Parameters
    ----------
    inputs, outputs : tuple of TensorInfo
    weights : dict
        Files by the kind of weights: "pytorch_state_dict", "onnx", "torchscript", ….
    name, description, version, license : str
    authors : tuple of str
    citation : str
    covers : tuple of File
    config : dict
        What programs have noted for themselves.
    """

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    weights: dict[str, File]
    name: str
    description: str = ""
    version: str = ""
    license: str = ""
    authors: tuple[str, ...] = ()
    citation: str = ""
    covers: tuple[File, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)


def import_spec() -> ModuleType:
    """Import the library that knows the format.

    Raises
    ------
    BadInput
        If it is not installed, or cannot be used.
    """
    try:
        from bioimageio import spec
    except Exception as error:  # also one that does not fit the other packages
        why = "" if isinstance(error, ModuleNotFoundError) else f" ({str(error)[:200]})"
        raise BadInput(
            "bioimage.io packages need a library that is not installed"
            f'{why}: pip install "napari-unet[bioimageio]".'
        ) from error
    # Its log is for developers; what users need to know comes as an error.
    sys.modules["loguru"].logger.disable("bioimageio")
    module: ModuleType = spec
    return module


def describe_package(package: Package) -> Description:
    """Read what a package says of its model.

    Parameters
    ----------
    package : Package
        Only its description is looked at, and nothing is fetched.

    Raises
    ------
    BadModel
        If it is not valid, or of no model.
    BadInput
        If the library that knows the format is not installed.
    """
    spec = import_spec()
    content = package.content
    # The library would fetch the other model.
    inputs = content.get("inputs")
    for tensor in inputs if isinstance(inputs, list) else []:
        if isinstance(tensor, dict) and tensor.get("output_of"):
            raise BadModel(
                "It takes the output of another model, which napari-unet cannot run. "
                "Choose a model that takes images."
            )
    if content.get("type") != "model":
        what = str(content.get("type", "nothing known"))[:40]
        raise BadModel(f"It describes {what}, not a model. Choose a model's package.")
    with blind_context(spec):
        try:
            descr = spec.build_description(content)
        except Exception as error:  # some mistakes it does not expect itself
            raise _invalid(str(error), content) from error
    if isinstance(descr, spec.InvalidDescr):
        raise _invalid(descr.get_reason(), content)
    if str(content.get("format_version", "")).startswith(("0.3", "0.4")):
        return _of_0_4(descr)
    return _of_0_5(descr)


@contextmanager
def blind_context(spec: ModuleType) -> Iterator[None]:
    """Let the library look at a description alone, at no file and no address."""
    with (
        tempfile.TemporaryDirectory(prefix="napari-unet-") as empty,
        spec.ValidationContext(
            perform_io_checks=False,
            disable_cache=True,
            log_warnings=False,
            root=Path(empty),
        ),
    ):
        yield


def _invalid(reason: str, content: dict[str, Any]) -> BadInput | BadModel:
    if "index_key" in reason:
        return BadInput(
            "The installed bioimageio.spec does not work with the installed pydantic: "
            'pip install "pydantic<2.14".'
        )
    lines = [line.strip(" -") for line in reason.strip().splitlines()]
    version = str(content.get("format_version", "of no version"))[:20]
    return BadModel(
        f"Its description (format {version}) is not valid: {'; '.join(lines[:3])[:400]}"
        ". Get the package again, or ask its authors."
    )


# --- format 0.5 ---------------------------------------------------------------


def _of_0_5(descr: Any) -> Description:
    weights = {
        name: _file(entry)
        for name, entry in descr.weights
        if entry is not None and getattr(entry, "external_data", None) is None
    }
    return Description(
        inputs=tuple(map(_tensor, descr.inputs)),
        outputs=tuple(map(_tensor, descr.outputs)),
        weights=weights,
        covers=tuple(map(_file, descr.covers)),
        config=dict(descr.config.model_extra or {}),
        **_general(descr),
    )


def _file(entry: Any) -> File:
    sha256 = None if entry.sha256 is None else str(entry.sha256)
    return File(str(entry.source), sha256)


def _tensor(tensor: Any) -> TensorInfo:
    return TensorInfo(
        name=str(tensor.id),
        axes=tuple(map(_axis, tensor.axes)),
        dtype=str(tensor.dtype),
        steps=tuple(
            Step(str(step.id), step.kwargs.model_dump() if step.kwargs else {})
            for step in getattr(tensor, "preprocessing", None)
            or getattr(tensor, "postprocessing", [])
        ),
        test=None if tensor.test_tensor is None else _file(tensor.test_tensor),
    )


def _axis(axis: Any) -> Axis:
    return Axis(
        kind=axis.type,
        name=str(axis.id) if axis.type == "space" else axis.type,
        channels=tuple(map(str, getattr(axis, "channel_names", ()))),
        scale=float(axis.scale),
        unit=None if axis.unit is None else str(axis.unit),
        halo=int(getattr(axis, "halo", 0)),
    )


def _general(descr: Any) -> dict[str, Any]:
    cited = []
    for entry in descr.cite:
        place = f"doi:{entry.doi}" if entry.doi else str(entry.url or "")
        cited.append(" ".join(part for part in (entry.text.strip(), place) if part))
    return {
        "name": str(descr.name),
        "description": str(descr.description or ""),
        "version": str(descr.version or ""),
        "license": str(descr.license or ""),
        "authors": tuple(str(author.name) for author in descr.authors),
        "citation": "; ".join(cited),
    }


# --- format 0.4 ---------------------------------------------------------------


def _of_0_4(descr: Any) -> Description:
    weights = {name: _file(entry) for name, entry in descr.weights if entry is not None}
    return Description(
        inputs=_tensors_0_4(descr.inputs, descr.test_inputs, "preprocessing"),
        outputs=_tensors_0_4(descr.outputs, descr.test_outputs, "postprocessing"),
        weights=weights,
        covers=tuple(File(str(cover)) for cover in descr.covers),
        config=dict(descr.config),
        **_general(descr),
    )


def _tensors_0_4(
    tensors: Any, tests: Any, steps: Literal["preprocessing", "postprocessing"]
) -> tuple[TensorInfo, ...]:
    return tuple(
        TensorInfo(
            name=str(tensor.name),
            axes=_axes_0_4(tensor),
            dtype=str(tensor.data_type),
            steps=tuple(_step_0_4(step) for step in getattr(tensor, steps)),
            test=File(str(test)),
        )
        for tensor, test in zip(tensors, tests, strict=True)
    )


def _axes_0_4(tensor: Any) -> tuple[Axis, ...]:
    halos = getattr(tensor, "halo", None) or [0] * len(tensor.axes)
    axes = []
    for place, (letter, halo) in enumerate(zip(tensor.axes, halos, strict=True)):
        kind: Any = _LETTERS.get(letter, "space")
        shape = tensor.shape if isinstance(tensor.shape, list | tuple) else ()
        count = shape[place] if kind == "channel" and shape else 0
        names = tuple(f"channel {i + 1}" for i in range(min(count, MAX_CHANNELS)))
        axes.append(Axis(kind, _LETTERS.get(letter, letter), names, halo=halo))
    return tuple(axes)


def _step_0_4(step: Any) -> Step:
    """Bring a step into the words of format 0.5."""
    arguments = step.kwargs.model_dump() if hasattr(step, "kwargs") else {}
    mode, name = arguments.pop("mode", None), str(step.name)
    letters = arguments.pop("axes", None)
    if letters is not None:
        axes = [_LETTERS.get(letter, letter) for letter in letters]
        arguments["axes"] = ["batch"] * (mode == "per_dataset") + axes
    if mode == "fixed":
        name = "fixed_zero_mean_unit_variance"
    elif name == "zero_mean_unit_variance":
        del arguments["mean"], arguments["std"]
    if name in ("scale_linear", "fixed_zero_mean_unit_variance"):
        arguments.pop("axes", None)
        if any(isinstance(value, list) for value in arguments.values()):
            arguments["axis"] = "channel"
    return Step(name, arguments)
