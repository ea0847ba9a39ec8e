"""Log-probabilities of responses: what every objective is a function of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Float32 logits alive at once, in elements: 2^25 are 128 MiB.
CHUNK_ELEMENTS = 2**25


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


class Policy(nn.Module):
    """A causal language model that answers with the log-probs of given tokens, never with logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.plain_head = has_plain_head(model)

    def forward(
        self, input_ids: Tensor, mask: Tensor, *, temperature: float = 1.0, entropy: bool = False
    ) -> tuple[Tensor, Tensor]:
        """input_ids [B,T] padded on the right, mask [B,T] (its first column False).

        Returns logps [B,T], log pi(token t | tokens before t) where the mask is True and 0 elsewhere, and the entropies
        [B,T] of those distributions (zeros unless asked for; they carry no gradient). Both float32.
        """
        rows, columns = mask.nonzero(as_tuple=True)
        hidden, head = self._hidden(input_ids)
        flat, flat_entropy = _logps(hidden[rows, columns - 1], head, input_ids[rows, columns], temperature, entropy)
        empty = torch.zeros(mask.shape, dtype=torch.float32, device=input_ids.device)
        entropies = empty.index_put((rows, columns), flat_entropy) if entropy else empty
        return empty.index_put((rows, columns), flat), entropies

    def _hidden(self, input_ids: Tensor) -> tuple[Tensor, nn.Module]:
        if not self.plain_head:
            return self.model(input_ids=input_ids, use_cache=False).logits, nn.Identity()
        hidden = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        return hidden, self.model.get_output_embeddings()


@torch.no_grad()
def has_plain_head(model: Any) -> bool:
    """Whether the output layer on the last hidden states gives the logits: many families scale, cap or transform them.

    Tried on two tokens. Where weights are so small that nothing would show, the names of such settings tell.
    """
    config = model.config.get_text_config()
    if any(getattr(config, name, None) for name in ("final_logit_softcapping", "logit_scale", "logits_scaling")):
        return False
    training = model.training
    model.eval()
    try:
        input_ids = torch.arange(2, device=next(model.parameters()).device).unsqueeze(0)
        logits = model(input_ids=input_ids, use_cache=False).logits
        hidden = getattr(model.base_model(input_ids=input_ids, use_cache=False), "last_hidden_state", None)
        head = model.get_output_embeddings()
        return hidden is not None and head is not None and torch.equal(head(hidden).to(logits.dtype), logits)
    finally:
        model.train(training)


def _logps(
    hidden: Tensor, head: nn.Module, targets: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor]:
    """hidden [N,D], targets [N] to log-probs [N] and entropies [N], without [N,V] alive where that is large."""

    def part(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(hidden).float()
        if temperature != 1.0:
            logits = logits / temperature
        normaliser = logits.logsumexp(-1)
        chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - normaliser
        if not entropy:
            return chosen, torch.zeros_like(chosen)
        with torch.no_grad():
            expected = torch.linalg.vecdot(torch.softmax(logits, -1), logits)
            return chosen, normaliser - expected

    vocabulary = getattr(head, "out_features", hidden.shape[-1])
    rows = max(1, CHUNK_ELEMENTS // vocabulary)
    if hidden.shape[0] <= rows:
        return part(hidden, targets)
    parts = [
        checkpoint(part, some, wanted, use_reentrant=False) if torch.is_grad_enabled() else part(some, wanted)
        for some, wanted in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    return torch.cat([one for one, _ in parts]), torch.cat([one for _, one in parts])
