"""What only the user can know of a model that was imported: a short form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qtpy.QtWidgets import (
    QComboBox,
    QDoubleSpinBox,
    QFormLayout,
    QHBoxLayout,
    QLineEdit,
    QPushButton,
    QVBoxLayout,
    QWidget,
)

from napari_unet.errors import BadInput
from napari_unet.widgets._dock import form_rows, narrow

if TYPE_CHECKING:
    from collections.abc import Callable

    from napari_unet.models.checkpoint import Header
    from napari_unet.models.model import ClassInfo, Passport

KINDS = {"objects": "objects", "region": "region"}
METHODS = {
    "percentile": "by percentiles",
    "mean_std": "mean and deviation",
    "fixed": "fixed grey values",
}
_NUMBERED = ("percentile", "fixed")
_EACH = "fixed by channel"  # as the file has them; too many to be typed
_RANGES = {"percentile": (1.0, 99.8), "mean_std": (1.0, 99.8), "fixed": (0.0, 255.0)}


class FactsForm(QWidget):
    """The facts of one model, and a button that saves what was changed.

    Parameters
    ----------
    on_save : callable
        Gets the changed fields of the passport.
    on_change : callable
        Called when other facts are shown or one is changed.
    """

    def __init__(
        self,
        on_save: Callable[[dict[str, Any]], None],
        on_change: Callable[[], None],
    ):
        super().__init__()
        self._on_change = on_change
        self._passport: Passport | None = None
        self._shown: dict[str, Any] = {}
        self._why_not = ""
        self._rows = QWidget()
        self.save = QPushButton("Save facts")
        self.save.clicked.connect(lambda: on_save(self.changes()))
        self._column = QVBoxLayout(self)
        self._column.setContentsMargins(0, 0, 0, 0)
        self._column.setSpacing(6)
        self._column.addWidget(self._rows)
        self._column.addWidget(self.save)
        self.show_facts(None, "No model is chosen.")

    def show_facts(self, header: Header | None, why_not: str) -> None:
        """Show the facts of another model.

        Parameters
        ----------
        header : Header or None
            Of its file.
        why_not : str
            Why its facts cannot be changed, "" if they can.
        """
        self._passport = None
        self._why_not = why_not
        rows = QWidget()
        form = form_rows()
        rows.setLayout(form)
        if header is not None:
            self._build(form, header)
            self._shown = self._values(header.passport)
            self._passport = header.passport
        self._column.replaceWidget(self._rows, rows)
        self._rows.hide()
        self._rows.deleteLater()
        self._rows = rows
        rows.setEnabled(not why_not)
        self.refresh()
        self._on_change()

    def set_why_not(self, why_not: str) -> None:
        """Allow changes, or say why there cannot be any now."""
        self._why_not = why_not
        self._rows.setEnabled(not why_not)
        self.refresh()

    def refresh(self) -> None:
        """Offer to save what was changed."""
        problem = self._why_not or self._problem()
        self.save.setEnabled(not problem)
        self.save.setToolTip(problem or "Into the copy in the library.")

    def _changed(self, *_: object) -> None:
        self.refresh()
        if self._passport is not None:  # else it is being filled
            self._on_change()

    # --- building -------------------------------------------------------------

    def _build(self, form: QFormLayout, header: Header) -> None:
        passport = header.passport
        self._classes = [self._class_row(form, info) for info in passport.classes[1:]]
        self._channels = []
        for number, name in enumerate(passport.channels, start=1):
            tip = "What this channel shows, for example nuclei or DAPI."
            one = "Channel" if len(passport.channels) == 1 else f"Channel {number}"
            self._channels.append(self._text(form, one, name, tip))
        sizes = passport.pixel_size or (0.0,) * header.config.ndim
        tip = (
            "Of the images that it was trained on. Images are rescaled to it.\nWithout "
            "it they are used as they are."
        )
        self._depth = None
        if header.config.ndim == 3:
            self._depth = self._number(form, "Plane distance", sizes[0], " µm", tip)
        self._size = self._number(form, "Pixel size", sizes[-1], " µm", tip)
        self._diameter = self._number(
            form,
            "Diameter",
            passport.object_diameter or 0.0,
            " pixels",
            "Of a typical object in the images that it was trained on.",
        )
        self._brightness_rows(form, passport)
        self._threshold = QDoubleSpinBox()
        self._threshold.setRange(0.01, 0.99)
        self._threshold.setSingleStep(0.05)
        self._threshold.setValue(passport.threshold)
        self._threshold.setToolTip(
            "Probability above which a pixel belongs to an object. Less finds more."
        )
        self._threshold.valueChanged.connect(self._changed)
        form.addRow("Threshold", self._threshold)
        self._description = self._text(
            form, "About", passport.description, "What it is for, in a sentence."
        )
        self._citation = self._text(
            form,
            "Citation",
            passport.citation,
            "Who made it, its licence, and what to cite when you use it.",
        )

    def _class_row(
        self, form: QFormLayout, info: ClassInfo
    ) -> tuple[QLineEdit, QComboBox]:
        name = QLineEdit(info.name)
        name.setToolTip("What this output of the network finds.")
        kind = narrow(QComboBox())
        for key, text in KINDS.items():
            kind.addItem(text, key)
        kind.setCurrentIndex(kind.findData(info.kind))
        name.textChanged.connect(self._changed)
        kind.currentIndexChanged.connect(self._changed)
        row = QHBoxLayout()
        row.addWidget(name, stretch=1)
        row.addWidget(kind, stretch=1)
        form.addRow("Finds", row)
        return name, kind

    def _brightness_rows(self, form: QFormLayout, passport: Passport) -> None:
        how = passport.normalization
        self._method = narrow(QComboBox())
        for key, text in METHODS.items():
            self._method.addItem(text, key)
        if how.ranges:
            self._method.addItem("fixed, by channel", _EACH)
        method = _EACH if how.ranges else how.method
        self._method.setCurrentIndex(self._method.findData(method))
        tip = (
            "How grey values were scaled in its training: look into its documentation "
            "or training script.\nA wrong choice gives empty or full images."
        )
        self._method.currentIndexChanged.connect(lambda _: self._on_method())
        form.addRow("Brightness", self._method)
        self._low, self._high = _Number(how.lower, -1e6), _Number(how.upper, -1e6)
        row = QHBoxLayout()
        for spin, what in ((self._low, "0"), (self._high, "1")):
            spin.setToolTip(f"What becomes {what}.\n{tip}")
            spin.valueChanged.connect(self._changed)
            row.addWidget(spin, stretch=1)
        form.addRow("from, to", row)
        self._on_method(keep=True)

    def _text(self, form: QFormLayout, title: str, text: str, tip: str) -> QLineEdit:
        line = QLineEdit(text)
        line.setCursorPosition(0)
        line.setToolTip(tip)
        line.textChanged.connect(self._changed)
        form.addRow(title, line)
        return line

    def _number(
        self, form: QFormLayout, title: str, value: float, unit: str, tip: str
    ) -> QDoubleSpinBox:
        spin = _Number(value, 0)
        spin.setSuffix(unit)
        spin.setSpecialValueText("not known")
        spin.setToolTip(tip)
        spin.valueChanged.connect(self._changed)
        form.addRow(title, spin)
        return spin

    def _on_method(self, *, keep: bool = False) -> None:
        method = self._method.currentData()
        if not keep and method in _RANGES:
            for spin, value in zip(
                (self._low, self._high), _RANGES[method], strict=True
            ):
                spin.setValue(value)
        for spin in (self._low, self._high):
            spin.setEnabled(method in _NUMBERED)
        self._changed()

    # --- values -----------------------------------------------------------------

    def facts(self) -> Passport:
        """Return the passport as the form has it now.

        Raises
        ------
        BadInput
            If no model is shown, or a value cannot be.
        """
        problem = self._mistake()
        if self._passport is None or problem:
            raise BadInput(problem)
        known = self._passport.model_dump() | self.changes()
        return type(self._passport).model_validate(known)

    def changes(self) -> dict[str, Any]:
        """Return the fields of the passport that the user has changed."""
        passport = self._passport
        if passport is None:
            return {}
        values = self._values(passport)
        return {key: now for key, now in values.items() if now != self._shown[key]}

    def _values(self, passport: Passport) -> dict[str, Any]:
        infos = zip(passport.classes[1:], self._classes, strict=True)
        found = [
            info.model_dump()
            | {"name": name.text().strip() or info.name, "kind": kind.currentData()}
            for info, (name, kind) in infos
        ]
        channels = zip(passport.channels, self._channels, strict=True)
        how, method = passport.normalization.model_dump(), self._method.currentData()
        if method not in (how["method"], _EACH):  # what else was told went with that
            how = {key: how[key] for key in ("scope", "joint_channels")}
        if method != _EACH:
            how.pop("ranges", None)
            how["method"] = method
        if method in _NUMBERED:
            how |= {"lower": self._low.value(), "upper": self._high.value()}
        sizes = [self._size.value()] * 2
        if self._depth is not None:
            sizes.insert(0, self._depth.value())
        return {
            "classes": (passport.classes[0].model_dump(), *found),
            "channels": tuple(line.text().strip() or old for old, line in channels),
            "pixel_size": tuple(sizes) if all(sizes) else None,
            "object_diameter": self._diameter.value() or None,
            "normalization": how,
            "threshold": self._threshold.value(),
            "description": self._description.text().strip(),
            "citation": self._citation.text().strip(),
        }

    def _mistake(self) -> str:
        """Say which values cannot be, "" if all can."""
        if self._passport is None:
            return "No model is chosen."
        if self._method.currentData() in _NUMBERED:
            if self._low.value() >= self._high.value():
                return "Of the two brightness values the second must be the larger."
            if self._method.currentData() == "percentile" and not (
                self._low.value() >= 0 and self._high.value() <= 100
            ):
                return "Percentiles lie between 0 and 100."
        if self._depth is not None and (
            bool(self._depth.value()) != bool(self._size.value())
        ):
            return "Give both the plane distance and the pixel size, or neither."
        return ""

    def _problem(self) -> str:
        """Say why nothing can be saved, "" if something can."""
        return self._mistake() or "Nothing was changed." * (not self.changes())


class _Number(QDoubleSpinBox):
    """A number without zeros at its end."""

    def __init__(self, value: float, smallest: float):
        super().__init__()
        self.setDecimals(4)
        self.setRange(smallest, 1e6)
        self.setStepType(QDoubleSpinBox.StepType.AdaptiveDecimalStepType)
        self.setValue(value)

    def textFromValue(self, value: float) -> str:
        """Write 19.9 rather than 19.9000."""
        text = super().textFromValue(value)
        point = self.locale().decimalPoint()
        return text.rstrip("0").rstrip(point) if point in text else text
