"""Audits the pinned packages: they come from the index and are those installed; none has a known vulnerability.

Vulnerabilities are those of OSV (https://osv.dev), which holds PyPA's and GitHub's advisories, asked in one request.
Where it cannot be reached, a line says so and the audit passes. What is known and accepted is in audit.toml, each with
a reason and a last day. Exit codes: 0 passed or skipped, 1 something was found.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import re
import sys
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SERVICE = "https://api.osv.dev/v1/querybatch"
TIMEOUT_SECONDS = 15
MAX_QUERIES = 1000  # of one request, by OSV
_PIN = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9.!+_-]+)")
# A new virtual environment comes with them, in whatever version its Python brings.
_OF_THE_ENVIRONMENT = {"pip", "setuptools"}


class Unreachable(Exception):
    """OSV gave no answer, or none that is OSV's."""


def read_pins(file: Path) -> list[tuple[str, str]]:
    """Name and version of every package that a file of constraints pins.

    Raises:
      ValueError: a line is anything but `name==version`, such as a URL or a repository, which no audit knows.
    """
    pins = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        match = _PIN.fullmatch(line)
        if match is None:
            raise ValueError(f"{file.name}:{number}: {line!r} is not name==version")
        pins.append((re.sub(r"[-_.]+", "-", match[1]).lower(), match[2]))
    return pins


def strangers(pins: Sequence[tuple[str, str]]) -> Iterator[str]:
    """What is installed here in another version than the pinned one, or not from an index."""
    for name, version in pins:
        if name in _OF_THE_ENVIRONMENT:
            continue
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of an extra that is not installed
        if version not in (found.version, found.version.partition("+")[0]):  # as pip compares: +cpu is a build of it
            yield f"{name} {version} is pinned, {found.version} is installed"
        if found.read_text("direct_url.json"):
            yield f"{name} is installed from a folder or a URL, not from an index"


def vulnerabilities(pins: Sequence[tuple[str, str]], service: str, timeout: float) -> dict[str, list[str]]:
    """Identifiers of advisories by `name version`.

    Raises:
      Unreachable: see there.
    """
    if len(pins) > MAX_QUERIES:
        raise ValueError(f"{len(pins)} pins do not fit into one request of {MAX_QUERIES}")
    queries = [{"package": {"name": name, "ecosystem": "PyPI"}, "version": version} for name, version in pins]
    request = urllib.request.Request(
        service, json.dumps({"queries": queries}).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            answer = json.load(response)
    except (OSError, ValueError) as error:
        raise Unreachable(" ".join(str(error).split())) from None
    results = answer.get("results") if isinstance(answer, dict) else None
    if not isinstance(results, list) or len(results) != len(pins):
        raise Unreachable("the answer is not OSV's")
    return {
        f"{name} {version}": sorted(found["id"] for found in result["vulns"])
        for (name, version), result in zip(pins, results, strict=True)
        if result.get("vulns")
    }


def read_accepted(file: Path, today: datetime.date) -> dict[str, str]:
    """Reasons, by the identifier of an advisory, of those entries whose day has not passed.

    Raises:
      ValueError: an entry has no identifier, reason or day.
    """
    accepted = {}
    for entry in tomllib.loads(file.read_text(encoding="utf-8")).get("accepted", []):
        match entry:
            case {"id": str(id), "reason": str(reason), "until": datetime.date() as until} if id and reason.strip():
                if until >= today:
                    accepted[id] = reason
            case _:
                raise ValueError(f"{file.name}: {entry} needs an id, a reason and a date (until)")
    return accepted


def report(found: Mapping[str, Sequence[str]], accepted: Mapping[str, str]) -> Iterator[str]:
    """A line for every advisory that is not accepted."""
    for package, ids in found.items():
        for id in ids:
            if id not in accepted:
                yield f"{package}: {id}, see https://osv.dev/vulnerability/{id}"


def main(arguments: Sequence[str]) -> int:
    """Audits, says what it found, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--service", default=SERVICE, help="where OSV's querybatch is")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_SECONDS, help="seconds to wait for it")
    parser.add_argument("--accepted", type=Path, default=ROOT / ".ci" / "audit.toml", help="what is known and accepted")
    parser.add_argument("files", type=Path, nargs="*", help="files of constraints; the first is what is installed")
    options = parser.parse_args(arguments)
    files = options.files or [ROOT / "constraints.txt", ROOT / "constraints-beam.txt"]
    pins = [read_pins(file) for file in files]
    problems: list[Any] = list(strangers(pins[0]))
    together = sorted({pin for some in pins for pin in some})
    try:
        found = vulnerabilities(together, options.service, options.timeout)
        problems += report(found, read_accepted(options.accepted, datetime.date.today()))
        print(f"audited {len(together)} pinned packages: {len(problems)} problems")
    except Unreachable as error:
        print(f"vulnerabilities: skipped, {options.service} cannot be reached ({error})")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
