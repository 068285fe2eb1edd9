"""The same work for many parts, on all cores: what numpy does lets others run."""

from __future__ import annotations

import os
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

Part = TypeVar("Part")
Result = TypeVar("Result")

FEWEST = 4  # parts that are worth threads
HEARTBEAT = 0.05  # seconds between two yields


def count_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def spread_steps(
    work: Callable[[Part], Result], parts: Sequence[Part]
) -> Generator[None, None, list[Result]]:
    """Do the same for each part, several at a time.

    Parameters
    ----------
    work : callable
        Called once for each part, in any thread and order. It may spread its own work.
    parts : sequence
        Few are done one after the other, here.

    Yields
    ------
    None
        Many times a second. Closed, it begins no other part; what has begun is
        finished in the background.

    Returns
    -------
    list
        Of the results, in the order of the parts. An error is raised at once.
    """
    threads = min(count_cores(), len(parts))
    if threads == 1 or len(parts) < FEWEST:
        results = []
        for part in parts:
            yield
            results.append(work(part))
        return results
    pool = ThreadPoolExecutor(threads, "napari-unet-parts")
    try:
        futures = [pool.submit(work, part) for part in parts]
        pending: set[Future[Result]] = set(futures)
        while pending:
            done, pending = wait(pending, HEARTBEAT, FIRST_EXCEPTION)
            for future in done:
                future.result()
            if pending:
                yield
        return [future.result() for future in futures]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
