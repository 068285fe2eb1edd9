"""A model's passport, readable."""

from __future__ import annotations

import re
from html import escape
from typing import TYPE_CHECKING

from qtpy.QtCore import QBuffer, QByteArray, Qt
from qtpy.QtGui import QImageReader, QPixmap
from qtpy.QtWidgets import QLabel, QVBoxLayout, QWidget

from napari_unet.models.description import facts
from napari_unet.widgets._dock import heading, text_label

if TYPE_CHECKING:
    from collections.abc import Iterable

    from napari_unet.models.family import Entry

THUMBNAIL = 64  # pixels on the screen
_LONG_WORD = 18  # letters
_MAX_PICTURE = 1024  # pixels that a thumbnail may have at most


class PassportView(QWidget):
    """The name, the picture and the facts of one model."""

    def __init__(self) -> None:
        super().__init__()
        row = heading("")
        self._caption = row.findChild(QLabel)
        self.picture = QLabel()
        self.picture.setToolTip("What it finds in an image of its training.")
        self.text = text_label()
        self.text.setTextFormat(Qt.TextFormat.RichText)
        column = QVBoxLayout(self)
        column.setContentsMargins(0, 0, 0, 0)
        column.setSpacing(6)
        for part in (row, self.picture, self.text):
            column.addWidget(part)

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
        lambda word: re.sub(rf"(\W|_|\w{{{_LONG_WORD}}})", "\\1\u200b", word[0]),
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
