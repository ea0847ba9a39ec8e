"""What both families share: the policy with its tokenizer, and the reference's log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tutelage.components.core.batches import Group, collate, micro_batches
from tutelage.components.core.model_source import check_model_directory
from tutelage.components.core.models import check_agreement, load_policy, load_tokenizer
from tutelage.components.core.scores import Policy
from tutelage.components.policy_optimization.stage import Config


def load(config: Config, policy: Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """The policy to train and its tokenizer. Raises ArtifactError if they are not whole or disagree."""
    check_model_directory(policy)
    tokenizer = load_tokenizer(policy, trust_remote_code=config.trust_remote_code)
    model = load_policy(policy, trust_remote_code=config.trust_remote_code)
    check_agreement(model, tokenizer, where=str(policy))
    return model, tokenizer


@torch.inference_mode()
def frozen_logps(
    reference: Policy, groups: Sequence[Group], *, tokens: int, pad: int, device: torch.device, temperature: float = 1.0
) -> dict[str, tuple[Tensor, ...]]:
    """Log-probs of every sequence of every group, one [len(sequence)] tensor each on the CPU, by the group's id."""
    found: dict[str, tuple[Tensor, ...]] = {}
    for indices, _ in micro_batches(groups, tokens=tokens):
        chosen = [groups[index] for index in indices]
        batch = collate(chosen, pad).to(device)
        logps, _ = reference(batch.input_ids, batch.mask, temperature=temperature)
        rows = iter(logps.cpu())
        for group in chosen:
            found[group[0].id] = tuple(next(rows)[: len(sequence)].clone() for sequence in group)
    return found
