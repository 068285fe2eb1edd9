"""What is refused before a batch begins: results that would destroy or be destroyed."""

from __future__ import annotations

import errno
import os
from functools import partial
from typing import TYPE_CHECKING

from napari_unet.batch.plan import RESERVED, ZARR, few, identity, name_key
from napari_unet.errors import BadInput, BadOutput

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from napari_unet.batch.job import BatchJob
    from napari_unet.batch.plan import Item
    from napari_unet.inference.backends import Device, Precision
    from napari_unet.models.model import Model

__all__ = ["check_batch", "check_memory", "check_plan"]


def check_plan(items: Sequence[Item], folder: Path, *, overwrite: bool) -> None:
    """Refuse before any work what could not be written, or would destroy a file.

    Parameters
    ----------
    items : sequence of Item
        From `plan_files` or `plan_batch_steps`.
    folder : Path
        Where the results are written, or in subfolders of it.
    overwrite : bool
        Whether results of an earlier run may be replaced; images never are.

    Raises
    ------
    BadInput
        If two images would have results of the same name.
    BadOutput
        If a result exists, would replace an image or cannot be written.
    """
    _check_collisions(items, folder)
    _check_folder(folder)
    images = {identity(item.image): item.image for item in items}
    images.pop(None, None)  # an image that has gone
    for place in (folder, *folder.absolute().parents):
        if image := images.get(identity(place)):
            raise BadOutput(
                f"The output lies inside the image {image}, which would change it; "
                "choose another folder."
            )
    existing = []
    for target in [path for item in items for path in item.outputs]:
        _check_target(target)
        if not os.path.lexists(target):
            continue
        if identity(target) in images:
            raise BadOutput(
                f"{target} is one of the images, which are never overwritten; choose "
                "another output."
            )
        existing.append(target)
    if existing and not overwrite:
        one = len(existing) == 1
        raise BadOutput(
            f"{few(existing)} exist{'s' * one} already; use --overwrite to replace "
            f"{'it' if one else 'them'}, or choose another output."
        )


def check_batch(job: BatchJob, items: Sequence[Item], *, overwrite: bool) -> None:
    """Do what `check_plan` does, and keep input and output apart.

    Parameters
    ----------
    job : BatchJob
        Where the images are and where the results go.
    items : sequence of Item
        From `plan_batch_steps`.
    overwrite : bool
        Whether results of an earlier run may be replaced.

    Raises
    ------
    BadInput, BadOutput
        See `check_plan`.
    """
    source = identity(job.input)
    output = job.output.absolute()
    if identity(output) == source:
        raise BadOutput(
            f"The images and the results would lie in the same folder, {job.output}; "
            "choose another folder for the results."
        )
    if job.recursive and source in map(identity, output.resolve().parents):
        raise BadOutput(
            f"The output {job.output} lies inside the folder of the images, where the "
            "results would be taken for images; choose a folder elsewhere."
        )
    target = identity(output)
    if target and target in map(identity, job.input.resolve().parents):
        raise BadOutput(
            f"The folder of the images lies inside the output {job.output}, where a "
            "result could replace an image; choose a folder elsewhere."
        )
    check_plan(items, job.output, overwrite=overwrite)


def check_memory(
    model: Model, device: Device, precision: Precision, memory_limit: float | None
) -> None:
    """Refuse a limit that is too low for the network, rather than file after file.

    Parameters
    ----------
    model : Model
        Whose network is to run.
    device : Device
        One that works.
    precision : "auto" or "float32"
        See `Backend`.
    memory_limit : float or None
        GB of the device's memory; with None nothing is refused.

    Raises
    ------
    BadInput
        If not even the smallest tile would fit.
    """
    if memory_limit is None:
        return
    from napari_unet.inference.backends import Backend
    from napari_unet.inference.machine import Machine

    backend_on = partial(
        Backend, model.network, precision=precision, memory_limit=memory_limit
    )
    # What is made for it is kept for the first file.
    Machine(backend_on, device.that_runs(model.network).name).close()


def _check_collisions(items: Sequence[Item], folder: Path) -> None:
    taken: dict[str, str] = {name_key(name): "the batch itself" for name in RESERVED}
    folders: dict[str, str] = {}
    for item in items:
        for target in item.outputs:
            below = target.relative_to(folder)
            key = name_key(below.as_posix())
            other = taken.setdefault(key, item.name)
            if other != item.name:
                raise BadInput(
                    f"The results of {other} and {item.name} would both be named "
                    f"{below}; rename one, or segment them into different folders."
                )
            for parent in list(below.parents)[:-1]:
                folders.setdefault(name_key(parent.as_posix()), item.name)
    for key in folders.keys() & taken.keys():
        raise BadInput(
            f"{key} would be both a folder of results, of {folders[key]}, and a result "
            f"of {taken[key]}; rename one of them."
        )


def _check_folder(folder: Path) -> None:
    """Try to write into a folder, or where it will be made; tidy it up."""
    from napari_unet.files.atomic import check_writable, sweep

    places = (folder.absolute(), *folder.absolute().parents)
    place = next(place for place in places if os.path.lexists(place))
    if not os.path.isdir(place):
        raise BadOutput(
            f"Cannot write into {folder}: {place} is not a folder; choose another one."
        )
    check_writable(place)
    if place == folder.absolute():
        sweep(folder)


def _check_target(target: Path) -> None:
    from napari_unet.files.atomic import MAX_NAME_BYTES, bad_output

    # An OME-Zarr is a folder, and may be there from an earlier run.
    if os.path.isdir(target) and target.suffix != ZARR:
        raise bad_output(target, IsADirectoryError(errno.EISDIR, ""))
    if len(os.fsencode(target.name)) > MAX_NAME_BYTES:
        raise bad_output(target, OSError(errno.ENAMETOOLONG, ""))
