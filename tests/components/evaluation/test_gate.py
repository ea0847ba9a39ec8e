"""The gate: every check alone can hold a policy back, each at its threshold."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tutelage.components.evaluation.gate import judge
from tutelage.components.evaluation.stage import Config

CONFIG = Config(min_win_rate=0.5, max_kl=10.0, min_distinct=0.5)
SFT: dict[str, Any] = {"distinct_2": 0.8}


def spread(mean: float, half: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def policy(**changes: Any) -> dict[str, Any]:
    """One that passes."""
    good = {
        "win_rate": spread(0.7, 0.1), "gold_gain": spread(0.3, 0.1), "learned_gain": spread(0.2, 0.1),
        "kl": spread(5.0, 1.0), "distinct_2": 0.6,
    }  # fmt: skip
    return good | changes


def failed(row: dict[str, Any], judged_by: str = "gold", config: Config = CONFIG) -> list[str]:
    verdict = judge(row, SFT, config, judged_by=judged_by)
    names = [check["name"] for check in verdict["checks"] if not check["passed"]]
    assert verdict["verdict"] == ("hold" if names else "promote")
    return names


def test_a_good_policy_is_promoted_by_four_checks_that_say_why() -> None:
    verdict = judge(policy(), SFT, CONFIG, judged_by="gold")
    assert verdict["verdict"] == "promote"
    checks = {check["name"]: check for check in verdict["checks"]}
    assert list(checks) == ["win_rate", "gold_gain", "kl", "distinct_2"]
    assert {name: (check["value"], check["threshold"]) for name, check in checks.items()} == {
        "win_rate": (pytest.approx(0.6), 0.5),
        "gold_gain": (pytest.approx(0.2), 0.0),
        "kl": (5.0, 10.0),
        "distinct_2": (0.6, pytest.approx(0.4)),
    }
    assert all(check["why"] and type(check["passed"]) is bool for check in checks.values())


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"win_rate": spread(0.55, 0.06)}, "win_rate"),  # the mean is above, the interval is not
        ({"win_rate": spread(0.6, 0.1)}, "win_rate"),  # exactly the threshold is not above it
        ({"gold_gain": spread(0.1, 0.1)}, "gold_gain"),
        ({"gold_gain": spread(-0.3, 0.1)}, "gold_gain"),
        ({"kl": spread(10.01, 3.0)}, "kl"),
        ({"distinct_2": 0.39}, "distinct_2"),
        ({"kl": spread(math.nan, 0.0)}, "kl"),
        ({"win_rate": spread(math.nan, 0.0)}, "win_rate"),
        ({"distinct_2": math.nan}, "distinct_2"),
    ],
)
def test_one_failed_check_holds(changes: dict[str, Any], name: str) -> None:
    assert failed(policy(**changes)) == [name]


def test_thresholds_themselves_pass_where_they_are_limits() -> None:
    assert failed(policy(kl=spread(10.0, 0.0), distinct_2=0.4)) == []


def test_the_judge_is_the_one_that_was_asked_for() -> None:
    row = policy(gold_gain=spread(-1.0, 0.1))
    assert failed(row, judged_by="learned") == []
    assert failed(row, judged_by="gold") == ["gold_gain"]
    learned_only = policy(gold_gain=None)
    assert failed(learned_only, judged_by="learned") == []


def test_thresholds_come_from_the_configuration() -> None:
    assert failed(policy(), config=Config(min_win_rate=0.65)) == ["win_rate"]
    assert failed(policy(), config=Config(max_kl=4.0)) == ["kl"]
    assert failed(policy(), config=Config(min_distinct=0.9)) == ["distinct_2"]
