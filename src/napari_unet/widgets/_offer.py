"""A line that offers to go on with what was left unfinished."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qtpy.QtWidgets import QHBoxLayout, QPushButton, QVBoxLayout, QWidget

from napari_unet.widgets._dock import TextLabel

if TYPE_CHECKING:
    from collections.abc import Callable

_DISCARD, _SURE = "Discard", "Really discard?"


class Offer(QWidget):
    """A sentence with two buttons; hidden while there is nothing to offer.

    Parameters
    ----------
    accept : str
        On the first button; the second is "Discard" and asks once more.
    tip : str
        What the first button does.
    on_accept, on_discard : callable
    """

    def __init__(
        self,
        accept: str,
        tip: str,
        on_accept: Callable[[], None],
        on_discard: Callable[[], None],
    ):
        super().__init__()
        self._on_discard = on_discard
        self.text = TextLabel(lines=2)
        self.accept = QPushButton(accept)
        self.accept.setToolTip(tip)
        self.accept.clicked.connect(lambda: on_accept())
        self.discard = QPushButton(_DISCARD)
        self.discard.setToolTip("Delete it for good, after a second click.")
        self.discard.clicked.connect(lambda: self._discard())
        row = QHBoxLayout()
        row.addWidget(self.accept, stretch=1)
        row.addWidget(self.discard, stretch=1)
        column = QVBoxLayout(self)
        column.setContentsMargins(0, 0, 0, 4)
        column.setSpacing(4)
        column.addWidget(self.text)
        column.addLayout(row)
        self.show_text("")

    def show_text(self, text: str) -> None:
        """Offer something; "" offers nothing any more."""
        self.text.setText(text)
        self.discard.setText(_DISCARD)
        self.setVisible(bool(text))

    def _discard(self) -> None:
        if self.discard.text() == _SURE:
            self._on_discard()
        else:
            self.discard.setText(_SURE)
