"""Direct preference optimization. h = a(y_w) - a(y_l), with a the summed log-ratio of policy to reference."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tutelage.components.core.errors import ConfigError
from tutelage.components.core.registry import register
from tutelage.components.core.scores import SequenceScores


@register(
    "dpo",
    family="pair objective",
    source="Rafailov et al. 2023 (arXiv 2305.18290), eq. 7; label smoothing: Mitchell 2023 (cDPO), eq. 3",
)
def dpo(
    chosen: SequenceScores,
    rejected: SequenceScores,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reference_free: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L = -(1-e) log sigma(beta h) - e log sigma(-beta h), summed log-probs.

    chosen, rejected: scores of [B,T]. label_smoothing e: the share of labels believed flipped. reference_free: the
    reference's log-probs count as zero. Returns losses [B] and metrics [B]: implicit rewards beta a and their order.
    Raises ConfigError for e outside [0, 1/2).
    """
    _check_smoothing(label_smoothing)
    chosen_rewards, rejected_rewards = implicit_rewards(chosen, rejected, beta, reference_free)
    margin = chosen_rewards - rejected_rewards
    losses = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return losses, _metrics(chosen_rewards, rejected_rewards)


@register("robust", family="pair objective", source="Chowdhury et al. 2024 (arXiv 2403.00409), eq. 7")
def robust(
    chosen: SequenceScores, rejected: SequenceScores, *, beta: float = 0.1, label_smoothing: float = 0.1
) -> tuple[Tensor, dict[str, Tensor]]:
    """L = [-(1-e) log sigma(beta h) + e log sigma(-beta h)] / (1-2e): unbiased where labels flip with rate e < 1/2.

    chosen, rejected: scores of [B,T]. Returns losses [B] and metrics [B]. Raises ConfigError for e outside [0, 1/2).
    """
    _check_smoothing(label_smoothing)
    chosen_rewards, rejected_rewards = implicit_rewards(chosen, rejected, beta, reference_free=False)
    margin = chosen_rewards - rejected_rewards
    losses = -(1 - label_smoothing) * F.logsigmoid(margin) + label_smoothing * F.logsigmoid(-margin)
    return losses / (1 - 2 * label_smoothing), _metrics(chosen_rewards, rejected_rewards)


def implicit_rewards(
    chosen: SequenceScores, rejected: SequenceScores, beta: float, reference_free: bool
) -> tuple[Tensor, Tensor]:
    """beta a(y) of both members: [B], [B]."""
    if reference_free:
        return beta * chosen.policy, beta * rejected.policy
    return beta * chosen.log_ratio, beta * rejected.log_ratio


def _check_smoothing(label_smoothing: float) -> None:
    # With half of the labels flipped nothing can be learned, and the robust loss divides by zero.
    if not 0 <= label_smoothing < 0.5:
        raise ConfigError(
            f"label_smoothing cannot be {label_smoothing}", fix="Give the share of flipped labels, from 0 to below 0.5."
        )


def _metrics(chosen_rewards: Tensor, rejected_rewards: Tensor) -> dict[str, Tensor]:
    margin = (chosen_rewards - rejected_rewards).detach()
    return {
        "rewards/chosen": chosen_rewards.detach(),
        "rewards/rejected": rejected_rewards.detach(),
        "rewards/margins": margin,
        "rewards/accuracies": (margin > 0).float(),
    }
