"""The README's table of faults, from what `benchmarks/fault_campaign.py` has found.

`python benchmarks/fault_table.py` reads `benchmarks/results/fault_campaign.json` and writes the table between the
markers of `README.md`.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import Field
from readme import markdown_table, replace_section

from ssl_jax import command_line, files
from ssl_jax.config import Section

Trial = Mapping[str, Any]

HEADER = ("fault", "trials", "where it hit", "saved steps lost", "wrong state", "same end, to the bit", "as promised")


class Options(Section):
    """Which results are shown, and where."""

    results: str = Field(default="benchmarks/results/fault_campaign.json", description="From fault_campaign.py.")
    readme: str = Field(default="README.md", description="Whose table is replaced.")


def main(arguments: Sequence[str]) -> None:
    """Reads the results, writes and prints the table."""
    options = command_line.parse(
        Options, arguments, program="python benchmarks/fault_table.py", summary=(__doc__ or "").strip()
    )
    text = render(files.read_json(Path(options.results)))
    replace_section(Path(options.readme), "fault table", text)
    print(text)


def render(results: Mapping[str, Any]) -> str:
    """The table, and a line that says on what it was found."""
    versions = results.get("versions", {})
    where = f"{results.get('cpu')}, {results.get('cores')} cores, jax {versions.get('jax')}"
    return f"{markdown_table(HEADER, rows(results['trials']))}\n\n{where}"


def rows(trials: Mapping[str, Mapping[str, Trial]]) -> Iterator[Sequence[str]]:
    """A row for every kind but that all ways of damaging the same files are one, and a row for all."""
    grouped: dict[str, dict[str, list[Trial]]] = {}
    for kind, found in trials.items():
        title, _, how = kind.partition(": ")
        grouped.setdefault(title, {})[how] = list(found.values())
    for title, by_way in grouped.items():
        merged = [trial for of_way in by_way.values() for trial in of_way]
        yield row(title, merged, {how: len(of_way) for how, of_way in by_way.items() if how})
    yield row("**all**", [trial for found in trials.values() for trial in found.values()])


def row(title: str, trials: Sequence[Trial], hits: Mapping[str, int] = MappingProxyType({})) -> tuple[str, ...]:
    """What came of the trials of a kind; `hits` says how they were distributed, if not over phases of a run."""
    is_sum = title.startswith("**")
    hits = hits or collections.Counter(trial["phase"] for trial in trials if "phase" in trial and not is_sum)
    places = ", ".join(f"{place} {count}" for place, count in sorted(hits.items(), key=lambda pair: -pair[1]))
    compared = [trial for trial in trials if "differences" in trial]
    same = sum(not trial["differences"] for trial in compared)
    return (
        title,
        str(len(trials)),
        places,
        str(sum(trial["lost"] for trial in trials)),
        str(sum(is_wrong(trial) for trial in trials)),
        f"{same} of {len(compared)}" if compared else "",
        f"{sum(trial['as_promised'] for trial in trials)} of {len(trials)}",
    )


def is_wrong(trial: Trial) -> bool:
    """Whether the trial came to a state that is not the right one, whether the run ended with it or began with it."""
    return bool(trial.get("wrong") or trial.get("differences"))


def line(trial: Trial) -> str:
    """A trial in a few words."""
    told = {name: trial[name] for name in ("phase", "file", "what", "code", "saved", "lost", "starts") if name in trial}
    words = [f"{name} {value}" for name, value in told.items()]
    words += [f"DIFFERS: {trial['differences']}"] if trial.get("differences") else []
    words += ["WRONG"] if trial.get("wrong") else []
    words += [] if trial["as_promised"] else ["NOT AS PROMISED", *map(str, trial.get("said", ()))]
    return ", ".join(words)


if __name__ == "__main__":
    command_line.run(main)
