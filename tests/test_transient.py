"""A bucket that fails now and then is asked again, one that refuses is not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import buckets
import pytest
from flaky import Flaky

from ssl_jax import storage

ROOT = Path(__file__).parent.parent

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

# Checkpoints go to the bucket by TensorStore and by fsspec, everything else by fsspec alone.
PROGRAM = """
import sys
import jax, numpy as np
from ssl_jax import storage
from ssl_jax.checkpoint import Checkpoints
url = sys.argv[1]
place = storage.place(url)
place.check_writable()
for number in range(4):
    (place.local / f"{number}.txt").write_text(str(number))
    place.push()
checkpoints = Checkpoints(place.path("checkpoints"), save_total_limit=1)
items = {"state": {"w": np.arange(1 << 16, dtype=np.float32)}}
for step in (1, 2):
    checkpoints.save(step, items, {"step": step})
checkpoints.close()
other = Checkpoints(place.path("checkpoints"))
assert other.newest() == 2 and other.steps() == [2]
shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), items)
assert (np.asarray(other.restore(2, shapes)["state"]["w"]) == items["state"]["w"]).all()
place.pull()
assert (place.local / "3.txt").read_text() == "3"
print("all is there")
"""
REFUSED = """
import sys
import numpy as np
from ssl_jax import storage
from ssl_jax.checkpoint import Checkpoints
from ssl_jax.errors import UserError
place = storage.place(sys.argv[1])
checkpoints = Checkpoints(place.path("checkpoints"))
for attempt in (
    place.check_writable,
    place.pull,
    checkpoints.newest,
    lambda: (checkpoints.save(1, {"state": {"w": np.zeros(9)}}, {}), checkpoints.wait()),
):
    try:
        attempt()
    except UserError as error:
        print("refused:", str(error).splitlines()[0])
"""


def run(program: str, url: str, variables: dict[str, str], folder: Path) -> tuple[str, float]:
    """What a process prints, and how long it took (seconds)."""
    environment = {**os.environ, **variables, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder)}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program, url], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, time.monotonic() - started


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_requests_that_fail_now_and_then_are_made_again(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buckets.require(scheme)
    with buckets.serving(scheme, tmp_path / "log") as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        storage.filesystem.cache_clear()
        buckets.make_bucket(scheme)
        url = variables["STORAGE_EMULATOR_HOST" if scheme == "gs" else "AWS_ENDPOINT_URL"]
        with Flaky(url, every=5).serving() as flaky:
            printed, _ = run(
                PROGRAM, f"{scheme}://{buckets.BUCKET}/run", buckets.environment(scheme, flaky.address), tmp_path
            )
    assert printed == "all is there\n"
    assert min(flaky.failed["503"], flaky.failed["reset"]) > 5, flaky.failed


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_refusal_is_final(scheme: str, tmp_path: Path) -> None:
    """Who may not does not ask again and again: the run would only end later."""
    buckets.require(scheme)
    with Flaky("", every=0).serving() as server:
        url = f"{scheme}://{buckets.BUCKET}/run"
        printed, seconds = run(REFUSED, url, buckets.environment(scheme, server.address), tmp_path)
    lines = printed.splitlines()
    assert len(lines) == 4 and all(line.startswith("refused: ") for line in lines), printed
    assert max(server.asked.values()) <= 4, server.asked
    assert seconds < 60
