from __future__ import annotations

import random
from pathlib import Path

import pytest

from tutelage.components.core.records import Demo, Pair
from tutelage.components.core.tables import Reason
from tutelage.components.data_prep import checks
from tutelage.components.data_prep.checks import Admission, KeySet, Rejected


@pytest.mark.parametrize("slots", [1, 8, 64, 1 << 12])
def test_a_key_set_is_a_set_of_integers_of_64_bits(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where most of the keys are in the file."""
    monkeypatch.setattr(checks, "SLOTS", slots)
    keys = KeySet()
    members = [0, -1, -(1 << 63), (1 << 63) - 1, *range(2, 200), *range(1 << 20, 50 << 20, 1 << 20)]
    for key in members:
        assert key not in keys
        assert keys.add(key)
        assert not keys.add(key)
    assert all(key in keys for key in members)
    assert not any(keys.add(key) for key in members)
    keys.close()


def test_a_key_set_larger_than_its_memory_forgets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "SLOTS", 1 << 12)
    monkeypatch.setattr(checks, "CACHE_KIBIBYTES", 64)
    draw = random.Random(0)
    members = [draw.getrandbits(64) - (1 << 63) for _ in range(50_000)]
    keys = KeySet()
    assert all(keys.add(key) for key in members)
    assert not any(keys.add(key) for key in members)
    keys.close()


def test_a_key_set_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQLITE_TMPDIR", str(tmp_path))
    monkeypatch.setattr(checks, "SLOTS", 1)
    monkeypatch.setattr(checks, "CACHE_KIBIBYTES", 64)
    keys = KeySet()
    for key in range(50_000):
        keys.add(key * 7919)
    keys.close()
    assert list(tmp_path.iterdir()) == []


def pair(id: str, chosen: str) -> Pair:
    return Pair(id=id, prompt="p", chosen=chosen, rejected="r")


def reason_of(admission: Admission, record: Pair, split: str = "train") -> Reason:
    with pytest.raises(Rejected) as caught:
        admission.identified(record, split, record.prompt, record.chosen)  # type: ignore[arg-type]
    return caught.value.reason


def admit(admission: Admission, record: Pair, split: str = "train") -> Pair:
    return admission.identified(record, split, record.prompt, record.chosen)  # type: ignore[arg-type]


def test_an_id_is_kept_or_made_from_the_content() -> None:
    with Admission(own_eval=False, eval_fraction=0.1) as one, Admission(own_eval=False, eval_fraction=0.1) as two:
        assert admit(one, pair("a", "x")).id == "a"
        made = admit(one, pair("", "y")).id
        assert len(made) == 16
        assert admit(two, pair("", "y")).id == made


def test_known_contents_and_ids_are_rejected() -> None:
    with Admission(own_eval=False, eval_fraction=0.1) as admission:
        admit(admission, pair("a", "x"))
        assert reason_of(admission, pair("a", "x")) == Reason.DUPLICATE
        assert reason_of(admission, pair("b", "x")) == Reason.DUPLICATE
        assert reason_of(admission, pair("a", "y")) == Reason.DUPLICATE_ID


def test_a_rejected_row_makes_no_later_row_a_duplicate() -> None:
    with Admission(own_eval=False, eval_fraction=0.1) as admission:
        admit(admission, pair("a", "x"))
        assert reason_of(admission, pair("a", "y")) == Reason.DUPLICATE_ID
        assert admit(admission, pair("b", "y")).id == "b"
        assert reason_of(admission, pair("b", "z")) == Reason.DUPLICATE_ID
        assert reason_of(admission, pair("c", "x")) == Reason.DUPLICATE
        assert admit(admission, pair("c", "z")).id == "c"


def test_records_of_different_kinds_do_not_meet() -> None:
    with Admission(own_eval=False, eval_fraction=0.1) as admission:
        admit(admission, pair("a", "x"))
        assert admission.identified(Demo(id="a", prompt="p", response="x"), "train", "p", "x").id == "a"


def test_files_of_both_splits_may_count_from_zero() -> None:
    with Admission(own_eval=True, eval_fraction=0.1) as admission:
        admit(admission, pair("0", "x"), "eval")
        assert admit(admission, pair("0", "y"), "train").id == "0"


def test_with_a_held_out_file_its_texts_leak() -> None:
    with Admission(own_eval=True, eval_fraction=0.1) as admission:
        assert admission.split(1, held_out=True) == "eval"
        assert admission.split(2, held_out=False) == "train"
        with pytest.raises(Rejected) as caught:
            admission.split(1, held_out=False)
        assert caught.value.reason == Reason.LEAK
