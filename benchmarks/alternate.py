"""Contestants that work in turn: each in a process of its own, asleep while another one works.

A machine's speed drifts by tens of percent over minutes, and one process's caches and thread pools are no other's
business. So every contestant is started once, warms up, and then all of them take short turns; what is compared is the
ratio within a round. The parent's side is `Player` and `take_turns`, the child's is `Turns`. They talk in lines of JSON
through the child's standard input and output.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from ssl_jax.errors import UserError


class Player:
    """A contestant's process. As a context manager it ends with the context.

    Attributes:
      name: for messages.
      description: what the process said of itself when it was ready, `{}` before.
    """

    def __init__(self, name: str, command: Sequence[str], variables: Mapping[str, str]) -> None:
        """Starts the process.

        Args:
          name: for messages.
          command: program and arguments.
          variables: added to this process's environment.
        """
        self.name = name
        self.description: dict[str, Any] = {}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **variables}
        )

    def __enter__(self) -> Player:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()
        with self._process:  # the end of its input ends it
            pass

    def get_ready(self) -> None:
        """Waits until the process has nothing left to do but its turns.

        Raises:
          UserError: it ended instead.
        """
        self.description = self._read()

    def play(self, amount: int) -> dict[str, Any]:
        """One turn of `amount` units of work; returns what the process measured.

        Raises:
          UserError: it ended instead.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{amount}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._lost()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else self._lost()

    def _lost(self) -> Any:
        code = self._process.wait()
        raise UserError(f"{self.name}: its process ended with exit code {code}; what it said is above")


class Turns:
    """The child's side: `ready`, then `wait` and `answer` in alternation until `wait` gives None."""

    def __init__(self) -> None:
        """Takes over standard output: what libraries print goes to standard error from here on."""
        self._answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self._asleep_from = 0.0
        self._used_asleep = 0.0

    def ready(self, description: Mapping[str, Any]) -> None:
        """Says that the work can begin."""
        self._write(description)

    def wait(self) -> int | None:
        """Sleeps until it is this process's turn: how much to do, or None when there is no more."""
        line = sys.stdin.readline()
        self._used_asleep = time.process_time() - self._asleep_from
        return int(line) if line else None

    def answer(self, values: Mapping[str, Any]) -> None:
        """Ends the turn. `cpu_seconds_asleep` is added: what all threads used since the turn before."""
        self._write({**values, "cpu_seconds_asleep": self._used_asleep})

    def _write(self, values: Mapping[str, Any]) -> None:
        print(json.dumps(dict(values)), file=self._answers, flush=True)
        self._asleep_from = time.process_time()


def warm_up(players: Sequence[Player], amount: int) -> dict[str, float]:
    """Gets all players ready and through a turn that nobody counts; then the seconds that one unit of work takes."""
    for player in players:
        player.get_ready()
    take_turns(players, {player.name: amount for player in players}, 1)
    trial = take_turns(players, {player.name: 1 for player in players}, 1)
    return {name: answers[0]["seconds"] for name, answers in trial.items()}


def take_turns(players: Sequence[Player], amounts: Mapping[str, int], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Lets everyone work in turn.

    Args:
      players: in the order of their turns, one each in a round.
      amounts: units of work in a turn, by name.
      rounds: how often.

    Returns:
      The answers of every player by name, one a round.
    """
    answers: dict[str, list[dict[str, Any]]] = {player.name: [] for player in players}
    for _ in range(rounds):
        for player in players:
            answers[player.name].append(player.play(amounts[player.name]))
    return answers


def spread(values: Sequence[float]) -> dict[str, float]:
    """`median`, `min`, `lower_quartile`, `upper_quartile` and `max`."""
    quartiles = statistics.quantiles(values, method="inclusive") if len(values) > 1 else [values[0]] * 3
    names = ("min", "lower_quartile", "median", "upper_quartile", "max")
    return dict(zip(names, (min(values), *quartiles, max(values)), strict=True))
