"""What is measured on a set of answers. Intervals are at 95%."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

# The 97.5% quantile of the standard normal distribution.
Z = 1.959964


def interval(values: Sequence[float], *, bounds: tuple[float, float] = (-math.inf, math.inf)) -> dict[str, float]:
    """Mean with its 95% interval, mean +- 1.96 s / sqrt(n) (s unbiased), cut at `bounds`.

    The normal approximation: meant for hundreds of values, one per prompt. Raises ValueError for fewer than two.
    """
    count = len(values)
    if count < 2:
        raise ValueError(f"an interval needs at least two values, got {count}")
    mean = math.fsum(values) / count
    error = Z * math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
    return {"mean": mean, "low": max(bounds[0], mean - error), "high": min(bounds[1], mean + error)}


def paired_gain(values: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """Interval of the difference, prompt by prompt."""
    return interval([value - base for value, base in zip(values, baseline, strict=True)])


def win_rate(values: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """Share of prompts with the higher reward, ties counted half, with its interval inside [0, 1]."""
    wins = [
        1.0 if value > base else 0.5 if value == base else 0.0 for value, base in zip(values, baseline, strict=True)
    ]
    return interval(wins, bounds=(0.0, 1.0))


def distinct_2(texts: Sequence[str]) -> float:
    """Different word pairs over all word pairs of the texts (Li et al. 2016, arXiv 1510.03055); 0 without any."""
    pairs = [pair for text in texts for pair in pairwise(text.split())]
    return len(set(pairs)) / len(pairs) if pairs else 0.0
