"""New objects of what is looked at, shown before those of the whole image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from napari.layers import Labels
    from numpy.typing import NDArray

    from napari_unet.inference.part import LabelledPart

    Place = tuple[slice, ...]


class PartOnShow:
    """Writes parts into a layer whose labels will follow as a whole.

    Only what changes is drawn again: to replace the labels of a large image takes
    the viewer longer than anybody should wait for a slider.
    """

    def __init__(self) -> None:
        # The layer, its labels then, and what they were at a place.
        self._before: list[tuple[Labels, NDArray, Place, NDArray]] = []

    def show(self, layer: Labels, part: LabelledPart, unused: int) -> None:
        """Show a part, in the colours that its objects have had.

        Parameters
        ----------
        layer : Labels
            If its labels are not of the image that the part is of, nothing happens.
        part : LabelledPart
            Its objects get the numbers of those that they lie on.
        unused : int
            From here on, numbers for new objects.
        """
        shape = tuple(box.stop - box.start for box in part.place)
        if not isinstance(layer.data, np.ndarray) or layer.ndim != len(shape):
            return
        before = layer.data[part.place]
        if before.shape != shape:
            return
        labels = keep_numbers(part.labels, before, part.first, unused)
        if labels.max(initial=0) > np.iinfo(before.dtype).max:
            return
        self._before.append((layer, layer.data, part.place, before.copy()))
        _write(layer, part.place, labels)

    def take_back(self) -> None:
        """Show again what was there before: the whole will not come."""
        for layer, data, place, before in reversed(self._before):
            if layer.data is data:
                _write(layer, place, before)
        self.forget()

    def forget(self) -> None:
        """Go on: the whole has come."""
        for layer in {layer for layer, *_ in self._before}:
            _clear_history(layer)
        self._before.clear()


def keep_numbers(
    labels: NDArray, before: NDArray, first: int, unused: int
) -> NDArray[np.int64]:
    """Number objects as those that they lie on.

    Parameters
    ----------
    labels : unsigned integer array
        Numbered anew.
    before : integer array of the same shape
        As they were numbered. Of several new objects on one old, one gets its
        number.
    first : int
        Smaller labels are no objects: they stay.
    unused : int
        From here on, numbers for the others.
    """
    number = np.zeros(int(labels.max(initial=0)) + 1, dtype=np.int64)
    is_known = (labels >= first) & (before >= first)
    number[labels[is_known]] = before[is_known]
    number[:first] = np.arange(len(number[:first]))
    is_new = np.ones(len(number), dtype=bool)
    is_new[np.unique(number, return_index=True)[1]] = False
    is_new |= number < first
    is_new[:first] = False
    number[is_new] = np.arange(np.count_nonzero(is_new)) + unused
    numbered: NDArray[np.int64] = number[labels]
    return numbered


def _write(layer: Labels, place: Place, labels: NDArray) -> None:
    changed = np.nonzero(layer.data[place] != labels)
    index = tuple(i + box.start for i, box in zip(changed, place, strict=True))
    with layer.events.paint.blocker():  # nobody has painted
        layer.data_setitem(index, labels[changed])


def _clear_history(layer: Labels) -> None:
    """Keep what was written here from being undone, as if somebody had painted it."""
    mode, editable = layer.mode, layer.editable
    layer.editable = False  # napari forgets by this
    layer.editable = editable
    layer.mode = mode
