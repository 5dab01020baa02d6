"""The README's table of speed and memory, from what the other benchmarks have measured.

`python benchmarks/performance_table.py` reads `benchmarks/results/` and writes the table between the markers of
`README.md`. A row whose benchmark has not been run, or not on such a device, says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from alternate import spread
from pydantic import Field
from readme import markdown_table, replace_section
from workload import Device, Size, workload

from ssl_jax import command_line, files
from ssl_jax.config import Section

Results = Mapping[str, Mapping[str, Any]]
Row = tuple[str, str, str, str, str]

HEADER: Row = ("what", "ours", "peer", "ratio (quartiles)", "limit; goal")
NOT_MEASURED = "not measured"
FILES = (
    "train_throughput",
    "generate_throughput",
    "pseudo_label_throughput",
    "start_up",
    "memory",
    "scaling",
    "prepare",
    "input_stream",
)
_OURS = "ssl_jax"
_PARAMETERS: dict[Size, str] = {"quickstart": "7M", "gpt2": "124M", "gpt2-medium": "355M", "gpt2-xl": "1.5B"}
_DEVICES: dict[Device, str] = {"cpu": "CPU", "cuda": "GPU"}
_PEERS = {
    "huggingface": "",
    "huggingface-compiled": " (`torch.compile`)",
    "huggingface-static": " (static cache, compiled)",
}


class Options(Section):
    """Which results are shown, and where."""

    results: str = Field(default="benchmarks/results", description="Folder with the files of the benchmarks.")
    readme: str = Field(default="README.md", description="Whose table is replaced.")


def main(arguments: Sequence[str]) -> None:
    """Reads the results, writes and prints the table."""
    options = command_line.parse(
        Options, arguments, program="python benchmarks/performance_table.py", summary=(__doc__ or "").strip()
    )
    text = render(read(Path(options.results)))
    replace_section(Path(options.readme), "performance table", text)
    print(text)


def read(folder: Path) -> Results:
    """The content of every file of results by its name, `{}` for one that is not there."""
    paths = {name: folder / f"{name}.json" for name in FILES}
    return {name: files.read_json(path) if path.exists() else {} for name, path in paths.items()}


def render(results: Results) -> str:
    """The table, and a line that says on what it was measured."""
    return f"{markdown_table(HEADER, rows(results))}\n\n{measured_on(results)}"


def rows(results: Results) -> Iterator[Row]:
    """The table's rows, those of the GPU at the end."""
    for dropout in (0.0, 0.1):
        yield training(results, "quickstart", "cpu", dropout, "≥ 1.0 ×")
        yield training(results, "gpt2", "cpu", dropout, "≥ 1.2 ×")
    yield waiting(results)
    yield unlabeled(results)
    for mode in ("greedy", "sample"):
        for batch, goal in ((1, "≥ 3 ×"), (8, "≥ 1.5 ×"), (32, "≥ 1.5 ×")):
            yield replies(results, batch, mode, goal)
    for batch in (1, 8, 32):
        yield replies(results, batch, "greedy", "≥ 3 ×" if batch == 1 else "", "int8")
    yield pseudo_labels(results)
    yield start(results, "step", "first training step, 7M, second start", "≤ 0.5 × the first")
    yield start(results, "token", "first token of a reply, 7M, second start", "")
    yield memory(results, "cpu")
    yield preparation(results)
    yield reading(results)
    compiled = "huggingface-compiled"
    yield training(results, "gpt2", "cuda", 0.0, "≥ 350,000 tokens/s, ≥ 1.3 ×", compiled)
    yield training(results, "gpt2-medium", "cuda", 0.0, "≥ 150,000 tokens/s", compiled)
    yield training(results, "gpt2-xl", "cuda", 0.0, "≥ 38,000 tokens/s", compiled)
    yield decoding(results, 1, "huggingface", "≥ 5 ×")
    yield decoding(results, 1, "huggingface-static", "")
    yield decoding(results, 256, "huggingface-static", "≥ 100,000 tokens/s")


def training(results: Results, size: Size, device: Device, dropout: float, goal: str, peer: str = "huggingface") -> Row:
    """Tokens a second of training; the limit is the device's peak."""
    work = workload(size, device)
    batch = f"{work.rows} × {work.sequence_length}"
    title = f"training, {_DEVICES[device]}, {_PARAMETERS[size]}, batch {batch}, dropout {dropout:g}"
    found = results["train_throughput"].get(f"{size}, {device}, {batch}, dropout {dropout:g}")
    if found is None:
        return _missing(title, goal, peer)
    rates = {name: spread(values)["median"] for name, values in found["tokens_per_sec"].items()}
    return (
        title,
        f"{rates[_OURS]:,.0f} tokens/s",
        _peer(rates.get(peer), peer, "{:,.0f} tokens/s"),
        _ratio(found["ratio"].get(peer)),
        f"{found['mfu'][_OURS]:.0%} of the peak's FLOP/s; {goal}",
    )


def waiting(results: Results) -> Row:
    """The share of a run's time in which its steps wait for data."""
    title, goal = "training's wait for data, CPU, 7M", "< 2%"
    found = [
        value["data_share"] for key, value in results["train_throughput"].items() if key.startswith("quickstart, cpu")
    ]
    return (title, f"{max(found):.2%} of the time", "", "", goal) if found else _missing(title, goal)


def unlabeled(results: Results) -> Row:
    """What a token costs where three of four rows are unlabeled, beside labeled rows alone."""
    title, goal = "a token with 3 unlabeled rows per labeled one, CPU, 7M", "1.0 ×: no more than its share"
    points = results["scaling"].get("quickstart, cpu, unlabeled", {}).get("points", {})
    if not {"0 to 1", "3 to 1"} <= points.keys():
        return _missing(title, goal)
    costs = {name: statistics.median(points[name]["ms_per_ktoken"]) for name in ("3 to 1", "0 to 1")}
    ratios = _pairs(points["0 to 1"]["ms_per_ktoken"], points["3 to 1"]["ms_per_ktoken"])
    mine, labeled = (f"{cost:,.0f} µs" for cost in costs.values())
    return title, mine, f"{labeled} (labeled rows alone)", _ratio(ratios), goal


def replies(results: Results, batch: int, mode: str, goal: str, weights: str = "") -> Row:
    """Tokens of replies a second on a CPU, prompts read included; the limit is to read the parameters once a token."""
    kept = f", {weights}" if weights else ""
    title = f"replies, CPU, 124M, batch {batch}, {mode}{kept}"
    found = results["generate_throughput"].get(f"gpt2, cpu, batch {batch}, {mode}{kept}")
    if found is None:
        return _missing(title, goal)
    drawn, decode_seconds = batch * found["new_tokens"], found["decode_seconds"]
    rates = {
        name: statistics.median(drawn / sum(parts) for parts in zip(first_seconds, decode_seconds[name], strict=True))
        for name, first_seconds in found["first_token_seconds"].items()
    }
    share = f"{found['bandwidth_share']['median']:.0%} of memory bandwidth, ≥ 60%; " if batch == 1 else ""
    return (
        title,
        f"{rates[_OURS]:,.0f} tokens/s",
        _peer(rates.get("huggingface"), "huggingface", "{:,.0f} tokens/s"),
        _ratio(found["ratio"].get("huggingface")),
        share + goal,
    )


def decoding(results: Results, batch: int, peer: str, goal: str) -> Row:
    """Tokens a second on a GPU once the prompts have been read."""
    title = f"decoding, GPU, 124M, batch {batch}, greedy"
    found = results["generate_throughput"].get(f"gpt2, cuda, batch {batch}, greedy")
    if found is None:
        return _missing(title, goal, peer)
    rates = {name: statistics.median(values) for name, values in found["decode_tokens_per_sec"].items()}
    return (
        title,
        f"{rates[_OURS]:,.0f} tokens/s",
        _peer(rates.get(peer), peer, "{:,.0f} tokens/s"),
        _ratio(found["decode_ratio"].get(peer)),
        goal,
    )


def start(results: Results, goal: str, title: str, limit: str) -> Row:
    """Seconds from the start of a process that finds what an earlier one compiled."""
    seconds = results["start_up"].get("quickstart, cpu", {}).get("seconds", {})
    if goal not in seconds.get("warm", {}):
        return _missing(title, limit)
    times = {column: values[goal] for column, values in seconds.items()}
    medians = {column: statistics.median(values) for column, values in times.items()}
    peer = times.get("huggingface")
    cold = f"{medians['warm'] / medians['cold']:.2f} × the first ({medians['cold']:.1f} s)"
    return (
        title,
        f"{medians['warm']:.1f} s",
        _peer(medians.get("huggingface"), "huggingface", "{:.1f} s"),
        _ratio(_pairs(peer, times["warm"]) if peer else None),
        f"{cold}; {limit}" if limit else cold,
    )


def memory(results: Results, device: Device) -> Row:
    """What a step of the 124M model holds, as the compiler counts, beside the same step with all logits at once."""
    title, goal = f"memory of a step, {_DEVICES[device]}, 124M, batch 8 × 1024", "≥ 2 ×"
    start_of_key = f"gpt2, {device}, 8 × 1024, vocabulary 50257"
    points = [point for key, point in results["memory"].items() if key.startswith(start_of_key)]
    if not points:
        return _missing(title, goal)
    mine, naive = (points[0][name]["compiler_bytes"] for name in ("ours", "naive"))
    return title, f"{mine / 1e9:.1f} GB", f"{naive / 1e9:.1f} GB (all logits at once)", f"{naive / mine:.2f} ×", goal


def pseudo_labels(results: Results) -> Row:
    """Tokens a second of a teacher's replies, finished rows refilled, beside batches that end with their longest."""
    title, goal = "a teacher's replies, CPU, 7M, finished rows refilled", "≥ 1.0 ×"
    points = [value for key, value in results["pseudo_label_throughput"].items() if key.startswith("quickstart, cpu")]
    if not points:
        return _missing(title, goal)
    found = points[0]
    mine, theirs = (statistics.median(found["useful_tokens_per_sec"][way]) for way in ("refilled", "in step"))
    share = (
        f"{found['row_utilization']['refilled']:.0%} of row-steps useful ({found['row_utilization']['in step']:.0%})"
    )
    return (
        title,
        f"{mine:,.0f} tokens/s",
        f"{theirs:,.0f} tokens/s (whole batches)",
        _ratio(found["ratio"]),
        f"{share}; {goal}",
    )


def preparation(results: Results) -> Row:
    """How fast data are prepared."""
    title, found = "preparing data, CPU", results["prepare"]
    if not found:
        return _missing(title, "")
    size, peak = found["bytes"] / 1e6, found["peak_bytes"] / 1e6
    return title, f"{found['megabytes_per_sec']:.1f} MB/s", "", "", f"{size:,.0f} MB in {peak:,.0f} MB of memory"


def reading(results: Results) -> Row:
    """How fast packed batches are read."""
    title, found = "reading packed batches from disk, CPU", results["input_stream"]
    if not found:
        return _missing(title, "")
    disk, kept = (statistics.median(found["tokens_per_sec"][place]) for place in ("shards on disk", "memory"))
    return title, f"{disk / 1e6:.1f}M tokens/s", "", "", f"{kept / 1e6:.1f}M tokens/s from memory"


def measured_on(results: Results) -> str:
    """Hardware and versions of what is in the table."""
    measured = [
        value for name in ("train_throughput", "generate_throughput", "start_up") for value in results[name].values()
    ]
    cpus = [f"{value['cpu']}, {value['cores']} cores, float32" for value in measured if value["device"] == "cpu"]
    gpus = [
        f"{gpu.split(',')[0]}, bfloat16" for value in measured if value["device"] == "cuda" for gpu in value["gpus"]
    ]
    packages = [
        f"{package} {value['versions'][package]}"
        for package in ("jax", "transformers", "torch")
        for value in measured
        if value["versions"].get(package)
    ]
    machines = [
        f"{kind}: {'; '.join(dict.fromkeys(names)) or NOT_MEASURED}" for kind, names in (("CPU", cpus), ("GPU", gpus))
    ]
    return f"{'. '.join(machines)}. {', '.join(dict.fromkeys(packages))}"


def _missing(title: str, goal: str, peer: str = "huggingface") -> Row:
    return title, NOT_MEASURED, _PEERS[peer].strip(), "", goal


def _peer(value: float | None, peer: str, form: str) -> str:
    return (NOT_MEASURED if value is None else form.format(value)) + _PEERS[peer]


def _pairs(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """How much faster ours is, from seconds that were measured in turn."""
    return spread([its / mine for its, mine in zip(theirs, ours, strict=True)])


def _ratio(values: Mapping[str, float] | None) -> str:
    if values is None:
        return ""
    return f"{values['median']:.2f} × ({values['lower_quartile']:.2f} to {values['upper_quartile']:.2f})"


if __name__ == "__main__":
    command_line.run(main)
