"""Tokens, masks and micro-batches: prefixes, counts, and every record exactly once under the budget."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.components.core.batches import (
    Encoder,
    Group,
    Sequence,
    align,
    collate,
    micro_batches,
    response_tokens,
    shuffled,
)
from tutelage.components.core.errors import DataError
from tutelage.components.core.records import Message, Pair

CHAT = (
    "{% for turn in messages %}<s> {{ turn.role }} {{ turn.content }} {% endfor %}"
    "{% if add_generation_prompt %}w9 {% endif %}"
)


def row(length: int, prompt: int = 1, id: str = "r") -> Sequence:
    return Sequence(id, tuple(range(4, 4 + length)), prompt)


# Encoder


def test_prompt_and_response_are_joined_with_start_and_end(tokenizer: Any) -> None:
    sequence = Encoder(tokenizer, 32)("a", "w5 w6", "w7 w8 w9")
    assert sequence.tokens == (1, 5, 6, 7, 8, 9, 2)
    assert sequence.prompt_length == 3
    assert sequence.id == "a"


def test_a_response_that_did_not_end_has_no_end_token(tokenizer: Any) -> None:
    assert Encoder(tokenizer, 32)("a", "w5", "w7", ended=False).tokens == (1, 5, 7)


def test_without_a_start_token_the_prompt_stands_first(tokenizer: Any) -> None:
    bare = tokenizer.__class__(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>", pad_token="<pad>")
    encoder = Encoder(bare, 32)
    assert encoder("a", "w5", "w7").tokens == (5, 7, 2)
    assert encoder("a", "", "w7 w8") == Sequence("a", (7, 8, 2), 0)


def test_prompt_is_a_prefix_where_the_tokenizer_would_merge_across_the_boundary() -> None:
    from tutelage.components.core.models import train_tokenizer

    merging = train_tokenizer(["abab ab ab"] * 50, 270)
    assert merging.tokenize("ab") == ["ab"]
    encoder = Encoder(merging, 32)
    sequence = encoder("x", "a", "b")
    assert sequence.tokens[: sequence.prompt_length] == encoder.prompt("a")
    assert merging.convert_ids_to_tokens(list(sequence.tokens)) == ["<s>", "a", "b", "</s>"]
    assert encoder.decode(sequence.tokens) == "ab"


# Without <, which the names of special tokens begin with: those are read as tokens wherever they stand.
texts = st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=1, max_size=12)


@given(prompt=texts, response=texts)
@settings(max_examples=60, deadline=None)
def test_prefix_and_round_trip_hold_for_any_text(prompt: str, response: str) -> None:
    encoder = byte_encoder()
    sequence = encoder("x", prompt, response)
    assert sequence.tokens[: sequence.prompt_length] == encoder.prompt(prompt)
    assert encoder.decode(sequence.tokens[: sequence.prompt_length]) == prompt
    assert encoder.decode(sequence.tokens[sequence.prompt_length :]) == response
    assert sequence.tokens[-1] == encoder.end


@functools.cache
def byte_encoder() -> Encoder:
    from tutelage.components.core.models import train_tokenizer

    return Encoder(train_tokenizer(["the the he"] * 9, 280), 64)


def test_messages_go_through_the_chat_template(tokenizer: Any) -> None:
    import copy

    chat = copy.deepcopy(tokenizer)
    chat.chat_template = CHAT
    turns = [Message(role="w10", content="w5 w6"), Message(role="w11", content="w7")]
    encoder = Encoder(chat, 32)
    assert encoder.prompt(turns) == (1, 10, 5, 6, 1, 11, 7, 9)
    assert encoder("a", turns, "w8") == Sequence("a", (1, 10, 5, 6, 1, 11, 7, 9, 8, 2), 8)


def test_messages_without_a_chat_template_are_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="no chat template"):
        Encoder(tokenizer, 32).prompt([Message(role="user", content="w5")])


def test_pairs_share_their_prompt_and_keep_their_order(tokenizer: Any) -> None:
    pairs = [Pair(id=f"p{n}", prompt="w5", chosen="w6", rejected=f"w{n}") for n in (7, 8)]
    groups = Encoder(tokenizer, 32).pairs(pairs, pytest.fail)
    assert [[one.tokens for one in group] for group in groups] == [
        [(1, 5, 6, 2), (1, 5, 7, 2)],
        [(1, 5, 6, 2), (1, 5, 8, 2)],
    ]
    assert [group[0].id for group in groups] == ["p7", "p8"]


def test_pairs_longer_than_the_context_are_left_out_and_counted(tokenizer: Any) -> None:
    long = [Pair(id=f"long{n}", prompt="w5", chosen="w6", rejected="w7 " * (4 + n)) for n in range(1, 5)]
    fits = Pair(id="fits", prompt="w5", chosen="w6", rejected="w7 w8 w9 w10")  # 1 + 1 + 4 + 1 = 7 tokens
    lines: list[str] = []
    groups = Encoder(tokenizer, 7).pairs([long[0], fits, *long[1:]], lines.append)
    assert [group[0].id for group in groups] == ["fits"]
    (line,) = lines
    assert "left out 4 of 5 records longer than 7 tokens" in line
    assert "long1 (8 tokens), long2 (9 tokens), long3 (10 tokens)" in line


def test_a_context_that_nothing_fits_is_an_error(tokenizer: Any) -> None:
    pair = Pair(id="p", prompt="w5", chosen="w6", rejected="w7")
    with pytest.raises(DataError, match=r"no record fits into 3 tokens.*max_tokens"):
        Encoder(tokenizer, 3).pairs([pair], lambda line: None)


# Batches


def test_collate_pads_right_and_masks_responses() -> None:
    batch = collate([(Sequence("a", (5, 6, 7, 8), 2), Sequence("a", (5, 6), 1)), (row(3, 0, "b"), row(1, 1, "b"))], 3)
    assert batch.ids == ("a", "b")
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [5, 6, 3, 3], [4, 5, 6, 3], [4, 3, 3, 3]]
    # A first token is never predicted: the third row has no prompt, and still its first column is False.
    assert batch.mask.int().tolist() == [[0, 0, 1, 1], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert batch.lengths.tolist() == [4, 2, 3, 1]
    assert batch.padding == pytest.approx(1 - 10 / 16)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_response_tokens_are_those_of_the_mask(shapes: list[tuple[int, int]]) -> None:
    groups: list[Group] = [(row(length, min(prompt, length)),) for length, prompt in shapes]
    assert sum(map(response_tokens, groups)) == collate(groups, 0).mask.sum()


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


# Micro-batches

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=60)


@given(lengths=lengths, size=st.integers(1, 3), tokens=st.integers(120, 400), ranks=st.integers(1, 5))
@settings(max_examples=200, deadline=None)
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
        batch = collate([groups[index] for index in indices], 0)
        assert batch.input_ids.numel() <= tokens
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
    groups = [(row(length),) for length in (2, 40, 3, 39)]
    assert micro_batches(groups, tokens=80) == [([1, 3], 1.0), ([2, 0], 1.0)]


def test_a_group_that_is_too_long_is_named() -> None:
    groups = [(row(5, id="short"), row(5, id="short")), (row(30, id="p17"), row(2, id="p17"))]
    with pytest.raises(DataError, match=r"record p17 takes 60 tokens, a micro-batch holds 59.*micro_batch_tokens"):
        micro_batches(groups, tokens=59)
