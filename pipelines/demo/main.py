"""The demo: both pipelines on real human ratings, on this machine, ending in one table.

People rated short texts from very negative to very positive. Pairs of texts of one kind become preferences; a tiny
base model learns to write the texts, then to write those that people would rate higher: once by a reward model and PPO,
once by DPO on the pairs. Whether it worked is judged by a rule-based sentiment scorer that nothing was trained on.
"""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tutelage.components.core.errors import TutelageError
from tutelage.pipelines.local import LocalRun, run_local
from tutelage.pipelines.parameters import read_file
from tutelage.pipelines.results import Evaluation, evaluation_of

HERE = Path(__file__).resolve().parent
DATA = HERE / "data" / "human_ratings.jsonl.gz"
BASE_MODEL = HERE / "base_model"
SHOWN_SAMPLES = 3


def run_demo(output_dir: Path, *, show: Callable[[str, str], None] | None = None) -> None:
    """Runs `rlhf` and `preference` below `output_dir` and prints what came of them.

    Raises TutelageError if a pipeline fails, or if a policy does not gain on the fine-tuned model by the gold reward.
    """
    from rich.console import Console

    console = Console(highlight=False)
    started = time.monotonic()
    console.print(
        f"{DATA.name}: short texts, each rated by 15 to 95 people. Everything goes to {output_dir}.", style="bold"
    )
    rlhf = _run("rlhf", {}, output_dir, console, show)
    reward_model = rlhf.outputs["reward-model"] / "reward_model"
    preference = _run("preference", {"eval_reward_uri": str(reward_model)}, output_dir, console, show)

    found = {"rlhf": evaluation_of(rlhf), "preference": evaluation_of(preference)}
    shutil.copyfile(found["rlhf"].report, output_dir / "report-rlhf.html")
    shutil.copyfile(found["preference"].report, output_dir / "report.html")
    models = _models(found)
    console.print()
    console.print(_table(models, found["rlhf"].judged["prompts"]))
    console.print()
    console.print(*_samples(found), sep="\n", soft_wrap=True, markup=False)
    for name, evaluation in found.items():
        gate = evaluation.judged["gate"]
        passed = sum(bool(check["passed"]) for check in gate["checks"])
        style = "bold green" if gate["verdict"] == "promote" else "bold red"
        console.print(
            f"gate of {name}: {gate['verdict']} ({passed} of {len(gate['checks'])} checks passed)", style=style
        )
    console.print(f"\nreport       {output_dir / 'report.html'} (DPO's run, PPO as champion)", soft_wrap=True)
    console.print(f"             {output_dir / 'report-rlhf.html'} (PPO's run)", soft_wrap=True)
    mlflow = shlex.quote(str(Path(sys.executable).parent / "mlflow"))
    database = (output_dir / "mlflow.db").absolute()
    console.print(f"tracking     {mlflow} ui --backend-store-uri sqlite:///{database}", soft_wrap=True)
    console.print(f"took         {time.monotonic() - started:.0f} s")
    _require_gains(models)


def _run(
    pipeline: str, more: Mapping[str, Any], output_dir: Path, console: Any, show: Callable[[str, str], None] | None
) -> LocalRun:
    parameters = {"data_uri": str(DATA), "model_uri": str(BASE_MODEL), **read_file(HERE / f"{pipeline}.yaml"), **more}
    console.print(f"\npipeline {pipeline}", style="bold")
    result = run_local(pipeline, parameters, output_dir, show=show)
    if result.status != "succeeded":
        raise TutelageError(
            f"{pipeline} {result.status}: {result.error}", where=result.failed, fix=f"See {result.log}."
        )
    return result


def _models(found: Mapping[str, Evaluation]) -> list[dict[str, Any]]:
    """Base, SFT, and the policy of each pipeline: prompts, seed and judges were the same."""
    rows = {row["role"]: row for row in found["rlhf"].judged["models"] if row["role"] in ("base", "sft")}
    policies = [
        next(row for row in found[name].judged["models"] if row["role"] == "policy") for name in ("preference", "rlhf")
    ]
    return [rows["base"], rows["sft"], *policies]


def _table(models: Sequence[Mapping[str, Any]], prompts: int) -> Any:
    from rich.table import Table

    title = f"{prompts} held-out prompts: means with 95% intervals"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="bold")
    table.add_column("\nmodel", no_wrap=True)
    headings = ("learned\nreward", "gold\nreward", "gold gain\nover SFT", "wins\nover SFT", "KL to\nSFT", "\nlength")
    for heading in (*headings, "\ndist-2"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in models:
        table.add_row(
            row["name"] if row["role"] == "base" else row["name"].upper(),
            *(_interval(row[key]) for key in ("learned_reward", "gold_reward", "gold_gain", "win_rate")),
            f"{row['kl']['mean']:.2f}",
            f"{row['length']['mean']:.1f}",
            f"{row['distinct_2']:.2f}",
        )
    return table


def _samples(found: Mapping[str, Evaluation]) -> list[str]:
    """The first prompts with their continuations before and after: first come, not picked."""
    lines = ["samples (SFT before; DPO and PPO after)"]
    pairs = zip(found["preference"].judged["samples"], found["rlhf"].judged["samples"], strict=True)
    for offline, online in list(pairs)[:SHOWN_SAMPLES]:
        lines.append("  " + " ".join(offline["prompt"].split()) + " ...")
        lines += [
            f"    {name:4} {' '.join(text.split())}"
            for name, text in (("SFT", offline["sft"]), ("DPO", offline["dpo"]), ("PPO", online["ppo"]))
        ]
    return lines


def _require_gains(models: Sequence[Mapping[str, Any]]) -> None:
    flat = [row["name"].upper() for row in models if row["role"] == "policy" and row["gold_gain"]["low"] <= 0]
    if flat:
        raise TutelageError(
            f"{' and '.join(flat)} did not raise the gold reward over SFT with an interval above zero",
            fix="See the report's curves.",
        )


def _interval(value: Mapping[str, float] | None) -> str:
    return "" if value is None else f"{value['mean']:.2f} ±{(value['high'] - value['low']) / 2:.2f}"
