"""What both families share: the policy with its tokenizer, and the reference's log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tutelage.components.core.batches import Group, collate, micro_batches
from tutelage.components.core.manifest import read_manifest
from tutelage.components.core.model_source import check_model_directory
from tutelage.components.core.models import check_agreement, load_policy, load_tokenizer
from tutelage.components.core.scores import Policy
from tutelage.components.core.trainer import Trainer
from tutelage.components.policy_optimization.stage import Config


def load(config: Config, policy: Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """The policy to train and its tokenizer. Raises ArtifactError if it is none, is not whole or they disagree."""
    check_model_directory(policy)
    read_manifest(policy, kind="policy", verify=False)
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


def reference_logps(trainer: Trainer, reference: Policy, groups: Sequence[Group]) -> dict[str, tuple[Tensor, ...]]:
    """frozen_logps in the trainer's precision. Every process computes its share, and all get all."""
    with trainer.autocast():
        found = frozen_logps(
            reference, groups[trainer.rank :: trainer.world],
            tokens=trainer.config.micro_batch_tokens, pad=trainer.pad, device=trainer.device,
        )  # fmt: skip
    shares = gather_object([found]) if trainer.world > 1 else [found]
    return {id: logps for share in shares for id, logps in share.items()}
