"""What was segmented, and the layers that show it."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from napari_unet.widgets import _layers
from napari_unet.widgets._part import PartOnShow

if TYPE_CHECKING:
    from napari.layers import Image, Labels
    from napari.viewer import Viewer
    from numpy.typing import NDArray

    from napari_unet.inference.instances import ObjectTable
    from napari_unet.inference.part import LabelledPart
    from napari_unet.inference.store import ProbabilityStore
    from napari_unet.models.model import Model

    Result = tuple[ProbabilityStore, NDArray, ObjectTable]


@dataclass(eq=False)
class Run:
    """What a run was started with; its layer may be gone when it ends."""

    layer: weakref.ref[Image]
    name: str
    axes: str
    channels: tuple[object, ...]
    space: dict[str, Any]
    pixel_size: dict[str, float]
    model: Model
    augment: bool
    labels: Labels | None
    stale: bool = False

    def note_change(self, event: object = None) -> None:
        """Other pixels have come into the image."""
        self.stale = True

    def extends(self, other: Run | None) -> bool:
        """Tell whether this run adds to the same probabilities as another."""
        return (
            other is not None
            and not other.stale
            and self.layer() is other.layer()
            and self.model is other.model
            and all(
                getattr(self, name) == getattr(other, name)
                for name in ("axes", "channels", "pixel_size", "augment")
            )
        )


class Segmented:
    """The run that is shown, its probabilities, and the layers of all runs.

    Parameters
    ----------
    viewer : Viewer
        Gets the layers.
    """

    def __init__(self, viewer: Viewer):
        self._viewer = viewer
        self.run: Run | None = None
        self.store: ProbabilityStore | None = None
        self._labels: weakref.WeakKeyDictionary[Image, Labels]
        self._labels = weakref.WeakKeyDictionary()  # the last ones of each image
        self._edited: weakref.WeakSet[Labels] = weakref.WeakSet()
        self._part = PartOnShow()

    def last_labels(self, image: Image) -> Labels | None:
        """Return the layer that the last run on an image has made."""
        return self._labels.get(image)

    def place_seen(self) -> dict[str, slice] | None:
        """Return what the canvas shows of the image that was segmented."""
        run = self.run
        layer = None if run is None else run.layer()
        if run is None or run.stale or layer not in self._viewer.layers:
            return None
        return _layers.looked_at(self._viewer, layer, run.axes, run.model.ndim, 1)

    def show(self, run: Run, result: Result, *, with_probabilities: bool) -> list[str]:
        """Put the objects of a run into the viewer.

        Parameters
        ----------
        run : Run
            Gets the layer that shows them.
        result : store, labels and table
            From `segment_stored_steps`.
        with_probabilities : bool
            Whether they are shown as a layer, too.

        Returns
        -------
        list of str
            Sentences that the user should read.
        """
        is_new, self.run = run is not self.run, run
        self.store, data, table = result
        self._part.forget()
        words = []
        if run.stale:
            words.append("The image has changed meanwhile: segment it again.")
        kept = run.labels if run.labels in self._viewer.layers else None
        if kept is not None and kept in self._edited:
            words.append(f"You have painted in {kept.name!r}: it is kept.")
            kept = None
        features = _layers.table_features(table, run.model, run.pixel_size)
        layer = _layers.show_labels(
            self._viewer, kept, data, f"{run.name} objects", run.space, features
        )
        if is_new and not layer.visible:  # for example while a copy was corrected
            layer.visible = True
        layer.events.paint.connect(self._on_paint)  # once, however often it is called
        run.labels = layer
        if (image := run.layer()) is not None:
            self._labels[image] = layer
            _layers.note_segmentation(layer, image)
        if with_probabilities:
            _layers.show_probabilities(
                self._viewer,
                self.store.data,
                [info.name for info in run.model.passport.classes[1:]],
                run.name,
                run.space,
            )
        return words

    def show_part(self, part: LabelledPart) -> None:
        """Show the new objects where somebody looks at, ahead of the others."""
        layer = None if self.run is None else self.run.labels
        if layer is None or layer not in self._viewer.layers or layer in self._edited:
            return
        numbers = layer.features.get("index", ())
        last = int(max(numbers)) if len(numbers) else 0
        self._part.show(layer, part, max(last + 1, part.first))

    def take_part_back(self) -> None:
        """Show again what was there before the part: the whole will not come."""
        self._part.take_back()

    def _on_paint(self, event: Any) -> None:
        self._edited.add(event.source)
