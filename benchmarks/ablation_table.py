"""The comparison as text: a page with a table for every regime and label budget, and a summary for the README."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ablation_rows
from ablation_results import Likelihoods, mean_of
from ablation_rows import LABELS, REGIMES, Row
from readme import markdown_table

from ssl_jax import metrics

_HEADER = (
    "trained on",
    "reply bits/byte",
    "gap closed",
    "label-equivalents",
    "R@1/20 forward",
    "R@1/20 PMI",
    "R@1/20 backward",
    "distinct-2 − human",
    "entropy-4 − human",
    "length ratio",
    "repetition-4",
    "tokens",
    "minutes",
    "seeds",
)
_SUMMARIZED = (
    "floor_untuned",
    "floor",
    "pretrain",
    "lm",
    "pseudo_unfiltered",
    "pseudo_filtered",
    "shuffled",
    "ema",
    "ensemble_kd",
    "back_translation",
    "r_drop",
    "full",
    "oracle",
)

_INTRODUCTION = """# What each method is worth

Every row is the same network on the same number of training tokens; only the method differs.

- *Reply bits/byte*: the bits that a model needs for a byte of the replies of held-out dialogues between people who
  occur in no other dialogue. Lower is better.
- *Gap closed*: the share of the distance between the floor (labels alone, tuned) and the oracle (every label), with a
  95 % bootstrap interval over dialogues, and over seeds where there are several. It is undefined where that distance is
  under two of its standard errors.
- *Label-equivalents*: with how many labeled dialogues labels alone are as good.
- *R@1/20*: how often the true reply is first among 20, ranked by log p(reply | context) (forward), by that less
  log p(reply) (PMI), and by log p(context | reply) (backward), for models that also read dialogues backwards. TF-IDF
  ranks by the words that context and reply share.
- The statistics of drawn replies are distances to those of people: best at 0, the length ratio at 1.

One tokenizer serves all rows, a byte-level BPE fitted on the smallest label budget and its logs, so that equal steps
are equal tokens; bits per byte do not depend on a tokenizer. R-Drop reads every row twice and has half as many. Below
a table stand the rows that have not been run. Where there is one seed, a difference as small as that between seeds says
nothing.
"""


@dataclasses.dataclass(frozen=True)
class Figures:
    """What is known of a row in a regime at a budget.

    Attributes:
      row: the row.
      runs: its finished runs, one a seed.
      failure: why a run of it has failed, where none is finished.
      bits: the mean of the runs' reply bits per byte.
      gap: how much of the way from the floor to the oracle it goes; None while one of the three is not run.
      equivalents: labeled dialogues with which labels alone are as good, for people; empty where it is not known.
    """

    row: Row
    runs: Sequence[Mapping[str, Any]]
    failure: str = ""
    bits: float | None = None
    gap: metrics.GapClosed | None = None
    equivalents: str = ""


class Comparison:
    """The results of a scale, by regime, budget and row."""

    def __init__(self, values: Mapping[str, Any], likelihoods: Likelihoods) -> None:
        """Takes what `ablation_results.read` gives."""
        self.values = values
        self._likelihoods = likelihoods
        self._runs: Mapping[str, Mapping[str, Any]] = values["runs"]
        self._figures: dict[tuple[str, str, int], Figures] = {}

    @functools.cached_property
    def budgets(self) -> list[int]:
        """Label budgets, increasing."""
        return sorted({run["budget"] for run in self._runs.values() if run["budget"] is not None})

    @functools.cached_property
    def regimes(self) -> list[str]:
        """Regimes of which something is known."""
        known = {run["regime"] for run in self._runs.values()}
        return [regime for regime in REGIMES if regime in known]

    def figures(self, row: Row, regime: str, budget: int) -> Figures:
        """What is known of a row; rows without unlabeled data are in every regime."""
        key = (row.name, regime, budget)
        if key not in self._figures:
            self._figures[key] = self._measure(row, regime, budget)
        return self._figures[key]

    def _measure(self, row: Row, regime: str, budget: int) -> Figures:
        names = self._names(row, regime, budget)
        runs = [self._runs[name] for name in names]
        if not runs:
            failures = [self.values["failed"][name] for name in self._failed(row, regime, budget)]
            why = f"failed, exit code {failures[0]['exit_code']}" if failures else ""
            return Figures(row, runs, why)
        bits = mean_of(runs, "reply_bits_per_byte")
        assert bits is not None  # every evaluation has it
        return Figures(row, runs, "", bits, self._gap(names, regime, budget), self._equivalents(bits))

    def rows(self, regime: str, budget: int) -> list[Row]:
        """The rows of a table: at the smallest budget all that apply, at others those meant for it or known."""
        applying = [row for row in ablation_rows.ROWS if regime in row.recipes or LABELS in row.recipes]
        if budget == min(self.budgets):
            return applying
        return [row for row in applying if row.is_main or self.figures(row, regime, budget).runs]

    def _gap(self, names: Sequence[str], regime: str, budget: int) -> metrics.GapClosed | None:
        floors, oracles = (self._names(ablation_rows.BY_NAME[name], regime, budget) for name in ("floor", "oracle"))
        if not (floors and oracles):
            return None
        nll = ([self._likelihoods[name] for name in group] for group in (floors, names, oracles))
        floor, method, oracle = nll
        return metrics.gap_closed_over_seeds(floor, method, oracle, self._likelihoods["bytes"])

    def _equivalents(self, bits: float) -> str:
        curve = self._curve
        if not curve:
            return ""
        budgets, reached = zip(*curve, strict=True)
        equivalents = metrics.label_equivalents(budgets, reached, bits)
        if equivalents is not None:
            return f"{equivalents:,.0f}"
        return f"< {budgets[0]:,}" if bits > reached[0] else f"> {budgets[-1]:,}"

    @functools.cached_property
    def _curve(self) -> list[tuple[int, float]]:
        """Labeled dialogues and the bits per byte that labels alone reach with them; the oracle is its end."""
        points = {}
        for run in self._runs.values():
            if run["row"] in ("floor", "oracle"):
                points.setdefault(run["labeled"], []).append(run["metrics"]["reply_bits_per_byte"])
        return [(labeled, sum(bits) / len(bits)) for labeled, bits in sorted(points.items())]

    def _names(self, row: Row, regime: str, budget: int) -> list[str]:
        return sorted(name for name, run in self._runs.items() if _belongs(run, row, regime, budget))

    def _failed(self, row: Row, regime: str, budget: int) -> list[str]:
        prefixes = [f"{place}-{amount}/{row.name}/" for place in (regime, LABELS) for amount in (budget, "all")]
        return sorted(name for name in self.values.get("failed", {}) if name.startswith(tuple(prefixes)))


def page(comparison: Comparison, command: str, plots: Sequence[str]) -> str:
    """The complete page as Markdown.

    Args:
      comparison: what is known.
      command: that repeats it.
      plots: file names of the plots beside the page.
    """
    values = comparison.values
    gpus = "".join(f", {gpu}" for gpu in values["gpus"])
    lines = [
        _INTRODUCTION,
        f"Measured on {values['cpu']}, {values['cores']} cores{gpus}, {values['date'][:10]}. To repeat it:",
        "",
        "```bash",
        command,
        "```",
        "",
        "Finished runs are not repeated; the configuration of every run is in its folder as `row.yaml`.",
        "",
    ]
    for plot in plots:
        lines += [f"![{plot.removesuffix('.png').replace('_', ' ')}]({plot})", ""]
    for regime in comparison.regimes:
        lines += [f"## {regime}: {REGIMES[regime]}", ""]
        for budget in comparison.budgets:
            lines += [f"### {regime}, {budget:,} labeled dialogues", "", table(comparison, regime, budget), ""]
    lines += ["## Rounds of pseudo-labels", "", _rounds_table(comparison), ""]
    lines += ["## The rows", "", *(f"- **{row.name}**: {row.description}" for row in ablation_rows.ROWS), ""]
    return "\n".join(lines)


def table(comparison: Comparison, regime: str, budget: int) -> str:
    """The table of a regime and a budget, and a line with the rows that have not been run."""
    applying = [comparison.figures(row, regime, budget) for row in comparison.rows(regime, budget)]
    known = [figures for figures in applying if figures.runs or figures.failure]
    missing = [figures.row.title for figures in applying if not (figures.runs or figures.failure)]
    baselines = comparison.values.get("baselines", {}).get(f"{regime}-{budget}", [])
    rows = [*map(_baseline_cells, baselines), *map(_cells, known)]
    if human := next((run["human"] for figures in known for run in figures.runs if run["human"]), None):
        rows.append(_fill("people", {"repetition-4": f"{human['repetition_4']:.3f}", "length ratio": "1.00"}))
    left_out = f"\n\nNot run: {', '.join(missing)}." if missing else ""
    return markdown_table(_HEADER, rows) + left_out


def summary(comparison: Comparison) -> str:
    """The most informative rows at the smallest budget, a column a regime."""
    budget = min(comparison.budgets)
    header = (f"trained on ({budget:,} labeled dialogues)", *(f"{regime}" for regime in comparison.regimes))
    rows = []
    for row in (ablation_rows.BY_NAME[name] for name in _SUMMARIZED):
        cells = [_summary_cell(comparison, row, regime, budget) for regime in comparison.regimes]
        rows.append((row.title, *cells))
    return markdown_table(header, rows)


def closed(figures: Figures) -> str:
    """The share of the gap with its interval, for people."""
    if figures.row.name in ("floor", "oracle"):
        return "0 %" if figures.row.name == "floor" else "100 %"
    if figures.gap is None:
        return "–"
    share = figures.gap.fraction
    return "undefined" if share is None else f"{share.value:.0%} ({share.low:.0%} to {share.high:.0%})"


def _cells(figures: Figures) -> tuple[str, ...]:
    if not figures.runs:
        return _fill(figures.row.title, {"reply bits/byte": figures.failure})
    runs = figures.runs
    # Others have never seen the token that begins such a dialogue.
    reads_backward = any("train.backward_fraction" in recipe.settings for recipe in figures.row.recipes.values())
    cells = {
        "reply bits/byte": f"{figures.bits:.3f}",
        "gap closed": closed(figures),
        "label-equivalents": figures.equivalents,
        "R@1/20 forward": _percent(mean_of(runs, "recall_at_1_of_20_forward")),
        "R@1/20 PMI": _percent(mean_of(runs, "recall_at_1_of_20")),
        "R@1/20 backward": _percent(mean_of(runs, "recall_at_1_of_20_backward")) if reads_backward else "–",
        "distinct-2 − human": _distance(runs, "distinct_2"),
        "entropy-4 − human": _distance(runs, "entropy_4"),
        "length ratio": _number(mean_of(runs, "length_ratio"), 2),
        "repetition-4": _number(mean_of(runs, "repetition_4"), 3),
        "tokens": f"{runs[0]['tokens'] / 1e6:.2f}M",
        "minutes": f"{sum(run['seconds'] for run in runs) / len(runs) / 60:.1f}",
        "seeds": str(len(runs)),
    }
    return _fill(figures.row.title, cells)


def _baseline_cells(baseline: Mapping[str, Any]) -> tuple[str, ...]:
    trained_on = baseline["trained_on"].replace("_train", "").replace("raw", "unlabeled")
    cells = {
        "reply bits/byte": _number(baseline.get("reply_bits_per_byte"), 3),
        "R@1/20 forward": _percent(baseline.get("recall_at_1_of_20")),
        "minutes": f"{baseline['seconds'] / 60:.1f}",
    }
    return _fill(f"{baseline['system']}, {trained_on}", cells)


def _rounds_table(comparison: Comparison) -> str:
    rows = [
        (
            name,
            values["kind"],
            str(values["round"]),
            f"{values['generated']:,}",
            f"{values['accepted']:,}",
            f"{values['accept_rate']:.1%}",
            _number(values.get("tokens_per_sec"), 0),
            f"{run['round_seconds_share']:.1%}",
        )
        for name, run in sorted(comparison.values["runs"].items())
        for values in run["rounds"]
    ]
    header = ("run", "kind", "round", "generated", "accepted", "share accepted", "tokens/s", "share of the run's time")
    return markdown_table(header, rows) if rows else "None was held."


def _summary_cell(comparison: Comparison, row: Row, regime: str, budget: int) -> str:
    if regime not in row.recipes and LABELS not in row.recipes:
        return "does not apply"
    figures = comparison.figures(row, regime, budget)
    if figures.bits is None:
        return figures.failure or "not run"
    return f"{figures.bits:.3f}, {closed(figures)}"


def _belongs(run: Mapping[str, Any], row: Row, regime: str, budget: int) -> bool:
    return run["row"] == row.name and run["regime"] in (regime, LABELS) and run["budget"] in (budget, None)


def _fill(title: str, cells: Mapping[str, str]) -> tuple[str, ...]:
    return (title, *(cells.get(name, "") for name in _HEADER[1:]))


def _distance(runs: Iterable[Mapping[str, Any]], name: str) -> str:
    distances = [run["metrics"][name] - run["human"][name] for run in runs if name in run["metrics"]]
    return f"{sum(distances) / len(distances):+.3f}" if distances else "–"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"
