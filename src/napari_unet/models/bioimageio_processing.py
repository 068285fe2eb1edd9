"""What a bioimage.io package does before and after its network, in our words.

What cannot be said exactly is refused, or told in a sentence; nothing is left out in
silence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from napari_unet.errors import BadModel
from napari_unet.models.normalize import Normalization

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from napari_unet.models.bioimageio_description import Step, TensorInfo

EPS = 1e-6  # of the format, where a package does not say another one

Activation = Literal["none", "sigmoid", "softmax"]


# --- before the network -------------------------------------------------------


@dataclass
class _Chain:
    """The steps so far: a linear one, then statistics, then limits."""

    gain: NDArray[np.float64]  # of each channel
    offset: NDArray[np.float64]
    method: Literal["percentile", "mean_std"] | None = None
    facts: dict[str, Any] = field(default_factory=dict)  # of Normalization
    clip: tuple[float | None, float | None] | None = None

    @property
    def is_changed(self) -> bool:
        """Whether any step has changed the values."""
        linear = bool((self.gain != 1).any() or self.offset.any())
        return linear or self.method is not None or self.clip is not None


def normalization_of(tensor: TensorInfo, channels: int) -> tuple[Normalization, str]:
    """Say in our words how a package normalises its input.

    Parameters
    ----------
    tensor : TensorInfo
        The input.
    channels : int
        Of the network.

    Returns
    -------
    normalization : Normalization
    note : str
        What is not quite the same, as a sentence; "" if all is.

    Raises
    ------
    BadModel
        If it cannot be said.
    """
    chain = _Chain(np.ones(channels), np.zeros(channels))
    note = ""
    for step in tensor.steps:
        if step.name == "ensure_dtype":
            _check_dtype(step, tensor, chain)
        elif step.name in ("scale_linear", "fixed_zero_mean_unit_variance"):
            _add_linear(chain, step)
        elif step.name in ("zero_mean_unit_variance", "scale_range"):
            note = _add_statistics(chain, step, tensor) or note
        elif step.name == "clip":
            _add_clip(chain, step)
        else:
            raise _refused(f"normalises with {step.name!r}")
    spatial = sum(axis.kind == "space" for axis in tensor.axes)
    # A network of planes gets one plane at a time.
    scope = "plane" if spatial == 2 else "image"
    facts = {"scope": scope, "clip": chain.clip} | chain.facts
    if chain.method is not None:
        return Normalization(method=chain.method, **facts), note
    ranges = _ranges(chain)
    lower, upper = np.mean(ranges, axis=0).tolist()
    if len(set(ranges)) > 1:
        facts["ranges"] = ranges
    else:
        lower, upper = ranges[0]
    return Normalization(method="fixed", lower=lower, upper=upper, **facts), note


def _refused(what: str) -> BadModel:
    return BadModel(
        f"It {what}, which napari-unet cannot do exactly. Use the package in its own "
        "program, or choose another model."
    )


def _check_dtype(step: Step, tensor: TensorInfo, chain: _Chain) -> None:
    dtype = str(step.arguments["dtype"])
    same = not chain.is_changed and dtype == tensor.dtype
    if not dtype.startswith("float") and not same:
        raise _refused(f"rounds the normalised image to {dtype}")


def _add_linear(chain: _Chain, step: Step) -> None:
    count = len(chain.gain)
    if step.arguments.get("axis", "channel") != "channel":
        raise _refused(f"scales every {step.arguments['axis']} differently")
    if step.name == "scale_linear":
        gain = _each(step.arguments.get("gain", 1.0), count)
        offset = _each(step.arguments.get("offset", 0.0), count)
    else:
        gain = 1 / _each(step.arguments["std"], count)
        offset = -_each(step.arguments["mean"], count) * gain
    if chain.method is not None or chain.clip is not None:
        if (gain != 1).any() or offset.any():
            raise _refused("scales the image again after it was normalised")
        return
    if not (np.isfinite(gain) & np.isfinite(offset) & (gain > 0)).all():
        raise _refused("turns bright into dark")
    chain.offset = chain.offset * gain + offset
    chain.gain = chain.gain * gain


def _each(value: Any, count: int) -> NDArray[np.float64]:
    """Return one number for each channel."""
    values = np.atleast_1d(np.asarray(value, dtype=np.float64))
    if values.shape not in ((1,), (count,)):
        raise _refused(f"scales {values.size} channels, but has {count}")
    return np.broadcast_to(values, count).copy()


def _add_statistics(chain: _Chain, step: Step, tensor: TensorInfo) -> str:
    if chain.method is not None or chain.clip is not None:
        raise _refused("normalises the image twice")
    arguments = step.arguments
    if arguments.get("reference_tensor") not in (None, tensor.name):
        raise _refused("takes the statistics of another image")
    named = {axis.name for axis in tensor.axes if axis.kind != "batch"}
    axes = arguments.get("axes")
    over = {str(axis) for axis in axes} if axes is not None else named | {"batch"}
    spatial = {axis.name for axis in tensor.axes if axis.kind == "space"}
    if not spatial <= over:
        missing = ", ".join(sorted(spatial - over))
        raise _refused(f"normalises every {missing} by itself")
    joint = "channel" in over and len(chain.gain) > 1
    same = np.ptp(chain.gain) == 0 and np.ptp(chain.offset) == 0
    eps = float(arguments.get("eps", EPS)) / float(chain.gain[0])
    if (not same and (joint or np.ptp(chain.gain) > 0)) or eps > 0.1:
        raise _refused("scales its channels differently before they are normalised")
    chain.facts = {"joint_channels": joint, "eps": eps}
    if step.name == "scale_range":
        chain.method = "percentile"
        chain.facts["lower"] = float(arguments.get("min_percentile", 0.0))
        chain.facts["upper"] = float(arguments.get("max_percentile", 100.0))
    else:
        chain.method = "mean_std"
    if "batch" in over and axes is not None:
        return (
            "It takes the statistics of a whole set of images; here those of each "
            "image are taken."
        )
    return ""


def _add_clip(chain: _Chain, step: Step) -> None:
    limits = step.arguments
    if limits.get("min_percentile") or limits.get("max_percentile"):
        raise _refused("cuts the image off at percentiles")
    if chain.clip is not None:
        raise _refused("cuts the image off twice")
    chain.clip = (limits.get("min"), limits.get("max"))


def _ranges(chain: _Chain) -> tuple[tuple[float, float], ...]:
    """Return the grey values that become 0 and 1, for each channel."""
    lower = -chain.offset / chain.gain
    upper = (1 - chain.offset) / chain.gain
    return tuple(zip((lower + 0.0).tolist(), upper.tolist(), strict=True))


def preprocessing_of(how: Normalization, ndim: int) -> list[tuple[str, dict[str, Any]]]:
    """Say in the format's words how we normalise.

    Parameters
    ----------
    how : Normalization
        Of a model.
    ndim : 2 or 3
        Spatial dimensions of the network.

    Returns
    -------
    list of (str, dict)
        Names of steps and their arguments.
    """
    axes = (["channel"] if how.joint_channels else []) + list("zyx"[-ndim:])
    # The smallest that the format allows to be told apart from none.
    statistics = {"axes": axes, "eps": how.eps or 1e-12}
    steps: list[tuple[str, dict[str, Any]]] = []
    if how.method == "percentile":
        wanted = {"min_percentile": how.lower, "max_percentile": how.upper}
        steps.append(("scale_range", statistics | wanted))
    elif how.method == "mean_std":
        steps.append(("zero_mean_unit_variance", statistics))
    else:
        ranges = how.ranges or ((how.lower, how.upper),)
        gain = [
            1 / (high - low + how.eps) if high > low else 0.0 for low, high in ranges
        ]
        offset = [-low * g for (low, _), g in zip(ranges, gain, strict=True)]
        if how.ranges:
            both = {"axis": "channel", "gain": gain, "offset": offset}
            steps.append(("scale_linear", both))
        elif (gain[0], offset[0]) != (1.0, 0.0):
            steps.append(("scale_linear", {"gain": gain[0], "offset": offset[0]}))
    if how.clip is not None:
        limits = dict(zip(("min", "max"), how.clip, strict=True))
        limits = {name: value for name, value in limits.items() if value is not None}
        steps += [("clip", limits)] if limits else []
    return steps


# --- after the network --------------------------------------------------------


@dataclass(frozen=True)
class Postprocessing:
    """What a package does with the output of its network.

    Parameters
    ----------
    activation : "none", "sigmoid" or "softmax"
    threshold : float or None
        Above which an output is 1 and below 0; None if it is not binarised.
    """

    activation: Activation
    threshold: float | None = None

    def apply(self, outputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Threshold what the activation gave."""
        if self.threshold is None:
            return outputs
        return (outputs > self.threshold).astype(np.float32)


def postprocessing_of(tensor: TensorInfo) -> Postprocessing:
    """Read the postprocessing of an output.

    Parameters
    ----------
    tensor : TensorInfo
        The output.

    Raises
    ------
    BadModel
        If it has other steps than an activation and a threshold.
    """
    activation: Activation = "none"
    threshold: float | None = None
    for step in tensor.steps:
        name, arguments = step.name, step.arguments
        if name == "ensure_dtype":
            dtype = str(arguments["dtype"])
            if dtype.startswith("float") or threshold is not None:
                continue
            raise _refused(f"rounds its output to {dtype}")
        if threshold is not None:
            raise _refused(f"changes its thresholded output with {name!r}")
        if name in ("sigmoid", "softmax") and activation == "none":
            if arguments.get("axis", "channel") != "channel":
                raise _refused(f"has a softmax along {arguments['axis']}")
            activation = "sigmoid" if name == "sigmoid" else "softmax"
        elif name == "binarize":
            values = set(np.atleast_1d(arguments["threshold"]).tolist())
            if len(values) > 1 or not all(map(math.isfinite, values)):
                raise _refused("has another threshold for every class")
            threshold = float(values.pop())
        elif name == "clip" and activation != "none" and _keeps_all(arguments):
            continue
        else:
            raise _refused(f"changes its output with {name!r}")
    return Postprocessing(activation, threshold)


def _keeps_all(limits: dict[str, Any]) -> bool:
    """Whether limits leave probabilities as they are."""
    low, high = limits.get("min"), limits.get("max")
    named = limits.get("min_percentile") or limits.get("max_percentile")
    return not named and (low is None or low <= 0) and (high is None or high >= 1)


def activation_steps(num_classes: int) -> Sequence[tuple[str, dict[str, Any]]]:
    """Say in the format's words what follows our networks."""
    if num_classes == 1:
        return [("sigmoid", {})]
    return [("softmax", {"axis": "channel"})]
