"""Run parameters as people write them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tutelage.components.core.config import merge
from tutelage.components.core.errors import ConfigError
from tutelage.pipelines.definition import definition_of, load_pipeline
from tutelage.pipelines.parameters import check_parameters, read_assignments, read_file

if TYPE_CHECKING:
    from kfp.dsl.graph_component import GraphComponent

REQUIRED = {"data_uri": "d", "model_uri": "m"}


@pytest.fixture(scope="module")
def rlhf() -> dict[str, Any]:
    return definition_of(load_pipeline("rlhf"))


def checked(definition: dict[str, Any], *assignments: str) -> dict[str, Any]:
    return check_parameters(definition, REQUIRED | read_assignments(assignments))


@pytest.mark.parametrize(
    ("written", "name", "value"),
    [
        ("sft_learning_rate=1e-5", "sft_learning_rate", 1e-5),
        ("sft_epochs=2", "sft_epochs", 2.0),
        ("run_seed=7", "run_seed", 7),
        ("run_seed=3.0", "run_seed", 3),
        ("gpu_count=2", "gpu_count", "2"),
        ("register_name=0123", "register_name", "0123"),
        ("register_name=null", "register_name", "null"),
        ("run_store_uri=", "run_store_uri", ""),
        ("data_uri=s3://b/k?versionId=3", "data_uri", "s3://b/k?versionId=3"),
        ("sft_overrides={training: {learning_rate: 1e-6}}", "sft_overrides", {"training": {"learning_rate": 1e-6}}),
        ("sft_overrides=", "sft_overrides", {}),
        ("sft_overrides.training.max_steps=5", "sft_overrides", {"training": {"max_steps": 5}}),
        ("pod_tolerations=[{key: gpu, operator: Exists}]", "pod_tolerations", [{"key": "gpu", "operator": "Exists"}]),
        ("policy_method=ppo", "policy_method", "ppo"),
    ],
)
def test_a_value_gets_its_parameters_type(rlhf: dict[str, Any], written: str, name: str, value: object) -> None:
    got = checked(rlhf, written)[name]
    assert got == value
    assert type(got) is type(value)


def test_keys_of_a_struct_add_up(rlhf: dict[str, Any]) -> None:
    written = (
        "sft_overrides={training: {batch_size: 8}}",
        "sft_overrides.training.max_steps=5",
        "sft_overrides.max_tokens=64",
    )
    assert checked(rlhf, *written)["sft_overrides"] == {"training": {"batch_size": 8, "max_steps": 5}, "max_tokens": 64}


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        (
            "sft_lr=1",
            r"unknown parameter 'sft_lr' \(in .* rlhf\)\. Did you mean 'sft_.*Parameters: data_format, ",
        ),
        ("policy_method=pppo", r"policy_method cannot be 'pppo' .* Did you mean 'ppo'\? It can be: .*ppo"),
        ("policy_method=dpo", r"policy_method cannot be 'dpo'"),
        ("sft_epochs=many", r"sft_epochs has to be a number, got 'many'"),
        ("sft_epochs=.inf", r"sft_epochs has to be a number"),
        ("run_seed=1.5", r"run_seed has to be a whole number, got 1\.5"),
        ("run_seed=true", r"run_seed has to be a whole number, got True"),
        ("sft_overrides=3", r"sft_overrides has to be a mapping"),
        ("pod_tolerations={a: 1}", r"pod_tolerations has to be a list"),
        ("register_name.a=1", r"register_name has to be text"),
        ("=1", r"'=1' is not name=value"),
        ("run_seed", r"'run_seed' is not name=value"),
    ],
)
def test_a_wrong_one_is_refused_with_what_would_be_right(rlhf: dict[str, Any], written: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        checked(rlhf, written)


def test_missing_ones_are_named(rlhf: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"missing parameters data_uri, model_uri .* -p data_uri="):
        check_parameters(rlhf, {})


def test_a_pipeline_of_ones_own_is_checked_too(light_pipeline: GraphComponent) -> None:
    given = {"text": "a", "options": None, "seconds": 1}
    assert check_parameters(definition_of(light_pipeline), given) == {"text": "a", "options": {}, "seconds": 1.0}


class TestFile:
    def test_assignments_go_over_the_file(self, rlhf: dict[str, Any], tmp_path: Path) -> None:
        path = tmp_path / "run.yaml"
        path.write_text(
            "data_uri: d\nmodel_uri: m\ngpu_count: 1\nsft_learning_rate: 5e-4\n"
            "sft_overrides: {training: {batch_size: 8, learning_rate: 1e-3}}\n"
        )
        given = merge(read_file(path), read_assignments(["sft_overrides.training.batch_size=4"]))
        values = check_parameters(rlhf, given)
        assert values["sft_learning_rate"] == 5e-4
        assert values["gpu_count"] == "1"
        assert values["sft_overrides"] == {"training": {"batch_size": 4, "learning_rate": 1e-3}}

    @pytest.mark.parametrize(("text", "complaint"), [("- 1\n", "no mapping"), ("a: [\n", "cannot be read")])
    def test_what_is_no_file_of_parameters_is_refused(self, tmp_path: Path, text: str, complaint: str) -> None:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError, match=complaint):
            read_file(path)

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"none\.yaml"):
            read_file(tmp_path / "none.yaml")
