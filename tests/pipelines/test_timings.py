"""Where the time of a run went."""

from __future__ import annotations

import pytest
from rich.console import Console

from tutelage.pipelines.timings import render, timings

RECORDS = [
    {"stage": "preflight", "seconds": 4.0, "phases": {"start": 1.0, "tracking": 2.0}},
    {
        "stage": "sft",
        "seconds": 20.0,
        "phases": {"start": 0.5, "imports": 2.0, "inputs": 1.0, "outputs": 1.5, "tracking": 1.0, "steps": 13.0},
    },
    {"stage": "evaluation", "status": "running"},
]


def test_work_is_what_no_overhead_phase_accounts_for() -> None:
    measured = timings(RECORDS, wall=30.0)
    preflight, sft = measured.stages
    assert (preflight.phases["work"], preflight.overhead) == (1.0, 3.0)
    assert (sft.phases["work"], sft.overhead) == (14.0, 6.0)
    assert measured.between == 6.0
    assert measured.overhead == 15.0
    assert measured.total == 30.0


def test_without_the_wall_clock_there_is_nothing_between() -> None:
    measured = timings(RECORDS)
    assert (measured.between, measured.total) == (0.0, 24.0)


def test_no_records_are_no_trouble() -> None:
    assert timings([]).total == 0.0
    render(timings([]))


@pytest.mark.parametrize("line", [["sft", "0.5", "2.0", "1.0", "14.0", "1.5", "1.0", "20.0", "30%"],
                                  ["between stages", "6.0"], ["run", "15.0", "30.0", "50%"]])  # fmt: skip
def test_the_table_has_a_line_for_each(line: list[str]) -> None:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(render(timings(RECORDS, wall=30.0)))
    shown = next(each for each in capture.get().splitlines() if each.startswith(line[0]))
    assert [cell for cell in line if cell not in shown] == []
