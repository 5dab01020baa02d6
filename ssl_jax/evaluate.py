"""Computes all metrics of a trained model: `python -m ssl_jax.evaluate --workdir DIR [--split test]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from ssl_jax import command_line, files, workdir
from ssl_jax.config import Section
from ssl_jax.errors import UserError


class Evaluate(Section):
    """What to evaluate."""

    workdir: str = Field(description="Work directory of a run.")
    split: str = Field(default="test", description="Labeled split: test, dev, train, or another that the data has.")
    recall_examples: int | None = Field(
        default=None, ge=0, description="Contexts to rank; absent: as the run's config says."
    )
    generated_replies: int | None = Field(
        default=None, ge=0, description="Replies to draw; absent: as the run's config says."
    )


def main(arguments: Sequence[str]) -> None:
    """Loads the run's model and data, evaluates, prints and writes `eval_<split>.json`."""
    command = command_line.parse(
        Evaluate, arguments, program="python -m ssl_jax.evaluate", summary=(__doc__ or "").strip()
    )
    directory = Path(command.workdir)
    config = workdir.read_config(directory)
    asked = command.model_dump(include={"recall_examples", "generated_replies"}, exclude_none=True)
    settings = config.evaluation.model_copy(update=asked)

    from ssl_jax import dialogue_model, evaluation
    from ssl_jax.data.pipeline import prepare

    prepared = prepare(config, say=_say)
    workdir.check_data(directory, prepared.summary)
    split = f"labeled_{command.split}"
    if split not in prepared.splits:
        known = ", ".join(name.removeprefix("labeled_") for name in prepared.splits if name.startswith("labeled_"))
        raise UserError(f"--split {command.split}: the data has no such split; it has {known}")
    model = dialogue_model.load(directory)
    rows = config.train.per_device_eval_batch_size
    result = {"split": split, **evaluation.full(model, prepared, split, settings, rows=rows, say=_say)}
    path = directory / f"eval_{command.split}.json"
    files.write_json(path, result)
    for name, value in result["metrics"].items():
        human = result.get("human", {}).get(name)
        print(f"{name:<20} {value:9.4f}" + (f"   human {human:.4f}" if human is not None else ""))
    print(f"written to {path}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    command_line.run(main)
