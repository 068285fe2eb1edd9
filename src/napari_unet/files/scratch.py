"""Temporary arrays that may be larger than the memory, compressed in a folder."""

from __future__ import annotations

import shutil
import threading
from typing import TYPE_CHECKING, Any

import zarr
from zarr.storage import LocalStore

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from zarr.core.buffer import Buffer

__all__ = ["Scratch"]

WRITE_SECONDS = 10.0  # for the chunks that are on their way to the disk


class Scratch:
    """A folder of temporary arrays, which stays away once it is removed.

    Parameters
    ----------
    folder : Path
        Made with the first array, if it is not there.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._stores: list[_Store] = []

    def new_array(
        self, shape: Sequence[int], chunks: Sequence[int], dtype: np.dtype[Any]
    ) -> zarr.Array:
        """Make an array of zeros.

        Parameters
        ----------
        shape, chunks : sequence of int
            Of the array, and of what is compressed and written at once.
        dtype : numpy.dtype
            Of its values.

        Returns
        -------
        zarr.Array

        Raises
        ------
        OSError
            If that fails; later, if what is put into the array cannot be written.
        """
        store = _Store(self.folder / str(len(self._stores)))
        self._stores.append(store)
        return zarr.create_array(
            store, shape=tuple(shape), chunks=tuple(chunks), dtype=dtype
        )

    def remove(self) -> None:
        """Delete the folder; what cannot be deleted stays."""
        for store in self._stores:
            store.end()
        shutil.rmtree(self.folder, ignore_errors=True)


class _Store(LocalStore):
    """A folder of chunks in which nothing is written any more after its end.

    When a chunk cannot be written, zarr raises at once and goes on with the others
    in the background: they would make a folder anew that has been deleted.
    """

    def __init__(self, root: Path | str, *, read_only: bool = False):
        super().__init__(root, read_only=read_only)
        self._is_over = False
        self._under_way = 0
        self._change = threading.Condition()

    async def set(self, key: str, value: Buffer) -> None:
        """Write a chunk, or at the end let it be."""
        with self._change:
            if self._is_over:
                return
            self._under_way += 1
        try:
            await super().set(key, value)
        finally:
            with self._change:
                self._under_way -= 1
                self._change.notify_all()

    def end(self) -> None:
        """Wait for the chunks that are being written, and write no others."""
        with self._change:
            self._is_over = True
            self._change.wait_for(lambda: not self._under_way, WRITE_SECONDS)
