"""Tokens per second that packed batches can be read at, from shards on disk and from memory.

    python benchmarks/input_stream.py --run configs/quickstart.yaml

Takes the raw dialogues of a configuration's prepared data, stores them many times over until they no longer fit into
the memory that a stream may use, and reads batches packed to a context of 1,024 tokens, as training does: the data
order is shuffled, so records are read by random access. Nothing trains meanwhile. Also measured: how full the rows are.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from provenance import provenance
from pydantic import Field

from ssl_jax import command_line, files
from ssl_jax.config import Config, Section
from ssl_jax.data import shards
from ssl_jax.data.pipeline import prepare
from ssl_jax.data.shards import Record
from ssl_jax.data.store import Prepared
from ssl_jax.data.streams import Batches, PackedStream, Phase
from ssl_jax.errors import UserError

SPLIT = "raw_train"


class Options(Section):
    """What is read, and where the result goes."""

    run: str = Field(default="configs/quickstart.yaml", description="Configuration of a run whose data are used.")
    tokens: int = Field(default=30_000_000, ge=1, description="Size of the store on disk (tokens).")
    sequence_length: int = Field(default=1024, ge=8, description="Tokens per packed row.")
    rows: int = Field(default=16, ge=1, description="Rows of a batch.")
    batches: int = Field(default=200, ge=1, description="Batches read in a measurement.")
    repeats: int = Field(default=5, ge=1, description="Measurements, alternated between disk and memory.")
    output: str = Field(default="benchmarks/results/input_stream.json", description="File that receives the result.")


def main(arguments: Sequence[str]) -> None:
    """Writes the store, measures, prints a table, writes the result."""
    options = command_line.parse(
        Options, arguments, program="python benchmarks/input_stream.py", summary=(__doc__ or "").strip()
    )
    prepared = prepare(command_line.validate(Config, command_line.read_yaml(options.run), origin=options.run))
    if SPLIT not in prepared.splits:
        raise UserError(f"{options.run}: its data has no raw text to read")
    with tempfile.TemporaryDirectory(prefix="input_stream_") as folder:
        stored = enlarged(prepared, options.tokens, Path(folder) / "store")
        result = measure({"shards on disk": stored, "memory": prepared}, options)
    result |= {"fill": {str(length): round(fill(prepared, length), 4) for length in (256, 1024)}}
    for place, rates in result["tokens_per_sec"].items():
        print(f"{place:<16}{statistics.median(rates):>12,.0f} tokens/s  ({min(rates):,.0f} to {max(rates):,.0f})")
    print("rows full: " + ", ".join(f"{share:.1%} at {length}" for length, share in result["fill"].items()))
    files.write_json(Path(options.output), {**provenance(), **options.model_dump(exclude={"output"}), **result})


def enlarged(prepared: Prepared, tokens: int, directory: Path) -> Prepared:
    """A store of at least so many tokens, made of copies of the prepared raw dialogues."""
    encoded = prepared.encoded(SPLIT)
    texts = [prepared.dialogue(SPLIT, index) for index in range(len(encoded))]
    copies = -(-tokens // int(prepared.lengths(SPLIT).sum()))

    def records() -> Iterator[Record]:
        for copy in range(copies):
            for dialogue, text in zip(encoded, texts, strict=True):
                yield Record.of(dataclasses.replace(dialogue, id=f"{dialogue.id}#{copy}"), text)

    summary = {name: prepared.summary[name] for name in ("content_hash", "rejected", "removed", "changed", "sources")}
    return shards.write(directory, {SPLIT: records()}, prepared.tokenizer, summary, [])


def measure(places: dict[str, Prepared], options: Options) -> dict[str, Any]:
    """Reads batches from every place in turn; `tokens_per_sec` of every repeat, padding not counted."""
    phase = Phase(0, options.batches, (("raw", options.rows),), {"raw": 0})
    readers = {
        place: Batches(phase, {"raw": stream(p, options.sequence_length)}, {"raw": 0},
                       sequence_length=options.sequence_length)
        for place, p in places.items()
    }  # fmt: skip
    rates: dict[str, list[float]] = {place: [] for place in places}
    for repeat in range(options.repeats + 1):
        for place, batches in readers.items():
            started, tokens = time.perf_counter(), 0
            for batch in batches.read():
                tokens += int((batch["segment_ids"] > 0).sum())
            if repeat:  # the first one opens files and fills caches
                rates[place].append(tokens / (time.perf_counter() - started))
    return {"tokens_per_sec": rates}


def stream(prepared: Prepared, sequence_length: int) -> PackedStream:
    """The raw dialogues as training reads them."""
    return PackedStream(
        prepared.encoded(SPLIT),
        prepared.lengths(SPLIT),
        prefix_lengths=prepared.prefix_lengths(SPLIT),
        sequence_length=sequence_length,
        seed=0,
    )


def fill(prepared: Prepared, sequence_length: int) -> float:
    """Share of the places of an epoch's rows that hold tokens."""
    return stream(prepared, sequence_length).fill()


if __name__ == "__main__":
    command_line.run(main)
