"""Where a model comes from: a directory, object storage, the MLflow registry or a hub id; and whether it is whole."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

from tutelage.components.core.errors import ArtifactError, DataError
from tutelage.components.core.manifest import read_manifest
from tutelage.components.core.store import local_path, localize

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")


def locate_model(uri: str, into: Path, *, tracking_uri: str = "") -> str:
    """A directory that holds the model of `uri`, or `uri` itself if it is a hub id.

    uri: a local path, file://, s3://, models:/name@alias (MLflow registry), or a hub id such as org/name or
    org/name@revision. What lies in object storage is copied below `into`. tracking_uri: where the registry is; empty:
    MLFLOW_TRACKING_URI. Raises ArtifactError if nothing is there, or the model is not whole.
    """
    if uri.startswith("models:/"):
        from tutelage.components.core.tracking import resolve_model_uri

        uri = resolve_model_uri(uri, tracking_uri=tracking_uri)
    if "://" not in uri and not Path(uri).exists() and HUB_ID.fullmatch(uri) and not uri.startswith("."):
        return uri
    try:
        directory = local_path(uri) or localize(uri, into)
    except DataError as error:
        raise ArtifactError(error.what, where=error.where, fix=error.fix) from None
    check_model_directory(directory, name=uri)
    return str(directory)


def check_model_directory(directory: Path, *, name: str = "") -> None:
    """Raises ArtifactError that says what is missing or half-written: configuration, tokenizer or weights."""
    where = name or str(directory)
    fix = "Give a directory written by save_pretrained, with safetensors weights."
    if not directory.is_dir():
        raise ArtifactError("there is no model directory", where=where, fix=fix)
    if (directory / "manifest.json").exists():
        read_manifest(directory)
    try:
        json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError("config.json is missing", where=where, fix=fix) from None
    except ValueError as error:
        raise ArtifactError(f"config.json is not JSON: {error}", where=where, fix=fix) from None
    if not any(
        (directory / file).exists() for file in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    ):
        raise ArtifactError("there is no tokenizer (tokenizer.json or a vocabulary)", where=where, fix=fix)
    for file in _weight_files(directory, where, fix):
        _check_safetensors(directory / file, where, fix)


def _weight_files(directory: Path, where: str, fix: str) -> list[str]:
    index = directory / "model.safetensors.index.json"
    if index.exists():
        try:
            return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ArtifactError(f"{index.name} is no list of weight files", where=where, fix=fix) from None
    if not (directory / "model.safetensors").exists():
        raise ArtifactError("model.safetensors is missing", where=where, fix=fix)
    return ["model.safetensors"]


def _check_safetensors(path: Path, where: str, fix: str) -> None:
    """The header says how long the file has to be: a cut file is found without reading the weights."""
    if not path.exists():
        raise ArtifactError(f"{path.name} is missing", where=where, fix=fix)
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > size:
                raise ValueError(length)
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
    except (struct.error, ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise ArtifactError(f"{path.name} is not a whole safetensors file", where=where, fix=fix) from None
    whole = 8 + length + max(ends, default=0)
    if size != whole:
        raise ArtifactError(f"{path.name} is cut: {size:,} of {whole:,} bytes", where=where, fix=fix)
