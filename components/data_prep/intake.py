"""Reads input files row by row, and keeps count: every row is either kept or in quarantine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from tutelage.components.core.context import StageContext
from tutelage.components.core.errors import DataError
from tutelage.components.core.records import Record
from tutelage.components.core.tables import Quarantine, Table
from tutelage.components.data_prep.checks import Rejected

RecordT = TypeVar("RecordT", bound=Record)
_ROWS_BETWEEN_REPORTS = 2000


@dataclass
class Source:
    """One input file: its rows, those kept, those in quarantine by reason, and its digest."""

    uri: str
    digest: str = ""
    rows: int = 0
    kept: int = 0
    quarantined: dict[str, int] = field(default_factory=dict)


class Intake:
    """Feeds files to the functions that take their records. `sources` has what was read so far, by name."""

    def __init__(self, context: StageContext, quarantine: Quarantine) -> None:
        self.context, self.quarantine = context, quarantine
        self.sources: dict[str, Source] = {}

    def feed(
        self, name: str, uri: str, model: type[RecordT], take: Callable[[RecordT], None], *, digest: str = ""
    ) -> None:
        """Hands each record of the file at `uri` to `take`, which raises Rejected for one that cannot be used.

        digest: the digest that the file must have, if it is known. Raises DataError if it has another, or is no table.
        """
        table = Table(uri, model, self.quarantine)
        source = self.sources[name] = Source(uri)
        before = Counter(self.quarantine.counts)
        reported = 0
        try:
            with self.context.phase("read"), self.context.progress(None, f"reading {uri}", unit="row") as progress:
                for number, raw, record in table:
                    try:
                        take(record)
                        source.kept += 1
                    except Rejected as verdict:
                        self.quarantine.add(uri, number, verdict.reason, verdict.detail, raw)
                    if table.seen - reported >= _ROWS_BETWEEN_REPORTS:
                        progress.advance(table.seen - reported)
                        reported = table.seen
                progress.advance(table.seen - reported)
        finally:
            source.rows, source.digest = table.seen, table.digest
            source.quarantined = dict(Counter(self.quarantine.counts) - before)
        if digest and table.digest != digest:
            what = f"data changed since preflight: digest {digest} then, {table.digest} now"
            raise DataError(what, where=uri, fix="Let nothing write to the file, and run again.")

    @property
    def rows(self) -> int:
        return sum(source.rows for source in self.sources.values())

    @property
    def kept(self) -> int:
        return sum(source.kept for source in self.sources.values())

    def summary(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "kept": self.kept,
            "quarantined": dict(self.quarantine.counts),
            "inputs": {name: asdict(source) for name, source in self.sources.items()},
        }
