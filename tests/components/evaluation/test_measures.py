"""Intervals, win rates and diversity: by hand, and intervals by how often they hold the truth."""

from __future__ import annotations

import math
import random

import pytest

from tutelage.components.evaluation.measures import distinct_2, interval, paired_gain, win_rate


def test_an_interval_by_hand() -> None:
    """Mean 3, unbiased variance 2.5, standard error sqrt(2.5 / 5) = 0.707107, half width 1.385904."""
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found == pytest.approx({"mean": 3.0, "low": 3 - 1.385904, "high": 3 + 1.385904}, abs=1e-5)


def test_intervals_hold_the_true_mean_in_95_of_100_cases() -> None:
    """1,000 samples of 60 skewed values of mean 1: within four standard errors of 95 % less what skewness costs."""
    draw = random.Random(0)
    held = 0
    for _ in range(1000):
        found = interval([draw.gammavariate(4, 0.25) for _ in range(60)])
        held += found["low"] <= 1.0 <= found["high"]
    assert held / 1000 == pytest.approx(0.945, abs=4 * math.sqrt(0.05 * 0.95 / 1000))


def test_equal_values_have_no_width_and_large_ones_lose_no_digits() -> None:
    assert interval([2.5] * 10) == {"mean": 2.5, "low": 2.5, "high": 2.5}
    shifted = interval([1e9 + 1, 1e9 + 2, 1e9 + 3])
    assert shifted["high"] - shifted["low"] == pytest.approx(2 * 1.959964 / math.sqrt(3), rel=1e-6)


@pytest.mark.parametrize("values", [[], [1.0]])
def test_one_value_has_no_interval(values: list[float]) -> None:
    with pytest.raises(ValueError, match="at least two values"):
        interval(values)


def test_bounds_cut_the_interval_not_the_mean() -> None:
    found = interval([0.0, 1.0, 1.0], bounds=(0.0, 1.0))
    assert found["mean"] == pytest.approx(2 / 3)
    assert (found["low"], found["high"]) == (pytest.approx(2 / 3 - 0.653321, abs=1e-5), 1.0)


def test_a_paired_gain_is_narrower_than_the_values() -> None:
    """Each prompt gains exactly 0.5, however the rewards differ between prompts."""
    baseline = [float(value) for value in range(100)]
    assert paired_gain([value + 0.5 for value in baseline], baseline) == pytest.approx(
        {"mean": 0.5, "low": 0.5, "high": 0.5}
    )
    with pytest.raises(ValueError, match="zip"):
        paired_gain([1.0, 2.0], [1.0])


def test_win_rates_count_ties_half() -> None:
    found = win_rate([1.0, 0.0, 2.0, 2.0], [0.0, 1.0, 2.0, 1.0])
    assert found["mean"] == (1 + 0 + 0.5 + 1) / 4
    assert 0 <= found["low"] < found["mean"] < found["high"] <= 1
    assert win_rate([1.0] * 5, [0.0] * 5) == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert win_rate([1.0] * 5, [1.0] * 5) == {"mean": 0.5, "low": 0.5, "high": 0.5}
    there, back = win_rate([3.0, 1.0, 5.0], [2.0, 2.0, 2.0]), win_rate([2.0, 2.0, 2.0], [3.0, 1.0, 5.0])
    assert there["mean"] + back["mean"] == pytest.approx(1.0)


def test_distinct_pairs_by_hand() -> None:
    assert distinct_2(["a b a b"]) == 2 / 3  # ab, ba, ab
    assert distinct_2(["a b", "a b"]) == 0.5  # over the texts together
    assert distinct_2(["a b c", "d e f"]) == 1.0
    assert distinct_2(["a  b\n c"]) == 1.0
    assert distinct_2(["word", "", "  "]) == 0.0
    assert distinct_2([]) == 0.0
