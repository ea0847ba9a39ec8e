"""Advantage estimators and whitening. rewards, values, mask are [B,T]; what lies outside the mask comes back 0."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tutelage.components.core.registry import register


@register("gae", family="advantage estimator", source="Schulman et al. 2016 (arXiv 1506.02438), eq. 16")
def gae(
    rewards: Tensor, mask: Tensor, *, values: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """delta_t = R_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}, returns A + V.

    The episode ends with the last token of the mask, where V_{t+1} is 0. The mask's tokens are next to each other.
    Returns advantages [B,T] and returns [B,T], without gradient.
    """
    with torch.no_grad():
        keep = mask.to(values.dtype)
        rewards, values = rewards * keep, values * keep
        advantage = torch.zeros_like(values[:, 0])
        following = torch.zeros_like(advantage)
        columns = []
        for step in reversed(range(values.shape[1])):
            delta = rewards[:, step] + gamma * following - values[:, step]
            advantage = (delta + gamma * lam * advantage) * keep[:, step]
            following = values[:, step]
            columns.append(advantage)
        advantages = torch.stack(columns[::-1], 1)
        return advantages, (advantages + values) * keep


@register("rloo", family="advantage estimator", source="Ahmadian et al. 2024 (arXiv 2402.14740), section 3.3")
def rloo(rewards: Tensor, mask: Tensor, *, groups: Tensor) -> tuple[Tensor, Tensor]:
    """A_i = G_i - mean of the other members' G_j: G the sum of a response's token rewards, A the same for its tokens.

    groups [B]: equal numbers for responses to one prompt, at least two of each. Returns A and G, [B,T].
    """
    total = (rewards * mask).sum(1)
    mean, size = _over_groups(total, groups)
    return _spread((total - mean) * size / (size - 1), mask), _spread(total, mask)


@register("grpo", family="advantage estimator", source="Shao et al. 2024 (arXiv 2402.03300), section 4.1.2")
def grpo(
    rewards: Tensor,
    mask: Tensor,
    *,
    groups: Tensor,
    scale: Literal["group", "batch", "none"] = "group",
    epsilon: float = 1e-4,
) -> tuple[Tensor, Tensor]:
    """A_i = (G_i - mean) / (std + epsilon) over the members of the group, unbiased std; the same for all its tokens.

    scale: "group"; "batch" divides by the std over all responses; "none" not at all (Liu et al. 2025).
    groups [B]: equal numbers for responses to one prompt, at least two of each. Returns A and G, [B,T].
    """
    total = (rewards * mask).sum(1)
    mean, size = _over_groups(total, groups)
    centred = total - mean
    variance = _over_groups(centred**2, groups)[0] * size / (size - 1)
    if scale == "group":
        centred = centred / (variance.sqrt() + epsilon)
    elif scale == "batch":
        centred = centred / (total.std() + epsilon)
    return _spread(centred, mask), _spread(total, mask)


def _over_groups(values: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of each value's group, and its size: [B], [B]."""
    _, places, sizes = groups.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(sizes), dtype=values.dtype, device=values.device).index_add(0, places, values)
    return (sums / sizes)[places], sizes[places]


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """[B] to [B,T], 0 outside the mask."""
    return values.unsqueeze(1) * mask


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over the mask, biased variance; shift_mean=False adds the mean back.

    Source: details of RLHF with PPO, P9 (the OpenAI lineage). values, mask: [B,T].
    """
    keep = mask.to(values.dtype)
    count = keep.sum()
    mean = (values * keep).sum() / count
    variance = ((values - mean) ** 2 * keep).sum() / count
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean) * keep
