"""Prints the dependencies of the package and of the extras named, without the package itself.

    python3 docker/requirements.py train lexicon > requirements.txt

An image installs them in a layer of their own, before the code is there. An extra that names another one, as in
`tutelage[stage]`, brings that one along.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


def requirements(project: Mapping[str, Any], extras: Iterable[str]) -> Iterator[str]:
    """The requirements of `project`, the table of that name in pyproject.toml, and of `extras`.

    Raises KeyError for an extra that is not there.
    """
    yield from project["dependencies"]
    waiting, seen = list(extras), set()
    while waiting:
        extra = waiting.pop()
        if extra in seen:
            continue
        seen.add(extra)
        for requirement in project["optional-dependencies"][extra]:
            if nested := re.fullmatch(rf"{project['name']}\[([\w,-]+)\]", requirement):
                waiting += nested[1].split(",")
            else:
                yield requirement


if __name__ == "__main__":
    with Path("pyproject.toml").open("rb") as file:
        print(*requirements(tomllib.load(file)["project"], sys.argv[1:]), sep="\n")
