"""What a model finds, needs and learnt from, in words for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from napari_unet.models.model import SCORES
from napari_unet.network.program_config import ProgramConfig

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from napari_unet.models.checkpoint import Header
    from napari_unet.models.model import Passport, TrainingRecord
    from napari_unet.models.normalize import Normalization
    from napari_unet.network.config import Config


def summary(header: Header) -> str:
    """Say in some words what a model finds."""
    passport = header.passport
    finds = _finds(passport)
    more = f" and {len(finds) - 3} more" if len(finds) > 4 else ""
    found = ", ".join(finds[:3] if more else finds) + more
    parts = [f"{header.config.ndim}D", found]
    if passport.pixel_size:
        parts.append(pixels(passport.pixel_size))
    return "  ".join(parts)


def facts(header: Header) -> Iterator[tuple[str, str]]:
    """Say what is known of a model.

    Parameters
    ----------
    header : Header
        Of its file.

    Yields
    ------
    title, text : str
        What is not known is left out. The last training comes first.
    """
    passport, config = header.passport, header.config
    known = {
        "Name": f"{passport.name}, version {passport.version}",
        "Description": passport.description,
        "Finds": ", ".join(_finds(passport)),
        "Channels": ", ".join(passport.channels),
        "Pixel size": pixels(passport.pixel_size) if passport.pixel_size else "",
        "Typical object": f"{passport.object_diameter:.3g} pixels across"
        if passport.object_diameter
        else "",
        "Intensities": _intensities(passport.normalization),
    }
    known["Network"], reason = _network(config)
    split = "" if passport.split_touching else "not "
    known["Recommended"] = (
        f"threshold {passport.threshold:g}, smallest object {passport.minimal_size} "
        f"{'voxels' if config.ndim == 3 else 'pixels'}, touching objects {split}split"
    )
    if reason:
        known["Tiles"] = f"the result depends a little on the tile size: {reason}"
    yield from ((title, text) for title, text in known.items() if text)
    for record in reversed(passport.history):
        yield "Trained", _training(record)
    if passport.citation:
        yield "Citation", passport.citation


def _network(config: Config) -> tuple[str, str | None]:
    """Say what a network is, and why its tiles are not exact, if they are not."""
    if isinstance(config, ProgramConfig):
        shape = " x ".join(map(str, config.fixed_shape or ()))
        tiles = f", in tiles of {shape} pixels" if shape else ""
        text = f"{config.ndim}D, {config.title}, which runs as it is{tiles}"
        return text, config.inexact_reason
    text = (
        f"{config.ndim}D U-Net, {config.depth} poolings, {config.base_channels} "
        f"channels at first, {config.weights:,} weights"
    )
    return text, config.inexact_reason


def pixels(sizes: Sequence[float]) -> str:
    """Write pixel sizes with their unit."""
    return " x ".join(f"{size:.3g}" for size in sizes) + " µm"


def _finds(passport: Passport) -> list[str]:
    return [f"{info.name} ({info.kind})" for info in passport.classes[1:]]


def _intensities(how: Normalization) -> str:
    if how.method == "mean_std":
        text = "brought to mean 0 and standard deviation 1"
    elif how.method == "fixed":
        ranges = how.ranges or ((how.lower, how.upper),)
        values = ", ".join(f"{low:g} to {high:g}" for low, high in ranges)
        each = " of the channels" if how.ranges else ""
        text = f"grey values {values}{each} become 0 to 1"
    else:
        text = f"percentiles {how.lower:g} to {how.upper:g} become 0 to 1"
    parts = [text, "of each plane" if how.scope == "plane" else ""]
    parts.append("all channels together" if how.joint_channels else "")
    parts.append("cut off at fixed limits" if how.clip else "")
    return ", ".join(part for part in parts if part)


def _training(record: TrainingRecord) -> str:
    """Say what it learnt from and how its scores changed."""
    scores = []
    for key, value in record.scores.items():
        if key.startswith("old "):
            continue
        old = record.scores.get(f"old {key}")
        before = "" if old is None else f"{old:.3g} → "
        scores.append(f"{SCORES.get(key, key)} {before}{value:.3g}")
    text = f"{record.date}, {record.steps} steps on {record.data}"
    return f"{text}; held-out scores: {', '.join(scores)}" if scores else text
