"""Our file: safetensors with the passport, as JSON, in the header.

Torch is imported when weights are read or written: lists of models need none.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from napari_unet.errors import BadModel
from napari_unet.files.atomic import atomic_path
from napari_unet.models.model import Model, Passport
from napari_unet.network.config import Config, config_from_dict
from napari_unet.network.program_config import ProgramConfig

if TYPE_CHECKING:
    from torch import Tensor

    from napari_unet.models.safety import CheckedFile
    from napari_unet.network.config import UNetConfig
    from napari_unet.network.unet import UNet

FORMAT = "napari-unet 1"
MAX_HEADER = 1_000_000  # bytes
_OUR_KEYS = {
    "config",
    "passport",
    "sha256",
}  # any: a damaged file of ours is not foreign


@dataclass(frozen=True)
class Header:
    """What a file says of its model.

    Parameters
    ----------
    config : UNetConfig or ProgramConfig
    passport : Passport
    sha256 : str
        Identifies the model, as `model_sha256` does.
    """

    config: Config
    passport: Passport
    sha256: str


def save_model(model: Model, path: str | Path) -> Path:
    """Write a model to a ``.safetensors`` file, atomically.

    Parameters
    ----------
    model : Model
        What to save.
    path : path
        The suffix ``.safetensors`` is added when missing.

    Returns
    -------
    Path
        Where it was written.

    Raises
    ------
    BadOutput
        If the file cannot be written; a previous one is left as it was.
    BadModel
        If the passport does not fit into the header.
    """
    from safetensors.torch import save

    path = Path(path)
    if path.suffix != ".safetensors":
        path = path.with_name(path.name + ".safetensors")
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.network.state_dict().items()
    }
    metadata = {
        "format": FORMAT,
        "config": json.dumps(model.network.config.to_dict()),
        "passport": model.passport.model_dump_json(),
    }
    metadata["sha256"] = _digest(tensors, metadata)
    content = save(tensors, metadata)
    if struct.unpack("<Q", content[:8])[0] > MAX_HEADER:
        raise BadModel(
            "The passport is too large for the file header (1 MB); shorten its "
            "description, history or thumbnail."
        )
    with atomic_path(path) as temporary:
        Path(temporary).write_bytes(content)
    return path


def read_model(path: str | Path) -> Model:
    """Read a model from one of our ``.safetensors`` files, or a known foreign one.

    Nothing in the file is executed. Beyond what `read_checked` looks at, the known
    keys and the tensors' names, shapes and hash are checked.

    Parameters
    ----------
    path : path
        Of the file, or a folder that ``save_pretrained`` has written.

    Returns
    -------
    Model
        On the CPU, in evaluation mode.

    Raises
    ------
    BadModel
        If the file is missing, broken or incomplete, or its network is not known.
    """
    from napari_unet.models.safety import read_checked

    path = Path(path)
    if (path / "config.json").is_file():
        # A folder, as segmentation_models_pytorch's save_pretrained writes it.
        model = read_model(path / "model.safetensors")
        passport = model.passport.model_copy(update={"name": path.name})
        return Model(model.network, passport)
    checked = read_checked(path)
    if not _OUR_KEYS & checked.metadata.keys():
        from napari_unet.models.foreign import import_checked  # which needs this module

        return import_checked(path, checked)
    header = _header(path.name, checked.metadata)
    if isinstance(header.config, ProgramConfig):
        return _read_program(path.name, header, checked)
    network = build_unet(header.config, checked.tensors, path.name)
    _check_digest(path.name, header, checked)
    return Model(network, header.passport)


def _read_program(file: str, header: Header, checked: CheckedFile) -> Model:
    """Make a model of a network that runs as it is."""
    from napari_unet.models.onnx_graph import read_graph
    from napari_unet.network.program import build_program

    assert isinstance(header.config, ProgramConfig)
    _check_digest(file, header, checked)
    try:
        if header.config.kind == "onnx" and "graph" in checked.tensors:
            read_graph(checked.tensors["graph"].numpy().tobytes())
        network = build_program(header.config, checked.tensors)
    except BadModel as error:
        raise BadModel(f"{file} cannot be used. {error}") from error
    return Model(network, header.passport)


def _check_digest(file: str, header: Header, checked: CheckedFile) -> None:
    if _digest(checked.tensors, checked.metadata) != header.sha256:
        raise BadModel(f"{file} is damaged: its checksum does not match. Get it again.")


def read_header(path: str | Path) -> Header:
    """Read what one of our files says of its model, without its weights.

    Fast, for lists: whether the weights are whole is found out by `read_model`.

    Parameters
    ----------
    path : path
        Of the file.

    Returns
    -------
    Header

    Raises
    ------
    BadModel
        If the file cannot be read or is not ours.
    """
    path = Path(path)
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise BadModel(
            f"{path.name} is not a napari-unet checkpoint, or damaged "
            f"({_first_line(error)}). Get the file again."
        ) from error
    return _header(path.name, metadata)


def _header(file: str, metadata: dict[str, str]) -> Header:
    if metadata.get("format") != FORMAT or not {"config", "passport"} <= set(metadata):
        raise BadModel(
            f"{file} is not a napari-unet checkpoint (.safetensors with a "
            "passport). Choose one that napari-unet has written."
        )
    try:
        return Header(
            config_from_dict(json.loads(metadata["config"])),
            Passport.model_validate_json(metadata["passport"]),
            metadata.get("sha256", ""),
        )
    except BadModel as error:
        raise BadModel(f"{file} cannot be used. {error}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise BadModel(
            f"The header of {file} is damaged or was written by a newer "
            f"napari-unet: {_first_line(error)}. Get the file again, or update."
        ) from error


def model_sha256(model: Model) -> str:
    """Return the hash that identifies a model: weights, configuration, passport."""
    tensors = {name: t.detach().cpu() for name, t in model.network.state_dict().items()}
    return _digest(
        tensors,
        {
            "config": json.dumps(model.network.config.to_dict()),
            "passport": model.passport.model_dump_json(),
        },
    )


def build_unet(config: UNetConfig, tensors: dict[str, Tensor], file: str) -> UNet:
    """Build a network of weights that are there already.

    Parameters
    ----------
    config : UNetConfig
        Of the network.
    tensors : dict of str to Tensor
        Its state_dict; they become its own.
    file : str
        Where they come from, for the message.

    Returns
    -------
    UNet
        In evaluation mode.

    Raises
    ------
    BadModel
        If they are not those of such a network.
    """
    import torch

    from napari_unet.network.unet import UNet

    # Without memory first, so that a forged configuration cannot claim gigabytes.
    with torch.device("meta"):
        network = UNet.from_config(config)
    _check_tensors(file, network, tensors)
    network.load_state_dict(tensors, assign=True)
    return network.requires_grad_(True).eval()


def _check_tensors(file: str, network: UNet, tensors: dict[str, Tensor]) -> None:
    """Raise `BadModel` unless the tensors are those of the network."""
    expected = network.state_dict()
    problems = [f"missing {name}" for name in expected if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in expected]
    for name in expected.keys() & tensors.keys():
        have, want = tensors[name], expected[name]
        if have.shape != want.shape:
            shapes = f"{tuple(have.shape)} instead of {tuple(want.shape)}"
            problems.append(f"{name} has shape {shapes}")
        elif have.dtype != want.dtype:
            problems.append(f"{name} is {have.dtype} instead of {want.dtype}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise BadModel(
            f"The weights in {file} do not fit its network: "
            f"{'; '.join(problems[:5])}{more}. The file is damaged or mislabelled."
        )


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256()
    for key in ("config", "passport"):
        digest.update(metadata[key].encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().numpy().reshape(-1).data)
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else "empty"
