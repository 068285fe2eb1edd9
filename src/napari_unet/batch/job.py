"""What a batch is told: a small file that can be read, changed and repeated."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from napari_unet.errors import BadInput
from napari_unet.files.atomic import atomic_path
from napari_unet.network.program_config import ProgramConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from napari_unet.inference.segment import SegmentOptions
    from napari_unet.models.model import Model

__all__ = [
    "FILE_NAME",
    "BatchJob",
    "SegmentSettings",
    "program_versions",
    "version_of",
]

FILE_NAME = "job.yaml"
VERSION = 1
MAX_BYTES = 1_000_000
_HEADER = "# A batch of napari-unet; repeat it with: napari-unet batch --job job.yaml\n"

# Whose versions the results depend on.
_PROGRAMS = ("napari-unet", "torch", "numpy", "scikit-image")
OF_PROCESSORS = "openvino"  # computes where it is installed and there is no GPU
# What computes networks that run as they are.
_OF_KINDS = {"onnx": "onnxruntime", "smp": "segmentation-models-pytorch"}
# The same program is installed under one name or the other.
_OTHER_NAMES = {"onnxruntime": "onnxruntime-gpu"}

# Side of the tiles, by dimensions, for models whose result depends on it a little.
# Fixed, so that it does not depend on the free memory.
TILES_IF_INEXACT = {2: 512, 3: 64}

_Channel = Annotated[int, Field(ge=0)]
_Axis = Annotated[str, Field(pattern="^[ZYX]$")]
_Micrometres = Annotated[float, Field(gt=0)]


class _Told(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SegmentSettings(_Told):
    """How each image is segmented; None is what the model recommends.

    Parameters
    ----------
    threshold : float or None
        Probability above which a pixel belongs to an object.
    minimal_size : int or None
        Smaller objects, in pixels or voxels, are left out.
    split_touching : bool or None
        Whether objects are cut apart at their necks.
    channels : tuple of int or None
        Channels that the model gets, counted from 0.
    precision : "auto" or "float32"
    test_time_augmentation : bool
        Average over 8 flips and rotations.
    device : str
        "auto", "cpu", "cuda" or "mps".
    tile : int or None
        Side of the tiles in pixels; None chooses by memory, or for models whose
        result depends on it `TILES_IF_INEXACT`.
    memory_limit : float or None
        GB of the device's memory that the network may take.
    """

    threshold: float | None = Field(None, ge=0, le=1)
    minimal_size: int | None = Field(None, ge=0)
    split_touching: bool | None = None
    channels: tuple[_Channel, ...] | None = None
    precision: Literal["auto", "float32"] = "auto"
    test_time_augmentation: bool = False
    device: str = "auto"
    tile: int | None = Field(None, ge=1)
    memory_limit: float | None = Field(None, gt=0)

    def options(self, ndim: int) -> SegmentOptions:
        """Return them as the arguments of `segment`, for a model of some dimensions."""
        told: Any = self.model_dump(exclude={"tile"})
        told["tile_shape"] = (self.tile,) * ndim if self.tile else None
        return told  # type: ignore[no-any-return]


class BatchJob(_Told):
    """A folder of images, and what is made of it.

    Parameters
    ----------
    input : Path
        The folder of the images. They are never changed.
    output : Path
        The folder of the results, made if needed.
    model : str
        A name in the library, or the path of a checkpoint.
    model_sha256 : str
        If it is known, no other model of that name will do.
    pattern : str or None
        Like ``"*_dapi.tif"``: only images with such names. All by default.
    recursive : bool
        Go into subfolders, which the results mirror.
    axes : str or None
        Of the images, if the files say it wrongly or not at all.
    pixel_size : dict or None
        Axis letter to micrometres, likewise.
    settings : SegmentSettings
    format : "tif", "ome.tif" or "ome.zarr"
        Of labels and probabilities.
    probabilities : bool
        Whether they are written, too.
    measure : bool
        Whether each object is measured.
    versions : dict of str to str
        Of the programs that made the results.
    """

    input: Path
    output: Path
    model: str = Field(min_length=1)
    model_sha256: str = Field("", pattern="^([0-9a-f]{64})?$")
    pattern: str | None = None
    recursive: bool = False
    axes: str | None = None
    pixel_size: dict[_Axis, _Micrometres] | None = None
    settings: SegmentSettings = SegmentSettings()
    format: Literal["tif", "ome.tif", "ome.zarr"] = "tif"
    probabilities: bool = False
    measure: bool = False
    versions: dict[str, str] = Field(default_factory=dict)

    @field_validator("pattern")
    @classmethod
    def _check_pattern(cls, pattern: str | None) -> str | None:
        if pattern is not None and (not pattern or "/" in pattern or "\\" in pattern):
            raise ValueError("it is compared with names of files, like '*_dapi.tif'")
        return pattern

    def fingerprint(self, *, is_exact: bool) -> str:
        """Return a hash of all that the results depend on but the images.

        Parameters
        ----------
        is_exact : bool
            Whether the result of the model does not depend on the tile size.
        """
        where = {"input", "output", "pattern", "recursive", "model"}
        told = self.model_dump(mode="json", exclude=where)
        for name in ("device", "memory_limit"):
            del told["settings"][name]
        if is_exact:
            del told["settings"]["tile"]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    @classmethod
    def of(cls, told: Mapping[str, Any], source: object = "The job") -> BatchJob:
        """Make a job of what a user has said.

        Parameters
        ----------
        told : mapping
            The fields by name.
        source : object
            Where it comes from, for the message.

        Raises
        ------
        BadInput
            If it makes no sense.
        """
        try:
            return cls.model_validate(told)
        except ValidationError as error:
            raise BadInput(f"{source} cannot be used: {_first(error)}.") from error

    def save(self, path: Path) -> Path:
        """Write the job to a YAML file, atomically and with absolute paths.

        Parameters
        ----------
        path : Path
            The file to make or replace.

        Raises
        ------
        BadOutput
            If that fails; a previous file is left as it was.
        """
        told: dict[str, Any] = {"batch_job": VERSION}
        told |= self.model_dump(mode="json", exclude_none=True)
        told |= {name: str(getattr(self, name).absolute()) for name in _FOLDERS}
        if _is_path(self.model):
            told["model"] = str(Path(self.model).expanduser().absolute())
        text = yaml.dump(
            told, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6
        )
        with atomic_path(path) as part:
            part.write_text(_HEADER + text, encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: Path) -> BatchJob:
        """Read a job; relative paths in it are relative to its folder.

        Parameters
        ----------
        path : Path
            A file written by `save`, or by hand.

        Raises
        ------
        BadInput
            If it is missing or damaged, was written by a newer version, or says
            what makes no sense.
        """
        told = _read_yaml(path)
        version = told.pop("batch_job", None)
        if isinstance(version, int) and version > VERSION:
            raise BadInput(
                f"{path} was written by a newer napari-unet; update napari-unet."
            )
        if version != VERSION:
            raise BadInput(
                f"{path} is not a batch job of napari-unet: it has no line "
                f"'batch_job: {VERSION}'. Choose a {FILE_NAME} that a batch has "
                "written."
            )
        job = cls.of(told, path)
        folder = path.absolute().parent
        found: dict[str, Any] = {
            name: folder / getattr(job, name).expanduser() for name in _FOLDERS
        }
        if _is_path(job.model):
            found["model"] = str(folder / Path(job.model).expanduser())
        return job.model_copy(update=found)


_FOLDERS = ("input", "output")


def program_versions(model: Model) -> dict[str, str]:
    """Return the versions of the programs that the results of a model depend on."""
    names = [*_PROGRAMS, OF_PROCESSORS]
    config = model.network.config
    if isinstance(config, ProgramConfig):
        names.append(_OF_KINDS[config.kind])
    found = {name: version_of(name) for name in names}
    return {name: number for name, number in found.items() if number}


@cache  # it takes a millisecond
def version_of(program: str) -> str:
    """Return the version of a program, "" if it is not installed."""
    for name in filter(None, (program, _OTHER_NAMES.get(program))):
        with suppress(PackageNotFoundError):
            return version(name)
    return ""


def _is_path(model: str) -> bool:
    """Tell a checkpoint from a name in the library."""
    return bool(Path(model).suffix) or len(PurePosixPath(model).parts) > 1


class _Dumper(yaml.SafeDumper):
    """Keeps the line breaks of Unicode, which PyYAML takes for plain ones."""

    def represent_text(self, text: str) -> yaml.Node:
        style = '"' if {"\x85", "\u2028", "\u2029"} & set(text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _Dumper.represent_text)


class _Loader(yaml.SafeLoader):
    """Plain data only; without references, which can stand for gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(
                problem="it refers to another part (*), which a job does not need",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError("it is too large for a job")
        told = yaml.load(content.decode("utf-8"), _Loader)
    except OSError as error:
        raise BadInput(
            f"Cannot read the job {path}: {error.strerror or error}; check the name."
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise BadInput(
            f"{path} is not a job that can be read: {_reason(error)}. Mend that (a "
            "text with special characters needs quotes), or get the file again."
        ) from error
    if not isinstance(told, dict):
        raise BadInput(f"{path} is not a batch job of napari-unet.")
    return told


def _reason(error: Exception) -> str:
    text = str(error)
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        text = f"line {error.problem_mark.line + 1}: {error.problem}"
    return " ".join(text.split())[:200]


def _first(error: ValidationError) -> str:
    """Say what is wrong, without repeating what may be huge."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part)[:80] for part in first["loc"])
    said = first["msg"].removeprefix("Value error, ").rstrip(".")
    return f"{where}: {said[:1].lower()}{said[1:]}"
