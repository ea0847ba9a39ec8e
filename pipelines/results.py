"""What a local run came to: its evaluation, found below the output directory and shown in the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutelage.components.core.errors import ArtifactError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tutelage.pipelines.local import LocalRun

# Heading -> key of a model's entry in evaluation.json; whether its interval is shown.
FIGURES = {
    "win rate": ("win_rate", True),
    "gold reward": ("gold_reward", True),
    "learned reward": ("learned_reward", True),
    "KL": ("kl", False),
    "length": ("length", False),
}


@dataclass(frozen=True)
class Evaluation:
    """evaluation.json of a run, and its HTML report."""

    judged: Mapping[str, Any]
    report: Path


def find_evaluation(directory: Path) -> Evaluation:
    """The newest evaluation below the output directory of a run. Raises ArtifactError if there is none."""
    found = sorted(directory.glob("pipeline_root/*/evaluation/evaluation/evaluation.json"), key=_age)
    if not found:
        fix = "Name the --output-dir of a run that got as far as its evaluation."
        raise ArtifactError("there is no evaluation", where=str(directory), fix=fix)
    return _read(found[-1].parent.parent)


def evaluation_of(run: LocalRun) -> Evaluation:
    """The evaluation of a run. Raises ArtifactError if it did not get that far."""
    if "evaluation" not in run.outputs:
        raise ArtifactError("the run has no evaluation", where=run.run_id, fix=f"See {run.log}.")
    return _read(run.outputs["evaluation"])


def _read(task: Path) -> Evaluation:
    path = task / "evaluation" / "evaluation.json"
    try:
        return Evaluation(json.loads(path.read_text(encoding="utf-8")), task / "report")
    except (OSError, ValueError) as error:
        raise ArtifactError(f"no evaluation: {error}", where=str(path), fix="Run the evaluation again.") from None


def render(judged: Mapping[str, Any]) -> list[RenderableType]:
    """A table of the models, with intervals below the means, and the gate's verdict with its checks."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("model", no_wrap=True)
    for heading in FIGURES:
        table.add_column(heading, justify="right", no_wrap=True)
    for model in judged["models"]:
        cells = [_figure(model.get(key), interval) for key, interval in FIGURES.values()]
        table.add_row(str(model["name"]), *cells, style="bold" if model["role"] == "policy" else "")
    gate = judged["gate"]
    title = f"{judged.get('prompts', '?')} prompts, judged by the {judged.get('judge', '?')} reward"
    lines: list[RenderableType] = [title, table]
    for check in gate.get("checks", ()):
        mark, style = ("passed", "green") if check["passed"] else ("failed", "red")
        lines.append(Text(f"{mark}: {check['name']} {_number(check['value'])}: {check['why']}", style=style))
    style = "bold green" if gate["verdict"] == "promote" else "bold red"
    return [*lines, Text(f"verdict: {gate['verdict']}", style=style)]


def _age(path: Path) -> float:
    return path.stat().st_mtime


def _figure(value: Any, interval: bool) -> str:
    if not isinstance(value, Mapping):
        return "-"
    below = f"\n{_number(value['low'])} to {_number(value['high'])}" if interval else ""
    return f"{_number(value['mean'])}{below}"


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else str(value)
