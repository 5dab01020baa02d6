"""What finished runs of the comparison say, in two files: figures as JSON, likelihoods of dialogues as arrays.

The arrays are what a bootstrap over dialogues needs, so that tables and intervals can be made again without the runs.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ablation_runs import Run
from ablation_schedule import Outcome
from numpy.typing import NDArray
from store import add_result

from ssl_jax import files
from ssl_jax.errors import UserError

SUMMARY, EVALUATION, BASELINES = "summary.json", "eval_test.json", "baselines.json"

_METRICS = "metrics.jsonl"
_DATA = "data.json"

Likelihoods = Mapping[str, NDArray[np.float32]]


def is_finished(folder: Path) -> bool:
    """Whether a run has ended well."""
    return (folder / SUMMARY).is_file() and (folder / EVALUATION).is_file()


def nll_file(output: Path) -> Path:
    """Where the arrays lie beside the JSON file."""
    return output.with_name(f"{output.stem}_nll.npz")


def collect(run: Run, folder: Path) -> dict[str, Any]:
    """A finished run as JSON values.

    Returns:
      `row`, `regime`, `budget` (None: all labels), `seed`; `labeled`, the dialogues that it had; `metrics` and `human`
      as evaluation names them; `tokens`, `tokens_by_stream`, `seconds`, `parameters`, `best_checkpoint`; `rounds`, what
      was logged of each round, whose `kind` is that of its stream; `round_seconds_share` of the run's time.
    """
    summary, evaluation = files.read_json(folder / SUMMARY), files.read_json(folder / EVALUATION)
    rounds = _rounds(folder / _METRICS)
    return {
        "row": run.row.name,
        "regime": run.regime,
        "budget": run.budget,
        "seed": run.seed,
        "labeled": files.read_json(folder / _DATA)["dialogues"]["labeled"]["train"],
        "metrics": evaluation["metrics"],
        "human": evaluation["human"],
        "counts": evaluation["counts"],
        "tokens": summary["tokens"],
        "tokens_by_stream": summary["tokens_by_stream"],
        "seconds": summary["seconds"],
        "parameters": summary["parameters"],
        "steps": summary["steps"],
        "best_checkpoint": summary["checkpoint"],
        "rounds": rounds,
        "round_seconds_share": sum(values.get("seconds", 0.0) for values in rounds) / max(summary["seconds"], 1e-9),
    }


def write(
    output: Path,
    scale: str,
    folder: Path,
    runs: Sequence[Run],
    outcomes: Mapping[str, Outcome],
    baselines: Mapping[str, Path],
) -> dict[str, Any]:
    """Adds what the runs say to the results of their scale, or puts it in the place of what they said before.

    Args:
      output: the JSON file; the arrays go beside it.
      scale: its key.
      folder: of the runs.
      runs: those that were asked for, finished or not.
      outcomes: by the run's name, where one is known.
      baselines: files of `baselines.py` by `<regime>-<budget>`, finished or not.

    Returns:
      All values of the scale.

    Raises:
      UserError: runs were evaluated on different dialogues.
    """
    before, likelihoods = read(output, scale, missing_ok=True)
    finished = {run.name: run for run in runs if is_finished(folder / run.name)}
    values = {
        "runs": {**before.get("runs", {}), **{name: collect(run, folder / name) for name, run in finished.items()}},
        "failed": _failures(before.get("failed", {}), finished, outcomes),
        "baselines": {
            **before.get("baselines", {}),
            **{name: files.read_json(file)["rows"] for name, file in baselines.items() if file.is_file()},
        },
    }
    merged = {**likelihoods, **_likelihoods(finished, folder, likelihoods)}
    output.parent.mkdir(parents=True, exist_ok=True)
    add_result(str(output), scale, values)
    others = {name: array for name, array in _read_arrays(nll_file(output)).items() if not name.startswith(f"{scale}/")}
    arrays = {**others, **{f"{scale}/{name}": array for name, array in merged.items()}}
    with files.replacing(nll_file(output)) as stream:
        np.savez_compressed(stream, allow_pickle=False, **arrays)
    return files.read_json(output)[scale]


def read(output: Path, scale: str, *, missing_ok: bool = False) -> tuple[dict[str, Any], Likelihoods]:
    """The results of a scale, and float32[D] nats of each test dialogue's replies by run; `bytes` are their bytes.

    Raises:
      UserError: there are none, unless `missing_ok`.
    """
    results = files.read_json(output) if output.is_file() else {}
    if scale not in results and not missing_ok:
        raise UserError(f"{output}: no results of scale {scale}; run python benchmarks/ssl_ablation.py --scale {scale}")
    prefix = f"{scale}/"
    arrays = _read_arrays(nll_file(output))
    return results.get(scale, {}), {
        name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)
    }


def seconds_of(folders: Iterable[Path]) -> list[float]:
    """How long the finished runs among them took."""
    return [files.read_json(folder / SUMMARY)["seconds"] for folder in folders if is_finished(folder)]


def mean_of(runs: Sequence[Mapping[str, Any]], name: str, group: str = "metrics") -> float | None:
    """The mean of a figure over runs, or None where one of them lacks it."""
    values = [run[group].get(name) for run in runs]
    return None if not values or None in values else statistics.fmean(values)


def _likelihoods(finished: Mapping[str, Run], folder: Path, known: Likelihoods) -> dict[str, NDArray[np.float32]]:
    result: dict[str, NDArray[np.float32]] = {}
    num_bytes = known.get("bytes")
    for name in finished:
        dialogues = files.read_json(folder / name / EVALUATION)["dialogues"]
        found = np.array(dialogues["bytes"], np.float32)
        if num_bytes is None:
            num_bytes = found
        if not np.array_equal(found, num_bytes):
            raise UserError(f"{folder / name}: evaluated on other dialogues than the runs before; repeat it or them")
        result[name] = np.array(dialogues["nll"], np.float32)
    return result if num_bytes is None else {**result, "bytes": num_bytes}


def _failures(
    before: Mapping[str, Any], finished: Mapping[str, Run], outcomes: Mapping[str, Outcome]
) -> dict[str, dict[str, Any]]:
    now = {
        name: {"exit_code": outcome.exit_code, "error": outcome.why}
        for name, outcome in outcomes.items()
        if outcome.state == "failed"
    }
    return {name: failure for name, failure in {**before, **now}.items() if name not in finished}


def _rounds(file: Path) -> list[dict[str, Any]]:
    """What `metrics.jsonl` says of every round: of `kind` pseudo (replies), or of another stream (contexts)."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    kinds = [(line, name.removesuffix("/round")) for line in lines for name in line if name.endswith("/round")]
    return [
        {"kind": kind, **{name.removeprefix(f"{kind}/"): line[name] for name in line if name.startswith(f"{kind}/")}}
        for line, kind in kinds
    ]


def _read_arrays(file: Path) -> dict[str, NDArray[np.float32]]:
    if not file.is_file():
        return {}
    with np.load(file) as arrays:
        return {name: arrays[name] for name in arrays.files}
