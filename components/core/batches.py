"""Micro-batches: sequences of tokens end to end, shared prompts once, cut by length under a token budget."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from tutelage.components.core.errors import DataError

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Sequence:
    """Tokens of prompt and response. The response, its end token included, begins at `prompt_length`."""

    id: str
    tokens: tuple[int, ...]
    prompt_length: int

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.tokens[: self.prompt_length]


# What is forwarded together: one sequence, the chosen and the rejected of a pair, or the members of a group.
Group = tuple[Sequence, ...]


@dataclass(frozen=True)
class Batch:
    """The R sequences of some groups, as N tokens end to end. What sequences with one prompt begin with is there once.

    Over the N tokens: input_ids [N] and positions [N] in their sequences.
    Over rows, one per sequence, padded on the right to T: mask [R,T], True on response tokens; lengths [R];
    layout [1,2,R,T]: layout[0,0] says which of the N tokens stands there (0 on padding), and the first N entries of
    layout[0,1], flattened, where each token stands first (see `attention.rows_attention`).
    Over the M response tokens, row by row: targets [M], their places [M] in the flattened rows, and predictors [M],
    which of the N tokens each follows. ends [R]: which of the N tokens is each row's last.
    ids are those of the groups. real: tokens of all rows together, so N / real is what sharing leaves to compute.
    """

    ids: tuple[str, ...]
    input_ids: Tensor
    positions: Tensor
    layout: Tensor
    mask: Tensor
    lengths: Tensor
    targets: Tensor
    places: Tensor
    predictors: Tensor
    ends: Tensor
    real: int

    @property
    def rows(self) -> Tensor:
        """Which of the N tokens stands where: [R,T]."""
        return self.layout[0, 0]

    def to(self, device: torch.device) -> Batch:
        moved: dict[str, Any] = {
            field.name: (value.pin_memory() if device.type == "cuda" else value).to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)


def collate(groups: SequenceOf[Group]) -> Batch:
    """One row per sequence, the members of a group next to each other."""
    sequences = [sequence for group in groups for sequence in group]
    height, width = len(sequences), max(map(len, sequences))
    tokens: list[int] = []
    positions: list[int] = []
    owners: list[int] = []
    rows = torch.zeros((height, width), dtype=torch.long)
    starts: dict[tuple[int, ...], tuple[Sequence, int]] = {}
    for row, sequence in enumerate(sequences):
        other, before = starts.get(sequence.prompt, (None, 0))
        shared = 0 if other is None else _common(sequence.tokens, other.tokens, sequence.prompt_length)
        if other is None:
            starts[sequence.prompt] = sequence, row
        else:
            rows[row, :shared] = rows[before, :shared]
        rows[row, shared : len(sequence)] = torch.arange(len(tokens), len(tokens) + len(sequence) - shared)
        tokens += sequence.tokens[shared:]
        positions += range(shared, len(sequence))
        owners += range(row * width + shared, row * width + len(sequence))
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    # Nothing comes before the first token, so nothing predicts it.
    prompts = torch.tensor([max(1, sequence.prompt_length) for sequence in sequences])
    column = torch.arange(width)
    mask = (column >= prompts.unsqueeze(1)) & (column < lengths.unsqueeze(1))
    places = mask.flatten().nonzero().squeeze(1)
    input_ids, flat = torch.tensor(tokens), rows.flatten()
    layout = torch.zeros((1, 2, height, width), dtype=torch.long)
    layout[0, 0] = rows
    layout[0, 1].view(-1)[: len(owners)] = torch.tensor(owners)
    return Batch(
        ids=tuple(group[0].id for group in groups),
        input_ids=input_ids,
        positions=torch.tensor(positions),
        layout=layout,
        mask=mask,
        lengths=lengths,
        targets=input_ids[flat[places]],
        places=places,
        predictors=flat[places - 1],
        ends=rows.gather(1, (lengths - 1).unsqueeze(1)).squeeze(1),
        real=int(lengths.sum()),
    )


def _common(one: tuple[int, ...], other: tuple[int, ...], known: int) -> int:
    """How many tokens both begin with; `known` of them are."""
    end = min(len(one), len(other))
    while known < end and one[known] == other[known]:
        known += 1
    return known


def one_each(group: Group) -> float:
    """The unit of losses that are means over examples."""
    return 1.0


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
    """Splits one global batch by length into micro-batches of at most `tokens` tokens, rows padded.

    Groups with the same prompt stay next to each other, so that it is computed once.
    Returns this rank's [(indices into groups, weight)]; every rank gets as many, of about the same size. The weight is
    1 but for a filler of weight 0 where there are fewer micro-batches than ranks ask for.
    Raises DataError for a group that is too long alone.
    """
    longest: dict[tuple[int, ...], int] = {}
    for group in groups:
        longest[group[0].prompt] = max(_width(group), longest.get(group[0].prompt, 0))
    order = sorted(
        range(len(groups)),
        key=lambda index: (-longest[groups[index][0].prompt], groups[index][0].prompt, -_width(groups[index]), index),
    )
    shapes = [(_width(group), len(group)) for group in groups]
    for group, (width, rows) in zip(groups, shapes, strict=True):
        if width * rows > tokens:
            raise DataError(
                f"record {group[0].id} takes {width * rows} tokens, a micro-batch holds {tokens}",
                fix="Raise training.micro_batch_tokens, or lower max_tokens.",
            )
    parts = _cut(order, shapes, tokens)
    if ranks > 1 and parts:
        # The smallest budget that takes no more rounds: so every rank gets about the same.
        most = -(-len(parts) // ranks) * ranks
        least = max(width * rows for width, rows in shapes)
        budget = bisect_left(range(tokens), True, lo=least, key=lambda few: len(_cut(order, shapes, few)) <= most)
        parts = _cut(order, shapes, budget)
    while len(parts) % ranks and (divisible := [part for part in parts if len(part) > 1]):
        largest = max(divisible, key=lambda part: _size(part, shapes))
        parts.remove(largest)
        parts += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
    parts.sort(key=lambda part: -_size(part, shapes))
    weighted = [(part, 1.0) for part in parts] + [(part, 0.0) for part in parts[-1:]] * (-len(parts) % ranks)
    # Dealt there and back, so that no rank always gets the larger ones.
    rounds = [weighted[start : start + ranks] for start in range(0, len(weighted), ranks)]
    return [(one if number % 2 == 0 else one[::-1])[rank] for number, one in enumerate(rounds)]


def _cut(order: SequenceOf[int], shapes: SequenceOf[tuple[int, int]], tokens: int) -> list[list[int]]:
    """`order` in runs of at most `tokens` tokens; shapes: (width, rows) of each group."""
    parts: list[list[int]] = []
    rows = widest = 0
    for index in order:
        width, height = shapes[index]
        if not parts or max(width, widest) * (rows + height) > tokens:
            parts.append([])
            rows = widest = 0
        parts[-1].append(index)
        rows, widest = rows + height, max(width, widest)
    return parts


def _size(part: SequenceOf[int], shapes: SequenceOf[tuple[int, int]]) -> int:
    """Tokens of a micro-batch, rows padded."""
    return max(shapes[index][0] for index in part) * sum(shapes[index][1] for index in part)


def _width(group: Group) -> int:
    return max(map(len, group))
