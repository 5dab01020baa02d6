"""How fast data is prepared, in how much memory, and where the time goes.

    python benchmarks/prepare.py --megabytes 1000

Writes a file of messages (JSON Lines) in which no two dialogues are equal, made of chitchat's turns, and prepares it
with the default cleaning and a fitted tokenizer, in a process of its own, as a user would. Memory is the sum over all
processes of what each holds alone and its share of what it holds with others (PSS), looked at ten times a second. The
steps are then timed one by one in a single process, on a part of the file.
"""

from __future__ import annotations

import functools
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from provenance import provenance
from pydantic import Field

from ssl_jax import command_line, files
from ssl_jax.config import Section, Source, Tokenizer
from ssl_jax.data import chitchat, formats, shards
from ssl_jax.data.cleaning.apply import Counts, clean
from ssl_jax.data.duplicates import text_hash
from ssl_jax.data.shards import Record
from ssl_jax.data.tokenizer import DialogueTokenizer, count_reply_bytes

_LABELED = 200
_VOCABULARY = 8192
_TURNS = (4, 9)
_NEW_WORD = 0.02
_SECONDS_BETWEEN_LOOKS = 0.1
_MAX_TURN_BYTES = 100_000
_CLOCK_GRAIN_SECONDS = 3


class Options(Section):
    """How much is prepared, and where the result goes."""

    megabytes: int = Field(default=1000, ge=1, description="Size of the file that is prepared (10^6 bytes).")
    step_megabytes: int = Field(default=20, ge=1, description="Size of the part by which the steps are timed.")
    seed: int = Field(default=0, description="Of what is written.")
    folder: str | None = Field(default=None, description="Where to write; absent: the system's temporary folder.")
    output: str = Field(default="benchmarks/results/prepare.json", description="File that receives the result.")


def main(arguments: Sequence[str]) -> None:
    """Writes the file, measures, prints tables, writes the result."""
    options = command_line.parse(
        Options, arguments, program="python benchmarks/prepare.py", summary=(__doc__ or "").strip()
    )
    with tempfile.TemporaryDirectory(prefix="prepare_", dir=options.folder) as name:
        folder = Path(name)
        rows = dialogues(options.seed)
        write(folder / "labeled.jsonl", (next(rows) for _ in range(_LABELED)))
        size = write(folder / "unlabeled.jsonl", rows, options.megabytes * 10**6)
        time.sleep(_CLOCK_GRAIN_SECONDS)  # a file that has just changed is not trusted to be the same
        whole = measure(folder)
        again = measure(folder)
        part = folder / "part.jsonl"
        write(part, dialogues(options.seed + 1), options.step_megabytes * 10**6)
        part_of_fit = min(1.0, Tokenizer().fit_bytes / size)
        steps = steps_of(part)
        steps["fit the tokenizer"] *= part_of_fit  # it sees so much of the file and no more
    rate = size / whole["seconds"] / 1e6
    peak = whole["peak_bytes"] / 1e6
    print(f"{size / 1e6:,.0f} MB in {whole['seconds']:.1f} s: {rate:.2f} MB/s; peak memory {peak:,.0f} MB")
    print(f"found again in {again['seconds']:.2f} s")
    total = sum(steps.values())
    for step, seconds in steps.items():
        print(f"{step:<28}{seconds / options.step_megabytes * 1e3:>8.1f} ms/MB{seconds / total:>8.1%}")
    per_megabyte = {step: seconds / options.step_megabytes for step, seconds in steps.items()}
    result = {
        **provenance(),
        **options.model_dump(exclude={"output", "folder"}),
        "bytes": size,
        "megabytes_per_sec": rate,
        **whole,
        "found_again_seconds": again["seconds"],
        "step_cpu_seconds_per_megabyte": per_megabyte,
    }
    files.write_json(Path(options.output), result)


def dialogues(seed: int) -> Iterator[bytes]:
    """Endless rows of messages, a system of chitchat's turns in which now and then a word is new."""
    generator = random.Random(seed)
    turns = [text for talk in chitchat.load(chitchat.data_file()) for _, text in talk.turns if text.strip()]
    while True:
        messages = []
        for number in range(generator.randrange(*_TURNS) // 2 * 2):
            words = generator.choice(turns).split(" ")
            if generator.random() < len(words) * _NEW_WORD:
                new = "".join(generator.choices("abcdefghiklmnoprstuvwy", k=generator.randint(3, 9)))
                words.insert(generator.randrange(len(words) + 1), new)
            messages.append({"role": ("user", "assistant")[number % 2], "content": " ".join(words)})
        yield json.dumps({"messages": messages}, ensure_ascii=False).encode() + b"\n"


def write(file: Path, rows: Iterable[bytes], size: float = float("inf")) -> int:
    """Writes rows up to a size; returns the bytes written."""
    written = 0
    with open(file, "wb") as stream:
        for row in rows:
            written += stream.write(row)
            if written >= size:
                break
    return written


def measure(folder: Path) -> dict[str, float]:
    """Seconds, CPU seconds and peak bytes of the command on the two files of `folder`."""
    config = {
        "data": {
            "labeled": [{"path": str(folder / "labeled.jsonl")}],
            "unlabeled": [{"path": str(folder / "unlabeled.jsonl")}],
            "prepared_dir": str(folder / "prepared"),
        },
        "tokenizer": {"vocab_size": _VOCABULARY},
        "train": {"steps": 1},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, "-m", "ssl_jax.prepare", "--config", str(folder / "config.yaml")])
    while process.poll() is None:
        peak = max(peak, sum(map(memory, family(process.pid))))
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    if process.returncode:
        raise SystemExit(process.returncode)
    return {"seconds": time.perf_counter() - started, "peak_bytes": peak}


def family(process: int) -> Iterator[int]:
    """A process and all that come from it."""
    yield process
    try:
        for thread in Path(f"/proc/{process}/task").iterdir():
            for child in (thread / "children").read_text().split():
                yield from family(int(child))
    except OSError:
        return  # it has just ended


def memory(process: int) -> int:
    """Proportional set size in bytes; 0 for a process that has ended."""
    try:
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def steps_of(file: Path) -> dict[str, float]:
    """Seconds of every step on one file, one after the other in this process."""
    seconds: dict[str, float] = {}
    timed = functools.partial(_timed, seconds)
    unit = next(formats.units(Source(path=str(file))))
    source = Source(path=str(file), format="messages")
    rows = timed("read", lambda: list(formats.read_unit(unit, source, "unlabeled", _MAX_TURN_BYTES)))
    read = [row.dialogue for row in rows if isinstance(row, formats.Accepted)]
    cleaned = timed("clean", lambda: [dialogue for dialogue, _ in clean(((one, None) for one in read), Counts())])
    timed("hash", lambda: [text_hash(dialogue) for dialogue in cleaned])
    texts = [turn.content for dialogue in cleaned for turn in dialogue.turns]
    tokenizer = timed("fit the tokenizer", lambda: DialogueTokenizer.fit(texts, _VOCABULARY))
    pairs = [(dialogue, count_reply_bytes(dialogue)) for dialogue in cleaned]
    encoded = timed("encode", lambda: list(tokenizer.encode_all(pairs)))
    records = [Record.of(tokens, dialogue) for tokens, dialogue in zip(encoded, cleaned, strict=True)]
    timed("serialize, compress, write", lambda: shards.write_shard(file.with_name("part.array_record"), records))
    return seconds


def _timed(seconds: dict[str, float], step: str, run: Callable[[], Any]) -> Any:
    started = time.process_time()
    result = run()
    seconds[step] = time.process_time() - started
    return result


if __name__ == "__main__":
    command_line.run(main)
