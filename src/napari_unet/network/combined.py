"""Outputs that may hold in the same pixel, as classes that exclude each other.

Every combination of outputs becomes a class. The logit of a combination is the sum of
those of its parts, so that nothing is lost: the probability of an output is the sum
over the combinations that contain it.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST = 3  # outputs; 8 classes
_EPS = 1e-7


def combinations(count: int) -> Tensor:
    """Return which outputs are part of each class.

    Parameters
    ----------
    count : int
        Of the outputs.

    Returns
    -------
    float32 Tensor of shape (2**count, count)
        0 or 1; in the first row, the background, all are 0.
    """
    return torch.tensor(
        [[number >> bit & 1 for bit in range(count)] for number in range(1 << count)],
        dtype=torch.float32,
    )


def combine(outputs: Tensor, *, are_probabilities: bool) -> Tensor:
    """Return the logits of every combination.

    Parameters
    ----------
    outputs : float32 Tensor of shape (batch, output, *spatial)
        Each with a sigmoid of its own.
    are_probabilities : bool
        Whether the sigmoids are applied already.

    Returns
    -------
    float32 Tensor of shape (batch, 2**output, *spatial)
    """
    logits = outputs.logit(_EPS) if are_probabilities else outputs
    matrix = combinations(outputs.shape[1]).to(outputs.device)
    return torch.einsum("nk,bk...->bn...", matrix, logits)
