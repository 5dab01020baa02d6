"""A server on this machine that speaks as Google Cloud Storage or S3 does, for tests that need a bucket."""

from __future__ import annotations

import contextlib
import importlib.util
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import processes
import pytest

from ssl_jax import storage

BUCKET = "bucket"

_SERVERS = {
    "gs": [str(Path(__file__).with_name("gs_server.py")), "{port}", "{bucket}"],
    "s3": ["-m", "moto.server", "-H", "127.0.0.1", "-p", "{port}"],
}
_NEEDED = {"gs": ("gcsfs", "gcp_storage_emulator"), "s3": ("s3fs", "moto", "flask")}


def require(scheme: str) -> None:
    """Skips a test whose server or driver is not installed."""
    missing = [name for name in _NEEDED[scheme] if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed; pip install 'ssl_jax[test-storage]'")


@contextlib.contextmanager
def serving(scheme: str, log: Path) -> Iterator[dict[str, str]]:
    """A server; gives the environment in which it is found.

    Args:
      scheme: gs or s3.
      log: where its output goes.
    """
    address = processes.free_address()
    command = [word.format(port=address.split(":")[1], bucket=BUCKET) for word in _SERVERS[scheme]]
    with log.open("w") as output:
        server = subprocess.Popen([sys.executable, *command], stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait_for(address)
        yield environment(scheme, f"http://{address}")
    finally:
        server.kill()
        server.wait(30)


def make_bucket(scheme: str) -> None:
    """Makes `BUCKET` on the server that this process's environment names; the one for gs has made it."""
    if scheme == "s3":
        # fsspec keeps a driver for the server that the environment named when it was made.
        type(storage.filesystem("s3://" + BUCKET)).clear_instance_cache()
        storage.filesystem.cache_clear()
        storage.filesystem("s3://" + BUCKET).mkdir(BUCKET)


def environment(scheme: str, url: str) -> dict[str, str]:
    """In which the drivers find a server."""
    if scheme == "gs":
        return {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            # Without credentials TensorStore asks the machine for them, which takes seconds.
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            # What kind of bucket it is, the driver asks another service of Google.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "tester",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def _wait_for(address: str) -> None:
    host, port = address.split(":")
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection((host, int(port)), 1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, f"nobody listens at {address}"
            time.sleep(0.05)
