"""Whether all processes of a run have the same code and the same configuration: found out before any work is done."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssl_jax import distributed
from ssl_jax.errors import UserError

# Whose other version may compute other numbers, order rows differently or speak another protocol.
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "array_record", "numpy", "tokenizers")

Facts = dict[str, dict[str, Any]]


def check(settings: Mapping[str, Any]) -> None:
    """Compares this process with the others of its run; at once where there is only one.

    Args:
      settings: what the run is told to do, as JSON values.

    Raises:
      UserError: on the primary, naming the process, and the version, file or field in which it differs.
    """
    if distributed.process_count() == 1:
        return
    told = distributed.exchange("agreement", json.dumps(_facts(settings)))
    distributed.primary_first("agree", lambda: _compare([json.loads(text) for text in told]))


def _facts(settings: Mapping[str, Any]) -> Facts:
    """What must be the same everywhere: versions, a digest of every source file, every field of the settings."""
    package = Path(__file__).parent
    sources = {
        path.relative_to(package.parent).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in sorted(package.rglob("*.py"))
    }
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {
        "versions": {"python": platform.python_version(), **versions},
        "sources": sources,
        "settings": _flat(settings),
    }


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted path, as on the command line."""
    if not isinstance(values, Mapping | list) or not values:
        return {prefix.removesuffix("."): values}
    pairs = values.items() if isinstance(values, Mapping) else enumerate(values)
    return {path: leaf for name, value in pairs for path, leaf in _flat(value, f"{prefix}{name}.").items()}


def _compare(facts: list[Facts]) -> None:
    """Raises UserError for the first process that differs from the first one."""
    first = facts[0]
    for number, other in enumerate(facts):
        if differing := _differing(first["versions"], other["versions"]):
            name = differing[0]
            there, here = other["versions"].get(name), first["versions"].get(name)
            raise UserError(
                f"process {number} has {name} {there}, process 0 has {here}; install the same versions everywhere"
            )
        if differing := _differing(first["sources"], other["sources"]):
            more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
            raise UserError(
                f"process {number} runs other code than process 0: {differing[0]}{more} differs; "
                "install the same version of ssl_jax everywhere"
            )
        if differing := _differing(first["settings"], other["settings"]):
            there, here = other["settings"], first["settings"]
            shown = "; ".join(f"{name} is {there.get(name)!r} there, {here.get(name)!r} here" for name in differing[:3])
            more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise UserError(
                f"process {number} has another configuration than process 0 ({shown}{more}); "
                "give all processes the same --config and flags"
            )


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Names with different values, or with one only in one of them."""
    missing = object()
    return [name for name in {**one, **other} if one.get(name, missing) != other.get(name, missing)]
