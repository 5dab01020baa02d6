"""Two finished evaluations of the same dialogues side by side."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ssl_jax import files, metrics
from ssl_jax.errors import UserError


def read(flag: str, directory: str, name: str, flags: str) -> dict[str, Any]:
    """An evaluation that a work directory holds.

    Args:
      flag: which flag names the directory.
      directory: the work directory.
      name: of the file.
      flags: of the command that writes it, besides the work directory.

    Raises:
      UserError: there is none; the message says which command makes it.
    """
    path = Path(directory) / name
    if not path.is_file():
        raise UserError(
            f"{flag} {directory} has no {name}; make it with python -m ssl_jax.evaluate --workdir {directory} {flags}"
        )
    try:
        return files.read_json(path)
    except ValueError:
        raise UserError(
            f"{path} is damaged; make it again with python -m ssl_jax.evaluate --workdir {directory} {flags}"
        ) from None


def checked(flag: str, result: Any) -> dict[str, Any]:
    """What `read` gives, if it is what `measure.full` has made.

    Raises:
      UserError: it is not.
    """
    if not _is_complete(result):
        raise UserError(
            f"{flag}: the eval_*.json of its work directory is damaged; make it again with python -m ssl_jax.evaluate "
            "--workdir"
        )
    return result


def compare(
    evaluation: Mapping[str, Any], baseline: Mapping[str, Any], oracle: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """How an evaluation differs from a baseline's, and how much of the way to an oracle's it goes.

    Args:
      evaluation, baseline, oracle: results of `measure.full`.

    Returns:
      `reply_bits_per_byte`: value minus the baseline's with the 95 % interval of `metrics.paired_bootstrap` over
      dialogues, as `value`, `low`, `high`; below 0 where the evaluation is better. `differences`: value minus the
      baseline's of every metric that both have. With an oracle `gap_closed`: the fields of `metrics.GapClosed`.

    Raises:
      UserError: the evaluations are not of the same dialogues.
    """
    for flag, other in (("--baseline", baseline), ("--oracle", oracle)):
        if other is not None and any(
            other["dialogues"][name] != evaluation["dialogues"][name] for name in ("id", "bytes")
        ):
            raise UserError(
                f"{flag}: its evaluation is of other dialogues than --workdir's; evaluate both on the same data and "
                "with the same evaluation.test_dialogues"
            )
    num_bytes = evaluation["dialogues"]["bytes"]
    bits, baseline_bits = (
        np.array(result["dialogues"]["nll"], np.float64) / math.log(2) for result in (evaluation, baseline)
    )
    interval = metrics.paired_bootstrap(bits, num_bytes, baseline_bits, num_bytes)
    result: dict[str, Any] = {
        "reply_bits_per_byte": dataclasses.asdict(interval),
        "differences": {
            name: value - baseline["metrics"][name]
            for name, value in evaluation["metrics"].items()
            if name in baseline["metrics"]
        },
    }
    if oracle is not None:
        floor, method, best = (one["dialogues"]["nll"] for one in (baseline, evaluation, oracle))
        result["gap_closed"] = dataclasses.asdict(metrics.gap_closed(floor, method, best, num_bytes))
    return result


def _is_complete(result: Any) -> bool:
    """Whether what a file holds has what is compared: a number of every dialogue, and metrics that are numbers."""
    try:
        dialogues, values = result["dialogues"], list(result["metrics"].values())
        ids, numbers = dialogues["id"], [*values, *dialogues["nll"], *dialogues["bytes"]]
        lengths = {len(ids), len(dialogues["nll"]), len(dialogues["bytes"])}
    except (KeyError, TypeError, AttributeError):
        return False
    return len(lengths) == 1 and bool(ids) and all(type(one) in (int, float) for one in numbers)
