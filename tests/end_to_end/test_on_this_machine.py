"""Both pipelines as processes on this machine, on local directories: rlhf, then preference in the same place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tutelage.components.core.store import open_store
from tutelage.pipelines.local import LocalRun, run_local
from tutelage.pipelines.results import evaluation_of


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("local")


@pytest.fixture(scope="module")
def runs(ratings: Path, parameters: dict[str, dict[str, Any]], output: Path) -> dict[str, LocalRun]:
    return {name: run_local(name, {**given, "data_uri": str(ratings)}, output) for name, given in parameters.items()}


@pytest.mark.parametrize("pipeline", ["rlhf", "preference"])
def test_a_pipeline_runs_to_a_registered_model(
    pipeline: str, runs: dict[str, LocalRun], output: Path, check_registered: Callable[[LocalRun, str, str], None]
) -> None:
    check_registered(runs[pipeline], f"sqlite:///{output / 'mlflow.db'}", pipeline)


def test_checkpoints_of_runs_that_succeeded_are_removed(runs: dict[str, LocalRun]) -> None:
    found = open_store(runs["preference"].store_uri).list("checkpoints")
    assert [key for key in found if "policy_optimization" in key or "reward_model" in key] == []


def test_what_is_pure_comes_from_the_cache(runs: dict[str, LocalRun]) -> None:
    assert runs["rlhf"].cached == []
    assert set(runs["preference"].cached) == {"data-prep", "sft"}


def test_the_second_run_is_compared_with_the_champion(runs: dict[str, LocalRun]) -> None:
    judged = evaluation_of(runs["preference"]).judged
    assert [row["role"] for row in judged["models"]] == ["base", "sft", "champion", "policy"]
    assert next(row["name"] for row in judged["models"] if row["role"] == "champion") == "champion (ppo)"
    assert isinstance(judged["gate"]["champion_beaten"], bool)


def test_prompts_and_seed_being_the_same_the_fine_tuned_model_answers_the_same(runs: dict[str, LocalRun]) -> None:
    rows = [
        next(row for row in evaluation_of(run).judged["models"] if row["role"] == "sft")["gold_reward"]
        for run in runs.values()
    ]
    assert rows[0] == rows[1]
