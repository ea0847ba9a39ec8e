"""The figures that a stage shows."""

from __future__ import annotations

import json
from pathlib import Path

from tutelage.components.core.figures import write_figures


def test_finite_numbers_are_shown_and_written(tmp_path: Path) -> None:
    result = {
        "steps": 3,
        "loss": 0.5,
        "name": "dpo",
        "kl": float("nan"),
        "gain": float("inf"),
        "ok": True,
        "none": None,
    }
    shown = write_figures(result, tmp_path / "metrics")
    assert shown == {"steps": 3, "loss": 0.5}
    assert json.loads((tmp_path / "metrics").read_text()) == shown
