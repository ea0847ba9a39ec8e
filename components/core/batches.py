"""From records to batches: tokens, response masks and length-sorted micro-batches under a token budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tutelage.components.core.errors import DataError
from tutelage.components.core.records import Pair

Item = TypeVar("Item")
# The share of the token budget from which on a micro-batch may be closed early.
ENOUGH = 0.125


@dataclass(frozen=True, slots=True)
class Sequence:
    """Tokens of prompt and response. The response, its end token included, begins at `prompt_length`."""

    id: str
    tokens: tuple[int, ...]
    prompt_length: int

    def __len__(self) -> int:
        return len(self.tokens)


# What is forwarded together: one sequence, the chosen and the rejected of a pair, or the members of a group.
Group = tuple[Sequence, ...]


class Encoder:
    """Turns prompts and responses into tokens. Prompt and response are tokenized apart and joined, so that the
    prompt's tokens are a prefix by construction, also where a tokenizer would merge across the boundary.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.end = int(tokenizer.eos_token_id)
        self.start = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]

    def prompt(self, prompt: Any) -> tuple[int, ...]:
        """Tokens of a prompt: text (after the start token, if there is one) or messages (by the chat template)."""
        if isinstance(prompt, str):
            return tuple(self.start + self.tokenizer.encode(prompt, add_special_tokens=False))
        if self.tokenizer.chat_template is None:
            raise DataError(
                "prompts are messages, but the tokenizer has no chat template",
                fix="Give a chat model, or plain text prompts.",
            )
        messages = [{"role": message.role, "content": message.content} for message in prompt]
        tokens = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return tuple(int(token) for token in tokens)

    def __call__(self, id: str, prompt: Any, response: str, *, ended: bool = True) -> Sequence:
        """`ended` says whether the response came to its end, so that the end token belongs to it."""
        before = self.prompt(prompt)
        tokens = self.tokenizer.encode(response, add_special_tokens=False)
        return Sequence(id, (*before, *tokens, self.end) if ended else (*before, *tokens), len(before))

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of tokens, special ones left out."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def pairs(self, pairs: Iterable[Pair], report: Callable[[str], None]) -> list[Group]:
        """(chosen, rejected) of each pair that fits into the context."""
        encoded = (
            (self(pair.id, pair.prompt, pair.chosen), self(pair.id, pair.prompt, pair.rejected)) for pair in pairs
        )
        return self.keep(encoded, report)

    def keep(self, groups: Iterable[Group], report: Callable[[str], None]) -> list[Group]:
        """The groups whose every sequence fits into the context; says how many do not, and which.

        Raises DataError if none fits.
        """
        fitting: list[Group] = []
        dropped: list[Group] = []
        for group in groups:
            longest = max(group, key=len)
            (dropped if len(longest) > self.max_tokens else fitting).append(group)
        if dropped:
            first = ", ".join(f"{group[0].id} ({max(map(len, group))} tokens)" for group in dropped[:3])
            share = f"{len(dropped):,} of {len(dropped) + len(fitting):,} records"
            report(f"left out {share} longer than {self.max_tokens} tokens: {first}")
        if not fitting:
            raise DataError(
                f"no record fits into {self.max_tokens} tokens", fix="Raise max_tokens, or shorten the texts."
            )
        return fitting


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right. Causal attention never looks ahead, so right padding needs no attention mask.

    input_ids [R,T]; mask [R,T] is True on response tokens; lengths [R] real tokens; ids of the groups.
    """

    ids: tuple[str, ...]
    input_ids: Tensor
    mask: Tensor
    lengths: Tensor
    padding: float

    def to(self, device: torch.device) -> Batch:
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            mask=self.mask.to(device, non_blocking=True),
            lengths=self.lengths.to(device, non_blocking=True),
        )


def collate(groups: SequenceOf[Group], pad: int) -> Batch:
    """One row per sequence, the members of a group next to each other."""
    rows = [sequence for group in groups for sequence in group]
    width = max(map(len, rows))
    input_ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for row, sequence in enumerate(rows):
        input_ids[row, : len(sequence)] = torch.tensor(sequence.tokens)
        mask[row, sequence.prompt_length : len(sequence)] = True
    mask[:, 0] = False  # nothing comes before the first token, so nothing predicts it
    lengths = torch.tensor([len(sequence) for sequence in rows])
    return Batch(
        tuple(group[0].id for group in groups), input_ids, mask, lengths, 1.0 - float(lengths.sum()) / input_ids.numel()
    )


def response_tokens(group: Group) -> float:
    """Tokens that the group's responses are predicted in: the unit of losses that are means over tokens."""
    return float(sum(len(sequence) - max(1, sequence.prompt_length) for sequence in group))


def align(rows: SequenceOf[Tensor], width: int) -> Tensor:
    """Per-token values of each row, one tensor [len(row)] each, as one tensor [R,T] with zeros behind."""
    table = rows[0].new_zeros((len(rows), width))
    for index, row in enumerate(rows):
        table[index, : len(row)] = row
    return table


def drawn(items: SequenceOf[Item], count: int, *, seed: int = 0) -> list[Item]:
    """`count` of the items, or all: the same draw for the same seed and number of items."""
    return [items[index] for index in shuffled(len(items), seed=seed, epoch=0)[:count]]


def shuffled(count: int, *, seed: int, epoch: int) -> list[int]:
    """A permutation of range(count) that depends on seed and epoch alone, so a resumed run sees the same order."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()


def micro_batches(
    groups: SequenceOf[Group], *, tokens: int, ranks: int = 1, rank: int = 0
) -> list[tuple[list[int], float]]:
    """Splits one global batch into length-sorted micro-batches of at most `tokens` padded tokens.

    Returns this rank's [(indices into groups, weight)]; every rank gets as many. The weight is 1 but for a filler of
    weight 0 where there are fewer micro-batches than ranks ask for.
    Raises DataError for a group that is too long alone.
    """
    order = sorted(range(len(groups)), key=lambda index: (-_width(groups[index]), index))
    parts: list[list[int]] = []
    for index in order:
        width, size = _width(groups[index]), len(groups[index])
        if width * size > tokens:
            raise DataError(
                f"record {groups[index][0].id} takes {width * size} tokens, a micro-batch holds {tokens}",
                fix="Raise training.micro_batch_tokens, or lower max_tokens.",
            )
        widest = _width(groups[parts[-1][0]]) if parts else 0
        full = not parts or widest * size * (len(parts[-1]) + 1) > tokens
        # Once a micro-batch is well filled, what is much shorter does better in one of its own than in padding.
        wasteful = parts and width < 0.75 * widest and widest * size * len(parts[-1]) >= tokens * ENOUGH
        if not (full or wasteful):
            parts[-1].append(index)
        else:
            parts.append([index])
    while len(parts) % ranks and len(largest := max(parts, key=len)) > 1:
        parts.remove(largest)
        parts += [largest[::2], largest[1::2]]
    parts.sort(key=lambda part: -_width(groups[part[0]]) * len(part))
    weighted = [(part, 1.0) for part in parts] + [(part, 0.0) for part in parts[-1:]] * (-len(parts) % ranks)
    return weighted[rank::ranks]


def _width(group: Group) -> int:
    return max(map(len, group))
