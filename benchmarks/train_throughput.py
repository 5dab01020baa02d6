"""Training speed: a run's own steps against Hugging Face's `Trainer` with `GPT2LMHeadModel` in PyTorch.

    python benchmarks/train_throughput.py --size quickstart
    python benchmarks/train_throughput.py --size gpt2 --device cuda --dropout 0 --peers huggingface-compiled

Model, batch, precision, optimizer, clipping and dropout are the same, every row is full, and each works in a process of
its own, in turn, or, with `--together False`, one after the other, where a GPU's memory does not hold them all. Both
compute with all cores. The peer's attention is PyTorch's fused one (`sdpa`, on a GPU in bfloat16 the flash kernel),
which is the default of its model; `huggingface-compiled` is it under `torch.compile`. Model FLOP/s are tokens/s × (6 N
+ 6 L D T), N parameters with one vocabulary, causal attention counted; MFU is their share of the device's peak. Without
PyTorch ours is measured alone.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from alternate import Player, spread, take_turns, warm_up
from pydantic import Field
from store import add_result
from workload import Device, Size, Workload, child, has_peer, variables, workload

from ssl_jax import command_line
from ssl_jax.config import Section

OURS = "ssl_jax"
Peer = Literal["huggingface", "huggingface-compiled"]

_WARM_UP_STEPS = 2


class Options(Section):
    """What is trained, against whom, and where the result goes."""

    size: Size = Field(default="quickstart", description="Model and batch.")
    device: Device = Field(default="cpu", description="Where to compute: float32 on cpu, bfloat16 on cuda.")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="On embeddings, attention and residual stream.")
    rows: int | None = Field(default=None, ge=1, description="Rows of a batch; absent: the size's.")
    sequence_length: int | None = Field(default=None, ge=8, description="Tokens per row; absent: the size's.")
    peers: tuple[Peer, ...] = Field(default=("huggingface",), description="Whom to compare with.")
    together: bool = Field(
        default=True, description="Whether they take turns; if not, each takes all of its turns before the next starts."
    )
    rounds: int = Field(default=9, ge=1, description="Turns of each.")
    turn_seconds: float = Field(default=3.0, gt=0, description="How long the slowest one's turn takes, about.")
    output: str = Field(
        default="benchmarks/results/train_throughput.json", description="File that receives the result."
    )


def main(arguments: Sequence[str]) -> None:
    """Measures, prints a table, puts the result beside those of other workloads in the file."""
    options = command_line.parse(
        Options, arguments, program="python benchmarks/train_throughput.py", summary=(__doc__ or "").strip()
    )
    work = workload(
        options.size,
        options.device,
        dropout=options.dropout,
        rows=options.rows,
        sequence_length=options.sequence_length,
    )
    peers = options.peers if has_peer() else ()
    result = measure(work, peers, together=options.together, rounds=options.rounds, turn_seconds=options.turn_seconds)
    result["not_measured"] = [peer for peer in options.peers if peer not in peers]
    print(report(result))
    key = f"{options.size}, {options.device}, {work.rows} × {work.sequence_length}, dropout {options.dropout:g}"
    add_result(options.output, key, {**options.model_dump(exclude={"output"}), **result})


def measure(
    work: Workload, peers: Sequence[Peer], *, together: bool, rounds: int, turn_seconds: float
) -> dict[str, Any]:
    """Lets everyone train, in turn if `together`.

    Returns:
      `workload`; `contestants` by name as they describe themselves; `steps_per_turn` and `tokens_per_sec` by name, of
      every round; of their medians `model_flops` and `mfu`; `ratio` by peer, the spread over the rounds of our rate ÷
      its; `last_loss` by name; `data_share`, of our time, in which the step waited for data; and by name
      `asleep_cpu_share`, CPU seconds that it used while it was another one's turn ÷ seconds of its own turns.
    """
    environment, described = variables(work.device), work.model_dump_json()
    commands = {
        OURS: child("train_ours.py", described),
        "huggingface": child("train_huggingface.py", described),
        "huggingface-compiled": child("train_huggingface.py", described, "compiled"),
    }
    names: tuple[str, ...] = (OURS, *peers)
    contestants: dict[str, dict[str, Any]] = {}
    steps: dict[str, int] = {}
    turns: dict[str, list[dict[str, Any]]] = {}
    for group in [names] if together else [(name,) for name in names]:
        with contextlib.ExitStack() as stack:
            players = [stack.enter_context(Player(name, commands[name], environment)) for name in group]
            slowest = max(warm_up(players, _WARM_UP_STEPS).values())
            steps |= dict.fromkeys(group, math.ceil(turn_seconds / slowest))
            turns |= take_turns(players, steps, rounds)
            contestants |= {player.name: player.description for player in players}
    ours = contestants[OURS]
    rates = {name: [steps[name] * work.tokens / turn["seconds"] for turn in taken] for name, taken in turns.items()}
    flops = {name: spread(values)["median"] * ours["flops_per_token"] for name, values in rates.items()}
    return {
        "workload": work.model_dump(),
        "contestants": contestants,
        "steps_per_turn": steps,
        "tokens_per_sec": rates,
        "model_flops": flops,
        "mfu": {name: value / ours["peak_flops"] for name, value in flops.items()},
        "ratio": {
            peer: spread([mine / theirs for mine, theirs in zip(rates[OURS], rates[peer], strict=True)])
            for peer in peers
        },
        "last_loss": {name: taken[-1]["loss"] for name, taken in turns.items()},
        "data_share": sum(turn["data_seconds"] for turn in turns[OURS]) / sum(turn["seconds"] for turn in turns[OURS]),
        "asleep_cpu_share": {
            name: sum(turn["cpu_seconds_asleep"] for turn in taken) / sum(turn["seconds"] for turn in taken)
            for name, taken in turns.items()
        },
    }


def report(result: Mapping[str, Any]) -> str:
    """The result for people."""
    ours, work = result["contestants"][OURS], result["workload"]
    lines = [
        f"{ours['parameters'] / 1e6:.1f}M parameters, batch {work['rows']} × {work['sequence_length']}, "
        f"{ours['dtype']}, dropout {work['dropout']:g}, {ours['device']}; "
        f"peak {ours['peak_flops'] / 1e9:,.0f} GFLOP/s ({ours['peak_from']})",
        f"{'':<22}{'tokens/s':>12}{'GFLOP/s':>12}{'MFU':>8}   ours ÷ its, median (quartiles; min to max)",
    ]
    for name, values in result["tokens_per_sec"].items():
        line = f"{name:<22}{spread(values)['median']:>12,.0f}{result['model_flops'][name] / 1e9:>12,.0f}"
        line += f"{result['mfu'][name]:>8.1%}"
        if name in result["ratio"]:
            of = result["ratio"][name]
            line += f"   {of['median']:.2f} ({of['lower_quartile']:.2f} to {of['upper_quartile']:.2f}; "
            line += f"{of['min']:.2f} to {of['max']:.2f})"
        lines.append(line)
    lines += [f"{name:<22}{'not measured':>12} (pip install 'ssl_jax[bench]')" for name in result["not_measured"]]
    lines.append(f"waiting for data: {result['data_share']:.2%} of our time")
    return "\n".join(lines)


if __name__ == "__main__":
    command_line.run(main)
