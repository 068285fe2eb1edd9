"""Ways to bring a model in: a file, a folder, an address, or dropping one of them.

Programs are converted with consent only: the one question that holds up everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from qtpy.QtCore import QObject, Qt, QTimer
from qtpy.QtWidgets import (
    QFileDialog,
    QHBoxLayout,
    QLineEdit,
    QMenu,
    QMessageBox,
    QPushButton,
    QToolButton,
    QWidget,
)

from napari_unet.errors import NeedsTrust
from napari_unet.models.library import import_steps
from napari_unet.models.web import is_url
from napari_unet.steps import Progress
from napari_unet.widgets._dock import while_alive
from napari_unet.widgets._model_chooser import CHECKPOINTS

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable

    from qtpy.QtCore import QMimeData

    from napari_unet.widgets._models_work import WorkRow

_LONGEST = 24  # letters of a name


class ImportButton(QPushButton):
    """Asks for a file, a folder or an address.

    Parameters
    ----------
    on_source : callable
        Gets a path.
    on_address : callable
        Called when the user wants to type an address.
    """

    def __init__(
        self, on_source: Callable[[str], None], on_address: Callable[[], None]
    ):
        super().__init__("Import…")
        self._on_source = on_source
        menu = QMenu(self)
        menu.setToolTipsVisible(True)
        for text, act, tip in (
            (
                "File…",
                self._browse_file,
                "A checkpoint, an ONNX file, or a packed bioimage.io model.",
            ),
            (
                "Folder…",
                self._browse_folder,
                "An unpacked bioimage.io model, or one of segmentation_models_pytorch.",
            ),
            ("Address…", on_address, "A model of bioimage.io, by its web address."),
        ):
            action = menu.addAction(text)
            assert action is not None
            action.setToolTip(tip)
            action.triggered.connect(lambda _=False, act=act: act())
        self.setMenu(menu)
        # In a narrow dock the arrow would lie on the text.
        self.setStyleSheet("QPushButton::menu-indicator { image: none; width: 0 }")

    def _browse_file(self) -> None:
        path, _ = QFileDialog.getOpenFileName(self, "Import", "", CHECKPOINTS)
        if path:
            self._on_source(path)

    def _browse_folder(self) -> None:
        path = QFileDialog.getExistingDirectory(self, "Import a folder")
        if path:
            self._on_source(path)


class AddressRow(QWidget):
    """A line for the address of a model, shown when it is asked for.

    Parameters
    ----------
    on_source : callable
        Gets the address.
    """

    def __init__(self, on_source: Callable[[str], None]):
        super().__init__()
        self._on_source = on_source
        self.line = QLineEdit()
        self.line.setPlaceholderText("https://… of a bioimage.io model")
        self.line.setToolTip(
            "Address of the package (.zip) or of its description (.yaml).\nIt is only "
            "fetched when you click Get."
        )
        self.line.setClearButtonEnabled(True)
        self.get = QPushButton("Get")
        close = QToolButton()
        close.setText("×")
        close.setToolTip("Close this line.")
        close.clicked.connect(lambda: self.hide())
        row = QHBoxLayout(self)
        row.setContentsMargins(0, 0, 0, 0)
        for part, stretch in ((self.line, 1), (self.get, 0), (close, 0)):
            row.addWidget(part, stretch=stretch)
        self._why_not = ""
        self.line.textChanged.connect(lambda _: self._refresh())
        self.line.returnPressed.connect(lambda: self._go())
        self.get.clicked.connect(lambda: self._go())
        self._refresh()
        self.hide()

    def ask(self) -> None:
        """Show the line and let the user type or paste."""
        self.show()
        self.line.setFocus()
        self.line.selectAll()

    def set_why_not(self, why_not: str) -> None:
        """Allow to fetch, or say why that cannot be now."""
        self._why_not = why_not
        self._refresh()

    def _refresh(self) -> None:
        empty = "Paste the address of a model first."
        problem = self._why_not or empty * (not is_address(self.line.text()))
        self.get.setEnabled(not problem)
        self.get.setToolTip(problem or "Fetch it and put it into the library.")

    def _go(self) -> None:
        if self.get.isEnabled():
            self._on_source(self.line.text().strip())


def is_address(text: str) -> bool:
    """Tell whether a text is the web address of something."""
    return is_url(text.strip()) and len(text.split()) == 1


def dropped(mime: QMimeData | None) -> list[str]:
    """Return the paths and addresses of what is dragged; [] if there are none."""
    if mime is None:
        return []
    urls = mime.urls() if mime.hasUrls() else []
    found = [url.toLocalFile() or url.toString() for url in urls]
    if not found and mime.hasText():
        found = mime.text().split()
    return [one for one in found if is_address(one) or Path(one).exists()]


def ask_consent(parent: QWidget, question: Question) -> bool:
    """Ask whether a program may be converted.

    Parameters
    ----------
    parent : QWidget
        Under which the dialog belongs.
    question : Question
        What it is, and what converting it means.

    Returns
    -------
    bool
        Whether the user has clicked "Convert anyway".
    """
    box = QMessageBox(parent)
    box.setIcon(QMessageBox.Icon.Warning)
    box.setWindowTitle("Convert a program?")
    what, _, meaning = question.words.partition("\n\n")
    box.setTextFormat(Qt.TextFormat.PlainText)  # it has names out of the file
    box.setText(what)
    box.setInformativeText(meaning)
    convert = box.addButton("Convert anyway", QMessageBox.ButtonRole.AcceptRole)
    cancel = box.addButton(QMessageBox.StandardButton.Cancel)
    box.setDefaultButton(cancel)
    box.setEscapeButton(cancel)
    box.exec()
    clicked = box.clickedButton() is convert
    box.deleteLater()
    return clicked


@dataclass(frozen=True)
class Question:
    """What the user must consent to before a program is converted."""

    words: str


def ask_first_steps(source: str) -> Generator[Progress, None, str | Question]:
    """Import a model as `import_steps` does; of a program, return what it means."""
    yield Progress(0, 1)
    try:
        return (yield from import_steps(source))
    except NeedsTrust as error:
        from napari_unet.models.trust import explain

        return Question(explain(short(source), error))


class Importer(QObject):
    """Imports one model after the other, and asks where consent is needed.

    Parameters
    ----------
    work : WorkRow
        Does it in the background, shows how far it is, and is its parent.
    on_imported : callable
        Gets a source and the name of its model in the library.
    """

    def __init__(self, work: WorkRow, on_imported: Callable[[str, str], None]):
        super().__init__(work)
        self._work = work
        self._on_imported = on_imported
        self._waiting: list[str] = []

    @while_alive
    def add(self, sources: Iterable[str]) -> None:
        """Import from paths and web addresses, as soon as nothing else is done."""
        self._waiting += sources
        self._next()

    def go_on(self) -> None:
        """Begin with the next one, once the work that ends has told its result."""
        if self._waiting:
            QTimer.singleShot(0, self._next)

    @while_alive
    def _next(self) -> None:
        if not self._waiting or self._work.busy:
            return  # it comes back when the work has ended
        source = self._waiting.pop(0)
        self._work.run(
            f"Importing {short(source)}",
            ask_first_steps(source),
            lambda result: self._on_result(source, result),
            stops=True,
        )

    def _on_result(self, source: str, result: str | Question) -> None:
        if isinstance(result, str):
            self._on_imported(source, result)
        elif ask_consent(self._work, result):
            self._work.run(
                f"Converting {short(source)}",
                import_steps(source, trust=True),
                lambda name: self._on_imported(source, name),
                stops=True,
            )
        else:
            self._work.say(f"{short(source)} was not imported.")


def short(source: str) -> str:
    """Name a file, folder or address so that it fits into a line."""
    name = PurePath(source.rstrip("/")).name or source
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"
