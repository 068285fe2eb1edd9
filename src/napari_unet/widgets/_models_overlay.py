"""A layer that comes and goes without changing anything else in the viewer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from napari.layers import Labels
from napari.utils.colormaps import DirectLabelColormap, label_colormap

from napari_unet.widgets import _layers
from napari_unet.widgets._training import outlines

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from napari.layers import Image
    from napari.viewer import Viewer
    from numpy.typing import NDArray

_COLOURS = 126  # of edges; each has a second one for what is inside
_FRAME = 255
_INSIDE = 0.3  # opacity: enough to tell full from empty, and to see the image


class Overlay:
    """Objects in a part of an image: their edges, faintly filled, in a frame.

    The layer is of the size of the part, however large the image is.

    Parameters
    ----------
    viewer : Viewer
    on_taken_away : callable
        Called when the user removes the layer.
    """

    def __init__(self, viewer: Viewer, on_taken_away: Callable[[], None]):
        self._viewer = viewer
        self._on_taken_away = on_taken_away
        self._layer: Labels | None = None
        viewer.layers.events.removed.connect(self._on_removed)

    def show(
        self,
        image: Image,
        axes: str,
        region: dict[str, slice],
        labels: NDArray,
        regions: Sequence[str],
        *,
        framed: bool,
    ) -> None:
        """Show objects, in place of those before.

        Parameters
        ----------
        image : Image
            In which they are.
        axes : str
            Of its layer.
        region : dict of str to slice
            The part, by axis letter; all along other axes.
        labels : unsigned integer array
            Of the part, without channels.
        regions : sequence of str
            Colours of the first labels; those after them are objects.
        framed : bool
            Whether the edge of the part is drawn.
        """
        space = part_space(image, axes, region)
        data = paint(labels, len(regions))
        if framed:
            sides = axes.replace("S", "").replace("C", "")
            for axis in map(sides.index, "YX"):
                np.moveaxis(data, axis, 0)[[0, -1]] = _FRAME
        colours = _colours(regions)
        layer = self._layer
        if layer is not None and layer.ndim == data.ndim:
            layer.data = data
            _layers.place(layer, space)
            layer.colormap = colours
            layer.name = f"{image.name} preview"
            return
        self.remove()
        self._layer = Labels(
            data,
            name=f"{image.name} preview",
            metadata={_layers.PREVIEW: True},
            colormap=colours,
            opacity=1,
            **space,
        )
        self._layer.editable = False
        selected = set(self._viewer.layers.selection)
        active = self._viewer.layers.selection.active
        self._viewer.add_layer(self._layer)
        self._viewer.layers.selection = selected
        self._viewer.layers.selection.active = active

    def remove(self) -> None:
        """Take the layer out of the viewer."""
        layer, self._layer = self._layer, None
        if layer is not None and layer in self._viewer.layers:
            self._viewer.layers.remove(layer)

    def _on_removed(self, event: Any) -> None:
        if self._layer is not None and event.value is self._layer:
            self._layer = None
            self._on_taken_away()


def part_space(image: Image, axes: str, region: dict[str, slice]) -> dict[str, Any]:
    """Return where a layer lies that shows a part of an image, without channels.

    Parameters
    ----------
    image : Image
        The whole.
    axes : str
        Of its layer.
    region : dict of str to slice
        By axis letter; all along other axes.

    Returns
    -------
    dict
        Keywords of `napari.layers.Labels`.
    """
    letters = axes.replace("S", "")
    first = [region[axis].start if axis in region else 0 for axis in letters]
    begin = image.affine.inverse(image.data_to_world(first))
    keep = [i for i, axis in enumerate(letters) if axis != "C"]
    return _layers.label_space(image, axes) | {"translate": np.asarray(begin)[keep]}


def paint(labels: NDArray, regions: int) -> NDArray[np.uint8]:
    """Number the colours of labels: those of edges, and behind them of the inside.

    Parameters
    ----------
    labels : unsigned integer array
        Of objects and regions; 0 is background.
    regions : int
        So many of the first labels keep their colours to themselves.

    Returns
    -------
    uint8 array of the same shape
        napari is slow to draw others.
    """
    own = min(regions, _COLOURS - 1)
    turn = (labels.astype(np.int64) - 1 - own) % (_COLOURS - own) + own + 1
    number = np.where(labels <= own, labels, turn)
    inside = outlines(labels) == 0
    painted = np.where(inside, number + _COLOURS, number)
    return np.where(labels > 0, painted, 0).astype(np.uint8)


def _colours(regions: Sequence[str]) -> DirectLabelColormap:
    """Make the colours of edges opaque, of the inside faint, of the frame white."""
    cycle = label_colormap(_COLOURS + 1).colors
    colours: dict[int | None, Any] = {None: (0, 0, 0, 0), 0: (0, 0, 0, 0)}
    for number in range(1, _COLOURS + 1):
        red, green, blue = 0.3 + 0.7 * cycle[number][:3]  # none is dark
        if number <= len(regions):
            text = regions[number - 1]
            red, green, blue = (int(text[i : i + 2], 16) / 255 for i in (1, 3, 5))
        colours[number] = (red, green, blue, 1)
        colours[number + _COLOURS] = (red, green, blue, _INSIDE)
    colours[_FRAME] = (1, 1, 1, 0.8)
    return DirectLabelColormap(color_dict=colours)
