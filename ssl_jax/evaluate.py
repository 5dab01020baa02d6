"""Computes all metrics of a model on held-out dialogues.

`python -m ssl_jax.evaluate --workdir DIR [--split test]` evaluates a run on its own data and writes
`DIR/eval_<split>.json`. With `--model DIR_OR_HUB_NAME` a Hugging Face GPT-2 is evaluated instead, on the data of that
run or on files of labeled dialogues (`--data FILE`).

`--workdir A --baseline B` compares two evaluations that are there: metrics of A minus those of B, with a bootstrap
interval over dialogues. With `--oracle O` also how much of the way from B to O is gone by A.

Started once on every host, as training is, it evaluates on all their devices; the first one prints and writes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from ssl_jax import agreement, command_line, distributed, storage, workdir
from ssl_jax.config import Data, Evaluation, ServedWeights, Source, TemplateName, Train
from ssl_jax.config.paths import check_path
from ssl_jax.errors import UserError
from ssl_jax.evaluation import comparison
from ssl_jax.evaluation.tables import coherence_lines, comparison_lines, metric_lines

if TYPE_CHECKING:
    from ssl_jax.dialogue import Dialogue

# Fields of the run's `evaluation` that the command may set otherwise.
_AMOUNTS = ("recall_examples", "generated_replies", "coherence_examples", "coherence_rankings", "self_chats")


class Evaluate(ServedWeights):
    """What to evaluate."""

    workdir: str | None = Field(default=None, description="Work directory of a run: its model and its data.")
    model: str | None = Field(
        default=None, description="Instead of the run's model: a Hugging Face GPT-2, a directory or a hub name."
    )
    template: TemplateName | Literal["auto"] = Field(
        default="auto",
        description="How a Hugging Face model reads dialogues; auto: its chat template, else as text.",
    )
    data: str | None = Field(
        default=None, description="Instead of the run's data: files of labeled dialogues, a path or a glob."
    )
    split: str = Field(default="test", description="Labeled split: test, dev, train, or another that the data has.")
    output: str | None = Field(
        default=None,
        description="Where the result goes; absent: eval_<split>.json of the work directory, "
        "with other weights eval_<split>_<weights>.json.",
    )
    recall_examples: int | None = Field(
        default=None, ge=0, le=1_000_000_000, description="Contexts to rank; absent: as the run's config says."
    )
    generated_replies: int | None = Field(
        default=None, ge=0, le=1_000_000_000, description="Replies to draw; absent: as the run's config says."
    )
    coherence_examples: int | None = Field(
        default=None,
        ge=0,
        le=1_000_000_000,
        description="Replies of each number scored for context_gain; absent: as the config says.",
    )
    coherence_rankings: int | None = Field(
        default=None,
        ge=0,
        le=1_000_000_000,
        description="Contexts to rank for each reply number; absent: as the run's config says.",
    )
    self_chats: int | None = Field(
        default=None, ge=0, le=1_000_000_000, description="Conversations with itself; absent: as the run's config says."
    )
    baseline: str | None = Field(
        default=None, description="Evaluates nothing: compares the run's evaluation with that of this work directory."
    )
    oracle: str | None = Field(
        default=None, description="With a baseline: work directory of a run that was trained with every label."
    )

    _paths = field_validator("workdir", "model", "data", "output", "baseline", "oracle")(check_path)

    @model_validator(mode="after")
    def _something_on_something(self) -> Evaluate:
        if self.workdir is None and self.model is None:
            raise ValueError("give --workdir DIR, or --model DIR_OR_HUB_NAME with --data FILE")
        if self.workdir is None and self.data is None:
            raise ValueError("--model needs dialogues: --data FILE, or --workdir DIR for those of a run")
        return self

    @model_validator(mode="after")
    def _compares_or_evaluates(self) -> Evaluate:
        if self.baseline is None:
            if self.oracle is not None:
                raise ValueError("--oracle says how far it is from a baseline; give --baseline DIR too")
            return self
        if self.workdir is None:
            raise ValueError("--baseline is compared with the evaluation of a run; give --workdir DIR")
        for name in ("model", "data", *_AMOUNTS):
            if getattr(self, name) is not None:
                raise ValueError(f"--baseline compares evaluations that are there; drop --{name.replace('_', '-')}")
        return self

    @property
    def file_name(self) -> str:
        """Of the evaluation in a work directory."""
        kept = "" if self.weights == "auto" else f"_{self.weights}"
        return f"eval_{self.split}{kept}.json"


def main(arguments: Sequence[str]) -> None:
    """Evaluates or compares, prints and writes the result."""
    with distributed.before_joining():
        command = command_line.parse(
            Evaluate, arguments, program="python -m ssl_jax.evaluate", summary=(__doc__ or "").strip()
        )
    distributed.join()
    agreement.check(command.model_dump(mode="json"))
    if command.baseline is None:
        _evaluate(command)
    elif distributed.is_primary():
        _compare(command, command.workdir or "", command.baseline)


def _compare(command: Evaluate, directory: str, baseline: str) -> None:
    """Compares the evaluations of work directories, prints the differences and adds them to the first one's file."""
    named = {"--workdir": directory, "--baseline": baseline, "--oracle": command.oracle}
    flags = f"--split {command.split}" + ("" if command.weights == "auto" else f" --weights {command.weights}")
    results = {
        flag: comparison.checked(
            flag, comparison.read(flag, _pulled(name, command.file_name), command.file_name, flags)
        )
        for flag, name in named.items()
        if name is not None
    }
    found = comparison.compare(results["--workdir"], results["--baseline"], results.get("--oracle"))
    names = {"baseline": baseline, **({} if command.oracle is None else {"oracle": command.oracle})}
    _print(comparison_lines(found))
    _write(command.output or f"{directory}/{command.file_name}", results["--workdir"] | {"comparison": names | found})


def _evaluate(command: Evaluate) -> None:
    """Loads model and data, evaluates, prints and writes the result."""
    run = None if command.workdir is None else workdir.read_config(command.workdir)
    asked = command.model_dump(include=set(_AMOUNTS), exclude_none=True)
    settings = (Evaluation() if run is None else run.evaluation).model_copy(update=asked)

    from ssl_jax import compilation_cache, loading, sharding
    from ssl_jax.evaluation import measure

    compilation_cache.enable()
    if command.data:
        dialogues = _from_files(command.data, Data() if run is None else run.data)
    else:
        directory = command.workdir or ""
        dialogues = distributed.primary_first("prepare the data", lambda: _from_run(directory, command.split))
    workdir_name = None if command.model else command.workdir
    model = loading.load_named(workdir_name, command.model, command.template, command.weights)
    shards = 1 if model.mesh is None else sharding.row_shards(model.mesh)
    result = {
        "split": command.data or f"labeled_{command.split}",
        "model": command.model or command.workdir,
        **({} if command.weights == "auto" else {"weights": command.weights}),
        **measure.full(
            model,
            list(model.tokenizer.encode_all(dialogues)),
            lambda index: dialogues[index][0],
            settings,
            rows=(Train() if run is None else run.train).per_device_eval_batch_size * shards,
            say=_say,
        ),
    }
    if not distributed.is_primary():
        return
    _print(metric_lines(command.split if command.data is None else "value", result["metrics"], result.get("human", {})))
    if "coherence" in result:
        _print(["", *coherence_lines(result["coherence"]), ""])
    for what, count in result["counts"].items():
        print(f"{what.replace('_', ' '):<28} {count}")
    path = command.output
    if path is None and command.model is None and command.data is None:
        path = f"{command.workdir}/{command.file_name}"
    if path is not None:
        _write(path, result)


def _print(lines: Sequence[str]) -> None:
    print(*lines, sep="\n")


def _pulled(name: str, file_name: str) -> str:
    """A work directory, or what mirrors it, with one of its files."""
    place = storage.place(name)
    place.pull(file_name)
    return str(place.local)


def _write(path: str, result: dict[str, Any]) -> None:
    storage.write_json(path, result)
    print(f"written to {path}")


def _from_run(directory: str, split: str) -> list[tuple[Dialogue, int]]:
    """A split of a run's data: dialogues, and the bytes of their replies before cleaning."""
    from ssl_jax.data.pipeline import prepare

    prepared = prepare(workdir.read_config(directory), say=_say)
    workdir.check_data(storage.place(directory), prepared.summary)
    name = f"labeled_{split}"
    if name not in prepared.splits:
        known = ", ".join(name.removeprefix("labeled_") for name in prepared.splits if name.startswith("labeled_"))
        raise UserError(f"--split {split}: the data has no such split; it has {known}")
    encoded = prepared.encoded(name)
    return [(prepared.dialogue(name, index), encoded[index].reply_bytes) for index in range(len(encoded))]


def _from_files(path: str, data: Data) -> list[tuple[Dialogue, int]]:
    """Labeled dialogues of files, cleaned as for training, and the bytes of their replies before cleaning."""
    from ssl_jax.data import formats
    from ssl_jax.data.cleaning.apply import Counts, clean
    from ssl_jax.data.tokenizer import count_reply_bytes

    rows = list(formats.read(Source(path=path), "labeled", data.max_turn_bytes))
    good = [(row, count_reply_bytes(row)) for row in rows if not isinstance(row, formats.Rejected)]
    bad = [row for row in rows if isinstance(row, formats.Rejected)]
    if bad:
        _say(f"{len(bad)} of {len(rows)} rows are malformed; first: {bad[0].file}:{bad[0].line}: {bad[0].reason}")
    if not good:
        raise UserError(f"--data {path}: no labeled dialogue; a row has messages that end in an assistant turn")
    return list(clean(good, Counts(), data.cleaning))


def _say(text: str) -> None:
    if distributed.is_primary():
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    command_line.run(main)
