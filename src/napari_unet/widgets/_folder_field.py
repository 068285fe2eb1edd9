"""A folder, typed, browsed for or dropped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qtpy.QtCore import QUrl
from qtpy.QtWidgets import QFileDialog, QHBoxLayout, QLineEdit, QToolButton, QWidget

if TYPE_CHECKING:
    from collections.abc import Callable


class FolderField(QWidget):
    """A folder, typed or browsed for.

    Parameters
    ----------
    title : str
        Of the dialog.
    tip : str
        What the folder is for.
    on_change : callable
        Called when the text changes, whoever changes it.
    """

    def __init__(self, title: str, tip: str, on_change: Callable[[], None]):
        super().__init__()
        self._title = title
        self.text = QLineEdit()
        self.text.setToolTip(tip)
        self.text.textChanged.connect(lambda _: on_change())
        browse = QToolButton()
        browse.setText("…")
        browse.setToolTip("Browse…")
        browse.clicked.connect(lambda: self._browse())
        row = QHBoxLayout(self)
        row.setContentsMargins(0, 0, 0, 0)
        row.addWidget(self.text, stretch=1)
        row.addWidget(browse)

    @property
    def path(self) -> Path | None:
        """The folder, None if there is no text."""
        text = self.text.text().strip()
        if text.startswith("file://"):  # dropped from a file manager
            text = QUrl(text).toLocalFile()
        return Path(text).expanduser().absolute() if text else None

    def _browse(self) -> None:
        start = str(self.path or "")
        if folder := QFileDialog.getExistingDirectory(self, self._title, start):
            self.text.setText(str(Path(folder)))
