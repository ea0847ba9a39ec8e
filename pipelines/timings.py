"""Where the time of a run went: the work itself, and everything around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tutelage.components.core.context import OVERHEAD_PHASES

if TYPE_CHECKING:
    from rich.table import Table

# Of the process, of its imports, ...; what is not work is overhead.
PHASES = ("start", "imports", "inputs", "work", "outputs", "tracking")


@dataclass(frozen=True)
class StageTime:
    """Seconds of one stage. phases: those of PHASES; `work` is what no overhead phase accounts for."""

    stage: str
    seconds: float
    phases: dict[str, float]

    @property
    def overhead(self) -> float:
        return self.seconds - self.phases["work"]


@dataclass(frozen=True)
class Timings:
    """The stages of a run in order. wall: seconds from the first process to the last, 0 if unknown."""

    stages: list[StageTime] = field(default_factory=list)
    wall: float = 0.0

    @property
    def between(self) -> float:
        """Seconds in which no stage ran: the platform's own."""
        return max(0.0, self.wall - sum(stage.seconds for stage in self.stages)) if self.wall else 0.0

    @property
    def overhead(self) -> float:
        return sum(stage.overhead for stage in self.stages) + self.between

    @property
    def total(self) -> float:
        return self.wall or sum(stage.seconds for stage in self.stages)


def timings(records: Sequence[dict[str, Any]], wall: float = 0.0) -> Timings:
    """Of the records that the stages left in the store (core.run_records); one that has not ended is left out."""
    return Timings([_stage(record) for record in records if "seconds" in record], wall)


def render(measured: Timings) -> Table:
    """A table with a line for each stage, one for the time between them, and the sum."""
    from rich.table import Table

    shown = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    shown.add_column("seconds", no_wrap=True)
    for heading in (*PHASES, "total", "overhead"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for stage in measured.stages:
        cells = [f"{stage.phases[phase]:.1f}" for phase in PHASES]
        shown.add_row(stage.stage, *cells, f"{stage.seconds:.1f}", _share(stage.overhead, stage.seconds))
    if measured.wall:
        shown.add_row("between stages", *[""] * len(PHASES), f"{measured.between:.1f}", "")
    sums = [f"{sum(stage.phases[phase] for stage in measured.stages):.1f}" for phase in PHASES]
    shown.add_row("run", *sums, f"{measured.total:.1f}", _share(measured.overhead, measured.total))
    return shown


def _stage(record: dict[str, Any]) -> StageTime:
    seconds, known = float(record["seconds"]), record.get("phases", {})
    around = {phase: float(known.get(phase, 0.0)) for phase in OVERHEAD_PHASES}
    return StageTime(str(record["stage"]), seconds, {**around, "work": max(0.0, seconds - sum(around.values()))})


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else "-"
