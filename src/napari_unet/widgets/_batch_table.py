"""The table of the files of a batch: fast with ten thousand of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qtpy.QtCore import QAbstractTableModel, QModelIndex, QRect, Qt
from qtpy.QtGui import QColor
from qtpy.QtWidgets import (
    QAbstractItemView,
    QHeaderView,
    QStyledItemDelegate,
    QTableView,
)

from napari_unet.steps import describe_seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from napari_unet.batch.journal import Entry

COLUMNS = ("File", "Objects", "Time", "Status")
FILE, OBJECTS, TIME, STATUS = range(len(COLUMNS))

_WORDS = {"skipped": "done", "other": "other results"}
# Legible on dark and on light.
_COLORS = {
    "failed": QColor("#e5484d"),
    "other": QColor("#d98c00"),
    "waiting": QColor("#8a8f98"),
    "running": QColor("#3b9eff"),
}
_LONG = 8  # letters that all names have in common and that need not be shown
_ORDER = ("failed", "other", "running", "waiting", "skipped", "done")


@dataclass(frozen=True)
class Row:
    """One file.

    Parameters
    ----------
    name : str
        Its path below the folder of images.
    status : str
        As in `BatchProgress` and `FileState`.
    entry : Entry or None
        What became of it.
    """

    name: str
    status: str
    entry: Entry | None = None

    def text(self, column: int) -> str:
        """Return what a cell says."""
        entry = self.entry
        if column == FILE:
            return self.name
        if column == STATUS:
            if entry is not None and entry.reason:
                own = self.name.rpartition("/")[2]  # is said in this row already
                reason = entry.reason.removeprefix(f"{own}: ").removeprefix(f"{own} ")
                return f"failed: {reason}"
            words = _WORDS.get(self.status, self.status)
            has_notes = entry is not None and entry.notes
            return f"{words}, note" if has_notes and words == "done" else words
        if entry is None or entry.status != "done":
            return ""
        if column == TIME:
            return describe_seconds(entry.seconds)
        return "" if entry.objects is None else f"{entry.objects:,}"

    def sort_key(self, column: int) -> Any:
        """Return what a column is sorted by; failed files come before others."""
        entry = self.entry
        if column == OBJECTS:
            return -1 if entry is None or entry.objects is None else entry.objects
        if column == TIME:
            return -1 if entry is None else entry.seconds
        return _ORDER.index(self.status)

    @property
    def tip(self) -> str:
        """All that there is to say, in full."""
        if (entry := self.entry) is None:
            return self.name
        told = self.name, entry.found, entry.reason, *entry.notes
        return "\n".join(filter(None, told))


def _count_same(names: list[str]) -> int:
    """Count the letters that all begin with, if these are too many to show."""
    first, last = min(names, default=""), max(names, default="")
    same = 0
    while same < min(len(first), len(last)) and first[same] == last[same]:
        same += 1
    same = len(first[:same].rstrip("0123456789"))  # whole numbers
    return same if len(names) > 1 and same > _LONG else 0


class _Rows(QAbstractTableModel):
    """Rows by the name of the file, shown in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Row] = []
        self._order: list[int] = []  # of the rows, as they are shown
        self._place: dict[str, int] = {}  # in `rows`
        self._shown_at: list[int] = []  # inverse of the order
        self._same = 0  # letters that all names begin with

    def show(self, rows: Iterable[Row]) -> None:
        """Show other rows; if the files are the same, everything stays in place."""
        rows = list(rows)
        if [row.name for row in rows] == [row.name for row in self.rows]:
            self.rows = rows
            if rows:
                self._tell(0, len(rows) - 1)
            return
        self.beginResetModel()
        self.rows = rows
        self._place = {row.name: place for place, row in enumerate(rows)}
        self._same = _count_same([row.name for row in rows])
        self._arrange(range(len(rows)))
        self.endResetModel()

    def update(self, changed: Mapping[str, Row]) -> None:
        """Show that some rows have changed."""
        shown = []
        for name, row in changed.items():
            if (place := self._place.get(name)) is not None:
                self.rows[place] = row
                shown.append(self._shown_at[place])
        if shown:
            self._tell(min(shown), max(shown))

    def at(self, shown: int) -> Row:
        """Return the row that is shown somewhere."""
        return self.rows[self._order[shown]]

    def shown_at(self, name: str) -> int:
        """Return where the row of a file is shown, -1 if it is not."""
        place = self._place.get(name)
        return -1 if place is None else self._shown_at[place]

    def _tell(self, first: int, last: int) -> None:
        corners = self.index(first, 0), self.index(last, len(COLUMNS) - 1)
        self.dataChanged.emit(*corners)

    def _arrange(self, order: Iterable[int]) -> None:
        self._order = list(order)
        self._shown_at = [0] * len(self._order)
        for shown, place in enumerate(self._order):
            self._shown_at[place] = shown

    # --- Qt's side ----------------------------------------------------------------

    def rowCount(self, parent: QModelIndex | None = None) -> int:
        """Return the number of files."""
        return len(self.rows)

    def columnCount(self, parent: QModelIndex | None = None) -> int:
        """Return the number of columns."""
        return len(COLUMNS)

    def headerData(
        self,
        section: int,
        orientation: Qt.Orientation,
        role: int = Qt.ItemDataRole.DisplayRole,
    ) -> Any:
        """Name the columns."""
        is_title = orientation == Qt.Orientation.Horizontal
        if is_title and role == Qt.ItemDataRole.DisplayRole:
            return COLUMNS[section]
        return None

    def data(self, index: QModelIndex, role: int = Qt.ItemDataRole.DisplayRole) -> Any:
        """Say what a cell shows."""
        row, column = self.at(index.row()), index.column()
        if role == Qt.ItemDataRole.DisplayRole:
            if column == FILE and self._same:  # what differs must be seen
                return f"…{row.name[self._same :]}"
            return row.text(column)
        if role == Qt.ItemDataRole.ForegroundRole:
            return _COLORS.get(row.status)
        if role == Qt.ItemDataRole.ToolTipRole:
            return row.tip
        if role == Qt.ItemDataRole.TextAlignmentRole and column in (OBJECTS, TIME):
            return Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter
        return None

    def sort(
        self, column: int, order: Qt.SortOrder = Qt.SortOrder.AscendingOrder
    ) -> None:
        """Sort once; rows that change later stay where they are."""
        places: Any = range(len(self.rows))
        is_down = order == Qt.SortOrder.DescendingOrder
        if column == FILE:  # which are in natural order
            places = reversed(places) if is_down else places
        elif column >= 0:
            places = sorted(
                places,
                key=lambda place: self.rows[place].sort_key(column),
                reverse=is_down,
            )
        self.layoutAboutToBeChanged.emit()
        before = self.persistentIndexList()
        names = [(self.at(index.row()).name, index.column()) for index in before]
        self._arrange(places)
        after = [self.index(self.shown_at(name), col) for name, col in names]
        self.changePersistentIndexList(before, after)
        self.layoutChanged.emit()


class _ElideRight(QStyledItemDelegate):
    """Names are cut in the middle, sentences at the end."""

    def initStyleOption(self, option: Any, index: QModelIndex) -> None:
        """Say how a cell is drawn."""
        super().initStyleOption(option, index)
        option.textElideMode = Qt.TextElideMode.ElideRight


class FileTable(QTableView):
    """What becomes of each file.

    While a batch runs, the running file is kept in sight, unless the user has
    scrolled away from it.

    Parameters
    ----------
    on_open : callable
        Gets the row of a double click.
    """

    def __init__(self, on_open: Callable[[Row], None]):
        super().__init__()
        self._rows = _Rows()
        self._current = ""
        self.setModel(self._rows)
        self.setSelectionBehavior(QAbstractItemView.SelectionBehavior.SelectRows)
        self.setSelectionMode(QAbstractItemView.SelectionMode.SingleSelection)
        self.setEditTriggers(QAbstractItemView.EditTrigger.NoEditTriggers)
        self.setTextElideMode(Qt.TextElideMode.ElideMiddle)
        self.setItemDelegateForColumn(STATUS, _ElideRight(self))
        self.setWordWrap(False)
        self.setShowGrid(False)
        self.setTabKeyNavigation(False)
        line = self.fontMetrics().lineSpacing() + 6
        side, top = self.verticalHeader(), self.horizontalHeader()
        assert side is not None
        assert top is not None
        side.hide()
        side.setSectionResizeMode(QHeaderView.ResizeMode.Fixed)
        side.setMinimumSectionSize(line)
        side.setDefaultSectionSize(line)
        top.setMinimumSectionSize(24)
        top.setSectionResizeMode(STATUS, QHeaderView.ResizeMode.Stretch)
        top.setHighlightSections(False)
        top.setSortIndicatorShown(True)
        top.setSortIndicator(FILE, Qt.SortOrder.AscendingOrder)
        wide = self.fontMetrics().horizontalAdvance
        # So that "done, note" has its place in a dock that is 300 pixels wide.
        for column, text in (FILE, "x" * 12), (OBJECTS, "Objects"), (TIME, "Time__"):
            self.setColumnWidth(column, wide(text) + 12)
        self.setSortingEnabled(True)
        self.setMinimumHeight(8 * line)
        self.doubleClicked.connect(lambda index: on_open(self._rows.at(index.row())))

    @property
    def rows(self) -> list[Row]:
        """All rows, in the order of the plan."""
        return self._rows.rows

    def show_rows(self, rows: Iterable[Row]) -> None:
        """Show other files, or the same in another state."""
        self._rows.show(rows)

    def update_rows(self, changed: Mapping[str, Row]) -> None:
        """Show what has become of some files."""
        self._rows.update(changed)

    def follow(self, name: str) -> None:
        """Keep the running file in sight, unless the one before it was not.

        Parameters
        ----------
        name : str
            The file; "" while there is none.
        """
        if name == self._current:
            return
        before, self._current = self._current, name
        shown = self._rows.shown_at(name)
        if shown >= 0 and (not before or self._is_seen(self._rows.shown_at(before))):
            self.executeDelayedItemsLayout()  # new rows may not have a place yet
            self.scrollTo(self._rows.index(shown, FILE))

    def _is_seen(self, shown: int) -> bool:
        viewport = self.viewport()
        if shown < 0 or viewport is None:
            return False
        place: QRect = self.visualRect(self._rows.index(shown, FILE))
        return viewport.rect().intersects(place)
