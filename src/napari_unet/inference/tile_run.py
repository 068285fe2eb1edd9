"""The tiles of one plane or volume, computed one after the other, or a few at once."""

from __future__ import annotations

import itertools
from collections import deque
from concurrent.futures import Future, wait
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from napari_unet.errors import OutOfMemory
from napari_unet.inference.backends import is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from napari_unet.inference.classify import Reduction
    from napari_unet.inference.machine import Machine
    from napari_unet.inference.plan import TilePlan
    from napari_unet.inference.tiling import Tile
    from napari_unet.steps import Progress

    Computed = tuple[Tile, Tile, NDArray]
    Tick = Callable[[int, str], Progress]

__all__ = ["TileRun", "result_steps"]

Result = TypeVar("Result")

HEARTBEAT = 0.25  # seconds between two yields within a tile


def _heartbeats(
    futures: Sequence[Future[Any]], tick: Callable[[], Progress]
) -> Generator[Progress, None, None]:
    """Wait for futures, yielding so that the caller can cancel."""
    while wait(futures, HEARTBEAT).not_done:
        yield tick()


def result_steps(
    future: Future[Result], tick: Callable[[], Progress]
) -> Generator[Progress, None, Result]:
    """Wait for a result, yielding so that the caller can cancel."""
    yield from _heartbeats([future], tick)
    return future.result()


class TileRun:
    """Predicts the tiles of a plane or volume.

    The next tiles are read, and on a GPU already uploaded and queued, while one is
    computed. Where memory runs out, the rest goes on with smaller tiles, and at last
    on the CPU.

    Parameters
    ----------
    machine : Machine
        What computes.
    plan : TilePlan
        Its tiles are cut where memory runs out.
    read : callable
        Brings what a tile needs to the device.
    reduce : Reduction
        What is kept of the probabilities.
    augment : bool
        See `Backend.run`.
    """

    def __init__(
        self,
        machine: Machine,
        plan: TilePlan,
        read: Callable[[Tile], Tensor],
        reduce: Reduction,
        *,
        augment: bool,
    ):
        self._machine, self._plan, self._read = machine, plan, read
        self._reduce, self._augment = reduce, augment
        self._waiting = deque(plan.tiles)
        self._flying: deque[tuple[Tile, Future[NDArray]]] = deque()
        self._ahead: dict[Tile, Future[Tensor]] = {}

    def steps(self, tick: Tick) -> Generator[Progress | Computed, None, None]:
        """Predict all tiles.

        Parameters
        ----------
        tick : callable
            Makes a `Progress` of the number of finished tiles and a note.

        Yields
        ------
        Progress, or (tile, tile with its overlap, what is kept of it)
        """
        while self._waiting or self._flying:
            self._take_off()
            tile, computing = self._flying.popleft()
            done = self._done - 1
            yield from _heartbeats([computing], partial(tick, done, ""))
            error = computing.exception()
            if error is None:
                yield tile, self._plan.with_overlap(tile), computing.result()
                yield tick(done + 1, "")
                continue
            if not is_out_of_memory(error):
                raise error
            others = [future for _, future in self._flying]
            yield from _heartbeats(others, partial(tick, done, ""))
            self._waiting.extendleft(other for other, _ in reversed(self._flying))
            self._flying.clear()
            self._ahead.clear()
            del computing, error, others  # whose tracebacks hold tensors
            note = self._make_room(tile)
            yield tick(self._done, note)

    @property
    def _done(self) -> int:
        """Tiles that neither wait nor are computed."""
        return len(self._plan.tiles) - len(self._waiting) - len(self._flying)

    def _take_off(self) -> None:
        """Start as many tiles as the device takes, and read one more."""
        submit = self._machine.submit
        free = self._machine.backend.transfers.in_flight - len(self._flying)
        for tile in itertools.islice(self._waiting, free + 1):
            if tile not in self._ahead:
                self._ahead[tile] = submit(self._read, tile)
        for _ in range(min(free, len(self._waiting))):
            tile = self._waiting.popleft()
            computing = submit(self._predict, self._ahead.pop(tile), tile)
            self._flying.append((tile, computing))

    def _predict(self, image: Future[Tensor], tile: Tile) -> NDArray:
        """Predict one tile with its overlap."""
        values = self._machine.backend.run(
            image.result(),
            self._plan.output_box(tile),
            augment=self._augment,
            reduce=self._reduce,
        )
        kept = (slice(*span) for span in self._plan.kept_box(tile))
        return values[(slice(None), *kept)]

    def _make_room(self, tile: Tile) -> str:
        """After memory ran out: halve what is left, or leave the GPU."""
        machine = self._machine
        machine.backend.release()
        device = machine.backend.device.type
        on_gpu = device != "cpu"
        rest, longest_side = self._plan.halve(tile, self._waiting, on_gpu=on_gpu)
        if rest:
            self._waiting = deque(rest)
            said = machine.longest_side is not None
            machine.longest_side = longest_side
            note = f"Memory ran out on {device}; going on with smaller tiles."
            return "" if said else note
        if not on_gpu:
            raise OutOfMemory(
                "Memory ran out even for the smallest tile. Close other programs or "
                "use a smaller model."
            )
        self._waiting.appendleft(tile)
        machine.leave_gpu()
        return f"Memory ran out on {device}; going on on the CPU, which is slower."
