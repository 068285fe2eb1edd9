"""What a batch is told: folders, model, objects and what to write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from magicgui.widgets import CheckBox, LineEdit
from qtpy.QtWidgets import (
    QCheckBox,
    QComboBox,
    QFormLayout,
    QHBoxLayout,
    QLineEdit,
    QVBoxLayout,
    QWidget,
)

from napari_unet.batch.job import BatchJob
from napari_unet.errors import BadInput
from napari_unet.inference.settings import DEVICES, ObjectSettings
from napari_unet.widgets import _session
from napari_unet.widgets._dock import Fold, TextLabel, form_rows, make_fold, while_alive
from napari_unet.widgets._folder_field import FolderField
from napari_unet.widgets._model_chooser import ModelChooser
from napari_unet.widgets._objects import ObjectsPanel
from napari_unet.widgets._running import (
    choose_averaging,
    choose_device,
    choose_memory_limit,
    choose_tile,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from napari_unet.batch.job import SegmentSettings
    from napari_unet.models.model import Model, Passport

FORMATS = {"tif": "TIFF", "ome.tif": "OME-TIFF", "ome.zarr": "OME-Zarr"}


class BatchForm(QWidget):
    """The fields of a job.

    Parameters
    ----------
    session : Session
        Holds the model, and how Segment makes objects.
    wanted : str
        Name or path of the model to begin with.
    on_change : callable
        Called when the job may have changed.
    """

    def __init__(
        self, session: _session.Session, wanted: str, on_change: Callable[[], None]
    ):
        super().__init__()
        self._session = session
        self._tell = on_change
        self._told: BatchJob | None = None  # that was loaded, while its model is
        self._awaited = ""  # the model of that job, until it is loaded
        self._built = False
        column = QVBoxLayout(self)
        column.setContentsMargins(0, 0, 0, 0)
        column.setSpacing(6)
        column.addLayout(self._rows(wanted))
        self.objects = ObjectsPanel(self._on_change)
        self.objects.count.hide()
        column.addWidget(self.objects)
        column.addWidget(self._more())
        session.events.model.connect(self._on_model)
        session.events.objects.connect(self._on_objects)
        if session.model is not None:
            self._show_objects(session.model.passport)
        elif (passport := self.chooser.passport) is not None:
            self._show_objects(passport)
        self._built = True

    # --- building -------------------------------------------------------------------

    def _rows(self, wanted: str) -> QFormLayout:
        form = form_rows()
        self.input = FolderField(
            "Folder of images",
            "The images in it are segmented; they are never changed.",
            self._on_input,
        )
        self._pattern = QLineEdit()
        self._pattern.setPlaceholderText("all images")
        self._pattern.setToolTip(
            "Only images with such names, like *_dapi.tif or *_ch1*, upper case or "
            "lower."
        )
        self._pattern.textChanged.connect(lambda _: self._on_change())
        self._recursive = QCheckBox("Subfolders")
        self._recursive.setToolTip(
            "Also the images in its subfolders, which the results mirror."
        )
        self._recursive.toggled.connect(lambda _: self._on_change())
        names = QHBoxLayout()
        names.addWidget(self._pattern, stretch=1)
        names.addWidget(self._recursive)
        self.output = FolderField(
            "Folder of results",
            "Gets the labels, the tables and the report. It is made if needed.",
            self._on_change,
        )
        self.output.text.textEdited.connect(self._on_output_edited)
        self.chooser = ModelChooser(self._session, wanted, self._on_chooser)
        self.about = TextLabel(lines=3)
        form.addRow("Images", self.input)
        form.addRow("Named", names)
        form.addRow("Results", self.output)
        form.addRow("Write", self._what_to_write())
        form.addRow("Model", self.chooser)
        form.addRow(self.about)
        return form

    def _what_to_write(self) -> QVBoxLayout:
        self._format = QComboBox()
        for key, text in FORMATS.items():
            self._format.addItem(text, key)
        self._format.setToolTip(
            "Of labels and probabilities. TIFF opens everywhere, in Fiji with its "
            "pixel size;\nOME-TIFF and OME-Zarr carry more metadata, OME-Zarr suits "
            "huge images."
        )
        self._format.currentIndexChanged.connect(lambda _: self._on_change())
        self._measure = QCheckBox("Measurements")
        self._measure.setToolTip(
            "Measure size, place, shape and intensity of each object; all go into one "
            "table, measurements.csv."
        )
        self._probabilities = QCheckBox("Probabilities")
        self._probabilities.setToolTip(
            "Also write how sure the model is of each class at each pixel. Takes much "
            "more room than labels."
        )
        boxes = QHBoxLayout()
        for box in self._measure, self._probabilities:
            box.toggled.connect(lambda _: self._on_change())
            boxes.addWidget(box)
        column = QVBoxLayout()
        column.addWidget(self._format)
        column.addLayout(boxes)
        return column

    def _more(self) -> Fold:
        self._axes = LineEdit(
            label="Axes",
            tooltip="One letter for each axis of the images: T, C, Z, Y, X, S "
            "(colours), if the files say it wrongly or not at all.",
        )
        self._pixel_size = LineEdit(
            label="Pixel size (µm)",
            tooltip="Like 0.325, or Z, Y, X like 1, 0.325, 0.325, if the files say it "
            "wrongly or not at all.",
        )
        for text in self._axes, self._pixel_size:
            text.native.setPlaceholderText("as in the files")
        self._channels = LineEdit(
            label="Channels",
            tooltip="The channels that the model gets, in its order: 2 is the second. "
            "Needed if the images have more than the model.",
        )
        self._channels.native.setPlaceholderText("all")
        self._device = choose_device()
        self._tile = choose_tile()
        self._memory_limit = choose_memory_limit()
        self._augment = choose_averaging()
        self._float32 = CheckBox(
            text="Round nothing to 16 bits",
            tooltip="Slower on a GPU or a newer processor. Then all devices give the "
            "same numbers.",
        )
        fields: list[Any] = [
            *(self._axes, self._pixel_size, self._channels),
            *(self._device, self._tile, self._memory_limit),
            *(self._augment, self._float32),
        ]
        for field in fields:
            field.changed.connect(lambda _: self._on_change())
        return make_fold(fields)

    # --- what follows what ------------------------------------------------------------

    def _on_change(self) -> None:
        if self._built:
            self._tell()

    def _on_input(self) -> None:
        folder = self.input.path
        if self._built and folder is not None and not self.output.text.isModified():
            self.output.text.setText(f"{folder}-labels")
        self._on_change()

    def _on_output_edited(self, text: str) -> None:
        self.output.text.setModified(bool(text))  # an empty one is proposed again

    def _on_chooser(self) -> None:
        if self._awaited and not self.chooser.loading:  # in vain
            self._awaited, self._told = "", None
        self._on_change()

    @while_alive
    def _on_model(self, model: Model) -> None:
        if self._awaited == self.chooser.loaded:
            self._awaited = ""
        elif not self._awaited:
            self._told = None  # another model was chosen, or this one anew
        self._show_objects(model.passport)
        self._on_change()

    @while_alive
    def _on_objects(self, objects: dict[str, Any]) -> None:
        """Segment makes objects in another way: so does the next batch."""
        if self._session.model is not None and self.isEnabled():
            self._told = None
            self._show_objects(self._session.model.passport)
            self._on_change()

    def _show_objects(self, passport: Passport) -> None:
        name = self.chooser.loaded or self.chooser.chosen
        mine = _session.recall("Segment").get("objects", {}).get(name, {})
        mine = self._session.objects.get(name, mine)
        if self._told is not None:
            told = self._told.settings.model_dump()
            mine = {key: value for key, value in told.items() if value is not None}
        self.objects.set_values(
            ObjectSettings.recommended(passport),
            mine,
            is_loaded=self._session.model is not None,
        )

    # --- values -----------------------------------------------------------------------

    def job(self) -> BatchJob:
        """Return what is to be done; raise `BadInput` in words."""
        folder, output = self.input.path, self.output.path
        if folder is None:
            raise BadInput("Choose the folder of the images.")
        if output is None:
            raise BadInput("Choose a folder for the results.")
        model = self._session.model
        if self.chooser.loading:
            raise BadInput("The model is being loaded.")
        if model is None:
            raise BadInput("No model is loaded. Choose one.")
        if not self.chooser.loaded:
            raise BadInput("The model has no file. Choose one of the list.")
        told = self._told
        return BatchJob.of(
            {
                "input": folder,
                "output": output,
                "model": self.chooser.loaded,
                "model_sha256": told.model_sha256 if told is not None else "",
                "pattern": self._pattern.text().strip() or None,
                "recursive": self._recursive.isChecked(),
                "axes": self._axes.value.strip().upper() or None,
                "pixel_size": _pixel_size(self._pixel_size.value),
                "settings": {
                    **self._object_values(model),
                    "channels": _channels(self._channels.value),
                    "precision": "float32" if self._float32.value else "auto",
                    "test_time_augmentation": self._augment.value,
                    "device": self._device.value,
                    "tile": int(self._tile.value) or None,
                    "memory_limit": self._memory_limit.value or None,
                },
                "format": self._format.currentData(),
                "probabilities": self._probabilities.isChecked(),
                "measure": self._measure.isChecked(),
            }
        )

    def _object_values(self, model: Model) -> dict[str, Any]:
        """Return what is chosen; what the model recommends goes without saying."""
        usual = ObjectSettings.recommended(model.passport)
        told = None if self._told is None else self._told.settings
        values = self.objects.values()
        return {
            name: _meant(name, value, told, usual) for name, value in values.items()
        }

    def show_job(self, job: BatchJob) -> None:
        """Show a job in the fields, and load its model."""
        self._told = job
        self.show_fields(job)
        is_loaded = self.chooser.loaded == job.model and not self.chooser.loading
        self._awaited = "" if is_loaded else job.model
        self.chooser.choose(job.model, 2)
        if is_loaded and self._session.model is not None:
            self._show_objects(self._session.model.passport)
        self._on_change()

    def show_fields(self, job: BatchJob) -> None:
        """Show a job in the fields, but for its model and its objects."""
        self._built = False
        self.input.text.setText(str(job.input))
        self.output.text.setText(str(job.output))
        self.output.text.setModified(True)
        self._pattern.setText(job.pattern or "")
        self._recursive.setChecked(job.recursive)
        self._format.setCurrentIndex(self._format.findData(job.format))
        self._probabilities.setChecked(job.probabilities)
        self._measure.setChecked(job.measure)
        self._axes.value = job.axes or ""
        sizes = job.pixel_size or {}
        self._pixel_size.value = ", ".join(str(sizes[a]) for a in "ZYX" if a in sizes)
        settings = job.settings
        self._channels.value = ", ".join(str(c + 1) for c in settings.channels or ())
        self._device.value = settings.device if settings.device in DEVICES else "auto"
        self._tile.value = settings.tile or 0
        self._memory_limit.value = settings.memory_limit or 0
        self._augment.value = settings.test_time_augmentation
        self._float32.value = settings.precision == "float32"
        self._built = True


def _meant(
    name: str, value: Any, told: SegmentSettings | None, usual: ObjectSettings
) -> Any:
    """Undo the rounding of a slider: it may stand where a job, or the model, put it."""
    if told is not None and getattr(told, name) is not None:
        if abs(getattr(told, name) - value) < 0.001:
            return getattr(told, name)
    elif abs(getattr(usual, name) - value) < 0.001:
        return None
    return value


def _pixel_size(text: str) -> dict[str, float] | None:
    parts = [part for part in text.replace(",", " ").split() if part]
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = [0]
    if len(numbers) == 1:
        numbers *= 2
    if not numbers:
        return None
    if len(numbers) > 3 or not all(0 < number < float("inf") for number in numbers):
        raise BadInput(
            f"{text!r} is not a pixel size: give µm like 0.325, or Z, Y, X like "
            "1, 0.325, 0.325."
        )
    return dict(zip("ZYX"[-len(numbers) :], numbers, strict=True))


def _channels(text: str) -> tuple[int, ...] | None:
    parts = text.replace(",", " ").split()
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise BadInput(
            f"{text!r} are no channels: give their numbers, like 2 or 1, 3; the first "
            "is 1."
        )
    return tuple(int(part) - 1 for part in parts) or None
