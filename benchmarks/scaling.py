"""What a token costs as model, batch, context and the share of unlabeled rows grow.

    python benchmarks/scaling.py

Ours alone. The points of a row of the table train in turn, each in a process of its own, with what is not varied as in
the quickstart benchmark. Along `context` a step has the same number of tokens; along `unlabeled` the same number of
rows, so that a ratio of costs of one says that unlabeled and pseudo-labeled rows cost their share and no more. Along
`teacher` half of the rows get the soft labels of an average of the student: a third of a training pass on half of the
rows, 1.17, is the least that it can cost.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from alternate import Player, spread, take_turns, warm_up
from pydantic import Field
from store import add_result
from workload import Device, Size, Workload, child, variables, workload

from ssl_jax import command_line
from ssl_jax.config import Section

_WARM_UP_STEPS = 2

Axis = Literal["model", "batch", "context", "unlabeled", "teacher"]


class Options(Section):
    """What is varied, and where the result goes."""

    size: Size = Field(default="quickstart", description="Model and batch from which one thing at a time is varied.")
    device: Device = Field(default="cpu", description="Where to compute: float32 on cpu, bfloat16 on cuda.")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="On embeddings, attention and residual stream.")
    axes: tuple[Axis, ...] = Field(
        default=("model", "batch", "context", "unlabeled", "teacher"), description="What is varied."
    )
    doublings: int = Field(default=3, ge=1, description="How often model, batch and context are doubled.")
    ratios: tuple[float, ...] = Field(default=(0, 1, 3), description="Unlabeled rows per labeled row.")
    rounds: int = Field(default=5, ge=1, description="Turns of each.")
    turn_seconds: float = Field(default=1.0, gt=0, description="How long a turn takes, about.")
    output: str = Field(default="benchmarks/results/scaling.json", description="File that receives the result.")


def main(arguments: Sequence[str]) -> None:
    """Measures, prints a table, puts each axis beside the others in the file as soon as it is there."""
    options = command_line.parse(
        Options, arguments, program="python benchmarks/scaling.py", summary=(__doc__ or "").strip()
    )
    base = workload(options.size, options.device, dropout=options.dropout)
    for axis in options.axes:
        result = measure(points(axis, base, options), options.rounds, options.turn_seconds)
        print(report(axis, result), flush=True)
        values = {**options.model_dump(exclude={"output", "axes"}), "axis": axis, "points": result}
        add_result(options.output, f"{options.size}, {options.device}, {axis}", values)


def points(axis: Axis, base: Workload, options: Options) -> dict[str, Workload]:
    """The workloads along an axis, by what is different about them."""

    def changed(**changes: Any) -> Workload:
        return command_line.validate(Workload, {**base.model_dump(), **changes}, origin=axis)

    factors = [2**power for power in range(options.doublings + 1)]
    match axis:
        case "model":
            # Width and heads, so that the width of a head stays.
            shapes = [(base.n_embd * factor, base.n_head * factor) for factor in factors]
            return {f"{width} wide": changed(n_embd=width, n_head=heads) for width, heads in shapes}
        case "batch":
            rows = [max(1, base.rows // 4) * factor for factor in factors]
            return {f"{number} rows": changed(rows=number) for number in rows}
        case "context":
            return {
                f"{base.sequence_length * factor} tokens": changed(
                    rows=max(1, base.rows // factor),
                    sequence_length=base.sequence_length * factor,
                    n_positions=max(base.n_positions, base.sequence_length * factor),
                )
                for factor in factors
            }
        case "unlabeled":
            return {f"{ratio:g} to 1": changed(unlabeled_ratio=ratio) for ratio in options.ratios}
        case "teacher":
            return {"none": base, "of half the rows": changed(unlabeled_ratio=1, taught_by_average=True)}


def measure(workloads: Mapping[str, Workload], rounds: int, turn_seconds: float) -> dict[str, Any]:
    """Lets all workloads train in turn.

    Returns:
      By name: `workload`, `parameters`, `flops_per_token`, `ms_per_ktoken` of every round, `cost_ratio`, the spread
      over the rounds of its cost ÷ that of the first workload, and `data_share`, of the time, waited for data.
    """
    with contextlib.ExitStack() as stack:
        players = [
            stack.enter_context(Player(name, child("train_ours.py", work.model_dump_json()), variables(work.device)))
            for name, work in workloads.items()
        ]
        seconds = warm_up(players, _WARM_UP_STEPS)
        amounts = {name: math.ceil(turn_seconds / each) for name, each in seconds.items()}
        turns = take_turns(players, amounts, rounds)
        described = {player.name: player.description for player in players}
    costs = {
        name: [1e6 * turn["seconds"] / (amounts[name] * work.tokens) for turn in turns[name]]
        for name, work in workloads.items()
    }
    first = costs[next(iter(workloads))]
    return {
        name: {
            "workload": work.model_dump(),
            "parameters": described[name]["parameters"],
            "flops_per_token": described[name]["flops_per_token"],
            "ms_per_ktoken": costs[name],
            "cost_ratio": spread([this / that for this, that in zip(costs[name], first, strict=True)]),
            "data_share": sum(t["data_seconds"] for t in turns[name]) / sum(t["seconds"] for t in turns[name]),
        }
        for name, work in workloads.items()
    }


def report(axis: Axis, result: Mapping[str, Any]) -> str:
    """One axis for people."""
    header = ("", "parameters", "batch", "ms/ktoken", "ratio", "of FLOPs", "data")
    first = next(iter(result.values()))["flops_per_token"]
    rows = [
        (
            f"{axis} {name}",
            f"{point['parameters'] / 1e6:.1f}M",
            f"{point['workload']['rows']} × {point['workload']['sequence_length']}",
            f"{spread(point['ms_per_ktoken'])['median']:,.1f}",
            f"{point['cost_ratio']['median']:.2f}",
            f"{point['flops_per_token'] / first:.2f}",
            f"{point['data_share']:.2%}",
        )
        for name, point in result.items()
    ]
    return "\n".join(f"{row[0]:<24}" + "".join(f"{cell:>12}" for cell in row[1:]) for row in (header, *rows))


if __name__ == "__main__":
    command_line.run(main)
