"""One training under way: its network, optimiser and state."""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch

from napari_unet.errors import OutOfMemory, UnetError
from napari_unet.inference.backends import is_out_of_memory
from napari_unet.inference.executors import (
    computes_bfloat16,
    memory_format,
    without_tf32,
)
from napari_unet.inference.segment import segment_steps
from napari_unet.steps import mapped_steps
from napari_unet.training.feed import Feed
from napari_unet.training.losses import (
    binary_cross_entropy,
    combined,
    cross_entropy,
    soft_dice,
)
from napari_unet.training.optimizer import Statistics, make_optimizer
from napari_unet.training.patches import Patches
from napari_unet.training.plan import smaller_plan
from napari_unet.training.settings import TrainingStep, View
from napari_unet.training.snapshot import Best, Saved, Snapshot, write_snapshot
from napari_unet.training.validation import (
    FEW_THRESHOLDS,
    THRESHOLDS,
    predict_held_out_steps,
    score,
    tune_steps,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from napari_unet.inference.settings import ObjectSettings
    from napari_unet.steps import Progress
    from napari_unet.training.annotations import Annotation
    from napari_unet.training.data import TrainingData
    from napari_unet.training.losses import Loss
    from napari_unet.training.plan import PatchPlan
    from napari_unet.training.settings import TrainingSettings
    from napari_unet.training.validation import Predicted

__all__ = ["Training", "is_better"]

Result = TypeVar("Result")
Beats: TypeAlias = Generator[TrainingStep, View | None, Result]

_LARGEST_GRADIENT = 5.0
_UNSAVED = 60.0  # seconds, at most
# A GPU looks at the held-out part every second or two, and to write a large network
# takes as long.
_UNSAVED_ON_GPU = 10.0


class Training:
    """A network that learns.

    Parameters
    ----------
    data : TrainingData
        Its model's network is trained, in place.
    annotations : sequence of Annotation
        For previews.
    settings : TrainingSettings
        How it learns.
    device : torch.device
        Where.
    view : View or None
        Of which previews are made.
    """

    def __init__(
        self,
        data: TrainingData,
        annotations: Sequence[Annotation],
        settings: TrainingSettings,
        device: torch.device,
        view: View | None,
    ):
        self.data = data
        self.state = Snapshot()
        self._annotations = annotations
        self._settings = settings
        self._device = device
        self._view = view
        self._view_is_new = view is not None
        self._told: set[str] = set()
        self._path: Path | None = None
        self._saved_at = time.monotonic()
        self._identity: dict[str, Any] = {}
        self._feed = Feed(Patches(data.images, settings.seed), data.plan, device)
        self.network = data.model.unet.to(device)
        self._layout = memory_format(device, data.model.ndim)
        self.network.to(memory_format=self._layout)  # type: ignore[call-overload]
        # Once, as the lists below: a search through all modules keeps a GPU waiting.
        self.network.train()
        if settings.freeze_encoder:
            for name, part in self.network.named_children():
                if name in ("encoder", "bridge", "bottleneck"):
                    part.requires_grad_(False).eval()
        self._weights = [w for w in self.network.parameters() if w.requires_grad]
        self._statistics = Statistics(self.network)
        self.optimizer = make_optimizer(self._weights, settings)
        self._loss = _loss(settings, self.network.config.num_classes)
        self._half = settings.precision == "auto" and computes_bfloat16(device)

    @property
    def plan(self) -> PatchPlan:
        """The shape of a batch, which may become smaller on the way."""
        return self._feed.plan

    def learn_steps(self, step: int, rate: float) -> Beats[float]:
        """Do one step of the optimiser, with less at once where memory runs out.

        Parameters
        ----------
        step : int
            From 1.
        rate : float
            Learning rate.

        Yields
        ------
        TrainingStep
            A note, if the patches are fewer or smaller from now on.

        Returns
        -------
        float
            The loss; not finite if the loss or its gradient is not, and then the
            network is as it was.
        """
        wanted = self.plan
        while True:
            try:
                with self._memory_in_words():
                    sizes = self._differentiate(step)
                break
            except OutOfMemory:
                smaller = smaller_plan(self.network.config, self.plan)
                if smaller is None:
                    raise
            # Only here has the error let go of what was computed so far.
            self._use(smaller)
        with self._memory_in_words():
            loss = self._change_weights(sizes, rate)
        if self.plan != wanted:
            note = f"Memory ran out with {wanted}: going on with {self.plan}."
            yield from self.tell(note=note)
        return loss

    def _differentiate(self, step: int) -> Tensor:
        """Compute the loss of a step, and its gradient; return the sizes of both."""
        self._statistics.keep()
        try:
            self.optimizer.zero_grad(set_to_none=True)
            image, target, weights = self._feed.batch(step)
            image = image.contiguous(memory_format=self._layout)
            with self._randomness(step), self._precision():
                with torch.autocast(
                    self._device.type, torch.bfloat16, enabled=self._half
                ):
                    logits = self.network(image)
                of_patches = self._loss(logits, target, weights)
                of_patches.backward()  # type: ignore[no-untyped-call]
            norm = torch.nn.utils.clip_grad_norm_(self._weights, _LARGEST_GRADIENT)
            return torch.stack([of_patches.detach(), norm])
        except BaseException:
            self._statistics.put_back()
            raise

    def _change_weights(self, sizes: Tensor, rate: float) -> float:
        """Do what the optimiser does, if loss and gradient are finite; return the loss.

        A GPU is waited for only when it has got all its commands: it decides itself.
        """
        is_finite = sizes.isfinite().all()
        # But AdamW on Apple's does not look whether it should.
        if self._device.type != "mps" or is_finite:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            # As torch's GradScaler tells fused optimisers to leave out a step.
            self.optimizer.found_inf = (~is_finite).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        loss, norm = sizes.tolist()
        if math.isfinite(loss) and math.isfinite(norm):
            return float(loss)
        self._statistics.put_back()
        return math.nan

    @contextmanager
    def _memory_in_words(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(
                f"Memory ran out on {self._device} with {self.plan}. Close other "
                "programs, or train a smaller network."
            ) from error

    def _use(self, plan: PatchPlan) -> None:
        """Go on with other patches than planned."""
        self._feed.use(plan)
        self.state.reduced = {"batch_size": plan.batch_size, "shape": plan.shape}
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def look_steps(self) -> Beats[dict[str, float]]:
        """Score the network as it is on the held-out part, with heartbeats.

        Returns
        -------
        dict of str to float
            The scores, see `TrainingStep`, of objects made in the best of a few ways.
        """
        predicted = yield from self.predict_steps()
        scores, _ = yield from self.tune_steps(predicted)
        return scores

    def predict_steps(self) -> Beats[list[Predicted]]:
        """Predict the held-out part with the network as it is, with heartbeats."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # the engine sizes its tiles by what is free
        device, precision = str(self._device), self._settings.precision
        held_out = self.data.held_out
        steps = predict_held_out_steps(self.data.model, held_out, device, precision)
        return (yield from self.beats(steps, "scoring"))

    def tune_steps(
        self, predicted: Sequence[Predicted], *, thoroughly: bool = False
    ) -> Beats[tuple[dict[str, float], ObjectSettings]]:
        """Find out how objects are best made of a prediction, with heartbeats.

        Parameters
        ----------
        predicted : sequence of Predicted
            From `predict_steps`.
        thoroughly : bool
            Try all ways instead of a few.

        Returns
        -------
        dict of str to float
            Their scores; see `TrainingStep`.
        ObjectSettings
            How they are made.
        """
        passport = self.data.model.passport
        sizes = (passport.minimal_size, self.data.smallest_object)
        thresholds = THRESHOLDS if thoroughly else FEW_THRESHOLDS
        grows = (passport.grow, 1) if thoroughly else (passport.grow,)
        tuning = tune_steps(predicted, passport, thresholds, grows, sizes)
        objects = yield from self.beats(tuning, "scoring")
        return score(predicted, passport, objects), objects

    def score_base_steps(self) -> Beats[dict[str, float]]:
        """Score the model before training, with heartbeats.

        It is compared with what was learnt in the end, for which all ways to make
        objects are tried, and shown beside what is learnt on the way.

        Returns
        -------
        dict of str to float
            What is shown.
        """
        predicted = yield from self.predict_steps()
        shown, _ = yield from self.tune_steps(predicted)
        scores, _ = yield from self.tune_steps(predicted, thoroughly=True)
        self.state.base_scores = scores
        self.state.history.append((0, shown))
        return shown

    def keep_if_best(self, step: int, scores: dict[str, float]) -> bool:
        """Note the scores after a step; keep the network if it is the best."""
        state = self.state
        state.history.append((step, scores))
        state.stale += 1
        if state.best is not None and not is_better(scores, state.best.scores):
            return False
        weights = {
            name: tensor.detach().to(
                "cpu", copy=True, memory_format=torch.contiguous_format
            )
            for name, tensor in self.network.state_dict().items()
        }
        state.best, state.stale = Best(step, scores, weights), 0
        return True

    def save_in_time(self, *, has_looked: bool) -> None:
        """Save after a look at the held-out part, and when a kill would cost much."""
        wait = _UNSAVED
        if has_looked:
            wait = 0.0 if self._device.type == "cpu" else _UNSAVED_ON_GPU
        if time.monotonic() >= self._saved_at + wait:
            self._save()

    def _save(self) -> None:
        """Write all that is needed to go on, if there is a file for it."""
        self._saved_at = time.monotonic()
        if self._path is None:
            return
        plan = self.data.plan
        saved = Saved(
            self._path,
            self._identity,
            {"patch_shape": plan.shape, "batch_size": plan.batch_size},
            self.state,
            self.network.state_dict(),
            self.optimizer.state_dict(),
        )
        write_snapshot(saved)

    def saves_to(self, path: Path | None, identity: dict[str, Any]) -> None:
        """Name the file of the snapshots; None for none."""
        self._path, self._identity = path, identity

    def close(self) -> None:
        """End what runs in the background."""
        self._feed.close()

    def restore(self, saved: Saved) -> None:
        """Go on from there."""
        self.state = saved.snapshot
        if self.state.reduced:
            self._feed.use(replace(self.data.plan, **self.state.reduced))
        self.network.load_state_dict(saved.network)
        self.optimizer.load_state_dict(saved.optimizer)

    def preview_steps(self) -> Beats[NDArray | None]:
        """Segment what is being looked at, with heartbeats; None if that cannot be."""
        if self._view is None:
            return None
        self._view_is_new = False
        annotation = self._annotations[self._view.annotation]
        steps = segment_steps(
            annotation.image,
            self.data.model,
            axes=annotation.image_axes,
            region=self._view.region,
            device=str(self._device),
            precision=self._settings.precision,
            pixel_size=annotation.pixel_size,
        )
        return (yield from self.beats(_or_none(steps), "preview"))

    @property
    def view_is_new(self) -> bool:
        """Whether another part is being looked at since the last preview."""
        return self._view_is_new

    def beats(
        self, steps: Generator[Progress | None, None, Result], message: str
    ) -> Beats[Result]:
        """Run a computation; what it yields becomes heartbeats of the training."""
        return mapped_steps(
            steps,
            lambda tick: self.tell(message=message, note=tick.note if tick else ""),
        )

    def tell(self, **what: Any) -> Generator[TrainingStep, View | None, None]:
        """Yield one step, and take the view if another one is sent; notes only once."""
        if what.get("note") in self._told:
            what["note"] = ""
        self._told.add(what.get("note", ""))
        done = what.pop("done", self.state.step)
        view = yield TrainingStep(done, self._settings.steps, **what)
        if view is not None:
            self._view, self._view_is_new = view, True

    def _randomness(self, step: int) -> AbstractContextManager[object]:
        """Let dropout depend only on the seed and the step."""
        if not self.network.config.dropout:
            return nullcontext()
        return _seeded(self._settings.seed * 1_000_003 + step, self._device)

    def _precision(self) -> AbstractContextManager[object]:
        if self._device.type == "cuda" and self._settings.precision == "float32":
            return without_tf32()
        return nullcontext()


def _or_none(
    steps: Generator[Progress, None, NDArray],
) -> Generator[Progress, None, NDArray | None]:
    """Do without a preview that fails: the training goes on."""
    try:
        return (yield from steps)
    except UnetError:
        return None


def is_better(scores: dict[str, float], others: dict[str, float]) -> bool:
    """Compare F1 first, then the loss."""
    f1, other = scores["F1@0.5"], others["F1@0.5"]
    return f1 > other or (f1 == other and scores["loss"] < others["loss"])


def _loss(settings: TrainingSettings, outputs: int) -> Loss:
    entropy = binary_cross_entropy if outputs == 1 else cross_entropy
    if settings.loss == "cross_entropy+dice":
        return combined((1.0, entropy), (1.0, soft_dice))
    return entropy


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch, and put its generators back afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
