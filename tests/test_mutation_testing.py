"""Mutants differ from their module in one place that matters, and what the tests miss is told."""

import json
import sys
from pathlib import Path

import pytest

from ssl_jax.errors import UserError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

pytest.importorskip("cosmic_ray", reason="needs the extra mutation")

import mutants  # noqa: E402
import mutation_testing  # noqa: E402

pytestmark = pytest.mark.slow

SOURCE = '''\
"""Numbers 1 + 1."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import decimal


def total(prices: list[int] | None, *, limit: int | None = None) -> int | decimal.Decimal:
    """No more than the limit; 0 - 0 is nothing."""
    added = sum(prices or [])
    return added if limit is None or added < limit else limit


def unused(price):
    return price - 7
'''

TESTS = """
from ssl_jax.prices import total


def test_a_total_is_a_sum():
    assert total([1, 2]) == 3


def test_a_total_is_limited():
    assert total([1, 2], limit=2) == 2
"""

MORE_TESTS = """

def test_nothing_and_limits_that_are_met_or_far():
    assert total(None) == 0
    assert [total([2, 2], limit=limit) for limit in (3, 4, 9)] == [3, 4, 4]
"""


def test_a_place_has_one_mutant_and_annotations_and_signatures_none():
    drawn = mutants.draw(SOURCE, limit=100, seed=0)
    places = [(mutant.line, mutant.column) for mutant in drawn.mutants]
    assert len(set(places)) == drawn.places == len(places)
    # `or`, the condition, `is`, `or`, `<`; minus and 7.
    assert [line for line, _ in places] == [13, 14, 14, 14, 14, 18, 18]
    for mutant in drawn.mutants:
        changed = [
            (old.strip(), new.strip())
            for old, new in zip(SOURCE.splitlines(), mutant.source.splitlines(), strict=True)
            if old != new
        ]
        assert changed == [(mutant.before, mutant.after)]


def test_a_smaller_sample_is_part_of_a_larger_one_and_follows_the_seed():
    def keys(limit, seed):
        return {mutant.key for mutant in mutants.draw(SOURCE, limit=limit, seed=seed).mutants}

    assert keys(3, 0) < keys(5, 0) < keys(7, 0)
    assert len({frozenset(keys(7, seed)) for seed in range(5)}) > 1


def test_functions_are_chosen_and_left_out_by_name():
    within = mutants.draw(SOURCE, limit=100, seed=0, only=("unused",))
    without = mutants.draw(SOURCE, limit=100, seed=0, without=("unused",))
    assert {mutant.line for mutant in within.mutants} == {18}
    assert {mutant.line for mutant in without.mutants} == {13, 14}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A package of one module, a test file for it, and no reasons."""
    root = tmp_path / "project"
    for name, content in {
        "ssl_jax/__init__.py": "",
        "ssl_jax/prices.py": SOURCE,
        "tests/test_prices.py": TESTS,
        "benchmarks/mutation_child.py": (BENCHMARKS / "mutation_child.py").read_text(),
        "benchmarks/equivalent_mutants.json": "[]",
        "pyproject.toml": "[tool.pytest.ini_options]\npythonpath = ['.']\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    target = mutation_testing.Target("prices", ("tests/test_prices.py",), without={"unused": "nobody calls it"})
    monkeypatch.setattr(mutation_testing, "ROOT", root)
    monkeypatch.setattr(mutation_testing, "REASONS", root / "benchmarks" / "equivalent_mutants.json")
    monkeypatch.setattr(mutation_testing, "TARGETS", {"ssl_jax/prices.py": target})
    return root


def run(project, *options):
    output = project / "result.json"
    mutation_testing.main(["--modules", "ssl_jax/prices.py", "--output", str(output), "--seed", "1", *options])
    return json.loads(output.read_text())["ssl_jax/prices.py"]


def test_what_tests_miss_is_told_and_tested_again_when_asked(project, capsys):
    first = run(project)
    assert (first["places"], first["tested"]) == (5, 5)
    missed = {row["after"] for row in first["survivors"]}
    assert 0 < len(missed) < 5 and first["killed"] == 5 - len(missed)
    told = capsys.readouterr().out
    assert all(after in told for after in missed)

    assert run(project)["outcomes"] == first["outcomes"]
    assert "ssl_jax/prices.py 1/" not in capsys.readouterr().out, "what is known is not tested again"

    (project / "tests" / "test_prices.py").write_text(TESTS + MORE_TESTS)
    second = run(project, "--again", "survived")
    assert first["killed"] < second["killed"]
    assert f"ssl_jax/prices.py {len(missed)}/{len(missed)} " in capsys.readouterr().out


def test_what_tests_share_sees_the_mutant_too(project):
    first = run(project)
    (project / "result.json").unlink()
    (project / "tests" / "conftest.py").write_text("")  # which is found before the tests, and its folder with it
    (project / "tests" / "shop.py").write_text("from ssl_jax.prices import total\n")
    (project / "tests" / "test_prices.py").write_text(TESTS.replace("ssl_jax.prices", "shop"))
    assert run(project)["outcomes"] == first["outcomes"]


def test_a_reason_is_told_from_no_reason(project):
    survivor, *others = run(project)["survivors"]
    reason = {"module": "ssl_jax/prices.py", "reason": "an example", **{k: survivor[k] for k in ("before", "after")}}
    (project / "benchmarks" / "equivalent_mutants.json").write_text(json.dumps([reason]))
    explained = run(project)["survivors"]
    assert [row["reason"] for row in explained] == ["an example", *[None for _ in others]]


def test_tests_that_fail_without_a_mutant_end_the_run(project):
    (project / "tests" / "test_prices.py").write_text(TESTS.replace("== 3", "== 4"))
    with pytest.raises(UserError, match=r"the tests fail on the module as it is: tests/test_prices\.py"):
        run(project)


def test_an_endless_mutant_is_a_killed_one(project):
    (project / "ssl_jax" / "prices.py").write_text(
        "def countdown(number):\n    while number:\n        number -= 1\n    return number\n"
    )
    (project / "tests" / "test_prices.py").write_text(
        "from ssl_jax.prices import countdown\n\n\ndef test_it_ends():\n    assert countdown(3) == 0\n"
    )
    result = run(project, "--seconds", "3")
    assert result["tested"] == result["killed"] == 2
    assert result["timeouts"] == 1
