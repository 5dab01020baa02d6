"""Runs whose files are in a bucket: they end as on a disk, go on without the machine they began on, and fail early."""

from __future__ import annotations

import contextlib
import http.server
import json
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import buckets
import numpy as np
import processes
import pytest
import tiny

from ssl_jax import storage

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]


class Hosts:
    """Machines that share a bucket and nothing else; each has its own folder for copies."""

    def __init__(self, scheme: str, folder: Path, variables: dict[str, str]) -> None:
        self.folder, self.variables = folder, variables
        self.root = f"{scheme}://{buckets.BUCKET}"
        # What takes the path of a work directory takes its URL.
        self.workdir: Any = f"{self.root}/runs/{folder.name}"

    def write_config(self, **changes: Any) -> None:
        """The configuration of `tiny.finished`, with data, prepared data and work directory in the bucket."""
        store = storage.filesystem(self.root)
        if not store.exists(f"{self.root}/data/raw.jsonl"):
            for name in ("labeled", "raw", "prompts"):
                store.put_file(str(tiny.config_file().parent / f"{name}.jsonl"), f"{self.root}/data/{name}.jsonl")
        values = tiny.settings(self.folder)
        values["workdir"] = self.workdir
        values["data"] |= {
            "labeled": [{"path": f"{self.root}/data/lab*.jsonl"}],
            "unlabeled": [{"path": f"{self.root}/data/{name}.jsonl"} for name in ("raw", "prompts")],
            "prepared_dir": f"{self.root}/prepared",
        }
        for section, fields in changes.items():
            values[section] |= fields
        tiny.write_config(self.folder / "config.yaml", values)

    def train(self, count: int = 1) -> processes.Group:
        command = tiny.command("train", "--config", str(self.folder / "config.yaml"))
        return processes.Group(command, count, each=self.environments(count))

    def environments(self, count: int) -> dict[int, dict[str, str]]:
        return {number: {**self.variables, "XDG_CACHE_HOME": str(self.cache(number))} for number in range(count)}

    def cache(self, number: int) -> Path:
        return self.folder / f"host_{number}"

    def lose_disks(self) -> None:
        for folder in self.folder.glob("host_*"):
            shutil.rmtree(folder)

    def run(self, name: str, *arguments: str) -> processes.Ended:
        (ended,) = processes.run(tiny.command(name, *arguments), 1, each=self.environments(1))
        return ended

    def read(self, name: str) -> str:
        return storage.filesystem(self.root).cat_file(f"{self.workdir}/{name}").decode()

    def metrics(self) -> list[dict[str, Any]]:
        copy = self.folder / "metrics.jsonl"
        copy.write_text(self.read("metrics.jsonl"))
        return tiny.metrics(self.folder)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], dict[str, str]]]:
    """Starts the server of a scheme, once; this process is told of it too."""
    folder, started = tmp_path_factory.mktemp("servers"), dict[str, dict[str, str]]()
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))

        def start(scheme: str) -> dict[str, str]:
            if scheme not in started:
                buckets.require(scheme)
                started[scheme] = stack.enter_context(buckets.serving(scheme, folder / f"{scheme}.log"))
                for name, value in started[scheme].items():
                    patch.setenv(name, value)
                buckets.make_bucket(scheme)
            return started[scheme]

        yield start


@pytest.fixture
def google(servers: Callable[[str], dict[str, str]], tmp_path: Path) -> Hosts:
    return Hosts("gs", tmp_path, servers("gs"))


@pytest.fixture
def amazon(servers: Callable[[str], dict[str, str]], tmp_path: Path) -> Hosts:
    return Hosts("s3", tmp_path, servers("s3"))


def assert_ends_as_on_a_disk(there: Hosts) -> None:
    """An interrupted run whose machine is lost goes on elsewhere and ends as `tiny.finished`."""
    with there.train() as group:
        group.wait_for("step 7/")
        group.send(signal.SIGTERM, 0)
        (ended,) = group.end()
    assert ended.code == 75 and "run the same command to go on" in ended.stderr, ended.stderr
    there.lose_disks()
    with there.train() as group:
        (ended,) = group.end()
    assert ended.code == 0 and "going on from checkpoint" in ended.stderr, ended.stderr
    undisturbed = tiny.finished()
    assert tiny.stored_parameters(there.workdir, tiny.STEPS) == tiny.stored_parameters(undisturbed)
    assert there.metrics() == tiny.metrics(undisturbed)
    for name in ("samples.jsonl", "eval_test.json", "pseudo_labels/round_0/summary.json"):
        assert there.read(name) == (undisturbed / name).read_text(), name


def test_a_run_on_google_cloud_storage_ends_as_on_a_disk(google: Hosts) -> None:
    google.write_config()
    assert_ends_as_on_a_disk(google)


def test_a_run_on_s3_ends_as_on_a_disk(amazon: Hosts) -> None:
    amazon.write_config()
    assert_ends_as_on_a_disk(amazon)
    expected = json.loads(amazon.read("eval_test.json"))["metrics"]
    amazon.lose_disks()
    storage.filesystem(amazon.root).rm_file(f"{amazon.workdir}/eval_test.json")
    ended = amazon.run("evaluate", "--workdir", amazon.workdir)
    assert ended.code == 0, ended.stderr
    assert json.loads(amazon.read("eval_test.json"))["metrics"] == pytest.approx(expected)
    ended = amazon.run("generate", "--workdir", amazon.workdir, "--prompt", "is the lamp red?", "--json")
    assert ended.code == 0 and json.loads(ended.printed()[0])["tokens"] > 0, ended.stderr
    ended = amazon.run("export", "--workdir", amazon.workdir, "--output", str(amazon.folder / "exported"))
    assert ended.code == 0 and (amazon.folder / "exported" / "model.safetensors").is_file(), ended.stderr


def test_two_hosts_that_share_only_a_bucket_train_as_one(amazon: Hosts) -> None:
    """Interrupted in the round, and gone on with on other machines: the losses of one process with as many rows."""
    amazon.write_config(train={**tiny.settings(amazon.folder)["train"], "per_device_train_batch_size": 1})
    with amazon.train(2) as group:
        group.wait_for("pseudo-label: round 0")
        group.send(signal.SIGTERM, 1)
        ended = group.end()
    assert [one.code for one in ended] == [75, 75], ended[0].stderr
    amazon.lose_disks()
    with amazon.train(2) as group:
        ended = group.end()
    assert [one.code for one in ended] == [0, 0], ended[0].stderr
    assert [line for line in ended[1].printed()] == []
    losses, expected = (
        {line["step"]: line["loss"] for line in lines if "loss" in line}
        for lines in (amazon.metrics(), tiny.metrics(tiny.finished()))
    )
    assert losses.keys() == expected.keys()
    np.testing.assert_allclose(list(losses.values()), list(expected.values()), rtol=2e-5)
    copied = [path.relative_to(amazon.cache(1)).as_posix() for path in amazon.cache(1).rglob("*") if path.is_file()]
    assert any("round_0/labels" in name for name in copied) and not any("manifest.ocdbt" in name for name in copied)


class _Forbidding(http.server.BaseHTTPRequestHandler):
    """Refuses everything."""

    def refuse(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.dumps({"error": {"code": 403, "message": "tester may not do that"}}).encode()
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = refuse

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_bucket_without_permission_ends_all_hosts_with_one_message(scheme: str, tmp_path: Path) -> None:
    buckets.require(scheme)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Forbidding) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        there = Hosts(scheme, tmp_path, buckets.environment(scheme, f"http://127.0.0.1:{server.server_port}"))
        tiny.write_config(tmp_path / "config.yaml", {**tiny.settings(tmp_path), "workdir": there.workdir})
        with there.train(2) as group:
            ended = group.end(60)
        server.shutdown()
    assert [one.code for one in ended] == [2, 2], ended[0].stderr
    lines = [line for one in ended for line in one.said()]
    assert len(lines) == 1 and f"no permission to write {there.root}" in lines[0], lines


@pytest.mark.parametrize("field", ["workdir", "data.prepared_dir"])
def test_a_bucket_that_is_not_there_is_named_before_any_work(amazon: Hosts, field: str) -> None:
    amazon.write_config()
    command = ["--config", str(amazon.folder / "config.yaml"), f"--{field}", "s3://elsewhere/a"]
    ended = amazon.run("train", *command)
    assert ended.code == 2 and len(ended.said()) == 1, ended.stderr
    assert "there is no bucket s3://elsewhere" in ended.stderr and "make it, or correct the name" in ended.stderr
