"""The gate: what a policy has to reach before it is registered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tutelage.components.evaluation.stage import Config


def judge(policy: Mapping[str, Any], sft: Mapping[str, Any], config: Config, *, judged_by: str) -> dict[str, Any]:
    """The verdict with every check: its value, threshold, whether it passed, and why. Rows as in evaluation.json."""
    win, gain, kl = policy["win_rate"], policy[f"{judged_by}_gain"], policy["kl"]
    least = config.min_distinct * sft["distinct_2"]
    checks = [
        _check("win_rate", win["low"], config.min_win_rate, win["low"] > config.min_win_rate,
               f"lower end of the win rate against the fine-tuned model, by {judged_by} reward, above the threshold"),
        _check(f"{judged_by}_gain", gain["low"], config.min_gain, gain["low"] > config.min_gain,
               f"lower end of the gain in {judged_by} reward over the fine-tuned model above the threshold"),
        _check("kl", kl["mean"], config.max_kl, kl["mean"] <= config.max_kl,
               "KL to the fine-tuned model, in nats per response, at most the threshold"),
        _check("distinct_2", policy["distinct_2"], least, policy["distinct_2"] >= least,
               f"distinct-2 at least {config.min_distinct:g} of the fine-tuned model's: no collapse into repetition"),
    ]  # fmt: skip
    return {"verdict": "promote" if all(check["passed"] for check in checks) else "hold", "checks": checks}


def _check(name: str, value: float, threshold: float, passed: bool, why: str) -> dict[str, Any]:
    return {"name": name, "value": value, "threshold": threshold, "passed": bool(passed), "why": why}
