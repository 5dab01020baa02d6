"""The audit of pinned packages finds what is known about them, and lets a build pass where nobody can be asked."""

from __future__ import annotations

import datetime
import http.server
import importlib.util
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

SCRIPT = tiny.ROOT / ".ci" / "audit.py"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="an archive of sources, without the scripts of the build")
TOMORROW = datetime.date.today() + datetime.timedelta(days=1)
YESTERDAY = datetime.date.today() - datetime.timedelta(days=1)


@pytest.fixture
def audit() -> Any:
    spec = importlib.util.spec_from_file_location("audit", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def osv() -> Iterator[Callable[[Callable[[Any], Any]], str]]:
    """A server that answers as it is told; gives its address."""
    servers = []

    def serve(answer: Callable[[Any], Any]) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(answer(asked)).encode())

            def log_message(self, format: str, *args: Any) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def vulnerable(name: str, *ids: str) -> Callable[[Any], Any]:
    """OSV's answer where one package has advisories."""

    def answer(asked: Any) -> Any:
        return {
            "results": [
                {"vulns": [{"id": id} for id in ids]} if query["package"]["name"] == name else {}
                for query in asked["queries"]
            ]
        }

    return answer


def constraints(folder: Path, *lines: str) -> str:
    (folder / "constraints.txt").write_text("\n".join(("# pins", "nobody_has.this==1.0", *lines)))
    return str(folder / "constraints.txt")


def accepted(folder: Path, *entries: str) -> str:
    (folder / "audit.toml").write_text("\n".join(f"[[accepted]]\n{entry}" for entry in entries))
    return str(folder / "audit.toml")


def test_a_known_vulnerability_fails_the_build(audit: Any, osv: Any, tmp_path: Path, capsys: Any) -> None:
    pins = constraints(tmp_path)
    assert audit.main(["--service", osv(vulnerable("other", "GHSA-1")), pins]) == 0
    assert audit.main(["--service", osv(vulnerable("nobody-has-this", "GHSA-1", "PYSEC-2")), pins]) == 1
    told = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in told] == ["nobody-has-this 1.0: GHSA-1", "nobody-has-this 1.0: PYSEC-2"]


@pytest.mark.parametrize(("until", "code"), [(TOMORROW, 0), (YESTERDAY, 1)])
def test_what_is_accepted_passes_until_its_day(
    audit: Any, osv: Any, tmp_path: Path, until: datetime.date, code: int
) -> None:
    known = accepted(tmp_path, f'id = "GHSA-1"\nreason = "never called"\nuntil = {until}')
    service = osv(vulnerable("nobody-has-this", "GHSA-1"))
    assert audit.main(["--service", service, "--accepted", known, constraints(tmp_path)]) == code


@pytest.mark.parametrize("entry", ['id = "A"\nreason = "b"', f'id = "A"\nuntil = {TOMORROW}\nreason = " "'])
def test_nothing_is_accepted_without_a_reason_and_a_day(audit: Any, tmp_path: Path, entry: str) -> None:
    with pytest.raises(ValueError, match="needs an id, a reason and a date"):
        audit.read_accepted(Path(accepted(tmp_path, entry)), datetime.date.today())


@pytest.mark.parametrize("answer", [[], {"results": []}, {"message": "not found"}], ids=str)
def test_an_answer_of_somebody_else_is_no_audit(audit: Any, osv: Any, tmp_path: Path, capsys: Any, answer: Any) -> None:
    assert audit.main(["--service", osv(lambda _: answer), constraints(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("vulnerabilities: skipped, ")


def test_a_service_out_of_reach_costs_a_line_and_little_time(audit: Any, tmp_path: Path, capsys: Any) -> None:
    with socket.socket() as silent:  # takes connections and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        before = time.monotonic()
        service = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        assert audit.main(["--timeout", "0.5", "--service", service, constraints(tmp_path)]) == 0
        assert time.monotonic() - before < 10
    assert audit.main(["--service", service, constraints(tmp_path)]) == 0  # nobody listens
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2 and all("skipped" in line and "cannot be reached" in line for line in out)
    assert audit.TIMEOUT_SECONDS <= 20


@pytest.mark.parametrize("line", ["git+https://example.org/a", "a @ https://example.org/a.whl", "-e .", "a>=1", "a==*"])
def test_only_versions_of_the_index_are_pins(audit: Any, tmp_path: Path, line: str) -> None:
    with pytest.raises(ValueError, match=r"constraints\.txt:3: .* is not name==version"):
        audit.read_pins(Path(constraints(tmp_path, line)))


def test_what_is_installed_is_what_is_pinned(audit: Any, tmp_path: Path, capsys: Any, osv: Any) -> None:
    service = osv(lambda asked: {"results": [{} for _ in asked["queries"]]})
    assert audit.main(["--service", service, constraints(tmp_path, f"pytest=={pytest.__version__}")]) == 0
    assert audit.main(["--service", service, constraints(tmp_path, "pytest==0.1")]) == 1
    assert f"pytest 0.1 is pinned, {pytest.__version__} is installed" in capsys.readouterr().err


def test_all_that_is_pinned_fits_into_one_request(audit: Any) -> None:
    pins = {pin for name in ("constraints.txt", "constraints-beam.txt") for pin in audit.read_pins(tiny.ROOT / name)}
    assert 100 < len(pins) < audit.MAX_QUERIES
