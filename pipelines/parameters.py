"""Run parameters as people write them: read, held against the pipeline's own, and refused before anything starts."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tutelage.components.core.config import merge
from tutelage.components.core.errors import ConfigError


class Loader(yaml.SafeLoader):
    """YAML in which 1e-5 is a number, as everywhere but in YAML 1.1."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_file(path: Path) -> dict[str, Any]:
    """The parameters in a YAML or JSON file. Raises ConfigError."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"parameters cannot be read: {error}", where=str(path)) from None
    if not isinstance(values, dict):
        raise ConfigError("the file is no mapping of names to values", where=str(path), fix="Write name: value.")
    return {str(name): value for name, value in values.items()}


def read_assignments(texts: Sequence[str]) -> dict[str, Any]:
    """`name=value` each; the value is YAML. `name.key.key=value` sets one key of a struct. Raises ConfigError."""
    values: dict[str, Any] = {}
    for text in texts:
        name, equals, written = text.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"{text!r} is not name=value", where="-p", fix="Write for example -p sft_epochs=2.")
        try:
            value = yaml.load(written, Loader)
        except yaml.YAMLError:
            value = written
        parameter, *keys = name.strip().split(".")
        for key in reversed(keys):
            value = {key: value}
        values = merge(values, {parameter: value if isinstance(value, dict) else _Written(written, value)})
    return values


class _Written:
    """A value of the command line before its parameter's type is known: text parameters take it as it stands."""

    def __init__(self, text: str, value: Any) -> None:
        self.text, self.value = text, value


def check_parameters(definition: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` with every value in the type that its parameter has.

    definition: the pipeline's compiled definition. Raises ConfigError for an unknown or missing name, a value of
    another type, or one that is none of the parameter's choices.
    """
    parameters = definition["root"].get("inputDefinitions", {}).get("parameters", {})
    known, where = sorted(parameters), f"pipeline {definition['pipelineInfo']['name']}"
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name not in parameters:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise ConfigError(f"unknown parameter {name!r}", where=where, fix=f"{hint}Parameters: {', '.join(known)}.")
        parameter = parameters[name]
        values[name] = _typed(name, value, parameter["parameterType"], where)
        choices = parameter.get("literals", [])
        if choices and values[name] not in choices:
            near = difflib.get_close_matches(str(values[name]), choices, n=1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise ConfigError(
                f"{name} cannot be {values[name]!r}", where=where, fix=f"{hint}It can be: {', '.join(choices)}."
            )
    missing = [name for name in known if name not in values and not parameters[name].get("isOptional")]
    if missing:
        raise ConfigError(
            f"missing parameter{'s' if len(missing) > 1 else ''} {', '.join(missing)}",
            where=where,
            fix=f"Give -p {missing[0]}=..., or a file of parameters.",
        )
    return values


def _typed(name: str, value: Any, kind: str, where: str) -> Any:
    if isinstance(value, _Written):
        value = value.text if kind == "STRING" else value.value
    match kind, value:
        case ("STRING", str()) | ("BOOLEAN", bool()) | ("STRUCT", dict()) | ("LIST", list()):
            return value
        case "STRING", int() | float() if not isinstance(value, bool):
            return str(value)
        case ("STRUCT", None) | ("LIST", None):
            return {} if kind == "STRUCT" else []
        case "NUMBER_INTEGER", int() | float() if not isinstance(value, bool) and value == math.floor(value):
            return int(value)
        case "NUMBER_DOUBLE", int() | float() if not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    expected = {
        "STRING": "text",
        "BOOLEAN": "true or false",
        "NUMBER_INTEGER": "a whole number",
        "NUMBER_DOUBLE": "a number",
        "STRUCT": 'a mapping such as {"key": value}',
        "LIST": "a list",
    }
    raise ConfigError(f"{name} has to be {expected.get(kind, kind)}, got {value!r}", where=where, fix="Correct it.")
