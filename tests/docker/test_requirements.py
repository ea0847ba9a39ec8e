"""What the images install before the code is there."""

from __future__ import annotations

import re
import runpy
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
requirements = runpy.run_path(str(ROOT / "docker" / "requirements.py"))["requirements"]

PROJECT: dict[str, Any] = {
    "name": "house",
    "dependencies": ["a>=1"],
    "optional-dependencies": {
        "ground": ["b>=2"],
        "upper": ["house[ground]", "c>=3"],
        "roof": ["house[upper,ground]", "d[fast]>=4"],
    },
}


def test_the_package_alone_brings_its_own_dependencies() -> None:
    assert list(requirements(PROJECT, [])) == ["a>=1"]


def test_an_extra_brings_along_those_it_names_once() -> None:
    assert sorted(requirements(PROJECT, ["roof"])) == ["a>=1", "b>=2", "c>=3", "d[fast]>=4"]


def test_an_unknown_extra_is_an_error() -> None:
    with pytest.raises(KeyError, match="cellar"):
        list(requirements(PROJECT, ["cellar"]))


def test_all_that_the_images_install_is_pinned() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    extras = re.findall(r"requirements\.py ([a-z ]+) >", (ROOT / "docker" / "Dockerfile").read_text())
    assert extras == ["stage", "train lexicon deepspeed qlora"]
    pins = {line.split("==")[0].lower() for line in (ROOT / "docker" / "constraints.txt").read_text().splitlines()}
    wanted = {re.split(r"[\[<>=!~]", line)[0].lower() for line in requirements(project, extras[1].split())}
    assert wanted - pins == set()
