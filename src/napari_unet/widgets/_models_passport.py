"""A model's passport, readable."""

from __future__ import annotations

import re
from html import escape
from typing import TYPE_CHECKING

from qtpy.QtCore import QBuffer, QByteArray, QEvent, QObject, Qt
from qtpy.QtGui import (
    QGuiApplication,
    QImageReader,
    QKeyEvent,
    QKeySequence,
    QPixmap,
)
from qtpy.QtWidgets import QLabel, QMenu, QVBoxLayout, QWidget

from napari_unet.models.description import facts
from napari_unet.widgets._dock import TextLabel, heading

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qtpy.QtCore import QPoint

    from napari_unet.models.family import Entry

THUMBNAIL = 64  # pixels on the screen
_LONG_WORD = 18  # letters
_MAX_PICTURE = 1024  # pixels that a thumbnail may have at most
_BREAK = "\u200b"
# What Qt has in selected text for line breaks, and around the cells of tables.
_COPIED = str.maketrans({_BREAK: ""} | dict.fromkeys("\u2029\ufdd0\ufdd1", "\n"))


class PassportView(QWidget):
    """The name, the picture and the facts of one model."""

    def __init__(self) -> None:
        super().__init__()
        row = heading("")
        self._caption = row.findChild(QLabel)
        self.picture = QLabel()
        self.picture.setToolTip("What it finds in an image of its training.")
        self.text = TextLabel()
        self.text.setTextFormat(Qt.TextFormat.RichText)
        self.text.installEventFilter(self)
        self.text.setContextMenuPolicy(Qt.ContextMenuPolicy.CustomContextMenu)
        self.text.customContextMenuRequested.connect(self._show_menu)
        self._menu = QMenu(self.text)
        self._menu.addAction("Copy", self._copy)
        column = QVBoxLayout(self)
        column.setContentsMargins(0, 0, 0, 0)
        column.setSpacing(6)
        for part in (row, self.picture, self.text):
            column.addWidget(part)

    def eventFilter(self, target: QObject | None, event: QEvent | None) -> bool:
        """Copy what is selected without the breaks that are in it for the width."""
        wanted = QKeySequence.StandardKey.Copy
        if isinstance(event, QKeyEvent) and event.type() == QEvent.Type.KeyPress:
            if event.matches(wanted):
                self._copy()
                return True
        return bool(super().eventFilter(target, event))

    def _show_menu(self, place: QPoint) -> None:
        self._menu.setEnabled(self.text.hasSelectedText())
        self._menu.popup(self.text.mapToGlobal(place))

    def _copy(self) -> None:
        text = self.text.selectedText().translate(_COPIED).strip()
        clipboard = QGuiApplication.clipboard()
        if text and clipboard is not None:
            clipboard.setText(text)

    def show_entry(self, entry: Entry | None) -> None:
        """Show another model, or why its file cannot be used; None shows nothing."""
        header = None if entry is None else entry.header
        self._caption.setText("" if entry is None else entry.name)
        pixmap = None if header is None else decode_picture(header.passport.thumbnail)
        self.picture.setVisible(pixmap is not None)
        self.picture.setPixmap(pixmap or QPixmap())
        if header is not None:
            self.text.setText(_table(facts(header)))
        else:
            self.text.setText("" if entry is None else escape(f"⚠ {entry.problem}"))


def _table(rows: Iterable[tuple[str, str]]) -> str:
    cells = "".join(
        f"<tr><td style='padding-right: 8px'><b>{escape(title)}</b></td>"
        f"<td>{escape(_breakable(text))}</td></tr>"
        for title, text in rows
    )
    return f"<table>{cells}</table>"


def _breakable(text: str) -> str:
    """Let addresses and the like go on in the next line; Qt would cut them off."""
    return re.sub(
        rf"\S{{{_LONG_WORD},}}",
        lambda word: re.sub(rf"(\W|_|\w{{{_LONG_WORD}}})", rf"\1{_BREAK}", word[0]),
        text,
    )


def decode_picture(thumbnail: str) -> QPixmap | None:
    """Decode a thumbnail, which may come from anyone; None if there is none."""
    if not thumbnail:
        return None
    content = QByteArray.fromBase64(thumbnail.encode(errors="replace"))
    buffer = QBuffer(content)
    reader = QImageReader(buffer, QByteArray(b"png"))
    size = reader.size()
    if not size.isValid() or max(size.width(), size.height()) > _MAX_PICTURE:
        return None
    size.scale(THUMBNAIL, THUMBNAIL, Qt.AspectRatioMode.KeepAspectRatio)
    reader.setScaledSize(size)
    image = reader.read()
    return None if image.isNull() else QPixmap.fromImage(image)
