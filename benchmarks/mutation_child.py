"""A process that runs test files against one version of a module after the other, without starting over.

    python benchmarks/mutation_child.py COPY MODULE TEST…

`COPY` is a copy of the project that may be changed; `MODULE` is the path of the module in it. It first runs the tests
as they are, and learns what they import. Then, for every line of standard input, JSON `{"source", "seconds"}`, it puts
the source in the module's place and forks, test file by test file until one fails. How the tests ended is a line of
standard output, as for the first run: `passed`, `failed` or `timeout`. Seconds are those of the processor, so that a
busy machine does not decide; one that only sleeps gets ten times as many.

A fork has pytest, JAX and all that does not depend on the module loaded, and shares with the others what XLA compiled.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import json
import math
import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

MEMORY_BYTES = 12 * 2**30
"""Address space of a fork: a mutant may ask for anything."""

FIRST_SECONDS = 600.0
"""For the tests as they are, which compile all that later ones find compiled."""


def main() -> None:
    """Serves until standard input ends."""
    import hypothesis
    import pytest

    copy, module, tests = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    # Where a test fails at all is enough to know; the smallest example of it takes long to find.
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    # And that it is slow says nothing, on a machine that does other things, too.
    slow = (hypothesis.HealthCheck.too_slow,)
    hypothesis.settings.register_profile(
        "mutants", phases=phases, suppress_health_check=slow, deadline=None, database=None, derandomize=True
    )
    hypothesis.settings.load_profile("mutants")
    options = ["-x", "-q", "-s", "-n", "0", "-p", "no:cacheprovider", "--tb=short", f"--basetemp={copy / 'temporary'}"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # Hypothesis is loaded already
    server = Server(copy, module, tests, answers)
    status = pytest.main([*options, *tests], plugins=[server])
    sys.stdout.flush()
    os._exit(status)  # of a fork


class Server:
    """What of pytest comes once is over when it begins to collect: there it forks."""

    def __init__(self, copy: Path, module: str, tests: list[str], answers: Any) -> None:
        """Does nothing yet.

        Args:
          copy: of the project.
          module: path of the module in it.
          tests: files or tests.
          answers: stream of text.
        """
        self._copy, self._module, self._tests, self._answers = copy, module, tests, answers
        self._notes = copy / "notes.json"
        self._imported: set[str] = set()
        self._seconds: dict[str, float] = {}
        self._kills: Counter[str] = Counter()

    def pytest_collection(self, session: Any) -> None:
        """Returns in every fork, and never in the process itself."""
        quiet = False
        seconds = FIRST_SECONDS
        while True:
            answer = "passed"
            for test in self._tests:
                child = os.fork()
                if child == 0:
                    _confine(seconds, quiet)
                    session.config.args = [test]
                    return
                answer = _outcome(child, seconds)
                self._learn(answer, is_first=not quiet)
                if answer != "passed":
                    break
            if not quiet:
                _load(self._imported, self._copy, self._module)
                quiet = True
            print(answer, file=self._answers, flush=True)
            line = sys.stdin.readline()
            if not line:
                os._exit(0)
            request = json.loads(line)
            seconds = request["seconds"]
            _put(self._copy / self._module, request["source"])

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Tests that have killed most come first, then those that take least time."""
        items.sort(key=lambda item: (-self._kills[item.nodeid], self._seconds.get(item.nodeid, 0.0)))

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Notes how long a test takes, and whether it fails."""
        self._seconds[report.nodeid] = self._seconds.get(report.nodeid, 0.0) + report.duration
        self._kills[report.nodeid] += report.failed

    def pytest_sessionfinish(self) -> None:
        """Leaves the notes of a fork to the process."""
        notes = {"imported": sorted(sys.modules), "seconds": self._seconds, "kills": self._kills}
        self._notes.write_text(json.dumps(notes), encoding="utf-8")

    def _learn(self, answer: str, *, is_first: bool) -> None:
        """Reads a fork's notes; one that was ended left none."""
        if not self._notes.exists():
            return
        notes = json.loads(self._notes.read_text(encoding="utf-8"))
        self._notes.unlink()
        if is_first:
            self._imported.update(notes["imported"])
            self._seconds.update(notes["seconds"])
        elif answer == "failed":
            self._kills = Counter(notes["kills"])


def _load(names: Collection[str], copy: Path, module: str) -> None:
    """Imports what tests need, but for what they test and what depends on it."""
    stale = _dependents(copy, module.removesuffix(".py").replace("/", "."))
    # What tests share may import anything, and they import it anew.
    ours = {path.stem for folder in ("tests", "tests/faults", "benchmarks") for path in (copy / folder).glob("*.py")}
    for name in sorted(names):
        top = name.split(".")[0]
        if name not in stale and top not in ours and top != "tests" and not top.startswith("__"):
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    if loaded := stale.intersection(sys.modules):
        raise RuntimeError(f"loaded before the mutants: {', '.join(sorted(loaded))}")


def _dependents(copy: Path, module: str) -> set[str]:
    """Names of the module and of all in its package that import it, directly or not."""
    imports: dict[str, set[str]] = {}
    for path in copy.glob(f"{module.split('.')[0]}/**/*.py"):
        name = ".".join(path.relative_to(copy).with_suffix("").parts).removesuffix(".__init__")
        found: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
        # A module's packages are imported before it.
        parts = name.split(".")
        imports[name] = found | {".".join(parts[:end]) for end in range(1, len(parts))}
    stale = {module}
    while more := {name for name, found in imports.items() if found & stale} - stale:
        stale |= more
    return stale


def _put(path: Path, source: str) -> None:
    """A file of that content, which no compiled file can be taken for."""
    path.write_text(source, encoding="utf-8")
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        compiled.unlink()


def _confine(seconds: float, quiet: bool) -> None:
    os.setpgid(0, 0)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), math.ceil(seconds) + 5))
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2) if quiet else (0,):
        os.dup2(nothing, descriptor)


def _outcome(child: int, seconds: float) -> str:
    """How a fork ends, which is not waited for longer than it may take."""
    ends = time.monotonic() + 10 * seconds
    pause = 0.01
    while time.monotonic() < ends:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            _end_group(child)
            if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
                return "timeout"
            return "passed" if status == 0 else "failed"
        time.sleep(pause)
        pause = min(2 * pause, 0.2)
    _end_group(child)
    os.waitpid(child, 0)
    return "timeout"


def _end_group(child: int) -> None:
    """With the processes that tests started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)


if __name__ == "__main__":
    main()
