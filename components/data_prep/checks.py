"""What a row must pass besides its schema: it is new, and it is not held out. In bounded memory."""

from __future__ import annotations

import mmap
import sqlite3
from typing import Any, Self, TypeVar

from tutelage.components.core.records import Record
from tutelage.components.core.tables import Reason
from tutelage.components.data_prep.splits import Split, content_id, content_key, split_of

RecordT = TypeVar("RecordT", bound=Record)
SLOTS = 1 << 23  # of 8 bytes, a power of two: room for the keys of some two million rows
PROBES = 8
CACHE_KIBIBYTES = 16 << 10


class Rejected(Exception):  # noqa: N818 - a verdict on a row, no error of the program
    """The row goes to quarantine."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class KeySet:
    """A set of 64-bit integers: a hash table of fixed size in memory, and a temporary SQLite file for the overflow.

    Open addressing with at most PROBES slots for a key. No key is ever taken out, so that a full run of slots stays
    full, and what went to the file is looked for there.
    """

    def __init__(self) -> None:
        self._slots = memoryview(mmap.mmap(-1, 8 * SLOTS)).cast("q")  # the kernel gives memory as slots are used
        self._last = SLOTS - 1
        self._database = sqlite3.connect("", isolation_level=None)  # no name: SQLite's own file, gone when closed
        for setting in (f"cache_size=-{CACHE_KIBIBYTES}", "journal_mode=OFF", "synchronous=OFF"):
            self._database.execute(f"PRAGMA {setting}")
        self._database.execute("CREATE TABLE keys (key INTEGER PRIMARY KEY)")
        self._database.execute("BEGIN")
        self._execute = self._database.cursor().execute

    def add(self, key: int) -> bool:
        """Whether the key is new."""
        key = key or 1  # 0 marks an empty slot
        slot = self._slot(key)
        if slot is None:
            return self._execute("INSERT OR IGNORE INTO keys VALUES (?)", (key,)).rowcount == 1
        new = self._slots[slot] != key
        self._slots[slot] = key
        return new

    def __contains__(self, key: int) -> bool:
        key = key or 1
        slot = self._slot(key)
        if slot is None:
            return self._execute("SELECT 1 FROM keys WHERE key = ?", (key,)).fetchone() is not None
        return self._slots[slot] == key

    def _slot(self, key: int) -> int | None:
        """The slot that has the key, or the empty one that it would get; None if all of its slots have other keys."""
        slots, last = self._slots, self._last
        for place in range(key, key + PROBES):
            if slots[place & last] in (key, 0):
                return place & last
        return None

    def close(self) -> None:
        self._database.close()


class Admission:
    """Remembers what was read so far, and finds for each record its split and its id.

    With a separate file of held-out records (`own_eval`), read that first: all of it is held out, and what shares a
    text with it leaks. Without, a hash of the text decides.
    """

    def __init__(self, *, own_eval: bool, eval_fraction: float) -> None:
        self.own_eval, self.eval_fraction = own_eval, eval_fraction
        self._contents, self._ids, self._held_out = KeySet(), KeySet(), KeySet()

    def split(self, key: int, *, held_out: bool) -> Split:
        """The split of a text by its `text_key`. held_out: it is from the file of held-out records."""
        if not self.own_eval:
            return split_of(key, self.eval_fraction)
        if held_out:
            self._held_out.add(key)
            return "eval"
        if key in self._held_out:
            raise Rejected(Reason.LEAK, "the held-out file has this text too")
        return "train"

    def identified(self, record: RecordT, split: Split, *content: object) -> RecordT:
        """The record with an id, its own or a hash of `content`. Raises Rejected for a known content or id."""
        kind = type(record).__name__
        key = content_key(kind, *content)
        if not record.id:
            self._add_content(key)
            return record.model_copy(update={"id": content_id(key)})
        id_key = content_key(kind, split if self.own_eval else "", record.id)
        if id_key in self._ids and key not in self._contents:
            raise Rejected(Reason.DUPLICATE_ID, f"an earlier row with other content has the id {record.id!r}")
        self._add_content(key)
        self._ids.add(id_key)
        return record

    def _add_content(self, key: int) -> None:
        if not self._contents.add(key):
            raise Rejected(Reason.DUPLICATE, "an earlier row has the same content")

    def is_new(self, *content: object) -> bool:
        """Whether this content, of something made from records, was not asked for before."""
        return self._contents.add(content_key(*content))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: Any) -> None:
        for keys in (self._contents, self._ids, self._held_out):
            keys.close()
