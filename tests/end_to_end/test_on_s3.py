"""Both pipelines with input data, checkpoints, the published model and MLflow's artifacts on S3 over HTTP."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest

from tutelage.pipelines.local import LocalRun, run_local

SECRET = "a-secret-that-is-nowhere-written"


@pytest.mark.parametrize("pipeline", ["rlhf", "preference"])
def test_everything_but_the_platforms_own_artifacts_on_s3(
    pipeline: str,
    ratings: Path,
    parameters: dict[str, dict[str, Any]],
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    check_registered: Callable[[LocalRun, str, str], None],
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("TUTELAGE_ARTIFACT_ROOT", f"s3://{bucket}/mlflow")
    client = boto3.client("s3")
    client.upload_file(str(ratings), bucket, "raw/ratings.jsonl")
    places = {"data_uri": f"s3://{bucket}/raw/ratings.jsonl", "run_store_uri": f"s3://{bucket}/tutelage"}

    run = run_local(pipeline, {**parameters[pipeline], **places}, tmp_path)

    check_registered(run, f"sqlite:///{tmp_path / 'mlflow.db'}", pipeline)
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
    keys = [item["Key"] for page in pages for item in page["Contents"]]
    assert any(key.startswith("tutelage/models/tutelage/") and key.endswith("/model.safetensors") for key in keys)
    assert any(key.startswith("mlflow/") and key.endswith("/report.html") for key in keys)
    assert any(key == f"tutelage/runs/{run.run_id}/sft.json" for key in keys)
    assert not any("checkpoints/" in key for key in keys), "a run that succeeded needs them no more"
    assert list((tmp_path / "store").rglob("*")) == [], "nothing goes to the local store"
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(SECRET.encode() in path.read_bytes() for path in written)
