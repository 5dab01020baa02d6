"""Orbax on S3: TensorStore has a driver for it, which Orbax 0.12 asks only for `gs://` and for local files."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from ssl_jax import storage

_SCHEME = "s3://"


def enable(directory: Any) -> None:
    """Lets Orbax write and read arrays at a path of S3; for another path, and the second time, does nothing.

    The endpoint is `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL` where one is set, as for the driver of fsspec.
    """
    if storage.is_url(directory) and os.fspath(directory).startswith(_SCHEME):
        _enable()


@functools.cache
def _enable() -> None:
    from orbax.checkpoint._src.serialization import tensorstore_utils

    # All addresses that TensorStore is given come from these two.
    for name in ("_build_ocdbt_kvstore_tspec", "_build_non_ocdbt_kvstore_tspec"):
        setattr(tensorstore_utils, name, _also_for_s3(getattr(tensorstore_utils, name)))


def _also_for_s3(build: Callable[..., Any]) -> Callable[..., Any]:
    def build_either(directory: str, *arguments: Any, **options: Any) -> Any:
        if not directory.startswith(_SCHEME):
            return build(directory, *arguments, **options)
        return _on_s3(build(f"gs://{directory.removeprefix(_SCHEME)}", *arguments, **options))

    return build_either


def _on_s3(spec: Any) -> Any:
    """TensorStore's description of a place with the driver of S3 instead of that of Google's storage."""
    if not isinstance(spec, dict):
        return spec
    changed = {name: _on_s3(value) for name, value in spec.items()}
    if changed.get("driver") in ("gcs", "gcs_grpc"):
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        changed |= {"driver": "s3"} | ({"endpoint": endpoint, "aws_region": region} if endpoint else {})
    return changed
