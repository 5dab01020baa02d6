"""How many errors the tests would notice: mutants of losses, masks, packing, filters and manifests.

    python benchmarks/mutation_testing.py
    python benchmarks/mutation_testing.py --modules ssl_jax/losses.py --again survived
    python benchmarks/mutation_testing.py --modules

Every mutant of a module (see `mutants.py`) is given to the test files that guard it, until one test fails. What was
found is in the output file at once, so that an interrupted run goes on where it stopped; a module that has changed is
begun anew. Without a module, only the table is printed. A mutant that no test can kill, since the program means the
same, stands with a reason in `equivalent_mutants.json`. Needs the extra `mutation`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from mutants import Drawn, draw
from provenance import provenance
from pydantic import Field

from ssl_jax import command_line, files
from ssl_jax.config import Section
from ssl_jax.errors import UserError

ROOT = Path(__file__).parents[1]
OUTCOMES = {"passed": "survived", "failed": "killed", "timeout": "timeout"}
"""Of a mutant, by how the tests end."""
REASONS = ROOT / "benchmarks" / "equivalent_mutants.json"


@dataclasses.dataclass(frozen=True)
class Target:
    """A module and who guards it.

    Attributes:
      group: what the module is about.
      tests: files or tests, those that kill most first.
      only: functions and classes outside of which nothing changes; none: everywhere.
      without: those in which nothing changes, with the reason.
    """

    group: str
    tests: tuple[str, ...]
    only: tuple[str, ...] = ()
    without: Mapping[str, str] = dataclasses.field(default_factory=dict)


TARGETS = {
    "ssl_jax/losses.py": Target("losses", ("tests/test_losses.py", "tests/test_rows_on_devices.py")),
    "ssl_jax/objectives.py": Target("losses", ("tests/test_objectives.py",)),
    "ssl_jax/attention.py": Target(
        "masks",
        ("tests/test_attention.py", "tests/test_rows_on_devices.py"),
        without={"_attend_by_cudnn": "runs on a GPU only"},
    ),
    "ssl_jax/data/packing.py": Target("packing", ("tests/test_packing.py",)),
    "ssl_jax/data/cleaning/filters.py": Target("filters", ("tests/test_cleaning_steps.py",)),
    "ssl_jax/data/cleaning/masks.py": Target("filters", ("tests/test_cleaning_steps.py",)),
    "ssl_jax/pseudo_labels/candidates.py": Target("filters", ("tests/test_candidates.py",)),
    "ssl_jax/pseudo_labels/make.py": Target("filters", ("tests/test_pseudo_labels.py",)),
    "ssl_jax/files.py": Target("manifest", ("tests/test_files.py", "tests/test_checkpoint.py")),
    "ssl_jax/checkpoint.py": Target(
        "manifest",
        ("tests/test_checkpoint.py",),
        only=(
            "Checkpoints._finish",
            "Checkpoints._delete_superfluous",
            "Checkpoints._why_saved",
            "Checkpoints._first_good",
            "Checkpoints._warn",
            "Checkpoints._by_metric",
            "Checkpoints._steps",
            "Checkpoints._step_folders",
            "Checkpoints._manifest",
        ),
    ),
    "ssl_jax/step_manifest.py": Target(
        "manifest", ("tests/test_checkpoint.py", "tests/test_security.py::test_a_manifest_of_other_types_is_damaged")
    ),
    "ssl_jax/manifest.py": Target("manifest", ("tests/test_manifest.py", "tests/test_checkpoint.py")),
}


class Options(Section):
    """What is tested, and where the result goes."""

    modules: tuple[str, ...] = Field(default=tuple(TARGETS), description="Paths of modules; all by default.")
    limit: int = Field(default=150, ge=1, description="Mutants of a module, drawn where there are more.")
    seed: int = Field(default=0, ge=0, description="Decides which are drawn.")
    again: tuple[Literal["survived", "timeout"], ...] = Field(
        default=(), description="Mutants with these outcomes are tested again, after tests have changed."
    )
    seconds: float = Field(default=120, gt=0, description="Of the processor; who takes longer is killed.")
    minutes: float = Field(default=600, gt=0, description="No mutant is begun after that time.")
    output: str = Field(default="benchmarks/results/mutation_testing.json", description="File of the results.")


def main(arguments: Sequence[str]) -> None:
    """Tests what has not been tested yet, then prints the table."""
    options = command_line.parse(
        Options, arguments, program="python benchmarks/mutation_testing.py", summary=(__doc__ or "").strip()
    )
    unknown = sorted(set(options.modules).difference(TARGETS))
    if unknown:
        raise UserError(f"no tests are known for {unknown[0]}; known: {', '.join(TARGETS)}")
    ends = time.monotonic() + 60 * options.minutes
    output = Path(options.output)
    for path in options.modules:
        test_module(path, options, output, ends)
    results = _results(output)
    files.write_json(output, results)
    print(report(results))


def test_module(path: str, options: Options, output: Path, ends: float) -> None:
    """Brings the results of one module up to date, as far as there is time.

    Raises:
      UserError: its tests fail on the module as it is.
    """
    target = TARGETS[path]
    source = (ROOT / path).read_text(encoding="utf-8")
    digest = hashlib.sha256(source.encode()).hexdigest()
    known = _results(output).get(path, {})
    if known.get("source_sha256") != digest:
        known = {}
    outcomes = known.get("outcomes", {})
    limit = max(options.limit, known.get("drawn", 0))  # a sample grows, and what is known stays
    drawn = draw(source, limit=limit, seed=options.seed, only=target.only, without=target.without)
    asked = [mutant for mutant in drawn.mutants if mutant.key not in outcomes or outcomes[mutant.key] in options.again]
    outcomes = {mutant.key: outcomes[mutant.key] for mutant in drawn.mutants if mutant.key in outcomes}
    if asked and time.monotonic() < ends:
        with _tester(path, target.tests) as test:
            for number, mutant in enumerate(asked, start=1):
                if time.monotonic() > ends:
                    break
                began = time.monotonic()
                outcomes[mutant.key] = OUTCOMES[test(mutant.source, options.seconds)]
                took = time.monotonic() - began
                print(f"{path} {number}/{len(asked)} {outcomes[mutant.key]:<8} {took:5.1f} s {mutant.key}", flush=True)
                _store(output, path, _result(target, digest, drawn, outcomes))
    _store(output, path, _result(target, digest, drawn, outcomes))


def report(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for every module and one for every group, then the survivors without a reason."""
    lines = [f"{'':<38}{'places':>8}{'tested':>8}{'killed':>8}{'of all':>9}{'equivalent':>12}{'unexplained':>13}"]
    groups = {target.group: [] for target in TARGETS.values()}
    for path, target in TARGETS.items():
        if path in results:
            groups[target.group].append(results[path])
            lines.append(_line(path, [results[path]]))
    lines += [_line(group, members) for group, members in groups.items() if members]
    for path, result in results.items():
        for mutant in result["survivors"]:
            if mutant["reason"] is None:
                lines.append(
                    f"{path}:{mutant['line']} {mutant['operator']}\n    {mutant['before']}\n    {mutant['after']}"
                )
    return "\n".join(lines)


def _line(name: str, results: Sequence[Mapping[str, Any]]) -> str:
    places, tested, killed = (sum(result[key] for result in results) for key in ("places", "tested", "killed"))
    explained = sum(mutant["reason"] is not None for result in results for mutant in result["survivors"])
    share = f"{killed / tested:.1%}" if tested else "–"
    return f"{name:<38}{places:>8}{tested:>8}{killed:>8}{share:>9}{explained:>12}{tested - killed - explained:>13}"


def _result(target: Target, digest: str, drawn: Drawn, outcomes: Mapping[str, str]) -> dict[str, Any]:
    counts = Counter(outcomes.values())
    return {
        **provenance(),
        "group": target.group,
        "tests": list(target.tests),
        "only": list(target.only),
        "without": dict(target.without),
        "source_sha256": digest,
        "places": drawn.places,
        "drawn": len(drawn.mutants),
        "tested": len(outcomes),
        # Whoever waits for a mutant that never ends has noticed it.
        "killed": counts["killed"] + counts["timeout"],
        "timeouts": counts["timeout"],
        "survivors": [
            {name: getattr(mutant, name) for name in ("line", "operator", "before", "after")}
            for mutant in drawn.mutants
            if outcomes.get(mutant.key) == "survived"
        ],
        "outcomes": dict(outcomes),
    }


def _results(output: Path) -> dict[str, Any]:
    """What is known, with the reasons that stand in their file now."""
    results = files.read_json(output) if output.exists() else {}
    reasons = {(row["module"], row["before"], row["after"]): row["reason"] for row in files.read_json(REASONS)}
    for path, result in results.items():
        for row in result["survivors"]:
            row["reason"] = reasons.get((path, row["before"], row["after"]))
    return results


def _store(output: Path, path: str, result: Mapping[str, Any]) -> None:
    results = {**_results(output), path: result}
    files.write_json(output, {name: results[name] for name in TARGETS if name in results})


@contextlib.contextmanager
def _tester(path: str, tests: Sequence[str]) -> Iterator[Callable[[str, float], str]]:
    """`test(source, seconds)`, which says how the tests end where the module at `path` has that source.

    Raises:
      UserError: they fail on the module as it is, or their process ended.
    """
    with tempfile.TemporaryDirectory(prefix="ssl_jax_mutants_") as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "__pycache__", ".*_cache", ".hypothesis"))
        command = [sys.executable, str(ROOT / "benchmarks" / "mutation_child.py"), str(copy), path, *tests]
        with subprocess.Popen(
            command, env=_variables(Path(folder)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdin is not None and child.stdout is not None
            requests, answers = child.stdin, child.stdout

            def answer() -> str:
                line = answers.readline().strip()
                if not line:
                    raise UserError(f"the process that tests {path} has ended; what it said is above")
                return line

            def test(source: str, seconds: float) -> str:
                requests.write(json.dumps({"source": source, "seconds": seconds}) + "\n")
                requests.flush()
                return answer()

            try:
                if answer() != "passed":
                    raise UserError(f"{path}: the tests fail on the module as it is: {' '.join(tests)}")
                yield test
            finally:
                requests.close()


def _variables(folder: Path) -> dict[str, str]:
    """Compiles fast, and what it has compiled already not again; leaves nothing behind."""
    temporary = folder / "tmp"
    temporary.mkdir()
    return {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(folder / "copy"),
        "TMPDIR": str(temporary),
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    }


if __name__ == "__main__":
    command_line.run(main)
