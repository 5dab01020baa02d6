"""The README's table: what unlabeled dialogues are worth, from finished runs and baselines.

`python benchmarks/quickstart_table.py` reads the runs of `configs/quickstart*.yaml` and `benchmarks/results/
baselines.json`, writes `benchmarks/results/quickstart.json` and the table between the markers of `README.md`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from provenance import provenance
from pydantic import Field
from readme import markdown_table, replace_section

from ssl_jax import command_line, files, metrics
from ssl_jax.config import Section
from ssl_jax.errors import UserError


class Options(Section):
    """Which runs are compared."""

    floor: str = Field(default="runs/quickstart_labeled_only", description="Trained on the labels alone.")
    method: str = Field(default="runs/quickstart", description="Trained on labeled and unlabeled dialogues.")
    oracle: str = Field(default="runs/quickstart_oracle", description="Trained with the labels of all dialogues.")
    baselines: str = Field(default="benchmarks/results/baselines.json", description="From benchmarks/baselines.py.")
    output: str = Field(default="benchmarks/results/quickstart.json", description="Where the figures go.")
    readme: str = Field(default="README.md", description="Whose table is replaced.")


def main(arguments: Sequence[str]) -> None:
    """Compares the runs, writes the figures and the table."""
    options = command_line.parse(
        Options, arguments, program="python benchmarks/quickstart_table.py", summary="Renders the README's table."
    )
    runs = {name: _read_run(Path(getattr(options, name))) for name in ("floor", "method", "oracle")}
    ids = runs["floor"]["eval"]["dialogues"]["id"]
    for name, run in runs.items():
        if run["eval"]["dialogues"]["id"] != ids:
            raise UserError(f"--{name}: {getattr(options, name)} was evaluated on other dialogues than the floor")
    nll = {name: run["eval"]["dialogues"]["nll"] for name, run in runs.items()}
    num_bytes = runs["floor"]["eval"]["dialogues"]["bytes"]
    gap = metrics.gap_closed(nll["floor"], nll["method"], nll["oracle"], num_bytes)
    bits = {name: np.array(values) / math.log(2) for name, values in nll.items()}
    gain = metrics.paired_bootstrap(bits["floor"], num_bytes, bits["method"], num_bytes)
    baselines = files.read_json(Path(options.baselines))["rows"]
    table = _table(runs, baselines, gap)
    result = {
        **provenance(),
        "runs": {name: run["summary"] for name, run in runs.items()},
        "gain_bits_per_byte": [gain.value, gain.low, gain.high],
        "gap_closed": None if gap.fraction is None else [gap.fraction.value, gap.fraction.low, gap.fraction.high],
        "oracle_gap_bits_per_byte": [gap.oracle_gap.value, gap.oracle_gap.low, gap.oracle_gap.high],
        "table": table,
    }
    files.write_json(Path(options.output), result)
    replace_section(Path(options.readme), "quickstart table", table)
    print(table)


def _read_run(directory: Path) -> dict[str, Any]:
    try:
        return {
            name: files.read_json(directory / file)
            for name, file in (("summary", "summary.json"), ("eval", "eval_test.json"))
        }
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no finished run; train it with configs/{directory.name}.yaml") from None


def _table(runs: Mapping[str, Any], baselines: Sequence[Mapping[str, Any]], gap: metrics.GapClosed) -> str:
    header = (
        "trained on",
        "reply bits/byte",
        "gap closed",
        "R@1/20",
        "distinct-2",
        "length ratio",
        "tokens",
        "minutes",
    )
    rows = [_baseline_row(row) for row in baselines]
    closed = "–"
    if gap.fraction is not None:
        closed = f"**{gap.fraction.value:.0%}** ({gap.fraction.low:.0%} to {gap.fraction.high:.0%})"
    names = {
        "floor": ("GPT-2, labeled only (floor)", "0 %"),
        "method": ("**GPT-2, semi-supervised**", closed),
        "oracle": ("GPT-2, every label (oracle)", "100 %"),
    }
    for name, (title, share) in names.items():
        summary, values = runs[name]["summary"], runs[name]["eval"]["metrics"]
        rows.append(
            (
                title,
                f"{values['reply_bits_per_byte']:.3f}",
                share,
                f"{values['recall_at_1_of_20']:.1%}",
                f"{values['distinct_2']:.3f}",
                f"{values['length_ratio']:.2f}",
                f"{summary['tokens'] / 1e6:.2f}M",
                f"{summary['seconds'] / 60:.1f}",
            )
        )
    human = runs["method"]["eval"]["human"]
    rows.append(("people", "", "", "", f"{human['distinct_2']:.3f}", "1.00", "", ""))
    return markdown_table(header, rows)


def _baseline_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    bits, recall = row.get("reply_bits_per_byte"), row.get("recall_at_1_of_20")
    return (
        f"{row['system']}, {row['trained_on'].replace('_train', '').replace('raw', 'unlabeled')}",
        f"{bits:.3f}" if bits is not None else "–",
        "",
        f"{recall:.1%}" if recall is not None else "–",
        "",
        "",
        "",
        f"{row['seconds'] / 60:.1f}",
    )


if __name__ == "__main__":
    command_line.run(main)
