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

# Heading -> key of a model's entry in evaluation.json.
FIGURES = {
    "win rate": "win_rate",
    "gold reward": "gold_reward",
    "learned reward": "learned_reward",
    "KL": "kl",
    "length": "length",
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
    path = found[-1]
    try:
        judged = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"is not JSON: {error}", where=str(path), fix="Run the evaluation again.") from None
    return Evaluation(judged, path.parent.parent / "report")


def render(judged: Mapping[str, Any]) -> list[RenderableType]:
    """A table of the models with their intervals, and the gate's verdict with its checks."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{judged.get('prompts', '?')} prompts, judged by the {judged.get('judge', '?')} reward")
    table.add_column("model")
    for heading in FIGURES:
        table.add_column(heading, justify="right")
    for model in judged["models"]:
        table.add_row(f"{model['name']} ({model['role']})", *[_interval(model.get(key)) for key in FIGURES.values()])
    gate = judged["gate"]
    lines: list[RenderableType] = [table]
    for check in gate.get("checks", ()):
        mark, style = ("passed", "green") if check["passed"] else ("failed", "red")
        lines.append(Text(f"{mark}: {check['name']} {_number(check['value'])}: {check['why']}", style=style))
    style = "bold green" if gate["verdict"] == "promote" else "bold red"
    return [*lines, Text(f"verdict: {gate['verdict']}", style=style)]


def _age(path: Path) -> float:
    return path.stat().st_mtime


def _interval(value: Any) -> str:
    if not isinstance(value, Mapping):
        return "-"
    return f"{_number(value['mean'])} [{_number(value['low'])}, {_number(value['high'])}]"


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else str(value)
