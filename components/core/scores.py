"""Log-probabilities of responses: what every objective is a function of."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class SequenceScores:
    """Per-token log-probs of responses under the policy and, where there is one, the reference.

    policy_logps, reference_logps: [..., T], any value outside the mask; mask: [..., T], True on response tokens.
    Leading dimensions are a batch [B] or lists [B,K].
    """

    policy_logps: Tensor
    reference_logps: Tensor | None
    mask: Tensor

    @property
    def policy(self) -> Tensor:
        """Summed log-prob of each response under the policy: [...]."""
        return self.policy_logps.masked_fill(~self.mask, 0.0).sum(-1)

    @property
    def reference(self) -> Tensor:
        """Summed log-prob of each response under the reference: [...]. Zero for a reference-free method."""
        return (
            torch.zeros_like(self.policy)
            if self.reference_logps is None
            else self.reference_logps.masked_fill(~self.mask, 0.0).sum(-1)
        )

    @property
    def length(self) -> Tensor:
        """Response tokens, the end token included: [...]."""
        return self.mask.sum(-1)

    @property
    def policy_mean(self) -> Tensor:
        """Log-prob per response token under the policy: [...]."""
        return self.policy / self.length.clamp(min=1)

    @property
    def log_ratio(self) -> Tensor:
        """a(y) = log pi(y|x) - log pi_ref(y|x), summed over the response: [...]."""
        return self.policy - self.reference

    def member(self, index: int) -> SequenceScores:
        """The scores of one member of each list: [B,K,T] to [B,T]."""
        reference = None if self.reference_logps is None else self.reference_logps[:, index]
        return replace(
            self, policy_logps=self.policy_logps[:, index], reference_logps=reference, mask=self.mask[:, index]
        )
