"""Losses of policy and value. Shapes: [B,T]; means are over the mask."""

from __future__ import annotations

import torch
from torch import Tensor

from tutelage.components.core.registry import register


@register("ppo", family="policy loss", source="Schulman et al. 2017 (arXiv 1707.06347), eq. 7")
def ppo(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, *, clip: float = 0.2
) -> tuple[Tensor, dict[str, Tensor]]:
    """mean_t max(-A_t rho_t, -A_t clip(rho_t, 1-e, 1+e)) with rho_t = exp(log pi - log pi_old).

    All [B,T]; old_logps and advantages carry no gradient. Returns the mean over the mask and metrics (scalars): the
    share of tokens where the clipped term won, and the approximate KL to the old policy (k3).
    """
    difference = (logps - old_logps) * mask
    ratio = difference.exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    loss = masked_mean(torch.maximum(unclipped, clipped), mask)
    with torch.no_grad():
        metrics = {
            "clip_share": masked_mean((clipped > unclipped).float(), mask),
            "old_kl": masked_mean((-difference).expm1() + difference, mask),
        }
    return loss, metrics


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float = 0.2) -> Tensor:
    """1/2 mean_t max((V-G)^2, (clip(V, V_old - e, V_old + e) - G)^2): details of RLHF with PPO, P10. All [B,T]."""
    clipped = torch.clamp(values, old_values - clip, old_values + clip)
    return 0.5 * masked_mean(torch.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the True entries of the mask."""
    return (values * mask).sum() / mask.sum()
