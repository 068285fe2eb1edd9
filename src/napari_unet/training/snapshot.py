"""A training on disk, complete, so that it can go on as if it had not stopped."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from napari_unet.errors import BadInput
from napari_unet.files.atomic import atomic_path

__all__ = ["Best", "Saved", "Snapshot", "read_snapshot", "write_snapshot"]

_FORMAT = "napari-unet training 1"


@dataclass(frozen=True)
class Best:
    """The best network so far.

    Parameters
    ----------
    step : int
        After which it was.
    scores : dict of str to float
        Its scores.
    weights : dict of str to Tensor
        Its state_dict, copied.
    """

    step: int
    scores: dict[str, float]
    weights: dict[str, Any]


@dataclass
class Snapshot:
    """All that changes during a training, after some step.

    What is random depends only on the seed and the number of the step, so no state
    of a generator is needed.

    Parameters
    ----------
    step : int
        Steps done.
    base_scores : dict of str to float
        Of the model before training, with objects made in the best of all ways.
    best : Best or None
        Of those that were scored.
    history : list of (int, dict)
        Steps and their scores, from 0 on; objects made in the best of a few ways.
    stale : int
        Looks at the held-out part since the best.
    reduced : dict or None
        "batch_size" and "shape" of the patches, if memory ran out with those planned.
    """

    step: int = 0
    base_scores: dict[str, float] = field(default_factory=dict)
    best: Best | None = None
    history: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    stale: int = 0
    reduced: dict[str, Any] | None = None


@dataclass(frozen=True)
class Saved:
    """What a file says.

    Parameters
    ----------
    path : Path
        The file.
    identity : dict
        What a training must have in common with this one to go on: "data" and "base",
        hashes, and "settings".
    plan : dict
        Shape of the patches and batch size with which the training began; they depend
        on the free memory.
    snapshot : Snapshot
    network, optimizer : dict
        Their state_dicts.
    """

    path: Path
    identity: dict[str, Any]
    plan: dict[str, Any]
    snapshot: Snapshot
    network: dict[str, Any]
    optimizer: dict[str, Any]

    def check(self, identity: dict[str, Any]) -> None:
        """Raise `BadInput` if another training was saved."""
        for part, reason in (
            ("base", "it started from another model"),
            ("data", "the images or their annotations have changed"),
        ):
            if self.identity[part] != identity[part]:
                raise BadInput(
                    f"{self.path.name} cannot be resumed: {reason}. Start anew."
                )
        old, new = self.identity["settings"], identity["settings"]
        keys = sorted(old.keys() | new.keys())
        if other := [key for key in keys if old.get(key) != new.get(key)]:
            raise BadInput(
                f"{self.path.name} cannot be resumed: it was made with other settings "
                f"({', '.join(other)}). Use the same, or start anew."
            )


def write_snapshot(saved: Saved) -> None:
    """Write everything, atomically.

    Parameters
    ----------
    saved : Saved
        Plain data and tensors; says where.

    Raises
    ------
    BadOutput
        If it cannot be written; the previous one is still there.
    """
    best = saved.snapshot.best
    snapshot = {**vars(saved.snapshot), "best": best and vars(best)}
    state = {**vars(saved), "format": _FORMAT, "snapshot": snapshot}
    del state["path"]
    # Not torch.save to the path: a full disk must be an OSError.
    content = io.BytesIO()
    torch.save(state, content)
    with atomic_path(saved.path) as temporary:
        Path(temporary).write_bytes(content.getbuffer())


def read_snapshot(path: Path) -> Saved:
    """Read a file that `write_snapshot` wrote; nothing in it is executed.

    Parameters
    ----------
    path : Path
        A file.

    Returns
    -------
    Saved

    Raises
    ------
    BadInput
        If it is no such file, or damaged.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state.pop("format") != _FORMAT:
            raise ValueError("format")
        values = state.pop("snapshot")
        best = values.pop("best")
        snapshot = Snapshot(**values, best=best and Best(**best))
        return Saved(path, snapshot=snapshot, **state)
    except OSError as error:
        raise BadInput(
            f"Cannot read the snapshot {path}: {error.strerror or error}. Start anew."
        ) from error
    except (
        pickle.UnpicklingError,
        RuntimeError,
        ValueError,
        EOFError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:
        raise BadInput(
            f"{path.name} is damaged or no snapshot of a training. Start anew."
        ) from error
