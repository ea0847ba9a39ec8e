"""The process in which kfp.local runs a compiled pipeline: `python -m tutelage.pipelines.engine REQUEST`.

A process of its own, because kfp.local keeps global state, replaces `print` and hands its whole environment to the
stages, and because one process group can be ended as one. `local.run_local` starts it and reads what it says.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

RUN_LABEL = "tutelage.run_id"


def main(request: dict[str, Any]) -> None:
    """request: compiled, parameters, pipeline_root, cache_root, runner, container (arguments of docker run).

    Exits with 1 if a stage failed.
    """
    warnings.filterwarnings("ignore", module=r"kfp\..*")  # that images and resources mean nothing here
    # kfp.local tells of skipped and cached tasks through the root logger, which is silent by default.
    line = "%(asctime)s - %(levelname)s - %(message)s"
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format=line, datefmt="%H:%M:%S")
    from kfp import components, local

    docker = request["runner"] == "docker"
    local.init(
        local.DockerRunner(**_container(request["container"])) if docker else local.SubprocessRunner(use_venv=False),
        pipeline_root=request["pipeline_root"],
        enable_caching=True,
        cache_root=request["cache_root"],
    )
    pipeline = components.load_component_from_file(request["compiled"])
    try:
        pipeline(**request["parameters"])
    except RuntimeError as error:  # how kfp.local says that a stage failed
        sys.exit(str(error))
    except KeyboardInterrupt:
        if docker:
            _kill_containers(os.environ["TUTELAGE_RUN_ID"])
        sys.exit(130)


def _container(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of docker run, with mounts and GPUs as the Docker client wants them."""
    from docker import types

    mounts = [types.Mount(path, path, type="bind", read_only=read_only) for path, read_only in arguments["mounts"]]
    gpus = arguments["gpus"]
    requests = [types.DeviceRequest(count=gpus, capabilities=[["gpu"]])] if gpus else None
    rest = {key: value for key, value in arguments.items() if key not in ("mounts", "gpus")}
    return {**rest, "mounts": mounts, "device_requests": requests}


def _kill_containers(run_id: str) -> None:
    import docker

    client = docker.from_env()
    for container in client.containers.list(filters={"label": f"{RUN_LABEL}={run_id}"}):
        container.kill()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
