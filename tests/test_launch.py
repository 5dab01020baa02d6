"""launch/until_done.sh runs a preempted training again and passes every other end on."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "launch" / "until_done.sh"

# A stand-in for `python` that notes its arguments and ends with the next of the given codes.
FAKE_PYTHON = """#!/usr/bin/env bash
echo "$@" >> "$0.calls"
trap 'exit 75' TERM
if [[ "{codes}" == hang ]]; then touch "$0.started"; while true; do sleep 0.05; done; fi
codes=({codes})
exit "${{codes[$(($(wc -l < "$0.calls") - 1))]}}"
"""


def start(folder: Path, codes: str) -> subprocess.Popen:
    python = folder / "python"
    python.write_text(FAKE_PYTHON.format(codes=codes), encoding="utf-8")
    python.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.Popen([str(SCRIPT), "--config", "a b.yaml"], env=environment, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize(("codes", "end", "calls"), [("0", 0, 1), ("75 0", 0, 2), ("75 3", 3, 2), ("2", 2, 1)])
def test_a_preempted_run_goes_on_and_any_other_end_is_passed_on(
    tmp_path: Path, codes: str, end: int, calls: int
) -> None:
    assert start(tmp_path, codes).wait(timeout=20) == end
    lines = (tmp_path / "python.calls").read_text(encoding="utf-8").splitlines()
    assert lines == ["-m ssl_jax.train --config a b.yaml"] * calls


def test_a_signal_is_passed_on_and_nothing_is_started_again(tmp_path: Path) -> None:
    process = start(tmp_path, "hang")
    for _ in range(200):
        if (tmp_path / "python.started").exists():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 75
    assert len((tmp_path / "python.calls").read_text(encoding="utf-8").splitlines()) == 1
