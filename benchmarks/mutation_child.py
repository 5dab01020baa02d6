"""A process that runs test files against one version of a module after the other, without loading libraries again.

    python benchmarks/mutation_child.py COPY MODULE

`COPY` is a copy of the project that may be changed; `MODULE` is the path of the module in it. For every line of
standard input, JSON `{"source", "tests", "seconds"}`, it puts the source in the module's place, forks, and writes how
the tests ended as a line of standard output: `passed`, `failed` or `timeout`. A fork has JAX and all other libraries
loaded, but nothing of `ssl_jax`, and shares with the others what XLA compiled.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

MEMORY_BYTES = 12 * 2**30
"""Address space of a fork: a mutant may ask for anything."""


def main() -> None:
    """Serves until standard input ends."""
    copy, module = Path(sys.argv[1]), sys.argv[2]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    _load(module)
    for line in sys.stdin:
        request = json.loads(line)
        _put(copy / module, request["source"])
        print(_run(request["tests"], request["seconds"], copy), file=answers, flush=True)


def _load(module: str) -> None:
    """Libraries, but for what is tested; the module is intact now."""
    import hypothesis
    import pytest

    # Where a test fails at all is enough to know; the smallest example of it takes long to find.
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    # And that it is slow says nothing, on a machine that does other things, too.
    slow = (hypothesis.HealthCheck.too_slow,)
    hypothesis.settings.register_profile(
        "mutants", phases=phases, suppress_health_check=slow, database=None, derandomize=True
    )
    hypothesis.settings.load_profile("mutants")
    importlib.import_module(module.removesuffix(".py").replace("/", "."))
    for name in [name for name in sys.modules if name.split(".")[0] == "ssl_jax"]:
        del sys.modules[name]
    del pytest


def _put(path: Path, source: str) -> None:
    """A file of that content, which no compiled file can be taken for."""
    path.write_text(source, encoding="utf-8")
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        compiled.unlink()


def _run(tests: list[str], seconds: float, copy: Path) -> str:
    child = os.fork()
    if child == 0:
        status = 2
        try:
            status = _test(tests, copy)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    ends = time.monotonic() + seconds
    pause = 0.01
    while time.monotonic() < ends:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            _end_group(child)
            return "passed" if status == 0 else "failed"
        time.sleep(pause)
        pause = min(2 * pause, 0.2)
    _end_group(child)
    os.waitpid(child, 0)
    return "timeout"


def _end_group(child: int) -> None:
    """With the processes that tests started."""
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        return


def _test(tests: list[str], copy: Path) -> int:
    import pytest

    os.setpgid(0, 0)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115 - until the process ends
    options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--tb=line", f"--basetemp={copy / 'temporary'}"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # Hypothesis is loaded already
    # One file after the other: what the first one finds spares loading the next.
    return next((status for test in tests if (status := int(pytest.main([*options, test])))), 0)


if __name__ == "__main__":
    main()
