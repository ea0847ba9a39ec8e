"""Layouts, masks and micro-batches: what is shared, where each token stands, every record once under the budget."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.components.core.batches import (
    Batch,
    Group,
    Sequence,
    align,
    collate,
    drawn,
    micro_batches,
    response_tokens,
    shuffled,
)
from tutelage.components.core.errors import DataError


def row(length: int, prompt: int = 1, id: str = "r") -> Sequence:
    return Sequence(id, tuple(range(4, 4 + length)), prompt)


# Layout, by hand


def test_sequences_stand_end_to_end_and_rows_say_where() -> None:
    batch = collate([(Sequence("a", (5, 6, 7, 8), 2), Sequence("a", (5, 9), 1)), (row(3, 0, "b"), row(1, 1, "b"))])
    assert batch.ids == ("a", "b")
    # The prompts differ: (5, 6), (5), () and (4).
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 5, 9, 4, 5, 6, 4]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2, 0]
    assert batch.rows.tolist() == [[0, 1, 2, 3], [4, 5, 0, 0], [6, 7, 8, 0], [9, 0, 0, 0]]
    assert batch.layout[0, 1].flatten()[:10].tolist() == [0, 1, 2, 3, 4, 5, 8, 9, 10, 12]
    # A first token is never predicted: the third row has no prompt, and still its first column is False.
    assert batch.mask.int().tolist() == [[0, 0, 1, 1], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert batch.lengths.tolist() == [4, 2, 3, 1]
    assert batch.places.tolist() == [2, 3, 5, 9, 10]
    assert batch.targets.tolist() == [7, 8, 9, 5, 6]
    assert batch.predictors.tolist() == [1, 2, 4, 6, 7]
    assert batch.ends.tolist() == [3, 5, 8, 9]
    assert batch.real == 10


def test_a_prompt_and_the_beginning_of_a_response_are_there_once() -> None:
    """The second row shares its prompt (5, 6) and its first response token 7 with the first."""
    batch = collate([(Sequence("a", (5, 6, 7, 8, 2), 2), Sequence("a", (5, 6, 7, 9), 2))])
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 2, 9]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 3]
    assert batch.rows.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 5, 0]]
    assert batch.layout[0, 1].flatten()[:6].tolist() == [0, 1, 2, 3, 4, 8]
    assert batch.targets.tolist() == [7, 8, 2, 7, 9]
    assert batch.predictors.tolist() == [1, 2, 3, 1, 2]
    assert batch.ends.tolist() == [4, 5]
    assert batch.real == 9


@pytest.mark.parametrize(
    ("sequences", "tokens"),
    [
        # Four responses to a prompt of 3: 3 + 2 + 2 + 1 + 3. Two of them begin alike, but neither is the first.
        ([(1, 2, 3, 4, 5), (1, 2, 3, 6, 7), (1, 2, 3, 8), (1, 2, 3, 6, 7, 8)], 11),
        ([(1, 2, 3, 4), (1, 2, 3, 4)], 4),  # twins
        ([(1, 2, 3, 4, 5), (1, 2, 3, 4)], 5),  # a prefix of the first
        ([(1, 2, 3), (1, 2, 3, 4, 5)], 5),  # the first has no response
        ([(1, 2, 3, 4), (1, 2, 5, 4)], 8),  # other prompts
    ],
)
def test_how_many_tokens_are_left_to_compute(sequences: list[tuple[int, ...]], tokens: int) -> None:
    batch = collate([(Sequence(str(index), one, 3),) for index, one in enumerate(sequences)])
    assert len(batch.input_ids) == tokens
    assert batch.real == sum(map(len, sequences))


@pytest.mark.parametrize("length", [0, 1])
def test_short_prompts_are_shared_too(length: int) -> None:
    batch = collate([(Sequence("a", (1, 2, 3), length), Sequence("a", (1, 2, 4, 5), length))])
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5]
    assert batch.mask.int().tolist() == [[0, 1, 1, 0], [0, 1, 1, 1]]


def test_a_batch_moves_to_a_device_as_a_whole() -> None:
    batch = collate([(row(3),)]).to(torch.device("meta"))
    assert {one.device.type for one in vars(batch).values() if isinstance(one, torch.Tensor)} == {"meta"}
    assert (batch.ids, batch.real) == (("r",), 3)


# Layout, of random groups

# A few words and a few prompts, so that much is shared.
texts = st.lists(st.integers(4, 6), min_size=1, max_size=7).map(tuple)
sequences = st.tuples(texts, st.integers(0, 7)).map(lambda one: Sequence("r", one[0], min(one[1], len(one[0]))))
random_groups = st.lists(st.lists(sequences, min_size=1, max_size=4).map(tuple), min_size=1, max_size=5)


@given(random_groups)
@settings(max_examples=150, deadline=None)
def test_layouts_of_random_groups(groups: list[Group]) -> None:
    batch, flat = collate(groups), [sequence for group in groups for sequence in group]
    rows, owners = batch.rows, batch.layout[0, 1].flatten()[: len(batch.input_ids)]
    assert torch.equal(rows.flatten()[owners], torch.arange(len(batch.input_ids)))
    for number, sequence in enumerate(flat):
        own = rows[number, : len(sequence)]
        assert tuple(batch.input_ids[own].tolist()) == sequence.tokens
        assert batch.positions[own].tolist() == list(range(len(sequence)))
        assert not rows[number, len(sequence) :].any()
        assert batch.ends[number] == own[-1]
    # A token that rows share is the same after the same tokens in all of them.
    before = {}
    for number, sequence in enumerate(flat):
        for column in range(len(sequence)):
            assert (
                before.setdefault(int(rows[number, column]), sequence.tokens[: column + 1])
                == (sequence.tokens[: column + 1])
            )
    assert naive_responses(batch, flat) == list(
        zip(batch.places.tolist(), batch.targets.tolist(), batch.predictors.tolist(), strict=True)
    )
    assert batch.mask.flatten().nonzero().squeeze(1).tolist() == batch.places.tolist()
    assert sum(map(response_tokens, groups)) == batch.mask.sum()


def naive_responses(batch: Batch, sequences: list[Sequence]) -> list[tuple[int, int, int]]:
    """(place, target, predictor) of every response token."""
    width = max(map(len, sequences))
    return [
        (number * width + column, sequence.tokens[column], int(batch.rows[number, column - 1]))
        for number, sequence in enumerate(sequences)
        for column in range(max(1, sequence.prompt_length), len(sequence))
    ]


@given(random_groups)
@settings(max_examples=100, deadline=None)
def test_each_row_shares_all_it_can_with_the_first_of_its_prompt(groups: list[Group]) -> None:
    flat = [sequence for group in groups for sequence in group]
    firsts: dict[tuple[int, ...], Sequence] = {}
    tokens = 0
    for sequence in flat:
        first = firsts.setdefault(sequence.prompt, sequence)
        if first is sequence:
            tokens += len(sequence)
            continue
        both = list(zip(sequence.tokens, first.tokens, strict=False))
        tokens += len(sequence) - next((n for n, (one, other) in enumerate(both) if one != other), len(both))
    assert len(collate(groups).input_ids) == tokens


# Rows and draws


def test_align_puts_rows_on_the_left_and_zeros_behind() -> None:
    rows = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]
    assert align(rows, 3).tolist() == [[1, 2, 0], [3, 0, 0]]
    assert align([torch.tensor([True])], 2).tolist() == [[True, False]]


def test_shuffled_depends_on_seed_and_epoch_alone() -> None:
    torch.manual_seed(0)
    first = shuffled(50, seed=1, epoch=2)
    torch.manual_seed(99)
    assert shuffled(50, seed=1, epoch=2) == first
    assert sorted(first) == list(range(50))
    assert len({tuple(shuffled(50, seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert drawn("abcdef", 3, seed=4) == drawn("abcdef", 6, seed=4)[:3] == drawn("abcdef", 9, seed=4)[:3]


# Micro-batches

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=60)


@given(lengths=lengths, size=st.integers(1, 3), tokens=st.integers(120, 400), ranks=st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_every_group_once_under_the_budget_and_as_many_micro_batches_per_rank(
    lengths: list[int], size: int, tokens: int, ranks: int
) -> None:
    groups = [tuple(row(max(1, length - member)) for member in range(size)) for length in lengths]
    shares = [micro_batches(groups, tokens=tokens, ranks=ranks, rank=rank) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    flat = [part for share in shares for part in share]
    assert all(weight in (0.0, 1.0) for _, weight in flat)
    assert sorted(index for indices, weight in flat if weight for index in indices) == list(range(len(groups)))
    for indices, _ in flat:
        assert collate([groups[index] for index in indices]).rows.numel() <= tokens
    fillers = [part for part in flat if part[1] == 0.0]
    # Only where there are fewer groups than ranks (or a remainder of single ones) does a rank get a filler.
    assert not fillers or (len(fillers) < ranks and all(len(indices) == 1 for indices, _ in flat))


def test_a_filler_has_weight_zero() -> None:
    groups = [(row(4),), (row(3),), (row(2),)]
    shares = [micro_batches(groups, tokens=64, ranks=2, rank=rank) for rank in range(2)]
    assert [weight for share in shares for _, weight in share] == [1.0, 1.0]
    shares = [micro_batches(groups[:1], tokens=64, ranks=3, rank=rank) for rank in range(3)]
    assert shares == [[([0], 1.0)], [([0], 0.0)], [([0], 0.0)]]


def test_no_groups_make_no_micro_batches() -> None:
    assert micro_batches([], tokens=64, ranks=2, rank=1) == []


def test_long_groups_come_first_and_short_ones_share() -> None:
    groups = [(row(length, length),) for length in (2, 40, 3, 39)]
    assert micro_batches(groups, tokens=80) == [([1, 3], 1.0), ([2, 0], 1.0)]


def rollouts(prompts: int, each: int, seed: int) -> list[Group]:
    """Prompts and responses of realistic random lengths (log-normal, 5 to 500), one group per response, shuffled."""
    draw = random.Random(seed)

    def length() -> int:
        return max(5, min(500, int(draw.lognormvariate(4, 0.7))))

    groups: list[Group] = []
    for number in range(prompts):
        prompt = tuple(draw.choices(range(60), k=length()))
        groups += [(Sequence(f"{number}/{one}", prompt + (1,) * length(), len(prompt)),) for one in range(each)]
    draw.shuffle(groups)
    return groups


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_rollouts_of_one_prompt_stay_together(ranks: int) -> None:
    """However the order was: within a micro-batch they are neighbours, and a budget cuts each prompt once at most."""
    groups = rollouts(20, 8, seed=3)
    parts = [part for rank in range(ranks) for part, _ in micro_batches(groups, tokens=4096, ranks=ranks, rank=rank)]
    for part in parts:
        prompts = [groups[index][0].prompt for index in part]
        assert 1 + sum(one != other for one, other in pairwise(prompts)) == len(set(prompts))
    assert sum(len({groups[index][0].prompt for index in part}) for part in parts) < 20 + len(parts)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("tokens", [2048, 8192, 65536])
@pytest.mark.parametrize(("prompts", "each"), [(64, 1), (16, 8)])
def test_ranks_get_about_the_same(ranks: int, tokens: int, prompts: int, each: int) -> None:
    """Real tokens of the fullest rank over the mean, and the same where ranks wait for each other after each part."""
    for seed in range(5):
        groups = rollouts(prompts, each, seed)
        shares = [
            [
                sum(len(groups[index][0]) for index in part)
                for part, _ in micro_batches(groups, tokens=tokens, ranks=ranks, rank=rank)
            ]
            for rank in range(ranks)
        ]
        mean = sum(map(sum, shares)) / ranks
        assert max(map(sum, shares)) < 1.4 * mean
        assert sum(map(max, zip(*shares, strict=True))) < 1.5 * mean


def test_a_group_that_is_too_long_is_named() -> None:
    groups = [(row(5, id="short"), row(5, id="short")), (row(30, id="p17"), row(2, id="p17"))]
    with pytest.raises(DataError, match=r"record p17 takes 60 tokens, a micro-batch holds 59.*micro_batch_tokens"):
        micro_batches(groups, tokens=59)
