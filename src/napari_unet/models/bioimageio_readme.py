"""The documentation in a bioimage.io package that we write."""

from __future__ import annotations

from typing import TYPE_CHECKING

from napari_unet.network.receptive_field import receptive_field

if TYPE_CHECKING:
    from napari_unet.models.model import Passport
    from napari_unet.network.config import UNetConfig


def readme(passport: Passport, config: UNetConfig) -> str:
    """Write what a user of another program should know, as Markdown.

    Parameters
    ----------
    passport : Passport
        Of the model.
    config : UNetConfig
        Of its network.
    """
    finds = ", ".join(info.name for info in passport.classes[1:])
    pixels = "not known"
    if passport.pixel_size is not None:
        pixels = " x ".join(f"{size:g}" for size in passport.pixel_size) + " µm"
    field = receptive_field(config)
    halo = max(field.halo) - field.shrink
    output = "the probabilities of all classes, the background first (softmax)"
    if config.num_classes == 1:
        output = "the probability of an object (sigmoid)"
    lines = [
        f"# {passport.name}",
        "",
        passport.description or "A U-Net.",
        "",
        f"- finds: {finds}",
        f"- channels: {', '.join(passport.channels)}",
        f"- pixel size of the images that it was trained on: {pixels}",
        f"- recommended: threshold {passport.threshold:g}, smallest object "
        f"{passport.minimal_size} pixels",
        "",
        f"The network is a {config.ndim}D U-Net with {config.depth} poolings. It gives "
        f"{output} at every pixel. Tiles should overlap: {halo} pixels at their edges "
        "depend on what lies beyond. Intensities are normalised over the whole image, "
        "not tile by tile.",
        "",
        "Where the percentiles that become 0 and 1 are the same, napari-unet takes the "
        "least and the greatest value instead, which this format cannot say.",
        "",
        "# Validation",
        "",
        *_scores(passport),
        "Compare the model's result on some images of your own with labels that you "
        "have painted, e.g. by `napari-unet evaluate`, before you rely on it.",
    ]
    if passport.citation:
        lines += ["", "# Citation", "", passport.citation]
    return "\n".join(lines) + "\n"


def _scores(passport: Passport) -> list[str]:
    for record in reversed(passport.history):
        scores = [
            f"{name} {value:.3g}"
            for name, value in record.scores.items()
            if not name.startswith("old ")
        ]
        if scores:
            told = f"Scores on held-out images ({record.data}): {', '.join(scores)}."
            return [told, ""]
    return []
