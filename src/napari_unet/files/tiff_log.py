"""What tifffile says while it reads: it logs most damage instead of raising."""

from __future__ import annotations

import logging
import re
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from napari_unet.errors import BadInput
from napari_unet.files.source import one_line

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_logger = logging.getLogger("tifffile")

# Tags without which the pixels and their axes are still right: names, dates,
# resolution, colour profiles, camera and map data.
_DESCRIPTIVE_TAGS = frozenset(
    (
        *(269, 271, 272, 282, 283, 285, 296, 305, 306, 315, 316, 337, 700),
        *(33432, 33550, 33723, 33922, 34377, 34665, 34675, 34735, 34736, 34737),
        *(34853, 37500, 37724, 42112, 42113, 50838, 50839),
    )
)
_TAG = re.compile(r"<tifffile\.TiffTag (\d+) @\d+>")

# Parts of the vendors' metadata that say nothing about the pixels.
_DESCRIPTIVE = (
    "read_uic_tag",
    "read_uic1tag",
    "<fluoview_metadata>",
    "<imagej_metadata>",
    "GDAL_NODATA",
    "<get_resolution>",
    "GeoKey",
    "eer_xml_metadata",
    "<nuvu_tags>",
    "<andor_tags>",
    "<epics_tags>",
    "<ndpi_tags>",
    "STK Datetime",
    "read_lsm_timestamps",
    "read_lsm_channelcolors",
    "read_lsm_lookuptable",
    "MMStack file name is invalid",
    "MMStack multi-file series cannot be read",
)


class _Listener(logging.Filter):
    """Takes this thread's records out of the log: they are told to the user."""

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()
        self.messages: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        if record.thread != self.thread:
            # As the program has set it.
            allowed = logging.Logger.isEnabledFor(_logger, record.levelno)
            return allowed and not _was_disabled
        if record.levelno >= logging.WARNING:
            self.messages.append(record.getMessage())
        return False


_lock = threading.Lock()
_listening = 0
_was_disabled = False


@contextmanager
def _awake() -> Iterator[None]:
    """Hear tifffile although the program has silenced it, or all logging."""
    global _listening, _was_disabled
    with _lock:
        if _listening == 0:
            _was_disabled, _logger.disabled = _logger.disabled, False
            # On the instance: levels and logging.disable() stay as they are.
            vars(_logger)["isEnabledFor"] = lambda _level: True
        _listening += 1
    try:
        yield
    finally:
        with _lock:
            _listening -= 1
            if _listening == 0:
                del vars(_logger)["isEnabledFor"]
                _logger.disabled = _was_disabled
                _was_disabled = False


@contextmanager
def listening(path: Path, notes: list[str] | None = None) -> Iterator[None]:
    """Fail a read during which tifffile reported damage.

    Parameters
    ----------
    path : Path
        The file that is being read in this block, by this thread.
    notes : list of str, optional
        Gets a sentence where only descriptive metadata is damaged.

    Raises
    ------
    BadInput
        When tifffile warned of pages, strips, tiles, sizes or missing files.
    """
    listener = _Listener()
    with _awake():
        _logger.addFilter(listener)
        try:
            yield
        finally:
            _logger.removeFilter(listener)
    harmless = [message for message in listener.messages if _is_harmless(message)]
    for message in listener.messages:
        if message not in harmless:
            raise BadInput(
                f"{path.name} is damaged or incomplete ({one_line(_plain(message))}); "
                "get a fresh copy, or save it again with the program that made it."
            )
    if harmless and notes is not None:
        notes.append(
            f"Some metadata of {path.name} could not be read and was ignored "
            f"({one_line(_plain(harmless[0]), 100)})."
        )


def _is_harmless(message: str) -> bool:
    tag = _TAG.search(message)
    if tag is not None:
        return int(tag[1]) in _DESCRIPTIVE_TAGS
    return any(words in message for words in _DESCRIPTIVE)


def _plain(message: str) -> str:
    """Drop what only tifffile's authors need: object names and addresses."""
    message = re.sub(r"^<[\w.]+> raised \w+\((['\"])(.*)\1\)$", r"\2", message)
    message = re.sub(
        r"<tifffile\.(TiffFile|TiffPages?|TiffFrame)[^>]*>\s*", "", message
    )
    return re.sub(r"<tifffile\.TiffTag (\d+) @\d+>", r"tag \1:", message)
