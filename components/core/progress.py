"""How far a stage is: a bar on a terminal, plain lines with the time in a log. Only rank 0 speaks, on stderr."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

SECONDS_BETWEEN_LINES = 10.0

monotonic = time.monotonic


def say(message: str, *, stage: str = "") -> None:
    """One plain line: `12:03:01 sft: message`."""
    if _speaks():
        print(f"{time.strftime('%H:%M:%S')} {stage + ': ' if stage else ''}{message}", file=sys.stderr, flush=True)


@contextmanager
def progress(total: int | None, description: str, *, unit: str = "step") -> Iterator[Progress]:
    """Counts what is done inside, of `total` (None: unknown), and shows it with the rate and the time left.

    On a terminal it is a bar. Elsewhere it is a line at most every 10 seconds and one at the end, also at an early end.
    """
    if not _speaks():
        kind: type[Progress] = Progress
    else:
        kind = _Bar if _on_terminal() else _Lines
    shown = kind(total, description, unit)
    try:
        yield shown
    finally:
        shown.close()


class Progress:
    """A count with a rate. This one shows nothing.

    The first call of `advance` starts the clock of the rate and is no part of it: it may be the slow first step, or the
    jump to where a resumed run goes on.
    """

    def __init__(self, total: int | None, description: str, unit: str) -> None:
        self.total, self.description, self.unit = total, description, unit
        self.done = 0
        self.figures: dict[str, Any] = {}
        self._first: tuple[float, int] | None = None

    def advance(self, n: int = 1, **figures: Any) -> None:
        """`n` more are done. `figures` are shown beside the count until others of the same name replace them."""
        self.done += n
        self.figures |= figures
        if self._first is None:
            self._first = (monotonic(), self.done)

    def close(self) -> None:
        """Shows the last state."""

    def rate(self) -> float:
        """Done per second; 0 while it is unknown."""
        if self._first is None:
            return 0.0
        start, before = self._first
        seconds = monotonic() - start
        return (self.done - before) / seconds if seconds > 0 else 0.0

    def count(self) -> str:
        """`120/500 steps`, or `120 steps` of an unknown total."""
        return f"{self.done}{'' if self.total is None else f'/{self.total}'} {self.unit}s"

    def speed(self) -> str:
        """`3.204 steps/s`, or `4.5 s/step` of slow ones; empty while it is unknown."""
        rate = self.rate()
        if rate == 0.0:
            return ""
        return f"{_short(rate)} {self.unit}s/s" if rate >= 1 else f"{_short(1 / rate)} s/{self.unit}"

    def left(self) -> str:
        """`1:58 left`; empty while it is unknown, and at the end."""
        rate, undone = self.rate(), (self.total or 0) - self.done
        return f"{duration(undone / rate)} left" if rate > 0 and undone > 0 else ""

    def reading(self) -> str:
        """The figures: `train/loss 0.6931, reward/mean 1.25`."""
        return ", ".join(f"{name} {_short(value)}" for name, value in self.figures.items())


class _Lines(Progress):
    """Plain lines, for a log."""

    def __init__(self, total: int | None, description: str, unit: str) -> None:
        super().__init__(total, description, unit)
        self._started = self._said = monotonic()

    def advance(self, n: int = 1, **figures: Any) -> None:
        super().advance(n, **figures)
        if monotonic() - self._said >= SECONDS_BETWEEN_LINES and self.done != self.total:  # the end has its own line
            self._said = monotonic()
            self._line(self.speed(), self.left())

    def close(self) -> None:
        early = "stopped early" if self.total is not None and self.done < self.total else ""
        self._line(early, f"in {duration(monotonic() - self._started)}", self.speed())

    def _line(self, *asides: str) -> None:
        aside = ", ".join(part for part in asides if part)
        parts = [f"{self.description}: {self.count()}", f"({aside})" if aside else "", self.reading()]
        say(" ".join(part for part in parts if part))


class _Bar(Progress):
    """A bar, for a terminal. Bars may be nested, and lines said meanwhile appear above them."""

    def __init__(self, total: int | None, description: str, unit: str) -> None:
        super().__init__(total, description, unit)
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Rich

        texts = [TextColumn(f"{{task.{field}}}", markup=False) for field in ("description", "fields[text]")]
        self._bar = Rich(texts[0], BarColumn(), texts[1], console=_console())
        self._task = self._bar.add_task(description, total=total, text=self.count())
        self._drawn = monotonic()
        self._bar.start()

    def advance(self, n: int = 1, **figures: Any) -> None:
        super().advance(n, **figures)
        if monotonic() - self._drawn >= 0.1:
            self._draw()

    def close(self) -> None:
        self._draw()
        self._bar.stop()

    def _draw(self) -> None:
        self._drawn = monotonic()
        text = "  ".join(part for part in (self.count(), self.speed(), self.left(), self.reading()) if part)
        self._bar.update(self._task, completed=self.done, text=text)


def duration(seconds: float) -> str:
    """`0:07`, `2:05`, `1:02:05`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
    return str(value)


def _speaks() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _on_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


@cache
def _console() -> Console:
    from rich.console import Console

    return Console(stderr=True)  # one for all, or bars could not be nested
