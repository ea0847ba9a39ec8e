"""Advantage estimators and whitening. rewards, values, mask are [B,T]; what lies outside the mask comes back 0."""

from __future__ import annotations

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
