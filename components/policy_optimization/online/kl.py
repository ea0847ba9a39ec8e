"""The distance to the reference: estimators, the token reward and the controllers of its coefficient."""

from __future__ import annotations

from torch import Tensor


def kl_estimates(logps: Tensor, reference_logps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """k1 = d, k2 = d^2/2, k3 = exp(-d) - 1 + d with d = log pi - log pi_ref, on tokens sampled from pi.

    Source: Schulman 2020, "Approximating KL divergence". k1 and k3 are unbiased, k3 is never negative. All [B,T].
    """
    difference = logps - reference_logps
    return difference, difference**2 / 2, (-difference).expm1() + difference


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, coefficient: float) -> Tensor:
    """R_t = -beta d_t + [t is the last token] score: scores [B], kl and mask [B,T] to rewards [B,T].

    Source: Ziegler et al. 2019 (arXiv 1909.08593), eq. 2.
    """
    # The first True of the reversed mask is the last token of the response.
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
    rewards = -coefficient * kl * mask
    return rewards.scatter_add(1, last.unsqueeze(1), scores.to(rewards.dtype).unsqueeze(1))


def adapt(coefficient: float, kl: float, *, target: float, horizon: float, episodes: int) -> float:
    """The next coefficient: beta (1 + e n / horizon), e = clip(kl / target - 1, -0.2, 0.2).

    kl: batch mean of the per-sequence summed k1.
    Source: Ziegler et al. 2019, section 2.2; details of RLHF with PPO, P11.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coefficient * (1.0 + error * episodes / horizon)
