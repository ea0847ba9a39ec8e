"""A stage context that logs to a list, and files of rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from tutelage.components.core.context import Settings, StageContext
from tutelage.components.core.store import open_store
from tutelage.components.core.tracking import NullTracker


class RecordingContext(StageContext):
    """The real one; what it logs is kept."""

    def __init__(self, work: Path, settings: Settings | None = None) -> None:
        store = open_store(work / "store")
        super().__init__("data_prep", settings or Settings(), store=store, tracker=NullTracker(), work=work)
        self.lines: list[str] = []

    def log(self, message: str) -> None:
        self.lines.append(message)


@pytest.fixture
def context(tmp_path: Path) -> RecordingContext:
    return RecordingContext(tmp_path / "work")


@pytest.fixture
def make_context(tmp_path: Path) -> Callable[[Settings], RecordingContext]:
    return lambda settings: RecordingContext(tmp_path / "work", settings)


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., str]:
    """Writes rows (as JSON lines, bytes as they are) to a file of that name and returns its path."""

    def write(name: str, rows: Iterable[Any]) -> str:
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (tmp_path / name).write_bytes(b"\n".join(lines) + b"\n")
        return str(tmp_path / name)

    return write


@pytest.fixture
def rows_of() -> Callable[[Path], list[dict[str, Any]]]:
    return lambda path: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
