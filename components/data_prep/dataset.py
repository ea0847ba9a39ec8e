"""The six files of a prepared dataset, and what is counted while they are written."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from tutelage.components.core.records import Demo, Pair, Prompt, plain_text
from tutelage.components.core.tables import Writer
from tutelage.components.data_prep.splits import Split

CHARACTER_EDGES = sorted({int(digit * 10**power) for power in range(6) for digit in (1, 1.5, 2, 3, 5, 7)})
STRENGTH_EDGES = [step / 4 for step in range(-16, 33)]
AGREEMENT_EDGES = [step / 20 for step in range(21)]
MOST_SOURCES = 1000
OTHER_SOURCES = "(other)"


class Histogram:
    """Counts of values between edges; what lies beyond is in the first and the last bin."""

    def __init__(self, edges: Sequence[float]) -> None:
        self.edges = edges
        self.count, self.total = 0, 0.0
        self.low, self.high = float("inf"), float("-inf")
        self._bins = [0] * (len(edges) - 1)

    def add(self, value: float) -> None:
        self.count += 1
        self.total += value
        if value < self.low:
            self.low = value
        if value > self.high:
            self.high = value
        self._bins[min(max(bisect_right(self.edges, value) - 1, 0), len(self._bins) - 1)] += 1

    def summary(self) -> dict[str, Any]:
        """Count, mean, extremes, and the bins from the first to the last that hold something."""
        if not self.count:
            return {"count": 0}
        filled = [place for place, count in enumerate(self._bins) if count]
        first, last = filled[0], filled[-1] + 1
        return {
            "count": self.count,
            "mean": self.total / self.count,
            "min": self.low,
            "max": self.high,
            "edges": list(self.edges[first : last + 1]),
            "counts": self._bins[first:last],
        }


class Dataset:
    """Writes records of both splits to `<kind>.<split>.jsonl` of a directory, which appear together at the end."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.sources: dict[str, Counter[str]] = {}
        self.dropped: Counter[str] = Counter()
        self.prompt, self.chosen, self.rejected = (Histogram(CHARACTER_EDGES) for _ in range(3))
        self.strength, self.agreement = Histogram(STRENGTH_EDGES), Histogram(AGREEMENT_EDGES)
        self._writers = {
            (kind, split): Writer(directory / f"{kind}.{split}.jsonl")
            for kind in ("demos", "pairs", "prompts")
            for split in ("train", "eval")
        }
        self._exit = ExitStack()

    def add_pair(self, split: Split, pair: Pair) -> None:
        self._writers["pairs", split].write(pair)
        self.prompt.add(len(plain_text(pair.prompt)))
        self.chosen.add(len(pair.chosen))
        self.rejected.add(len(pair.rejected))
        if pair.strength is not None:
            self.strength.add(pair.strength)
        if pair.agreement is not None:
            self.agreement.add(pair.agreement)
        if pair.source is not None:
            self._count_source(pair.source, split)

    def add_demo(self, split: Split, demo: Demo) -> None:
        self._writers["demos", split].write(demo)

    def add_prompt(self, split: Split, prompt: Prompt) -> None:
        self._writers["prompts", split].write(prompt)

    def _count_source(self, source: str, split: Split) -> None:
        if source not in self.sources and len(self.sources) >= MOST_SOURCES:
            source = OTHER_SOURCES  # a file may name another source in each row
        self.sources.setdefault(source, Counter())[split] += 1

    def counts(self) -> dict[str, int]:
        """Records by file name."""
        return {writer.path.name: writer.count for writer in self._writers.values()}

    def summary(self) -> dict[str, Any]:
        histograms = {
            "prompt_characters": self.prompt,
            "chosen_characters": self.chosen,
            "rejected_characters": self.rejected,
            "strength": self.strength,
            "agreement": self.agreement,
        }
        return {
            "files": self.counts(),
            "pairs_by_source": {source: dict(counts) for source, counts in sorted(self.sources.items())},
            "dropped": dict(self.dropped),
            "histograms": {name: histogram.summary() for name, histogram in histograms.items() if histogram.count},
        }

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for writer in self._writers.values():
                stack.enter_context(writer)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._exit.__exit__(*raised)
