"""What containers share with this machine, and what they say. No engine is needed; tests/end_to_end has the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from tutelage.components.core.errors import ConfigError
from tutelage.pipelines.containers import _lines, _name_and_tag, local_path, mounts


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("/data/pairs.jsonl", "/data/pairs.jsonl"),
        ("file:///data/two%20words.jsonl", "/data/two words.jsonl"),
        ("sqlite:////data/mlflow.db", "/data/mlflow.db"),
        ("sqlite:////data/mlflow.db?timeout=5", "/data/mlflow.db"),
        ("sqlite:///mlflow.db", None),
        ("pairs.jsonl", None),
        ("org/model", None),
        ("s3://bucket/data", None),
        ("http://mlflow:5000", None),
    ],
)
def test_the_path_behind_a_uri(uri: str, path: str | None) -> None:
    assert local_path(uri) == (Path(path) if path else None)


def test_what_is_written_is_made_and_shared(tmp_path: Path) -> None:
    out, store, tracking = tmp_path / "out", tmp_path / "store", tmp_path / "tracking"
    shared = mounts(out, read=[], written=[store.as_uri(), f"sqlite:///{tracking}/mlflow.db", "s3://bucket/prefix"])
    assert shared == [(str(out), False), (str(store), False), (str(tracking), False)]
    assert store.is_dir()
    assert tracking.is_dir()


def test_what_is_read_is_shared_for_reading_if_it_is_there(tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    data.touch()
    shared = mounts(tmp_path / "out", read=[str(data), str(tmp_path / "absent"), "org/model"], written=[])
    assert shared == [(str(tmp_path / "out"), False), (str(data), True)]


def test_a_place_that_is_read_too_can_be_written(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    assert mounts(tmp_path / "out", read=[str(store)], written=[str(store)])[1:] == [(str(store), False)]


def test_the_output_directory_is_shared_once(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    written = [f"sqlite:///{tmp_path}/mlflow.db", (tmp_path / "store").as_uri()]
    assert mounts(tmp_path, read=[str(tmp_path / "model")], written=written) == [(str(tmp_path), False)]


def test_a_relative_database_would_be_another_one_in_each_container(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absolute path \(in sqlite:///mlflow.db\).*four slashes"):
        mounts(tmp_path, read=[], written=["sqlite:///mlflow.db"])


def test_lines_are_whole_however_the_stream_is_cut() -> None:
    chunks = [b"one\ntw", b"o\r\nth", b"r\xc3", b"\xa9e\n\xff\n", b"last"]
    assert list(_lines(chunks)) == ["one", "two", "thr\u00e9e", "\ufffd", "last"]


@pytest.mark.parametrize(
    ("image", "name", "tag"),
    [
        ("tutelage/light:0.1.0", "tutelage/light", "0.1.0"),
        ("registry:5000/light", "registry:5000/light", None),
        ("registry:5000/light:1", "registry:5000/light", "1"),
        ("light@sha256:0a", "light@sha256:0a", None),
    ],
)
def test_an_image_is_pulled_by_name_and_tag(image: str, name: str, tag: str | None) -> None:
    assert _name_and_tag(image) == (name, tag)
