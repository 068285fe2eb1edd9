"""What a model finds in the image that is looked at, with the facts as they stand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from qtpy.QtCore import QTimer
from qtpy.QtWidgets import QCheckBox, QVBoxLayout, QWidget

from napari_unet.errors import BadInput, BadModel, UnetError
from napari_unet.inference.settings import ObjectSettings
from napari_unet.inference.source import open_source
from napari_unet.models.checkpoint import read_model
from napari_unet.models.model import Model
from napari_unet.steps import Progress, run_to_end
from napari_unet.widgets import _layers
from napari_unet.widgets._dock import TextLabel, form_rows, while_alive
from napari_unet.widgets._image_chooser import ImageChooser
from napari_unet.widgets._live import limit_preview
from napari_unet.widgets._models_overlay import Overlay
from napari_unet.widgets._worker import FollowUp

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    import napari.viewer
    from napari.layers import Image
    from numpy.typing import NDArray

    from napari_unet.inference.segment import Found
    from napari_unet.models.family import Entry
    from napari_unet.models.model import Passport

DELAY = 300  # ms after the last change, and between two looks at the canvas
PIXELS = 512 * 512  # that are segmented, on the image's grid and on the model's
_NOTHING = "nothing is looked at"
_FULL = 0.97  # of the pixels: more of them is rarely meant


@dataclass(frozen=True, eq=False)
class _View:
    """What is looked at: a part of an image, and its place."""

    image: Image
    region: dict[str, slice]
    axes: str

    @property
    def letters(self) -> str:
        """Of the axes that labels have."""
        return self.axes.replace("S", "").replace("C", "")

    @property
    def is_part(self) -> bool:
        """Whether there is more of this plane or volume than is segmented."""
        letters = self.axes.replace("S", "")
        shape = dict(zip(letters, _layers.image_array(self.image).shape, strict=False))
        return any(
            part.stop - part.start < shape[axis]
            for axis, part in self.region.items()
            if axis in "YX"
        )


@dataclass(frozen=True, eq=False)
class Seen:
    """What was found in a view.

    Parameters
    ----------
    key : object
        Equal as long as the network would say the same.
    probabilities : float32 array of shape (class, *labels)
    labels : unsigned integer array
        Of the view, without channels.
    found : Found
    """

    key: object
    probabilities: NDArray[np.float32]
    labels: NDArray
    found: Found


class FactsPreview(QWidget):
    """Segments the middle of what the canvas shows whenever facts change.

    The result is a layer of its own, which goes when the preview ends; all other
    layers stay as they are.

    Parameters
    ----------
    viewer : napari.viewer.Viewer
        Its image is segmented.
    facts : callable
        Returns the passport as the form has it now; raises `BadInput` in words.
    """

    def __init__(self, viewer: napari.viewer.Viewer, facts: Callable[[], Passport]):
        super().__init__()
        self._viewer = viewer
        self._facts = facts
        self._entry: Entry | None = None
        self._loading: Entry | None = None
        self._model: Model | None = None  # of the entry, once it is loaded
        self._problem = ""  # why that cannot be loaded
        self._seen: Seen | None = None
        self._asked: object = None  # what was asked for last
        self._pending: _View | None = None  # that is computed
        self._is_open = False
        self._overlay = Overlay(viewer, self._on_taken_away)
        self.later = FollowUp(self, DELAY, self._steps, self._show, self._fail)
        self._look_timer = QTimer(self)
        self._look_timer.setInterval(DELAY)
        self._look_timer.timeout.connect(self._look)
        self._build()

    def _build(self) -> None:
        self.wanted = QCheckBox("Live preview on the image")
        self.wanted.setToolTip(
            "Shows in the viewer what the model finds in the middle of what you look "
            "at,\nwith the facts as they stand. Nothing is saved by it."
        )
        self.wanted.setChecked(True)
        self.wanted.toggled.connect(lambda _: self._switch())
        rows = QWidget()
        form = form_rows()
        rows.setLayout(form)
        self.status = TextLabel(lines=2)
        column = QVBoxLayout(self)
        column.setContentsMargins(0, 0, 0, 0)
        column.setSpacing(6)
        for part in (self.wanted, rows, self.status):
            column.addWidget(part)
        self._rows = rows
        self.image = ImageChooser(self._viewer, form, self.request)
        self.image.reset()

    # --- what is previewed --------------------------------------------------------

    def show_entry(self, entry: Entry | None) -> None:
        """Preview another model, or one whose file has changed; None previews none."""
        before, self._entry = self._entry, entry
        if _weights_of(before) != _weights_of(entry):
            self._model, self._problem, self._seen = None, "", None
            self._overlay.remove()
        self.request()

    def open(self, is_open: bool) -> None:
        """Begin when the form is opened, end when it is closed."""
        if is_open != self._is_open:
            self._is_open = is_open
            self._switch()

    @while_alive
    def request(self) -> None:
        """Show soon what is found now; what is being computed is outdated."""
        self._asked = None
        if self._is_wanted:
            self.later.cancel()
            self.later.request()

    @property
    def _is_wanted(self) -> bool:
        return self._is_open and self.wanted.isChecked()

    def _switch(self) -> None:
        self._rows.setVisible(self.wanted.isChecked())
        if self._is_wanted:
            self._look_timer.start()
            self.request()
        else:
            self._look_timer.stop()
            self.later.cancel()
            self._overlay.remove()
            self._seen = self._model = None  # gives their memory back
            self.status.setText("")

    @while_alive
    def _on_taken_away(self) -> None:
        """Whoever removes the layer by hand wants no preview."""
        self.wanted.setChecked(False)

    def _look(self) -> None:
        """Follow the canvas, the sliders and the chosen image."""
        if self.later.is_busy or self._model is None or self._asked is None:
            return
        try:
            view = self._view(Model(self._model.network, self._facts()))
        except UnetError:
            return  # as was said
        if view is not None and _key(view) != self._asked:
            self.request()

    # --- computing ----------------------------------------------------------------

    def _steps(self) -> Generator[Progress, None, Any] | None:
        """Return the next thing to do, or say what is in its way."""
        entry = self._entry
        if not self._is_wanted or entry is None or entry.header is None:
            self._say("")
            return None
        try:
            if self._problem:
                raise BadModel(self._problem)
            if self.image.layer is None:
                raise BadInput("Open an image to see in it what the model finds.")
            if self._model is None:
                self._say("Loading the model …", keep=True)
                self._loading = entry
                return _load_steps(entry)
            return self._preview_steps(entry.header.sha256, self._model)
        except UnetError as error:
            self._say(str(error))
            return None

    def _preview_steps(
        self, sha256: str, loaded: Model
    ) -> Generator[Progress, None, Seen]:
        self.image.offer_channels(loaded)
        model = Model(loaded.network, self._facts())
        image, axes, channels = self.image.engine_input()
        open_source(image, model, axes, channels)  # says in words what does not fit
        view = self._view(model)
        if view is None:
            self._asked = _NOTHING  # what comes into view is something else
            raise BadInput("The canvas shows nothing of the image: move it there.")
        self._asked, self._pending = _key(view), view
        self._say("Looking at the image …", keep=True)
        return preview_steps(
            self._seen,
            model,
            (sha256, self._asked, self.image.channels),
            image=image,
            axes=axes,
            channels=channels,
            region=view.region,
            pixel_size=_layers.pixel_size(view.image, view.axes),
        )

    def _view(self, model: Model) -> _View | None:
        """Return the middle of what the canvas shows, None if that is nothing."""
        image, axes = self.image.layer, self.image.axes
        if image is None:
            return None
        try:
            seen = _layers.looked_at(self._viewer, image, axes, model.ndim, largest=1)
        except (KeyError, ValueError):  # axes that do not fit, as was said
            return None
        if any(part.start >= part.stop for part in seen.values()):
            return None
        factors = model.rescaling(_layers.pixel_size(image, axes)) or (1.0,)
        finer = float(np.prod(np.maximum(factors, 1)))
        letters = axes.replace("S", "")
        here = dict(
            zip(letters, _layers.current_index(self._viewer, image), strict=True)
        )
        most = max(1, int(PIXELS / finer))
        return _View(image, limit_preview(seen, here.get("Z", 0), most), axes)

    # --- showing ------------------------------------------------------------------

    def _show(self, result: Model | Seen) -> None:
        view = self._pending
        if not self._is_wanted:
            return
        if isinstance(result, Model):
            if self._loading is self._entry:  # else another was chosen meanwhile
                self._model = result
                self.later.request()
            return
        if view is None or view.image not in self._viewer.layers:
            return
        if self._model is None:  # another was chosen meanwhile
            return
        self._seen = result
        classes = result.found.passport.classes[1:]
        regions = any(info.kind == "region" for info in classes)
        self._overlay.show(
            view.image,
            view.axes,
            view.region,
            result.labels,
            [info.color for info in classes] if regions else [],
            framed=view.is_part,
        )
        model = Model(self._model.network, result.found.passport)
        self._say(_words(model, result.found, view), keep=True)

    def _fail(self, message: str) -> None:
        if self._model is None and self._loading is self._entry:
            self._problem = message
        self._say(message)

    def _say(self, words: str, *, keep: bool = False) -> None:
        """Show a sentence; the layer goes unless it is still true."""
        self.status.setText(words)
        if not keep:
            self._overlay.remove()
            self._seen = None


def _words(model: Model, found: Found, view: _View) -> str:
    """Say what was found, and what may be done where that looks wrong."""
    where = "in the frame" if view.is_part else "here"
    words = f"{found.describe()} {where} ({found.covered:.0%} covered)."
    if not found.covered:
        return f"Nothing is found {where}. Try another brightness or a lower threshold."
    if found.covered > _FULL:
        return f"{words} Too much? Try another brightness or a higher threshold."
    sizes = _layers.pixel_size(view.image, view.axes)
    fit = model.describe_fit(sizes)
    return f"{words} {fit.capitalize()}." if fit else words


def _weights_of(entry: Entry | None) -> object:
    """Tell files apart whose weights may differ."""
    if entry is None or entry.header is None:
        return None
    return entry.path, entry.header.sha256


def _key(view: _View) -> object:
    region = tuple((axis, p.start, p.stop) for axis, p in sorted(view.region.items()))
    return id(view.image), region, view.axes


def _load_steps(entry: Entry) -> Generator[Progress, None, Model]:
    yield Progress(0, 1, "loading the model")
    return read_model(entry.path)


def preview_steps(
    before: Seen | None, model: Model, place: object, **options: Any
) -> Generator[Progress, None, Seen]:
    """Segment a part of an image; without the network if only objects change.

    Parameters
    ----------
    before : Seen or None
        What was found last.
    model : Model
        With the facts as they stand.
    place : object
        Says which part of which image that is.
    **options
        Image, axes, channels, region and pixel size, as `predict` takes them.

    Yields
    ------
    Progress

    Returns
    -------
    Seen
    """
    from napari_unet.inference.classify import foreground
    from napari_unet.inference.objects import find_objects_steps
    from napari_unet.inference.predict import predict_steps
    from napari_unet.inference.segment import Found

    passport = model.passport
    sizes = tuple(sorted(options["pixel_size"].items()))
    key = (place, passport.normalization, model.rescaling(dict(sizes)))
    if before is not None and before.key == key:
        probabilities = before.probabilities
    else:
        image = options.pop("image")
        probabilities = yield from predict_steps(image, model, **options)
    yield Progress(1, 1, "making objects")
    letters = options["axes"].replace("S", "").replace("C", "")
    shape = probabilities.shape[1:]
    sides = [
        n
        for n, axis in zip(shape, letters, strict=True)
        if axis in "ZYX"[-model.ndim :]
    ]
    one = probabilities.reshape(len(probabilities), *sides)
    settings = ObjectSettings.recommended(passport)
    kinds = [info.kind for info in passport.classes[1:]]
    objects = run_to_end(find_objects_steps(foreground(one), kinds, settings))
    found = Found.count(objects, passport)
    return Seen(key, probabilities, objects.labels.reshape(shape), found)
