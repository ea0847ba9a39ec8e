"""Where a stage runs: in this process, or as several processes under torchrun on this machine."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tutelage.components.core.config import StageConfig
from tutelage.components.core.context import RUN_ID_VARIABLE, Settings, open_stage
from tutelage.components.core.errors import ConfigError, TrainingError, TutelageError


def launch(
    stage: str,
    config: StageConfig,
    settings: Mapping[str, Any] | None = None,
    *,
    inputs: Mapping[str, str] | None = None,
    outputs: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Runs `tutelage.components.<stage>.stage.run` and returns its Result as a dict.

    inputs, outputs: paths by the names of run's keyword arguments; an input that is empty is passed as None.
    Several processes are started where the configuration (`training.processes`) or the GPUs ask for them.
    Raises what the stage raises; TrainingError when a process of several fails.
    """
    inputs, outputs = dict(inputs or {}), dict(outputs or {})
    count = _process_count(config)
    if count > 1 and "WORLD_SIZE" not in os.environ:
        return _torchrun(stage, config, settings or {}, inputs, outputs, count)
    module = importlib.import_module(f"tutelage.components.{stage}.stage")
    run_settings = Settings.build(settings)
    with open_stage(stage, config, run_settings, inputs=inputs, outputs=outputs) as (context, record):
        paths = {name: Path(path) if path else None for name, path in {**inputs, **outputs}.items()}
        result = module.run(config, context, **paths).model_dump(mode="json")
        record["metrics"] = {name: value for name, value in result.items() if isinstance(value, int | float)}
    return result


def main(stage: str, arguments: Sequence[str] | None = None) -> None:
    """The command line of `python -m tutelage.components.<stage>`. Exits with 1 and one line for a user's error."""
    parser = argparse.ArgumentParser(
        prog=f"python -m tutelage.components.{stage}", description=f"Runs the {stage} stage."
    )
    parser.add_argument("--config", type=Path, help="YAML or JSON file with the stage's configuration")
    parser.add_argument("--settings", type=Path, help="YAML or JSON file with the run's settings (store, tracking)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one configuration key, dotted")
    parser.add_argument("--input", action="append", default=[], metavar="NAME=PATH", help="an input artifact")
    parser.add_argument("--output", action="append", default=[], metavar="NAME=PATH", help="where an output goes")
    parser.add_argument("--result", type=Path, help="where to write the result as JSON")
    given = parser.parse_args(arguments)
    try:
        module = importlib.import_module(f"tutelage.components.{stage}.stage")
        config = module.Config.build(_assignments(given.set), **_load(given.config))
        paths = [dict(_pair(text) for text in texts) for texts in (given.input, given.output)]
        result = launch(stage, config, _load(given.settings), inputs=paths[0], outputs=paths[1])
    except TutelageError as error:
        sys.exit(f"{stage}: {error}")
    if int(os.environ.get("RANK", "0")) == 0:
        text = json.dumps(result, indent=1)
        given.result.write_text(text) if given.result else print(text)


def _process_count(config: StageConfig) -> int:
    training = getattr(config, "training", None)
    if training is None:
        return 1
    if training.processes:
        return int(training.processes)
    import torch

    return max(1, torch.cuda.device_count())


def _torchrun(
    stage: str,
    config: StageConfig,
    settings: Mapping[str, Any],
    inputs: dict[str, str],
    outputs: dict[str, str],
    count: int,
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix=f"tutelage-{stage}-launch-") as folder:
        files = {name: Path(folder) / f"{name}.json" for name in ("config", "settings", "result")}
        files["config"].write_text(config.model_dump_json())
        files["settings"].write_text(json.dumps(dict(settings)))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        command += ["-m", f"tutelage.components.{stage}"]
        command += [word for name, path in files.items() for word in (f"--{name}", str(path))]
        for flag, paths in (("--input", inputs), ("--output", outputs)):
            command += [word for name, path in paths.items() for word in (flag, f"{name}={path}")]
        run_id = os.environ.get(RUN_ID_VARIABLE) or f"local-{uuid.uuid4().hex[:12]}"
        process = subprocess.Popen(command, env={**os.environ, RUN_ID_VARIABLE: run_id})
        previous = signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number))
        try:
            code = process.wait()
        finally:
            signal.signal(signal.SIGTERM, previous)
        if code:
            raise TrainingError(
                f"one of {count} processes failed with exit code {code}", where=stage, fix="Its error stands above."
            )
        return dict(json.loads(files["result"].read_text()))


def _load(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot be read: {error}", where=str(path)) from None
    if not isinstance(values, dict):
        raise ConfigError("is not a mapping of keys to values", where=str(path))
    return values


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"{text!r} is not NAME=VALUE")
    return name, value


def _assignments(texts: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for text in texts:
        name, value = _pair(text)
        *path, last = name.split(".")
        below = values
        for part in path:
            below = below.setdefault(part, {})
        below[last] = yaml.safe_load(value)
    return values
