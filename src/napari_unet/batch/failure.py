"""What makes an image of a batch fail, and what ends the batch."""

from __future__ import annotations

import errno
import traceback
from typing import TYPE_CHECKING

from napari_unet.batch.journal import Entry
from napari_unet.errors import BadInput, BadModel, BadOutput, UnetError
from napari_unet.files.members import list_members, state_of

if TYPE_CHECKING:
    from napari_unet.batch.file import Opened, Task
    from napari_unet.batch.plan import Item

__all__ = ["check_output", "check_unchanged", "failed"]

# What the operating system refuses to one file, and not to the others.
_OF_ONE_FILE = (errno.EFBIG, errno.ENAMETOOLONG)


def check_output(task: Task) -> None:
    """Refuse to make a folder anew that was there when the batch began."""
    if task.internal == task.output:  # of single images, whose folder may be new
        return
    try:
        task.internal.stat()
    except OSError as error:
        raise BadOutput(
            f"{task.output} was removed while the batch wrote into it, and what was "
            "done with it. Start the batch again, or choose another output."
        ) from error


def check_unchanged(item: Item) -> None:
    """Refuse to write what was made of other pixels than the image has now."""
    if item.state != (0, 0) and state_of(list_members(item.image)) != item.state:
        raise BadInput(
            f"{item.image} was changed or removed while the batch ran. Leave the "
            "images alone until it has ended, and resume it (--resume)."
        )


def failed(item: Item, error: Exception, opened: Opened | None = None) -> Entry:
    """Record why a file could not be done; raise what would befall the others, too.

    Parameters
    ----------
    item : Item
        The file.
    error : Exception
        `BadModel`, and `BadOutput` from the operating system (the disk is full, the
        folder is gone), end a batch. All else is the file's own, also that its
        results are too large for the disk or would have too long a name.
    opened : Opened or None
        What was read, if it could be.
    """
    cause = error.__cause__
    is_system = isinstance(cause, OSError) and cause.errno not in _OF_ONE_FILE
    if isinstance(error, BadModel) or (isinstance(error, BadOutput) and is_system):
        raise error
    details = ""
    if isinstance(error, UnetError):
        reason = str(error)
    elif isinstance(error, MemoryError):
        reason = "Memory ran out. Close other programs, or crop the image."
    else:
        # One that nobody foresaw; hundreds of files must not wait for its mending.
        reason = f"An unexpected error, please report it: {error!r}."
        details = "".join(traceback.format_exception(error))
    return Entry(
        *(item.name, "failed", *item.state),
        reason=reason,
        details=details,
        notes=opened.image.notes if opened else (),
    )
