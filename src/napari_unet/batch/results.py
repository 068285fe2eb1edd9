"""The files that are made of one segmented image."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from napari_unet import __version__
from napari_unet.batch.thumbnail import make_thumbnail
from napari_unet.files.atomic import bad_output
from napari_unet.files.measurements import measure_steps
from napari_unet.files.outputs import write_labels, write_probabilities
from napari_unet.files.table import writing_csv

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from napari_unet.batch.file import Segmented, Task
    from napari_unet.models.model import Model

__all__ = ["write_results", "writing"]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make the folder if needed; say in one sentence why something failed in it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise bad_output(path, error) from error


def write_results(
    done: Segmented, axes: str, model: Model, task: Task, check: Callable[[], None]
) -> None:
    """Write everything that is made of one image, the labels last.

    Parameters
    ----------
    done : Segmented
        What was computed.
    axes : str
        Of the labels.
    model : Model
        Named in the files.
    task : Task
        What is wanted.
    check : callable
        Called before each piece that is read; raises to stop.

    Raises
    ------
    BadOutput
        If that fails; of each file there is then the old one or none.
    """
    item, passport = done.opened.item, model.passport
    if item.probabilities:
        names = [info.name for info in passport.classes]
        write_probabilities(
            item.probabilities,
            _Checked(done.probabilities, check),
            axes="C" + axes,
            pixel_size=done.pixel_size,
            # A network with one output says nothing of the background.
            class_names=names[-done.probabilities.shape[0] :],
            overwrite=task.overwrite,
        )
    if task.measure:
        _measure(done, axes, model, task, check)
    if task.thumbnails:
        _write_thumbnail(done, axes, task)
    write_labels(
        item.labels,
        _Checked(done.labels, check),
        axes=axes,
        pixel_size=done.pixel_size,
        description=f"Segmented by napari-unet {__version__} with the model "
        f"{passport.name} {passport.version}.",
        overwrite=task.overwrite,
    )


def _measure(
    done: Segmented, axes: str, model: Model, task: Task, check: Callable[[], None]
) -> None:
    image, name = done.opened.image, done.opened.item.name
    kinds = [info.kind for info in model.passport.classes]
    path = task.measurements(name)
    with writing(path.parent), writing_csv(path) as write:
        steps = measure_steps(
            done.labels,
            image.data,
            lambda table: write({"file": [name] * len(table["label"]), **table}),
            label_axes=axes,
            image_axes=image.axes,
            pixel_size=done.pixel_size,
            channel_names=image.channel_names,
            ndim=model.ndim,
            regions=[index for index, kind in enumerate(kinds) if kind == "region"],
        )
        for _ in steps:
            check()


def _write_thumbnail(done: Segmented, axes: str, task: Task) -> None:
    channels = task.options.get("channels")
    picture = make_thumbnail(
        done.opened.image, done.labels, axes, channels[0] if channels else 0
    )
    path = task.thumbnail(done.opened.item.name)
    with writing(path.parent):
        # Nothing depends on it: it need not be on the disk before the labels are.
        path.write_bytes(picture)


class _Checked:
    """An array that is asked before each piece whether to go on."""

    def __init__(self, data: Any, check: Callable[[], None]):
        self._data = data
        self._check = check
        self.shape, self.dtype, self.ndim = data.shape, data.dtype, data.ndim

    def __getitem__(self, key: Any) -> Any:
        self._check()
        return self._data[key]
