"""The figures of a stage, for the platform to show."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_figures(result: Mapping[str, Any], path: str | Path) -> dict[str, float]:
    """The finite numbers among a stage's results, also written as JSON to `path`.

    The file is needed: kfp.local takes an artifact without one for lost, and would never find the stage in its cache.
    """
    figures = {
        name: value
        for name, value in result.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
    Path(path).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return figures
