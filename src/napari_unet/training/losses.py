"""What training makes small.

Every loss takes logits, the class of each pixel and the weight of each pixel, and
returns one number. Pixels of weight 0 are unknown: neither their logits nor their
target nor even a NaN there changes the loss, and their gradient is exactly 0. If
everything is unknown, the loss is 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Loss", "binary_cross_entropy", "combined", "cross_entropy", "soft_dice"]

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

_DICE_EPSILON = 1.0


def cross_entropy(logits: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Weighted softmax cross-entropy, as in the U-Net paper.

    The sum of weight times cross-entropy, divided by the sum of the weights, so
    that neither the size of a patch nor its unknown part changes the step.

    Parameters
    ----------
    logits : float Tensor of shape (batch, class, *spatial)
        Of any precision; computed in float32 at least.
    target : integer or bool Tensor of shape (batch, *spatial)
        Class of each pixel; anything where the weight is 0.
    weights : Tensor of shape (batch, *spatial)
        0 or more, or bool.

    Returns
    -------
    Tensor
        Scalar, float32 or as precise as `logits`.

    Raises
    ------
    ValueError
        If the shapes do not belong together.

    References
    ----------
    Ronneberger, Fischer & Brox (2015), https://arxiv.org/abs/1505.04597, equation 1.
    """
    logits, target, weights = _known_only(logits, target, weights)
    losses = functional.cross_entropy(logits, target, reduction="none")
    return _weighted_mean(losses, weights)


def binary_cross_entropy(logits: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Weighted binary cross-entropy of a network with one output channel.

    Parameters
    ----------
    logits : float Tensor of shape (batch, 1, *spatial)
        Of any precision; computed in float32 at least.
    target : integer or bool Tensor of shape (batch, *spatial)
        Every class but 0 is what the network finds.
    weights : Tensor of shape (batch, *spatial)
        0 or more, or bool.

    Returns
    -------
    Tensor
        Scalar; normalised as `cross_entropy`.

    Raises
    ------
    ValueError
        If the shapes do not belong together or there are several channels.
    """
    logits, target, weights = _known_only(logits, target, weights)
    if logits.shape[1] != 1:
        raise ValueError(f"binary cross-entropy needs 1 channel, not {logits.shape[1]}")
    found = (target != 0).to(logits.dtype)
    losses = functional.binary_cross_entropy_with_logits(
        logits[:, 0], found, reduction="none"
    )
    return _weighted_mean(losses, weights)


def soft_dice(
    logits: Tensor, target: Tensor, weights: Tensor, *, squared: bool = False
) -> Tensor:
    """One minus the soft Dice coefficient over the known pixels of the batch.

    With p the probability of a class and t whether it is the true one,
    ``1 - (2 * sum(p * t) + 1) / (sum(p) + sum(t) + 1)``, averaged over the classes
    except background.

    Parameters
    ----------
    logits : float Tensor of shape (batch, class, *spatial)
        Softmax is taken of two and more channels, the sigmoid of one.
    target : integer or bool Tensor of shape (batch, *spatial)
        With one channel, every class but 0 is what the network finds.
    weights : Tensor of shape (batch, *spatial)
        Counts only by being 0 or not.
    squared : bool, optional
        Sum p squared in the denominator, as Milletari et al. 2016.

    Returns
    -------
    Tensor
        Scalar between 0 and 1.

    Raises
    ------
    ValueError
        If the shapes do not belong together.

    References
    ----------
    Milletari, Navab & Ahmadi (2016), https://arxiv.org/abs/1606.04797.
    """
    logits, target, weights = _known_only(logits, target, weights)
    known = (weights != 0).unsqueeze(1)
    if logits.shape[1] == 1:
        probability = logits.sigmoid()
        true = (target != 0).unsqueeze(1)
    else:
        probability = logits.softmax(1)[:, 1:]
        classes = torch.arange(1, logits.shape[1], device=target.device)
        true = target.unsqueeze(1) == classes.view(1, -1, *[1] * (target.ndim - 1))
    probability = probability * known  # there, none is true
    pixels = [0, *range(2, logits.ndim)]
    overlap = (probability * true).sum(pixels)
    size = (probability.square() if squared else probability).sum(pixels)
    size = size + true.sum(pixels)
    dice = (2 * overlap + _DICE_EPSILON) / (size + _DICE_EPSILON)
    return 1 - dice.mean()


def combined(*terms: tuple[float, Loss]) -> Loss:
    """Make the weighted sum of losses.

    Parameters
    ----------
    *terms : tuple of float and Loss
        How much each counts.

    Returns
    -------
    Loss

    Raises
    ------
    ValueError
        If there are no terms.

    Examples
    --------
    >>> loss = combined((1.0, cross_entropy), (0.5, soft_dice))
    >>> ones = torch.ones(1, 4, 4)
    >>> loss(torch.zeros(1, 2, 4, 4), ones.long(), ones).item()
    0.8531...
    """
    if not terms:
        raise ValueError("a sum of losses needs one at least")

    def loss(logits: Tensor, target: Tensor, weights: Tensor) -> Tensor:
        values = [factor * term(logits, target, weights) for factor, term in terms]
        return torch.stack(values).sum()

    return loss


def _known_only(
    logits: Tensor, target: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Make logits precise enough, and set them and the target to 0 where unknown.

    Multiplying by a weight of 0 would keep NaN and infinity, in the loss and in the
    gradient.
    """
    shape = (logits.shape[0], *logits.shape[2:])
    if target.shape != shape or weights.shape != shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} need target and weights of shape {shape}, "
            f"not {tuple(target.shape)} and {tuple(weights.shape)}"
        )
    unknown = weights == 0
    logits = logits.masked_fill(unknown.unsqueeze(1), 0)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    target = target.long().masked_fill(unknown, 0)
    return logits, target, weights.to(logits.dtype)


def _weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    total = weights.sum()
    return (losses * weights).sum() / torch.where(total > 0, total, 1)
