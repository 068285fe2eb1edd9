"""The models of the library as a tree: below each what was fine-tuned from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qtpy.QtCore import Qt, QTimer
from qtpy.QtWidgets import QAbstractItemView, QHeaderView, QTreeWidget, QTreeWidgetItem

from napari_unet.models.description import summary
from napari_unet.models.library import is_bundled
from napari_unet.widgets._dock import while_alive

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from napari_unet.models.family import Branch, Entry
    from napari_unet.models.trash import Removed

_KEY = Qt.ItemDataRole.UserRole
_TOOLTIP = Qt.ItemDataRole.ToolTipRole
_LINES = 8


class ModelTree(QTreeWidget):
    """Shows all models, and below them those in the trash.

    Parameters
    ----------
    on_choice : callable
        Called when another row is chosen.
    on_rename : callable
        Gets a name and the one that the user has typed over it.
    """

    def __init__(
        self, on_choice: Callable[[], None], on_rename: Callable[[str, str], None]
    ):
        super().__init__()
        self._on_rename = on_rename
        self.setColumnCount(2)
        self.setHeaderHidden(True)
        self.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.setEditTriggers(QAbstractItemView.EditTrigger.EditKeyPressed)
        self.setIndentation(14)
        self.setMinimumHeight(_LINES * (self.fontMetrics().lineSpacing() + 6))
        header = self.header()
        assert header is not None
        header.setStretchLastSection(False)
        header.setSectionResizeMode(0, QHeaderView.ResizeMode.Stretch)
        header.setSectionResizeMode(1, QHeaderView.ResizeMode.ResizeToContents)
        self.currentItemChanged.connect(lambda *_: on_choice())
        self.itemChanged.connect(self._on_edited)

    @property
    def chosen(self) -> str:
        """Name of the chosen model of the library, "" if there is none."""
        kind, name = self._key
        return name * (kind == "model")

    @property
    def chosen_removed(self) -> str:
        """Name of the chosen model in the trash, "" if there is none."""
        kind, name = self._key
        return name * (kind == "removed")

    def fill(
        self,
        families: tuple[Branch, ...],
        removed: Mapping[str, Removed],
        in_use: str,
        wanted: str,
    ) -> None:
        """Show what there is.

        Parameters
        ----------
        families : tuple of Branch
            Of the library.
        removed : mapping
            In the trash, by name.
        in_use : str
            The model that the docks work with.
        wanted : str
            Of the library; it is chosen then, if it is there. Else the choice stays
            as it is, or is what is in use.
        """
        before = self._key
        self.blockSignals(True)
        self.clear()
        for branch in families:
            self.addTopLevelItem(self._item(branch, in_use))
        if removed:
            trash = QTreeWidgetItem(["Removed"])
            trash.setFlags(Qt.ItemFlag.ItemIsEnabled)
            self.addTopLevelItem(trash)
            for name, one in removed.items():
                row = _row(name, "removed", "")
                row.setData(0, _TOOLTIP, f"Kept until {one.kept_until}.")
                trash.addChild(row)
        self.expandAll()
        keys = (("model", wanted), before, ("model", in_use))
        rows = [row for row in map(self._find, keys) if row is not None]
        self.setCurrentItem(rows[0] if rows else self.topLevelItem(0))
        self.blockSignals(False)

    def edit_name(self) -> None:
        """Let the user type another name over the chosen one."""
        self.setFocus()
        self.editItem(self.currentItem(), 0)

    def _item(self, branch: Branch, in_use: str) -> QTreeWidgetItem:
        entry = branch.entry
        bundled = is_bundled(entry.name)
        row = _row(entry.name, "model", _state(entry, in_use, bundled))
        row.setData(0, _TOOLTIP, _tooltip(entry))
        if entry.name == in_use:
            font = row.font(0)
            font.setBold(True)
            row.setFont(0, font)
        if not bundled:
            row.setFlags(row.flags() | Qt.ItemFlag.ItemIsEditable)
        for child in branch.children:
            row.addChild(self._item(child, in_use))
        return row

    @property
    def _key(self) -> tuple[str, str]:
        """The kind and name of the chosen row."""
        item = self.currentItem()
        kind, name = (item is not None and item.data(0, _KEY)) or ("", "")
        return kind, name

    def _find(self, key: tuple[str, str]) -> QTreeWidgetItem | None:
        exactly = Qt.MatchFlag.MatchExactly | Qt.MatchFlag.MatchRecursive
        found = self.findItems(key[1], exactly, 0)
        return next((row for row in found if row.data(0, _KEY) == key), None)

    def _on_edited(self, item: QTreeWidgetItem, column: int) -> None:
        _, old = item.data(0, _KEY)
        new = item.text(0).strip()
        # The tree is filled anew then, which must wait until the editor is closed.
        QTimer.singleShot(0, lambda: self._rename(str(old), new))

    @while_alive
    def _rename(self, old: str, new: str) -> None:
        self._on_rename(old, new)


def _row(name: str, kind: str, state: str) -> QTreeWidgetItem:
    row = QTreeWidgetItem([name, state])
    row.setData(0, _KEY, (kind, name))
    return row


def _state(entry: Entry, in_use: str, bundled: bool) -> str:
    if entry.header is None:
        return "cannot be used"
    if entry.name == in_use:
        return "in use"
    return "bundled" if bundled else ""


def _tooltip(entry: Entry) -> str:
    about = entry.problem if entry.header is None else summary(entry.header)
    return f"{entry.path}\n{about}"
