"""Every kind of fault of `benchmarks/fault_campaign.py`, a few times each: nothing is lost, nothing wrong gets in."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import fault_campaign  # noqa: E402
import fault_injection  # noqa: E402
import fault_table  # noqa: E402
import tiny  # noqa: E402
from fault_trials import KINDS, Workload  # noqa: E402

# Trials that start the command again and those that need not, which take no time.
STARTED = [kind for kind in KINDS if ":" not in kind]
QUICK = [kind for kind in KINDS if ":" in kind]
OFTEN = {"full disk": 2}


@pytest.fixture(scope="module")
def work() -> Workload:
    """The undisturbed run."""
    return Workload.make(tiny.scratch() / "faults", compile_first=False)


@pytest.fixture(autouse=True)
def without_leftovers(work: Workload) -> Iterator[None]:
    """Every trial begins with the folders that it makes."""
    before = set(work.folder.iterdir())
    yield
    for path in set(work.folder.iterdir()) - before - {work.folder / "half"}:
        shutil.rmtree(path)


def check(work: Workload, kind: str, number: int) -> None:
    """Runs a trial: no step that was saved is lost, no state is wrong, and the run says what it promises to say."""
    trial = fault_campaign.run(work, kind, number, seed=1)
    assert trial["lost"] == 0 and not fault_table.is_wrong(trial) and trial["as_promised"], trial


@pytest.mark.parametrize("kind", QUICK)
def test_damaged_files_are_noticed_and_the_others_are_what_they_were(work: Workload, kind: str) -> None:
    for number in range(3):
        check(work, kind, number)


def test_a_kill_at_a_random_moment_costs_nothing_that_was_saved(work: Workload) -> None:
    check(work, "SIGKILL", 5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "number"), [(kind, number) for kind in STARTED for number in range(OFTEN.get(kind, 1))]
)
def test_every_fault_ends_as_the_undisturbed_run(work: Workload, kind: str, number: int) -> None:
    if kind == "full disk" and not fault_injection.can_mount():
        pytest.skip("file systems may not be mounted here")
    if kind == "read-only folders" and not fault_injection.can_drop_privileges():
        pytest.skip("root may write everywhere, and there is no setpriv")
    check(work, kind, number)


def test_the_table_counts_what_was_lost_or_wrong() -> None:
    good = {"phase": "train", "lost": 0, "differences": [], "as_promised": True}
    trials = {
        "SIGKILL": {"0": good, "1": {**good, "phase": "save"}, "2": {**good, "lost": 4}},
        "rounds: deleted": {"0": {"lost": 0, "wrong": False, "as_promised": True}},
        "rounds: a bit": {str(number): {"lost": 0, "wrong": False, "as_promised": True} for number in range(2)},
        "full disk": {"0": {**good, "differences": ["checkpoint 8"], "as_promised": False}},
    }
    assert list(fault_table.rows(trials)) == [
        ("SIGKILL", "3", "train 2, save 1", "4", "0", "3 of 3", "3 of 3"),
        ("rounds", "3", "a bit 2, deleted 1", "0", "0", "", "3 of 3"),
        ("full disk", "1", "train 1", "0", "1", "0 of 1", "0 of 1"),
        ("**all**", "7", "", "4", "1", "3 of 4", "6 of 7"),
    ]


def test_a_campaign_goes_on_where_it_was_stopped(work: Workload, tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    kinds, where = ["rounds: a bit", "prepared data: emptied"], ["--folder", str(work.folder), "--output", str(output)]
    for trials in ("1", "2"):
        fault_campaign.main(["--kinds", *kinds, "--trials", trials, *where])
        found = json.loads(output.read_text())["trials"]
        assert {kind: sorted(of_kind) for kind, of_kind in found.items()} == {
            kind: [str(number) for number in range(int(trials))] for kind in kinds
        }
        if trials == "1":
            first = found
    assert all(found[kind]["0"] == first[kind]["0"] for kind in kinds)
