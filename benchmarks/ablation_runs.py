"""The runs behind the rows of the published comparison: which there are, in what order, and how each is configured."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ablation_rows
from ablation_rows import LABELS, REGIMES, Recipe, Row, Settings

from ssl_jax.errors import UserError

# The rows that answer the question of the comparison, in the order in which one would want to know them.
_FIRST = ("floor", "oracle", "lm", "full")

_SIZES_OF_ROUNDS = ("pseudo_labels.prompts_per_round", "pseudo_labels.replies_per_round")


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
      settings: values by dotted path, on the base.
      rows: rows of a step, of all streams together. All runs of a scale are fed steps × rows × sequence_length tokens.
    """

    settings: Settings
    rows: int


SCALES: Mapping[str, Scale] = {
    "cpu": Scale({}, rows=8),
    "gpu": Scale(
        {
            "model.n_layer": 8,
            "model.n_head": 8,
            "model.n_embd": 512,
            "model.scan_layers": True,
            "tokenizer.vocab_size": 4096,
            "train.steps": 1220,  # 10M tokens
            "pseudo_labels.batch_size": 256,
            "evaluation.recall_examples": 394,
            "evaluation.generated_replies": 2000,
        },
        rows=32,
    ),
    "tiny": Scale(
        {
            "model.n_layer": 1,
            "model.n_head": 2,
            "model.n_embd": 32,
            "model.n_positions": 64,
            "tokenizer.vocab_size": 320,
            "train.steps": 20,
            "train.sequence_length": 64,
            "train.eval_steps": 10,
            "train.save_steps": 10,
            "pseudo_labels.prompts_per_round": 16,
            "pseudo_labels.replies_per_round": 16,
            "pseudo_labels.max_prompt_tokens": 32,
            "pseudo_labels.sampling.max_new_tokens": 16,
            "evaluation.recall_examples": 8,
            "evaluation.generated_replies": 8,
            "evaluation.max_prompt_tokens": 32,
            "evaluation.sampling.max_new_tokens": 16,
        },
        rows=8,
    ),
}
"""cpu: hours on two cores for all rows. gpu: minutes a row. tiny: seconds a row, to see that everything works."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
      row: what is trained.
      regime: of the unlabeled data, or `LABELS`.
      budget: labeled dialogues; None: all of them.
      seed: of the run.
    """

    row: Row
    regime: str
    budget: int | None
    seed: int

    @property
    def name(self) -> str:
        """What it is called, also as a path: `logs-100/lm/seed-0`."""
        return f"{self.regime}-{self.budget or 'all'}/{self.row.name}/seed-{self.seed}"

    @property
    def recipe(self) -> Recipe:
        """The row's recipe for this regime."""
        return self.row.recipes[self.regime]


@dataclasses.dataclass(frozen=True)
class Selection:
    """What is to be known.

    Attributes:
      rows: names; empty: all.
      regimes, budgets, seeds: of the runs; the first budget and the first seed are those of every row.
      complete: every row with every budget and seed, not only the rows that are meant for it.
    """

    rows: Sequence[str]
    regimes: Sequence[str]
    budgets: Sequence[int]
    seeds: Sequence[int]
    complete: bool = False


def select(selection: Selection) -> list[Run]:
    """All runs of a selection and the runs that teach them, the most informative first and teachers before students.

    Raises:
      UserError: a name that is none, or nothing to run.
    """
    for what, names, known in (
        ("rows", selection.rows, ablation_rows.BY_NAME),
        ("regimes", selection.regimes, REGIMES),
    ):
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"--{what} {unknown[0]}: not one of {', '.join(known)}")
    rows = [row for row in ablation_rows.ROWS if not selection.rows or row.name in selection.rows]
    wanted = [run for row in rows for run in _runs_of(row, selection)]
    if not wanted:
        raise UserError(f"--rows {' '.join(selection.rows)}: none applies to --regimes {' '.join(selection.regimes)}")
    found: dict[Run, None] = {}
    for run in sorted(wanted, key=lambda run: _priority(run, selection)):
        _add_after_teachers(run, selection.seeds, found)
    return list(found)


def teachers(run: Run, seeds: Iterable[int]) -> list[Run]:
    """The runs whose predictions a run follows: its regime and budget where their row has regimes, every seed."""
    if run.recipe.teachers is None:
        return []
    row = ablation_rows.BY_NAME[run.recipe.teachers]
    regime = run.regime if run.regime in row.recipes else LABELS
    return [Run(row, regime, None if row.all_labels else run.budget, seed) for seed in seeds]


def configuration(
    run: Run, base: Mapping[str, Any], scale: Scale, folder: Path, seeds: Iterable[int], steps: int | None = None
) -> dict[str, Any]:
    """A run's configuration as YAML values.

    Args:
      run: the run.
      base: `configs/ablation.yaml`.
      scale: how large.
      folder: of all runs of this scale; holds the tokenizer and the prepared data too.
      seeds: of the runs that teach.
      steps: in the place of the scale's.
    """
    recipe = run.recipe
    settings: dict[str, Any] = {**scale.settings, **recipe.settings}
    settings |= _batch(scale.rows, settings)
    # How much is generated is part of a row, but a scale that says how much goes before it.
    settings |= {path: scale.settings[path] for path in _SIZES_OF_ROUNDS if path in scale.settings}
    if steps is not None:
        settings["train.steps"] = steps
    settings |= {
        "seed": run.seed,
        "workdir": str(folder / run.name),
        "data.prepared_dir": str(folder / "prepared"),
        "data.labeled": [_labeled_source(run.budget)],
        "data.unlabeled": [] if run.regime == LABELS else [dict(ablation_rows.UNLABELED_SOURCES[run.regime])],
        "tokenizer.name_or_path": str(folder / "tokenizer"),
    }
    if taught_by := teachers(run, seeds):
        settings["distillation.teachers"] = [str(folder / teacher.name) for teacher in taught_by]
    return _with_settings(base, settings)


def tokenizer_configuration(
    base: Mapping[str, Any], scale: Scale, folder: Path, budgets: Sequence[int]
) -> dict[str, Any]:
    """The configuration whose prepared data have the tokenizer of all runs: the smallest budget's, with logs."""
    settings = {
        **scale.settings,
        "data.prepared_dir": str(folder / "prepared"),
        "data.labeled": [_labeled_source(min(budgets))],
        "data.unlabeled": [dict(ablation_rows.UNLABELED_SOURCES["logs"])],
    }
    return _with_settings(base, settings)


def baseline_configuration(
    regime: str, budget: int, base: Mapping[str, Any], scale: Scale, folder: Path
) -> dict[str, Any]:
    """The configuration of the baselines (`baselines.py`) of a regime and a budget."""
    run = Run(ablation_rows.BY_NAME["lm"], regime, budget, 0)
    values = configuration(run, base, scale, folder, ())
    return {**values, "workdir": str(folder / f"{regime}-{budget}" / "baselines")}


def _runs_of(row: Row, selection: Selection) -> Iterator[Run]:
    regimes = [regime for regime in (LABELS, *selection.regimes) if regime in row.recipes]
    budgets: Sequence[int | None] = selection.budgets if row.is_main or selection.complete else selection.budgets[:1]
    if row.all_labels:
        budgets = [None]
    seeds = selection.seeds if row.is_repeated or selection.complete else selection.seeds[:1]
    for regime, budget, seed in itertools.product(regimes, budgets, seeds):
        yield Run(row, regime, budget, seed)


def _priority(run: Run, selection: Selection) -> tuple[int, ...]:
    """First the main question, then every row once, then other budgets, then other seeds."""
    seed = selection.seeds.index(run.seed)
    budget = 0 if run.budget is None else selection.budgets.index(run.budget)
    first = _FIRST.index(run.row.name) if run.row.name in _FIRST else len(_FIRST)
    return (seed, budget, first, ablation_rows.ROWS.index(run.row), [LABELS, *REGIMES].index(run.regime))


def _add_after_teachers(run: Run, seeds: Sequence[int], found: dict[Run, None]) -> None:
    for teacher in teachers(run, seeds):
        _add_after_teachers(teacher, seeds, found)
    found.setdefault(run)


def _batch(rows: int, settings: Settings) -> dict[str, Any]:
    """Rows of a step: a quarter labeled, or by the row's ratio. R-Drop feeds each twice, so it has half as many."""
    if settings.get("objectives.r_drop"):
        rows //= 2
    labeled = max(1, round(rows / (1 + settings.get("train.unlabeled_ratio", 3))))
    if labeled == rows:
        return {"train.per_device_train_batch_size": rows}
    return {"train.per_device_train_batch_size": labeled, "train.unlabeled_ratio": (rows - labeled) / labeled}


def _labeled_source(budget: int | None) -> dict[str, Any]:
    source = dict(ablation_rows.LABELED_SOURCE)
    return source if budget is None else {**source, "max_dialogues": budget}


def _with_settings(base: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    result = copy.deepcopy(dict(base))
    for path, value in settings.items():
        *groups, name = path.split(".")
        group = result
        for part in groups:
            group = group.setdefault(part, {})
        group[name] = copy.deepcopy(value)
    return result
