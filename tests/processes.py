"""Several processes that form one run on this machine, as the hosts of a pod do."""

from __future__ import annotations

import dataclasses
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO

import tiny


@dataclasses.dataclass
class Ended:
    """A process that is over: its exit code, what it wrote, and when it ended (seconds of the monotonic clock)."""

    code: int
    stdout: str
    stderr: str
    at: float

    def said(self) -> list[str]:
        """All lines but those that Gloo writes of its own accord."""
        return self.printed() + _without_gloo(self.stderr)

    def printed(self) -> list[str]:
        """What of `said` is on stdout."""
        return _without_gloo(self.stdout)


def _without_gloo(text: str) -> list[str]:
    return [line for line in text.splitlines() if "[Gloo]" not in line]


class Group:
    """Processes `0 … n-1` of one run; a context manager that leaves none of them behind."""

    def __init__(
        self,
        command: Sequence[str],
        processes: int,
        devices: int = 1,
        *,
        each: Mapping[int, dict[str, str]] | None = None,
    ) -> None:
        """Starts them.

        Args:
          command: what every process runs.
          processes: how many.
          devices: of each process.
          each: variables of the environment of single processes.
        """
        address = free_address()
        cluster = {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_COORDINATOR_BIND_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(processes),
        }
        self._members = [
            _Member(
                command,
                {
                    **tiny.environment(),
                    "JAX_NUM_CPU_DEVICES": str(devices),
                    **({**cluster, "JAX_PROCESS_ID": str(number)} if processes > 1 else {}),
                    **(each or {}).get(number, {}),
                },
            )
            for number in range(processes)
        ]

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        for member in self._members:
            member.process.kill()
        for member in self._members:
            member.end(60)

    def wait_for(self, text: str, process: int = 0) -> None:
        """Returns when a process has written a line that begins with `text`."""
        member = self._members[process]
        deadline = time.monotonic() + 120
        while not any(line.startswith(text) for line in list(member.stderr)):
            assert time.monotonic() < deadline and member.process.poll() is None, "".join(member.stderr)
            time.sleep(0.002)

    def send(self, number: signal.Signals, process: int) -> float:
        """Sends a signal to one of them; returns when."""
        self._members[process].process.send_signal(number)
        return time.monotonic()

    def end(self, seconds: float = 240) -> list[Ended]:
        """All processes, when they have ended by themselves."""
        deadline = time.monotonic() + seconds
        return [member.end(deadline - time.monotonic()) for member in self._members]


class _Member:
    """One process, whose output is read while it runs."""

    def __init__(self, command: Sequence[str], variables: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            command, env=variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.stdout: list[str] = []
        self.stderr: list[str] = []
        self._ended_at = 0.0
        self._threads = [
            threading.Thread(target=self._read, args=pair, daemon=True)
            for pair in ((self.process.stdout, self.stdout), (self.process.stderr, self.stderr))
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, stream: IO[str], lines: list[str]) -> None:
        with stream:
            for line in stream:
                lines.append(line)
        self.process.wait()
        self._ended_at = time.monotonic()

    def end(self, seconds: float) -> Ended:
        self.process.wait(seconds)
        for thread in self._threads:
            thread.join(10)
        return Ended(self.process.returncode, "".join(self.stdout), "".join(self.stderr), self._ended_at)


def run(
    command: Sequence[str], processes: int, devices: int = 1, *, each: Mapping[int, dict[str, str]] | None = None
) -> list[Ended]:
    """Runs a command in so many processes of so many devices each, all to their ends."""
    with Group(command, processes, devices, each=each) as group:
        return group.end()


def free_address() -> str:
    """Where a coordinator can listen."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"
