"""What the file of a layer says and napari's own reader of TIFFs leaves out."""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from napari_unet.steps import Progress
from napari_unet.widgets._worker import start_worker

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from napari.layers import Image


@dataclass(frozen=True)
class FileFacts:
    """What the header of a file says.

    Parameters
    ----------
    axes : str
        One letter for each axis of the array.
    shape : tuple of int
        Of the array.
    pixel_size : dict of str to float
        Axis letter to micrometres.
    """

    axes: str
    shape: tuple[int, ...]
    pixel_size: dict[str, float]

    def of_array(self, shape: tuple[int, ...], *, is_rgb: bool) -> FileFacts | None:
        """Return what holds for an array; None if that is not the file's.

        It may also be a single channel: napari can make a layer of each.
        """
        for axes in (self.axes, self.axes.replace("C", "")):
            sides = zip(self.shape, self.axes, strict=True)
            mine = tuple(side for side, axis in sides if axis in axes)
            if mine == shape and ("S" in axes) == is_rgb:
                return FileFacts(axes, shape, self.pixel_size)
        return None


_known: weakref.WeakKeyDictionary[Image, FileFacts | None]
_known = weakref.WeakKeyDictionary()  # of all layers whose files were looked at
_waiting: weakref.WeakKeyDictionary[Image, list[Callable[[Image], None]]]
_waiting = weakref.WeakKeyDictionary()
# Layers and their files, the first of which is being read.
_queue: deque[tuple[weakref.ref[Image], str]] = deque()


def file_facts(layer: Image, shape: tuple[int, ...]) -> FileFacts | None:
    """Return what the file of a layer says, if it was read and has such an array."""
    facts = _known.get(layer)
    return facts and facts.of_array(tuple(shape), is_rgb=layer.rgb)


def is_being_read(layer: Image) -> bool:
    """Whether `file_facts` may soon say more."""
    return layer in _waiting


def read_file_facts(layer: Image, on_read: Callable[[Image], None]) -> None:
    """Read the header of the file of a layer in a thread, once.

    Parameters
    ----------
    layer : Image
        Nothing is read if it is not of a TIFF: other readers give it axis labels.
    on_read : callable
        Called with the layer when it is read, once.
    """
    if layer in _waiting:
        if on_read not in _waiting[layer]:
            _waiting[layer].append(on_read)
        return
    path = str(layer.source.path or "")
    if layer in _known or not path.lower().endswith((".tif", ".tiff")):
        return
    _known[layer] = None
    _waiting[layer] = [on_read]
    _queue.append((weakref.ref(layer), path))
    if len(_queue) == 1:
        _read_next()


def _read_next() -> None:
    """Read one file at a time: the threads are few, and not for this alone."""
    while _queue and _queue[0][0]() is None:
        _queue.popleft()  # the layer has gone
    if not _queue:
        return
    of_layer, path = _queue[0]

    def keep(facts: FileFacts) -> None:
        if (layer := of_layer()) is not None:
            _known[layer] = facts

    def tell() -> None:
        _queue.popleft()
        _read_next()
        if (layer := of_layer()) is not None:
            for on_read in _waiting.pop(layer, []):
                on_read(layer)

    start_worker(
        _read_steps(path),
        title="",
        on_progress=lambda step: None,
        on_result=keep,
        on_error=lambda message: None,  # napari could read it: there is an image
        on_finished=tell,
    )


def _read_steps(path: str) -> Generator[Progress, None, FileFacts]:
    yield Progress(0, 1, "reading")
    from napari_unet.files.images import read_image  # takes a while the first time

    image = read_image(path, max_bytes=0)  # lazily
    return FileFacts(image.axes, tuple(image.data.shape), image.pixel_size)
