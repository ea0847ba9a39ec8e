"""Shared fixtures: one thread per process, and an S3 store that answers over HTTP."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

# Before torch is imported anywhere: more threads than cores make the tests slower, and sums depend on their number.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_variable] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

_START_SECONDS = 60


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an empty S3 server of this session, which the environment names with working credentials."""
    folder = tmp_path_factory.mktemp("s3")
    log = folder / "server.log"
    with log.open("wb") as stream, pytest.MonkeyPatch.context() as patch:
        # Port 0: the server takes a free one and writes it to its log once it listens.
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
        server = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, cwd=folder)
        try:
            url = _wait_for_url(server, log)
            for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_REGION"):
                patch.delenv(name, raising=False)
            patch.setenv("AWS_ENDPOINT_URL", url)
            patch.setenv("AWS_ACCESS_KEY_ID", "tests-access-key")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "tests-secret-key")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            # Nothing of the developer's own configuration counts.
            patch.setenv("AWS_CONFIG_FILE", str(folder / "config"))
            patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "credentials"))
            patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
            patch.setenv("NO_PROXY", "127.0.0.1")
            yield url
        finally:
            server.kill()
            server.wait()


@pytest.fixture
def bucket(s3_endpoint: str) -> str:
    """The name of a bucket that nobody else uses."""
    import boto3

    name = f"test-{uuid4().hex}"
    boto3.session.Session().client("s3").create_bucket(Bucket=name)
    return name


def _wait_for_url(server: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        if found := re.search(rb"Running on (http://[\d.:]+)", log.read_bytes()):
            return found.group(1).decode()
        time.sleep(0.05)
    raise RuntimeError(f"the S3 server did not start: {log.read_text()}")
