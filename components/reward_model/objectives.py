"""Objectives on the rewards of pairs. Shapes: chosen_rewards[B], rejected_rewards[B] to losses[B]."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tutelage.components.core.errors import ConfigError
from tutelage.components.core.registry import register


@register(
    "bradley_terry",
    family="reward-model objective",
    source="Bradley and Terry 1952; Ouyang et al. 2022 (arXiv 2203.02155), eq. 1",
)
def bradley_terry(
    chosen_rewards: Tensor, rejected_rewards: Tensor, *, label_smoothing: float = 0.0, centre: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """L = -(1-e) log sigma(r_w - r_l) - e log sigma(r_l - r_w) + c (r_w + r_l)^2.

    label_smoothing e: the share of pairs whose label is believed flipped. centre c: weight of the term that keeps
    rewards around zero (Eisenstein et al. 2023, arXiv 2312.09244); 0 leaves it out. Metrics are per pair: [B].
    Raises ConfigError for e outside [0, 1/2).
    """
    if not 0 <= label_smoothing < 0.5:
        raise ConfigError(
            f"label_smoothing cannot be {label_smoothing}", fix="Give the share of flipped labels, from 0 to below 0.5."
        )
    difference = chosen_rewards - rejected_rewards
    losses = -(1 - label_smoothing) * F.logsigmoid(difference) - label_smoothing * F.logsigmoid(-difference)
    losses = losses + centre * (chosen_rewards + rejected_rewards) ** 2
    return losses, {"accuracy": (difference > 0).float(), "margin": difference.detach()}
