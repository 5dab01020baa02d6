"""Speed of pseudo-labeling: rows that get the next prompt when a reply is done, against batches in step.

    python benchmarks/pseudo_label_throughput.py --size quickstart
    python benchmarks/pseudo_label_throughput.py --size gpt2 --device cuda --prompts 4096 --batch-size 256

A model with random weights, whose tokens are about equally likely, answers random prompts; so many of the tokens end a
reply that replies have the mean length asked for. Both ways draw the same replies, in turn, in one process. A useful
row-step is one that gave a token of a reply or its end; the others went to rows that waited for the rest.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from alternate import spread
from pydantic import Field
from store import add_result
from workload import Device, Size, Workload, workload

from ssl_jax import command_line
from ssl_jax.config import Section

IN_STEP, REFILLED = "in step", "refilled"


class Options(Section):
    """What is drawn, and where the result goes."""

    size: Size = Field(default="quickstart", description="Model.")
    device: Device = Field(default="cpu", description="Where to compute: float32 on cpu, bfloat16 on cuda.")
    prompts: int = Field(default=512, ge=1, description="Prompts of a round.")
    num_return_sequences: int = Field(default=1, ge=1, description="Replies to each prompt.")
    batch_size: int = Field(default=64, ge=1, description="Replies drawn at a time.")
    prompt_tokens: int = Field(default=32, ge=4, description="Longest prompt; the shortest has a quarter of it.")
    new_tokens: int = Field(default=48, ge=2, description="Longest reply.")
    mean_tokens: float = Field(default=15, gt=1, description="Mean length of replies, were they not cut.")
    rounds: int = Field(default=5, ge=1, description="Turns of each.")
    output: str = Field(
        default="benchmarks/results/pseudo_label_throughput.json", description="File that receives the result."
    )


def main(arguments: Sequence[str]) -> None:
    """Measures, prints a table, puts the result beside those of other sizes in the file."""
    options = command_line.parse(
        Options, arguments, program="python benchmarks/pseudo_label_throughput.py", summary=(__doc__ or "").strip()
    )
    # JAX looks for its platform once, when it is imported.
    os.environ["JAX_PLATFORMS"] = options.device
    work = workload(options.size, options.device, sequence_length=options.prompt_tokens, dropout=0.0)
    result = measure(work, options)
    print(report(result))
    replies = f"{options.prompts} × {options.num_return_sequences}"
    key = f"{options.size}, {options.device}, {replies}, batch {options.batch_size}"
    add_result(options.output, key, {**options.model_dump(exclude={"output"}), **result})


def measure(work: Workload, options: Options) -> dict[str, Any]:
    """Draws a round in both ways in turn.

    Returns:
      By way: `seconds` and `useful_tokens_per_sec` of every round, `row_steps`, `row_utilization` (useful ones among
      them), `steps_per_token`; `ratio` of the rates, refilled ÷ in step; `tokens` of all replies, ends counted;
      `load_average` of the machine before every round.
    """
    from train_ours import random_model

    from ssl_jax import sampling
    from ssl_jax.drawing import Drawer

    drawer = Drawer(
        *random_model(work),
        sampling.Options(
            options.new_tokens,
            num_return_sequences=options.num_return_sequences,
            end_ids=tuple(range(round(work.vocab_size / options.mean_tokens))),
        ),
        seed=0,
        limit=options.prompt_tokens,
    )
    rng = np.random.default_rng(0)
    lengths = np.sort(rng.integers(options.prompt_tokens // 4, options.prompt_tokens, options.prompts, endpoint=True))
    prompts = [rng.integers(0, work.vocab_size, length).astype(np.int32) for length in lengths[::-1]]
    batch = max(1, options.batch_size // options.num_return_sequences)
    ways = {IN_STEP: drawer.in_step, REFILLED: drawer.refilled}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    row_steps, tokens, loads = dict.fromkeys(ways, 0), dict.fromkeys(ways, 0), []
    for turn in range(options.rounds + 1):  # the first compiles
        loads.append(os.getloadavg()[0])
        for name, draw in ways.items():
            started = time.perf_counter()
            parts = list(draw(prompts, range(options.prompts), batch))
            if turn:
                seconds[name].append(time.perf_counter() - started)
            row_steps[name] = sum(part.row_steps for part in parts)
            tokens[name] = sum(len(drawn.tokens) + drawn.stopped for part in parts for drawn in part.replies)
    assert tokens[IN_STEP] == tokens[REFILLED], "both ways draw the same replies"
    # The first token of a reply comes with its prompt, without a step.
    useful = tokens[IN_STEP] - options.prompts * options.num_return_sequences
    return {
        "workload": work.model_dump(),
        "load_average": loads[1:],
        "tokens": tokens[IN_STEP],
        "seconds": seconds,
        "useful_tokens_per_sec": {name: [tokens[name] / s for s in taken] for name, taken in seconds.items()},
        "row_steps": row_steps,
        "row_utilization": {name: useful / taken for name, taken in row_steps.items()},
        "steps_per_token": {name: taken / useful for name, taken in row_steps.items()},
        "ratio": spread([slow / fast for slow, fast in zip(seconds[IN_STEP], seconds[REFILLED], strict=True)]),
    }


def report(result: Mapping[str, Any]) -> str:
    """The result for people: a line for each way."""
    lines = [f"{'':<12}{'useful tokens/s':>18}{'rows × steps':>16}{'of them useful':>18}"]
    for name, rates in result["useful_tokens_per_sec"].items():
        rate, steps, share = spread(rates)["median"], result["row_steps"][name], result["row_utilization"][name]
        lines.append(f"{name:<12}{rate:>18,.0f}{steps:>16,}{share:>18.0%}")
    ratio = result["ratio"]
    lines.append(f"refilled ÷ in step: {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})")
    return "\n".join(lines)


if __name__ == "__main__":
    command_line.run(main)
