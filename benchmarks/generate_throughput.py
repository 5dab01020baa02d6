"""Generation speed: our sampler against Hugging Face's `generate` of `GPT2LMHeadModel` in PyTorch.

    python benchmarks/generate_throughput.py --size gpt2 --batch-sizes 1 --modes greedy
    python benchmarks/generate_throughput.py --size gpt2 --device cuda --peers huggingface huggingface-static

Random weights and prompts, no end token, so that every reply has the same length; both keep a key-value cache and
compute with all cores, on a GPU with parameters in bfloat16. Each works in a process of its own, in turn.
`huggingface-static` is `generate` with a cache of fixed size, for which it compiles its step on a GPU. The first
token's time is that of reading the prompts and of one token; decoding is what the other tokens take. On a CPU decoding
at batch 1 reads every parameter once a token: the limit is the parameters' bytes over the bandwidth of a copy (bytes
read and written), measured before every round. Without PyTorch ours is measured alone.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from alternate import Player, spread, take_turns
from pydantic import Field
from store import add_result
from workload import Device, Size, Workload, child, has_peer, variables, workload

from ssl_jax import command_line
from ssl_jax.config import Section, Weights

OURS = "ssl_jax"
Peer = Literal["huggingface", "huggingface-static"]
Mode = Literal["greedy", "sample"]

_BANDWIDTH_BYTES = 2**28
# In the first a peer that compiles does so, in the second it knows how long its cache is from the beginning.
_WARM_UP_TURNS = 2


class Options(Section):
    """What is generated, and where the result goes."""

    size: Size = Field(default="gpt2", description="Model.")
    device: Device = Field(default="cpu", description="Where to compute: float32 on cpu, bfloat16 on cuda.")
    batch_sizes: tuple[int, ...] = Field(default=(1, 8, 32), description="Prompts answered at a time.")
    modes: tuple[Mode, ...] = Field(
        default=("greedy", "sample"), description="Take the likeliest token, or draw with top_k 50 and top_p 0.95."
    )
    weights: Weights = Field(default="auto", description="Of ours, as in `ssl_jax.generate`; the peer keeps its own.")
    prompt_tokens: int = Field(default=64, ge=1, description="Tokens of every prompt.")
    new_tokens: int = Field(default=33, ge=2, description="Tokens of every reply.")
    peers: tuple[Peer, ...] = Field(default=("huggingface",), description="Whom to compare with.")
    rounds: int = Field(default=5, ge=1, description="Turns of each.")
    output: str = Field(
        default="benchmarks/results/generate_throughput.json", description="File that receives the result."
    )


def main(arguments: Sequence[str]) -> None:
    """Measures, prints a table, puts each result beside the others in the file as soon as it is there."""
    options = command_line.parse(
        Options, arguments, program="python benchmarks/generate_throughput.py", summary=(__doc__ or "").strip()
    )
    peers = options.peers if has_peer() else ()
    settings = options.model_dump(exclude={"output", "batch_sizes", "modes"})
    settings["not_measured"] = [peer for peer in options.peers if peer not in peers]
    print(HEADING)
    for batch in options.batch_sizes:
        work = workload(options.size, options.device, rows=batch, sequence_length=options.prompt_tokens, dropout=0.0)
        for mode in options.modes:
            result = measure(
                work, mode, peers, weights=options.weights, new_tokens=options.new_tokens, rounds=options.rounds
            )
            key = f"{options.size}, {options.device}, batch {batch}, {mode}"
            key += "" if options.weights == "auto" else f", {options.weights}"
            print(report(key, result), flush=True)
            add_result(options.output, key, {**settings, "mode": mode, **result})


def measure(
    work: Workload, mode: Mode, peers: Sequence[Peer], *, weights: Weights = "auto", new_tokens: int, rounds: int
) -> dict[str, Any]:
    """Lets everyone generate in turn.

    Args:
      work: model; rows are prompts, the sequence length is that of the prompts.
      mode: how the next token is chosen.
      peers: whom to compare with.
      weights: how exactly we keep ours.
      new_tokens: of every reply.
      rounds: turns of each.

    Returns:
      By name and over the rounds: `first_token_seconds`, `decode_seconds`, `prefill_tokens_per_sec`,
      `decode_tokens_per_sec`; by peer of our rates ÷ its, `ratio` of the whole (tokens of replies a second) and of its
      parts, `prefill_ratio` and `decode_ratio`; `copy_gb_per_sec` and `read_gb_per_sec` of memory on a CPU, and
      `bandwidth_share`: what reading the parameters once takes at the rate of a copy, over a step of decoding;
      `load_average` of the machine before every round: much above 1, others' work is in the figures.
    """
    commands = {
        OURS: child("generate_ours.py", work.model_dump_json(), mode, weights),
        "huggingface": child("generate_huggingface.py", work.model_dump_json(), mode),
        "huggingface-static": child("generate_huggingface.py", work.model_dump_json(), mode, "static"),
    }
    amounts: dict[str, int] = dict.fromkeys((OURS, *peers), new_tokens)
    turns: dict[str, list[dict[str, Any]]] = {}
    bandwidths: list[dict[str, float]] = []
    loads: list[float] = []
    with contextlib.ExitStack() as stack:
        players = [stack.enter_context(Player(name, commands[name], variables(work.device))) for name in amounts]
        for player in players:
            player.get_ready()
        take_turns(players, amounts, _WARM_UP_TURNS)
        for _ in range(rounds):
            loads.append(os.getloadavg()[0])
            if work.device == "cpu":
                bandwidths.append(memory_bandwidth())
            for name, taken in take_turns(players, amounts, 1).items():
                turns.setdefault(name, []).extend(taken)
        parameter_bytes = players[0].description["parameter_bytes"]
    first = {name: [turn["first_seconds"] for turn in taken] for name, taken in turns.items()}
    decode = {name: [turn["decode_seconds"] for turn in taken] for name, taken in turns.items()}
    whole = {name: [turn["seconds"] for turn in taken] for name, taken in turns.items()}
    result: dict[str, Any] = {
        "workload": work.model_dump(),
        "parameter_bytes": parameter_bytes,
        "load_average": loads,
        "first_token_seconds": first,
        "decode_seconds": decode,
        "prefill_tokens_per_sec": {name: [work.tokens / s for s in seconds] for name, seconds in first.items()},
        "decode_tokens_per_sec": {
            name: [work.rows * (new_tokens - 1) / s for s in seconds] for name, seconds in decode.items()
        },
    }
    for name, seconds in (("ratio", whole), ("prefill_ratio", first), ("decode_ratio", decode)):
        result[name] = {
            peer: spread([theirs / mine for mine, theirs in zip(seconds[OURS], seconds[peer], strict=True)])
            for peer in peers
        }
    if bandwidths:
        steps = [seconds / (new_tokens - 1) for seconds in decode[OURS]]
        copies = [measured["copy"] for measured in bandwidths]
        result |= {
            "copy_gb_per_sec": spread([rate / 1e9 for rate in copies]),
            "read_gb_per_sec": spread([measured["read"] / 1e9 for measured in bandwidths]),
            "bandwidth_share": spread(
                [parameter_bytes / rate / step for rate, step in zip(copies, steps, strict=True)]
            ),
        }
    return result


def memory_bandwidth() -> dict[str, float]:
    """Bytes per second of all cores together, the best of three: a `copy` (bytes read and written) and a `read`."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    source = np.ones(_BANDWIDTH_BYTES // 4, np.float32)
    target = np.zeros_like(source)
    pieces = list(zip(np.array_split(source, threads), np.array_split(target, threads), strict=True))

    def copy(piece: tuple[np.ndarray, np.ndarray]) -> None:
        np.copyto(piece[1], piece[0])

    def read(piece: tuple[np.ndarray, np.ndarray]) -> None:
        piece[0].view(np.int64).max()  # a float's maximum looks for NaN, and an integer's is nothing but reading

    rates = {}
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for name, work, traffic in (("copy", copy, 2 * source.nbytes), ("read", read, source.nbytes)):
            seconds = []
            for _ in range(3):
                started = time.perf_counter()
                list(pool.map(work, pieces))
                seconds.append(time.perf_counter() - started)
            rates[name] = traffic / min(seconds)
    return rates


HEADING = f"{'':<30}{'first token':>24}{'decode tokens/s':>34}{'of bandwidth':>14}   ours ÷ its: all, prefill, decode"


def report(title: str, result: Mapping[str, Any]) -> str:
    """The result for people, a line: medians, ours before its."""
    first = [f"{spread(values)['median'] * 1e3:,.0f}" for values in result["first_token_seconds"].values()]
    decode = [f"{spread(values)['median']:,.1f}" for values in result["decode_tokens_per_sec"].values()]
    line = f"{title:<30}{' / '.join(first) + ' ms':>24}{' / '.join(decode):>34}"
    line += f"{result['bandwidth_share']['median']:>14.0%}" if "bandwidth_share" in result else " " * 14
    if not result["ratio"]:
        return line + "   peer not measured (pip install 'ssl_jax[bench]')"
    for peer, whole in result["ratio"].items():
        line += f"   {whole['median']:.2f} ({whole['min']:.2f} to {whole['max']:.2f})"
        line += f", {result['prefill_ratio'][peer]['median']:.2f}, {result['decode_ratio'][peer]['median']:.2f}"
    return line


if __name__ == "__main__":
    command_line.run(main)
