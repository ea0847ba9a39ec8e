"""Both pipelines, as processes on this machine: on local directories, and with data, checkpoints and models on S3."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import boto3
import mlflow
import pytest

from tutelage.components.core.manifest import read_manifest
from tutelage.components.core.store import open_store
from tutelage.pipelines.demo.main import BASE_MODEL, DATA
from tutelage.pipelines.local import LocalRun, run_local

ROWS = 1200
SMALL: dict[str, Any] = {"max_steps": 3, "batch_size": 16, "micro_batch_tokens": 1024, "threads": 1, "log_every": 1}
PARAMETERS: dict[str, Any] = {
    "model_uri": str(BASE_MODEL),
    "data_format": "ratings",
    "data_overrides": {"max_tokens": 96},
    "sft_overrides": {"max_tokens": 96, "training": SMALL},
    "policy_overrides": {
        "max_tokens": 96,
        "training": SMALL,
        "online": {"rollouts": 32, "update_epochs": 1, "sampling": {"max_new_tokens": 8}},
    },
    "eval_gold": "vader",
    # A gate that a few steps can pass: what is tested is the way through it.
    "eval_overrides": {"prompts": 24, "threads": 1, "min_gain": -1e9, "sampling": {"max_new_tokens": 8}},
    "gate_min_win_rate": 0.0,
}
REWARD = {"reward_overrides": {"max_tokens": 96, "training": SMALL}}


@pytest.fixture(scope="module")
def ratings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "ratings.jsonl"
    with gzip.open(DATA, "rt", encoding="utf-8") as rows:
        path.write_text("".join(line for number, line in enumerate(rows) if number % 17 == 0 and number < 17 * ROWS))
    return path


@pytest.fixture(scope="module")
def local_runs(ratings: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[LocalRun, Path]]:
    """rlhf, then preference in the same directory: it finds a champion there, and data and SFT in the cache."""
    output = tmp_path_factory.mktemp("local")
    given = {**PARAMETERS, "data_uri": str(ratings)}
    return {
        "rlhf": (run_local("rlhf", {**given, **REWARD}, output), output),
        "preference": (run_local("preference", given, output), output),
    }


@pytest.mark.parametrize("pipeline", ["rlhf", "preference"])
def test_a_pipeline_runs_to_a_registered_model(pipeline: str, local_runs: dict[str, tuple[LocalRun, Path]]) -> None:
    run, output = local_runs[pipeline]
    assert run.status == "succeeded", run.error
    _check(run, f"sqlite:///{output / 'mlflow.db'}", pipeline)
    assert open_store(run.store_uri).children("checkpoints") == [], "checkpoints of a run that succeeded are removed"


def test_what_is_pure_comes_from_the_cache(local_runs: dict[str, tuple[LocalRun, Path]]) -> None:
    assert local_runs["rlhf"][0].cached == []
    assert set(local_runs["preference"][0].cached) == {"data-prep", "sft"}


def test_the_second_run_is_compared_with_the_champion(local_runs: dict[str, tuple[LocalRun, Path]]) -> None:
    judged = _evaluation(local_runs["preference"][0])
    assert [row["role"] for row in judged["models"]] == ["base", "sft", "champion", "policy"]
    assert next(row["name"] for row in judged["models"] if row["role"] == "champion") == "champion (ppo)"
    assert isinstance(judged["gate"]["champion_beaten"], bool)


@pytest.mark.parametrize("pipeline", ["rlhf", "preference"])
def test_data_checkpoints_models_and_tracking_artifacts_on_s3(
    pipeline: str, ratings: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = boto3.client("s3")
    client.upload_file(str(ratings), bucket, "raw/ratings.jsonl")
    monkeypatch.setenv("TUTELAGE_ARTIFACT_ROOT", f"s3://{bucket}/mlflow")
    given = {**PARAMETERS, "data_uri": f"s3://{bucket}/raw/ratings.jsonl", "run_store_uri": f"s3://{bucket}/tutelage"}
    run = run_local(pipeline, {**given, **(REWARD if pipeline == "rlhf" else {})}, tmp_path)
    assert run.status == "succeeded", run.error
    _check(run, f"sqlite:///{tmp_path / 'mlflow.db'}", pipeline)
    keys = [item["Key"] for item in client.list_objects_v2(Bucket=bucket)["Contents"]]
    assert any(key.startswith("tutelage/models/tutelage/") and key.endswith("model.safetensors") for key in keys)
    assert any(key.startswith("mlflow/") and "report" in key for key in keys)
    assert not any("checkpoints/" in key for key in keys)
    assert not any(tmp_path.joinpath("store").rglob("*.safetensors")), (
        "nothing of the model is left on the local disk's store"
    )
    printed = run.log.read_text()
    assert "testing-secret" not in printed


def _evaluation(run: LocalRun) -> dict[str, Any]:
    return json.loads((run.outputs["evaluation"] / "evaluation" / "evaluation.json").read_text())


def _check(run: LocalRun, tracking_uri: str, pipeline: str) -> None:
    judged = _evaluation(run)
    assert judged["gate"]["verdict"] == "promote"
    assert judged["prompts"] == 24
    assert (run.outputs["evaluation"] / "report").read_text().startswith("<!DOCTYPE html>")
    manifest = read_manifest(run.outputs["policy-optimization"] / "optimized", kind="policy")
    assert manifest.extra["method"] == {"rlhf": "ppo", "preference": "dpo"}[pipeline]

    client = mlflow.MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)
    version = client.get_model_version_by_alias("tutelage", "challenger")
    assert {"manifest.json", "model.safetensors", "tokenizer.json"} <= set(open_store(version.source).list())
    (parent,) = client.search_runs(
        [client.get_experiment_by_name("tutelage").experiment_id],
        f"tags.`tutelage.run_id` = '{run.run_id}' and tags.`tutelage.stage` = 'pipeline'",
    )
    assert parent.info.status == "FINISHED"
