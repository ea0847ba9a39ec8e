"""Which texts are held out: a function of the text alone, so that it stays held out for every seed and every run."""

from __future__ import annotations

import unicodedata
from hashlib import blake2b
from typing import Literal

from pydantic_core import to_json

Split = Literal["train", "eval"]
_SALT = b"tutelage"  # a constant: another salt would move yesterday's held-out texts into training
_KEYS = 1 << 64


def normalized(text: str) -> str:
    """The text without the differences that do not make it another text: case, white space, Unicode form."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def text_key(text: str) -> int:
    """64 bits of the normalized text, signed as SQLite wants them."""
    return _key(normalized(text).encode())


def content_key(*parts: object) -> int:
    """64 bits of anything that JSON can hold, exactly as it is. Two of 10^8 contents share a key with p = 3e-4."""
    return _key(to_json(parts))


def content_id(key: int) -> str:
    """An id for a record that came without one."""
    return f"{key % _KEYS:016x}"


def split_of(key: int, eval_fraction: float) -> Split:
    """The split of a text by its `text_key`, uniform over keys: about `eval_fraction` of the texts are held out."""
    return "eval" if (key % _KEYS) < eval_fraction * _KEYS else "train"


def draw(below: int, *parts: object) -> int:
    """An integer in 0..below-1 that depends on `parts` alone."""
    return content_key(*parts) % below


def _key(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8, person=_SALT).digest(), "big", signed=True)
