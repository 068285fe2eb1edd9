"""Show an image of a batch with its labels in the viewer."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from napari.layers import Image, Labels
from qtpy.QtCore import QObject

from napari_unet.errors import BadInput
from napari_unet.steps import Progress
from napari_unet.widgets import _layers
from napari_unet.widgets._dock import while_alive
from napari_unet.widgets._worker import start_worker

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    import napari.viewer

    from napari_unet.files.images import ImageFile


@dataclass
class _Shown:
    """The layers of one image of a batch; the user may remove them."""

    images: list[weakref.ref[Image]]
    labels: weakref.ref[Labels] | None = None
    state: tuple[int, int] = (0, 0)  # of the file of the labels

    def layers(self, viewer: napari.viewer.Viewer) -> list[Image | Labels]:
        """Return those that are in the viewer, labels last."""
        references = [*self.images, *([self.labels] if self.labels else [])]
        found = [reference() for reference in references]
        return [layer for layer in found if layer in viewer.layers]


class ResultOpener(QObject):
    """Opens one image at a time; those that it opened before are hidden.

    Parameters
    ----------
    parent : QObject
        Ends it with itself.
    viewer : napari.viewer.Viewer
        Gets the layers.
    say : callable
        Gets a sentence if there is something to say.
    """

    def __init__(
        self,
        parent: QObject,
        viewer: napari.viewer.Viewer,
        say: Callable[[str], None],
    ):
        super().__init__(parent)
        self._viewer = viewer
        self._say = say
        self._shown: dict[Path, _Shown] = {}
        self._opening: set[Path] = set()

    def open(self, image: Path, labels: Path, axes: str | None, reason: str) -> None:
        """Show an image and its labels; what is there already is selected.

        Parameters
        ----------
        image, labels : Path
            The labels need not exist.
        axes : str or None
            Of the image, if its file says them wrongly.
        reason : str
            Why there are no labels, "" if nothing has failed.
        """
        state = _state(labels)
        shown = self._shown.get(image)
        if shown and shown.layers(self._viewer) and shown.state == state:
            self._select(shown)
        elif image not in self._opening:
            self._opening.add(image)
            start_worker(
                _read_steps(image, labels, axes),
                title=f"Opening {image.name}",
                on_progress=lambda step: None,
                on_result=lambda files: self._show(image, state, reason, *files),
                on_error=lambda message: self._fail(reason or message),
                on_finished=lambda: self._opening.discard(image),
            )

    @while_alive
    def _fail(self, message: str) -> None:
        self._say(message)

    @while_alive
    def _show(
        self,
        path: Path,
        state: tuple[int, int],
        reason: str,
        image: ImageFile,
        labels: ImageFile | None,
    ) -> None:
        before = self._shown.get(path)
        there = before.layers(self._viewer) if before else []
        images = [layer for layer in there if type(layer) is Image]
        if not images:
            images = _add_image(self._viewer, image, path)
        space = _layers.label_space(images[0], image.axes.replace("C", ""))
        shown = _Shown([weakref.ref(layer) for layer in images], None, state)
        if labels is not None:
            old = there[-1] if there and isinstance(there[-1], Labels) else None
            data: Any = labels.data  # lazy if it is huge
            name = f"{images[0].name} objects"
            layer = _layers.show_labels(self._viewer, old, data, name, space, {})
            _layers.note_segmentation(layer, images[0])
            shown.labels = weakref.ref(layer)
        self._shown[path] = shown
        self._select(shown)
        if reason:
            self._say(reason)

    def _select(self, shown: _Shown) -> None:
        """Make these layers, and of those opened before only these, visible."""
        mine = shown.layers(self._viewer)
        for other in self._shown.values():
            for layer in other.layers(self._viewer):
                layer.visible = layer in mine
        self._viewer.layers.selection.active = mine[-1]


def _state(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return (0, 0)
    return status.st_size, status.st_mtime_ns


def _read_steps(
    image: Path, labels: Path, axes: str | None
) -> Generator[Progress, None, tuple[ImageFile, ImageFile | None]]:
    yield Progress(0, 1, "reading the image")
    from napari_unet.files.images import read_image

    read = read_image(image, axes)
    yield Progress(0, 1, "reading the labels")
    if not labels.exists():
        return read, None
    # The result has the axes of the image, without channels.
    found = read_image(labels, "".join(a for a in read.axes if a not in "CS"))
    if found.data.shape != tuple(
        n for a, n in zip(read.axes, read.data.shape, strict=True) if a not in "CS"
    ):
        raise BadInput(
            f"The labels {labels.name} are not of the size of {image.name}: segment it "
            "again."
        )
    return read, found


def _add_image(
    viewer: napari.viewer.Viewer, image: ImageFile, path: Path
) -> list[Image]:
    """Add a layer for each channel, as microscopists expect it."""
    axes, pixels = image.axes, image.data
    layers: Any
    if "S" in axes:
        pixels = np.moveaxis(pixels, axes.index("S"), -1)  # type: ignore[type-var]
        axes = axes.replace("S", "")
    letters = axes.replace("C", "")
    sizes = image.pixel_size
    layers = viewer.add_image(
        pixels,
        channel_axis=axes.index("C") if "C" in axes else None,
        name=path.name,
        rgb="S" in image.axes,
        scale=[sizes.get(axis, 1) for axis in letters],
        units=["um" if axis in sizes else "pixel" for axis in letters],
        axis_labels=list(letters.lower()),
    )
    return list(layers) if isinstance(layers, list) else [layers]
