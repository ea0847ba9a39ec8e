"""Policy and value model as the one module that the trainer trains."""

from __future__ import annotations

from torch import Tensor, nn

from tutelage.components.core.models import ScalarModel
from tutelage.components.core.scores import Policy


class ActorCritic(nn.Module):
    """A policy and a value model apart, without shared weights."""

    def __init__(self, policy: Policy, critic: ScalarModel) -> None:
        super().__init__()
        self.policy, self.critic = policy, critic

    def forward(
        self, input_ids: Tensor, mask: Tensor, temperature: float, *, entropy: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """input_ids, mask [B,T] to log-probs, entropies (where asked for) and values, all [B,T] and 0 outside the mask.

        values[:, t] is the value of the state in which token t is chosen: that of the position before it.
        """
        logps, entropies = self.policy(input_ids, mask, temperature=temperature, entropy=entropy)
        return logps, entropies, self.critic(input_ids).roll(1, dims=1) * mask
