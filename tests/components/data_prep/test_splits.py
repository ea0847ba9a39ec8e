from __future__ import annotations

import pytest

from tutelage.components.data_prep.splits import content_id, content_key, draw, normalized, split_of, text_key

TEXTS = [f"text number {number}" for number in range(10_000)]


def test_the_split_of_a_text_never_changes() -> None:
    """Else what was held out from an older model would be trained on."""
    held_out = [number for number, text in enumerate(TEXTS[:100]) if split_of(text_key(text), 0.1) == "eval"]
    assert held_out == [5, 10, 18, 25, 36, 62, 63, 66, 73, 79, 82, 91, 94, 97]


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.5])
def test_the_fraction_is_met(fraction: float) -> None:
    """10,000 draws: four standard deviations are below 0.02."""
    held_out = sum(split_of(text_key(text), fraction) == "eval" for text in TEXTS)
    assert held_out / len(TEXTS) == pytest.approx(fraction, abs=0.02)


def test_a_larger_fraction_holds_out_more_and_releases_nothing() -> None:
    small, large = ({text for text in TEXTS if split_of(text_key(text), share) == "eval"} for share in (0.1, 0.2))
    assert small < large


def test_the_ends_of_the_fraction() -> None:
    keys = [-(1 << 63), -1, 0, (1 << 63) - 1]
    assert [split_of(key, 0.0) for key in keys] == ["train"] * 4
    assert [split_of(key, 0.5) for key in keys] == ["train", "train", "eval", "eval"]


@pytest.mark.parametrize("other", ["  the film\twas\n\ngood ", "THE FILM WAS GOOD", "the ﬁlm was good"])
def test_case_space_and_form_make_no_other_text(other: str) -> None:
    assert normalized(other) == "the film was good"
    assert text_key(other) == text_key("the film was good")


def test_content_is_taken_exactly() -> None:
    assert content_key("a", "b") == content_key("a", "b")
    assert len({content_key("a", "b"), content_key("ab", ""), content_key("A", "b"), content_key("a b")}) == 4


def test_keys_fit_into_an_integer_of_sqlite() -> None:
    assert all(-(1 << 63) <= content_key(text) < 1 << 63 for text in TEXTS[:1000])


def test_ids_are_16_digits() -> None:
    assert content_id(0) == "0" * 16
    assert content_id(-1) == "f" * 16


def test_draws_are_uniform_and_depend_on_their_parts() -> None:
    counts = [0] * 5
    for number in range(10_000):
        counts[draw(5, "part", number)] += 1
    assert counts == pytest.approx([2000] * 5, abs=160)  # four standard deviations
    assert [draw(1000, "seed", seed) for seed in range(3)] == [draw(1000, "seed", seed) for seed in range(3)]
    assert len({draw(1 << 63, "seed", seed) for seed in range(100)}) == 100
