"""Stages as containers of this machine: which places they share with it, how one is run, and how it ended.

kfp.local has the engine remove a container the moment it ends, and takes one whose exit status is gone by then for a
success. `run_container` stands in for its loop: first the status, then the removal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from tutelage.components.core.errors import ConfigError

if TYPE_CHECKING:
    from docker.client import DockerClient
    from docker.models.containers import Container

RUN_LABEL = "tutelage.run_id"
# For a stage to tidy up after an interrupt; shorter than the grace that its runner is given.
TIDY_SECONDS = 15


def mounts(output_dir: Path, *, read: Iterable[str], written: Iterable[str]) -> list[tuple[str, bool]]:
    """What containers share with this machine, under the same names: (path, whether only for reading).

    read, written: paths and URIs. What is written is a directory, made here, or a SQLite file, whose directory is
    shared. What lies below `output_dir`, or elsewhere than on this machine, needs no mount.
    Raises ConfigError for a relative SQLite file, which would be another one in each container.
    """
    shared = {output_dir: False}
    for uri in written:
        path = local_path(uri)
        if path is None and uri.startswith("sqlite"):
            what = "a SQLite database that containers share needs an absolute path"
            raise ConfigError(what, where=uri, fix="Write sqlite:////, with four slashes, and the path.")
        if path is not None:
            folder = path.parent if uri.startswith("sqlite") else path
            folder.mkdir(parents=True, exist_ok=True)
            shared[folder] = False
    for uri in read:
        path = local_path(uri)
        if path is not None and path.exists():
            shared.setdefault(path, True)
    outside = {path: only for path, only in shared.items() if path == output_dir or output_dir not in path.parents}
    return [(str(path), only) for path, only in outside.items()]


def local_path(uri: str) -> Path | None:
    """The path behind an absolute path, a file:// or a SQLite URI of one; else None."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        path = Path(uri)
    elif scheme == "file":
        path = Path(unquote(urlsplit(uri).path))
    elif scheme.startswith("sqlite"):
        path = Path(rest.removeprefix("/").partition("?")[0])
    else:
        return None
    return path if path.is_absolute() else None


def require_images(client: DockerClient, definition: Mapping[str, Any]) -> None:
    """Fetches the images of a compiled pipeline that are not here. Raises ConfigError for one that cannot be had."""
    from docker.errors import APIError, ImageNotFound

    executors = definition["deploymentSpec"]["executors"].values()
    for image in sorted({executor["container"]["image"] for executor in executors}):
        try:
            client.images.get(image)
        except ImageNotFound:
            try:
                client.images.pull(*_name_and_tag(image))
            except APIError as error:
                what = f"image {image} is not on this machine and cannot be pulled: {error.explanation}"
                raise ConfigError(what, where="--runner docker", fix="Build it with make images.") from None


def run_container(
    client: DockerClient, image: str, command: Sequence[str], volumes: Mapping[str, Any], **arguments: Any
) -> int:
    """Runs a container, prints what it says line by line, and returns its exit status. Arguments as of docker run.

    An interrupt is passed on to all processes in the container, which then have TIDY_SECONDS.
    """
    container = client.containers.run(image, command, detach=True, volumes=volumes, **arguments)
    try:
        for line in _lines(container.logs(stream=True, follow=True)):
            print(line)
        status = int(container.wait()["StatusCode"])
        if status:
            container.reload()
            memory = ", out of memory" if container.attrs["State"]["OOMKilled"] else ""
            print(f"the container ended with exit status {status}{memory}")
        return status
    except KeyboardInterrupt:
        _interrupt(container)
        raise
    finally:
        container.remove(v=True, force=True)


def remove_containers(client: DockerClient, run_id: str) -> None:
    """Removes every container of a run, whatever it is doing."""
    for container in client.containers.list(all=True, filters={"label": f"{RUN_LABEL}={run_id}"}):
        container.remove(v=True, force=True)


def _interrupt(container: Container) -> None:
    """As Control-C on a terminal does. The shell that is process 1 there would not pass a signal on."""
    with suppress(Exception):  # it may be gone by now, and is removed in any case
        container.exec_run(["sh", "-c", "kill -INT -1"])
        container.wait(timeout=TIDY_SECONDS)


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """The lines in a stream of bytes that is cut anywhere."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace").rstrip("\r")
    if rest:
        yield rest.decode(errors="replace")


def _name_and_tag(image: str) -> tuple[str, str | None]:
    name, colon, tag = image.rpartition(":")
    return (name, tag) if colon and "/" not in tag and "@" not in image else (image, None)
