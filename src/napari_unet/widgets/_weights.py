"""The weight map as a layer that follows the painting."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from qtpy.QtCore import QObject, QTimer

from napari_unet.widgets import _layers, _live, _pairs
from napari_unet.widgets._worker import FollowUp

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from napari.layers import Image
    from napari.viewer import Viewer

    from napari_unet.steps import Progress
    from napari_unet.widgets._annotations import AnnotationPanel
    from napari_unet.widgets._options import TrainingOptions

DELAY = 200  # ms after the last change
LOOK_INTERVAL = 300  # ms between two looks at what the user looks at


class WeightMap(QObject):
    """Shows the weights of the plane that is looked at while a button is pressed.

    Parameters
    ----------
    viewer : Viewer
    annotations : AnnotationPanel
        What is painted.
    options : TrainingOptions
        How it is weighted; has the button.
    ndim : callable
        Returns the number of axes that the network sees.
    on_doubt : callable
        Gets a sentence if the weights cannot be computed.
    """

    def __init__(
        self,
        viewer: Viewer,
        annotations: AnnotationPanel,
        options: TrainingOptions,
        ndim: Callable[[], int],
        on_doubt: Callable[[str], None],
    ):
        super().__init__(options)
        self._viewer = viewer
        self._annotations = annotations
        self._options = options
        self._ndim = ndim
        self._layers = _live.PlaneLayers(viewer, _live.make_weights)
        self._image: weakref.ref[Image] | None = None  # what was weighted last
        self._region: dict[str, slice] = {}
        self._later = FollowUp(self, DELAY, self._steps, self._show, on_doubt)
        self._timer = QTimer(self)
        self._timer.setInterval(LOOK_INTERVAL)
        self._timer.timeout.connect(self._look)
        options.show_weights.toggled.connect(self._on_toggled)

    @property
    def is_on(self) -> bool:
        """Whether the user wants to see it."""
        return self._options.show_weights.isChecked()

    def request(self) -> None:
        """Compute it soon, if it is shown."""
        if self.is_on:
            self._later.request()

    def _look(self) -> None:
        """Follow the sliders and the chosen image."""
        image = self._annotations.image.layer
        if not self.is_on or image is None:
            return
        known = self._image() if self._image is not None else None
        if image is not known or self._plane(image) != self._region:
            self.request()

    def _plane(self, image: Image) -> dict[str, slice]:
        axes = self._annotations.image.axes_of(image)
        return _layers.looked_at(self._viewer, image, axes, self._ndim())

    def _on_toggled(self, on: bool) -> None:
        self._image = None
        if on:
            self._timer.start()
            self.request()
        else:
            self._timer.stop()
            self._layers.hide()

    def _steps(self) -> Generator[Progress, None, Any] | None:
        pair = self._annotations.current()
        if not self.is_on or pair is None:
            return None
        region = self._plane(pair.image)
        self._image, self._region = weakref.ref(pair.image), region
        meaning = _pairs.Meaning(
            self._annotations.unpainted, self._options.labels_are.value
        )
        annotation = self._annotations.read(pair, meaning)
        return _live.weight_steps(
            _pairs.cut_plane(annotation, region),
            self._ndim(),
            self._options.border_weights(),
        )

    def _show(self, weights: Any) -> None:
        image = self._image() if self._image is not None else None
        if image is None or not self.is_on:
            return
        axes = self._annotations.image.axes_of(image)
        layer = self._layers.put(image, axes, self._region, weights)
        if layer is not None:
            layer.contrast_limits = (0, max(float(weights.max()), 1.0))
