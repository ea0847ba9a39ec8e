from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.components.core.context import Settings, StageContext
from tutelage.components.core.errors import DataError
from tutelage.components.core.store import open_store
from tutelage.components.core.tracking import NullTracker
from tutelage.components.data_prep.splits import normalized, split_of, text_key
from tutelage.components.data_prep.stage import Config, run

Rows = list[dict[str, Any]]
Table = Callable[..., str]
Reader = Callable[[Path], Rows]


def pair(prompt: str, chosen: str = "good", rejected: str = "bad", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


PROMPTS = [f"Prompt {number}" for number in range(40)]
HELD_OUT = [prompt for prompt in PROMPTS if split_of(text_key(prompt), 0.1) == "eval"]
TRAINING = [prompt for prompt in PROMPTS if prompt not in HELD_OUT]


def files(directory: Path, rows_of: Reader) -> dict[str, Rows]:
    return {path.name.removesuffix(".jsonl"): rows_of(path) for path in directory.glob("*.jsonl")}


def reasons(directory: Path, rows_of: Reader) -> list[tuple[int, str]]:
    return [(row["row"], row["reason"]) for row in rows_of(directory / "quarantine.jsonl")]


def test_pairs_become_pairs_demonstrations_and_prompts(
    table: Table, tmp_path: Path, context: StageContext, rows_of: Reader
) -> None:
    assert len(HELD_OUT) >= 2
    rows = [pair(prompt, id=f"id {prompt}", margin=1.5, source="here") for prompt in PROMPTS]
    result = run(Config.build(data_uri=table("data.jsonl", rows)), context, dataset=tmp_path / "out")
    found = files(tmp_path / "out", rows_of)
    for split, prompts in (("train", TRAINING), ("eval", HELD_OUT)):
        assert found[f"pairs.{split}"] == [
            pair(prompt, id=f"id {prompt}", margin=1.5, source="here", weight=1.0) for prompt in prompts
        ]
        assert found[f"demos.{split}"] == [
            {"id": f"id {prompt}", "prompt": prompt, "response": "good"} for prompt in prompts
        ]
        assert [(row["prompt"], row["meta"]) for row in found[f"prompts.{split}"]] == [
            (prompt, {"source": "here"}) for prompt in prompts
        ]
    assert found["quarantine"] == []
    assert (result.rows, result.kept, result.quarantined) == (40, 40, {})
    assert result.files["pairs.eval.jsonl"] == len(HELD_OUT)


def test_a_prompt_with_several_pairs_is_one_prompt(
    table: Table, tmp_path: Path, context: StageContext, rows_of: Reader
) -> None:
    """Three pairs, two of them with the same chosen response; in another case and spacing it is the same prompt."""
    rows = [pair("A prompt", "x", "y"), pair("A prompt", "x", "z"), pair(" a  PROMPT", "y", "z")]
    config = Config.build(data_uri=table("data.jsonl", rows), eval_fraction=0)
    run(config, context, dataset=tmp_path / "out")
    found = files(tmp_path / "out", rows_of)
    assert len(found["pairs.train"]) == 3
    assert [row["response"] for row in found["demos.train"]] == ["x", "y"]
    assert [row["prompt"] for row in found["prompts.train"]] == ["A prompt"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["dropped"] == {"repeated_demos": 1, "repeated_prompts": 2}


def test_a_conversation_stays_one(table: Table, tmp_path: Path, context: StageContext, rows_of: Reader) -> None:
    user, yes, no = (
        {"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "y"), ("assistant", "n"))
    )
    rows = [{"chosen": [user, yes], "rejected": [user, no]}]
    run(Config.build(data_uri=table("d", rows), eval_fraction=0), context, dataset=tmp_path / "out")
    found = files(tmp_path / "out", rows_of)
    (row,) = found["pairs.train"]
    assert (row["prompt"], row["chosen"], row["rejected"]) == ([user], "y", "n")
    assert found["demos.train"] == [{"id": row["id"], "prompt": [user], "response": "y"}]
    assert found["prompts.train"][0]["prompt"] == [user]


def test_rows_without_id_get_the_same_id_again(
    table: Table, tmp_path: Path, context: StageContext, rows_of: Reader
) -> None:
    for name, rows in (("one", [pair("a"), pair("b")]), ("two", [pair("b"), pair("c")])):
        run(Config.build(data_uri=table(name, rows), eval_fraction=0), context, dataset=tmp_path / f"out {name}")
    one, two = (files(tmp_path / f"out {name}", rows_of) for name in ("one", "two"))
    for kind in ("pairs", "demos", "prompts"):
        assert one[f"{kind}.train"][1] == two[f"{kind}.train"][0]
        assert len({row["id"] for row in [*one[f"{kind}.train"], *two[f"{kind}.train"]]}) == 3


def test_what_is_wrong_with_a_pair(table: Table, tmp_path: Path, context: StageContext, rows_of: Reader) -> None:
    rows = [
        pair("a", id="1"),
        pair("a", "same", "same"),
        pair("a", id="2"),
        pair("b", id="1"),
        b"{",
        pair("b", id="3"),
    ]
    config = Config.build(data_uri=table("data.jsonl", rows), eval_fraction=0, max_bad_fraction=0.7)
    result = run(config, context, dataset=tmp_path / "out")
    expected = [(2, "same_pair"), (3, "duplicate"), (4, "duplicate_id"), (5, "malformed_json")]
    assert reasons(tmp_path / "out", rows_of) == expected
    assert (result.rows, result.kept) == (6, 2)
    assert result.quarantined == {"same_pair": 1, "duplicate": 1, "duplicate_id": 1, "malformed_json": 1}


def test_a_held_out_file_is_held_out(table: Table, tmp_path: Path, context: StageContext, rows_of: Reader) -> None:
    """Whatever the hash of a prompt says; the training row that shares a prompt with it leaks."""
    data = table("data.jsonl", [pair(prompt) for prompt in [*PROMPTS, "Held  OUT"]])
    held_out = table("eval.jsonl", [pair("held out"), pair("other")])
    run(Config.build(data_uri=data, eval_data_uri=held_out), context, dataset=tmp_path / "out")
    found = files(tmp_path / "out", rows_of)
    for kind in ("pairs", "demos", "prompts"):
        assert [row["prompt"] for row in found[f"{kind}.eval"]] == ["held out", "other"]
        assert [row["prompt"] for row in found[f"{kind}.train"]] == PROMPTS
    assert found["quarantine"][0]["file"] == data
    assert reasons(tmp_path / "out", rows_of) == [(41, "leak")]


def test_own_demonstrations_and_prompts_replace_derived_ones(
    table: Table, tmp_path: Path, context: StageContext, rows_of: Reader
) -> None:
    names = [f"Other {number}" for number in range(40)]
    demos: list[Any] = [{"prompt": name, "response": "r"} for name in names]
    turns = [{"role": role, "content": role} for role in ("user", "assistant")]
    demos += [{"messages": turns}, {"messages": turns}, {"prompt": "p"}]
    prompts = [{"prompt": name, "meta": {"n": 1}} for name in [*names, "other 0"]]
    config = Config.build(
        data_uri=table("data.jsonl", [pair(prompt) for prompt in PROMPTS]),
        demos_uri=table("demos.jsonl", demos),
        prompts_uri=table("prompts.jsonl", prompts),
    )
    result = run(config, context, dataset=tmp_path / "out")
    found = files(tmp_path / "out", rows_of)
    held_out = [name for name in names if split_of(text_key(name), 0.1) == "eval"]
    assert {row["prompt"] for row in found["demos.eval"] if isinstance(row["prompt"], str)} == set(held_out)
    assert [row["prompt"] for row in found["prompts.eval"]] == held_out
    assert len(found["demos.train"]) + len(found["demos.eval"]) == 41
    assert len(found["prompts.train"]) + len(found["prompts.eval"]) == 40
    assert all(row["meta"] == {"n": 1} for row in found["prompts.train"])
    assert (result.rows, result.kept) == (40 + 43 + 41, 40 + 41 + 40)
    assert reasons(tmp_path / "out", rows_of) == [(42, "duplicate"), (43, "missing_field"), (41, "duplicate")]


def test_own_files_do_not_train_on_a_held_out_file(
    table: Table, tmp_path: Path, context: StageContext, rows_of: Reader
) -> None:
    config = Config.build(
        data_uri=table("data.jsonl", [pair("a")]),
        eval_data_uri=table("eval.jsonl", [pair("held out")]),
        demos_uri=table("demos.jsonl", [{"prompt": "HELD OUT", "response": "r"}, {"prompt": "d", "response": "r"}]),
        prompts_uri=table("prompts.jsonl", [{"prompt": "p"}, {"prompt": "Held out"}]),
        max_bad_fraction=0.5,
    )
    run(config, context, dataset=tmp_path / "out")
    found = files(tmp_path / "out", rows_of)
    assert [row["prompt"] for row in found["demos.train"]] == ["d"]
    assert [row["prompt"] for row in found["prompts.train"]] == ["p"]
    assert [row["prompt"] for row in found["demos.eval"]] == ["held out"]
    assert [row["prompt"] for row in found["prompts.eval"]] == ["held out"]
    assert reasons(tmp_path / "out", rows_of) == [(1, "leak"), (2, "leak")]


def test_the_split_does_not_depend_on_the_seed_or_the_order(
    table: Table, tmp_path: Path, context: StageContext, rows_of: Reader
) -> None:
    forth = table("forth", [pair(prompt) for prompt in PROMPTS])
    back = table("back", [pair(prompt) for prompt in reversed(PROMPTS)])
    for name, data, seed in (("one", forth, 0), ("two", back, 7)):
        run(Config.build(data_uri=data, seed=seed), context, dataset=tmp_path / name)
    one, two = (rows_of(tmp_path / name / "pairs.eval.jsonl") for name in ("one", "two"))
    assert one == two[::-1]
    assert [row["prompt"] for row in one] == HELD_OUT


texts = st.sampled_from(["a", "A ", "b", "c d", "é", " "])
records = st.fixed_dictionaries(
    {"prompt": texts, "chosen": texts, "rejected": texts}, optional={"id": st.sampled_from(["1", "2"])}
)
lines = st.one_of(
    records.map(lambda row: json.dumps(row).encode()),
    records.map(lambda row: json.dumps(row, ensure_ascii=False).encode("latin-1")),
    st.binary(max_size=12).map(lambda data: data.replace(b"\n", b" ")),
)


@settings(max_examples=60, deadline=None)
@given(data=st.lists(lines, max_size=25), held_out=st.none() | st.lists(lines, max_size=6))
def test_no_row_is_lost_and_nothing_held_out_is_trained_on(data: list[bytes], held_out: list[bytes] | None) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = json.dumps(pair("first")).encode()  # so that the file begins like a table
        (folder / "data").write_bytes(b"\n".join([first, *data]))
        (folder / "eval").write_bytes(b"\n".join([first, *(held_out or [])]))
        config = Config.build(
            data_uri=str(folder / "data"),
            eval_data_uri="" if held_out is None else str(folder / "eval"),
            eval_fraction=0.5,
            max_bad_fraction=1,
        )
        out = folder / "out"
        store = open_store(folder)
        context = StageContext("data_prep", Settings(), store=store, tracker=NullTracker(), work=folder)
        refused = "nothing is left"
        try:
            run(config, context, dataset=out)
        except DataError as error:
            refused = str(error)
        assert "nothing is left" in refused
        summary = json.loads((out / "summary.json").read_text())
        expected = sum(1 for line in [first, *data] if line.strip(b" \t\r"))
        expected += 0 if held_out is None else sum(1 for line in [first, *held_out] if line.strip(b" \t\r"))
        quarantined = (out / "quarantine.jsonl").read_bytes().count(b"\n")
        assert summary["rows"] == expected == summary["kept"] + quarantined
        assert quarantined == sum(summary["quarantined"].values())
        assert summary["files"]["pairs.train.jsonl"] + summary["files"]["pairs.eval.jsonl"] == summary["kept"]
        if (out / "manifest.json").exists():
            for kind in ("pairs", "demos", "prompts"):
                prompts = [
                    {normalized(json.loads(line)["prompt"]) for line in (out / f"{kind}.{split}.jsonl").open("rb")}
                    for split in ("train", "eval")
                ]
                assert not prompts[0] & prompts[1]


def test_rows_in_object_storage_and_in_parquet_give_the_same(
    table: Table, tmp_path: Path, context: StageContext, rows_of: Reader, bucket: str
) -> None:
    import boto3
    import pyarrow
    from pyarrow import parquet

    rows = [pair(prompt, margin=0.5) for prompt in PROMPTS]
    path = table("data.jsonl", rows)
    boto3.session.Session().client("s3").upload_file(path, bucket, "data.jsonl")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    uris = (path, f"s3://{bucket}/data.jsonl", f"file://{tmp_path}/data.parquet")
    found = []
    for number, uri in enumerate(uris):
        run(Config.build(data_uri=uri), context, dataset=tmp_path / str(number))
        found.append(files(tmp_path / str(number), rows_of))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(("max_tokens", "kept"), [(30, 2), (29, 1)])
def test_rows_beyond_the_context_go_to_quarantine(
    table: Table, tmp_path: Path, context: StageContext, rows_of: Reader, max_tokens: int, kept: int
) -> None:
    """A token is a byte here: a prompt of 9, a longest response of 20 and the end are 30 tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    (tmp_path / "model").mkdir()
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "model" / "tokenizer_config.json").write_text("{}")
    rows = [pair("prompt 12", "x" * 5, "y" * 20), pair("short"), pair("long", "x" * 40)]
    config = Config.build(
        data_uri=table("data.jsonl", rows),
        model_uri=str(tmp_path / "model"),
        max_tokens=max_tokens,
        eval_fraction=0,
        max_bad_fraction=1,
    )
    assert run(config, context, dataset=tmp_path / "out").kept == kept
    assert {reason for _, reason in reasons(tmp_path / "out", rows_of)} == {"too_long"}
