"""What the manifest of one checkpoint says: its step, the leaves of its items, its files.

The keys of a manifest are `step`, `metric`, `meta` (JSON values of whoever saved), `items` (`float32[50304,768]` by
path of a leaf, by name of an item) and `files` (`manifest.write`). An item's files lie in a folder of its name.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

from ssl_jax import manifest
from ssl_jax.errors import UserError

PyTree = Any

# Of a step, of which nothing else is read meanwhile.
_LOCAL_READS_AT_ONCE = min(4, os.cpu_count() or 1)


def leaves_by_path(tree: PyTree) -> dict[str, Any]:
    """`{"params/wte": leaf, …}`; one flat form for dicts, tuples and dataclasses.

    Raises:
      ValueError: two leaves have the same path.
    """
    import jax

    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}
    if len(leaves) != len(flat):
        raise ValueError("two leaves of the tree have the same path")
    return leaves


def body(
    step: int, items: Mapping[str, Mapping[str, Any]], meta: Mapping[str, Any], metric: float | None
) -> dict[str, Any]:
    """What the manifest of a step says besides `files`; `items` are leaves by path, by name. Nothing is shared."""
    return {
        "step": step,
        "metric": metric if metric is not None and math.isfinite(metric) else None,
        "meta": json.loads(json.dumps(dict(meta))),
        "items": {name: {path: _describe(leaf) for path, leaf in leaves.items()} for name, leaves in items.items()},
    }


def read(folder: Any) -> dict[str, Any]:
    """Raises ValueError, with the reason, if the manifest is absent, not as it was written, or none of a checkpoint."""
    found = manifest.read(folder / manifest.NAME)
    # Whoever writes another manifest can give it its digest.
    if not _is_ours(found):
        raise ValueError(f"{manifest.NAME} is damaged")
    return found


def problem(folder: Any, items: Iterable[str] | None = None) -> str | None:
    """Why the step in a folder cannot be trusted, or None; its files are read, with `items` only those of these."""
    try:
        stored = read(folder)
    except ValueError as error:
        return str(error)
    if stored["step"] != int(folder.name):
        return f"{manifest.NAME} is that of step {stored['step']}"
    others = set(stored["items"]).difference(items if items is not None else stored["items"])
    declared = {name: file for name, file in stored["files"].items() if name.split("/")[0] not in others}
    return manifest.difference(folder, declared, at_once=_LOCAL_READS_AT_ONCE)


def check_leaves(where: str, stored: Mapping[str, Mapping[str, str]], name: str, wanted: Mapping[str, Any]) -> None:
    """Compares the `items` of a manifest with what is to be restored of one of them.

    Raises:
      UserError: there is no such item, or its leaves differ from those that are wanted; `where` begins the message.
    """
    if name not in stored:
        raise UserError(f"{where} has no item '{name}'; it has {', '.join(stored)}")
    has = stored[name]
    for path, leaf in wanted.items():
        if path not in has:
            raise UserError(f"{where}, item '{name}': leaf '{path}' is not in it; was the model changed?")
        if has[path] != _describe(leaf):
            raise UserError(f"{where}, item '{name}': leaf '{path}' is {has[path]}, expected {_describe(leaf)}")
    if superfluous := sorted(set(has).difference(wanted)):
        raise UserError(f"{where}, item '{name}': leaf '{superfluous[0]}' is in it, but not expected")


def _describe(leaf: Any) -> str:
    """`float32[50304,768]`."""
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _is_ours(body: Mapping[str, Any]) -> bool:
    """Whether a JSON object has the parts of a manifest, of their types."""
    return (
        body.keys() == {"step", "metric", "meta", "items", "files"}
        and type(body["step"]) is int
        and (body["metric"] is None or isinstance(body["metric"], int | float))
        and all(isinstance(body[part], dict) for part in ("meta", "items"))
        and all(isinstance(leaves, dict) for leaves in body["items"].values())
    )
