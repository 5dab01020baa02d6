"""A run that does not move says where it is, ever more rarely, until it moves again."""

import re
import time

import pytest

from ssl_jax.watchdog import Watchdog


def hang(seconds: float) -> None:
    time.sleep(seconds)


def test_a_phase_that_hangs_is_named_with_the_place_in_the_code() -> None:
    said: list[str] = []
    watchdog = Watchdog(0.1, said.append)
    with watchdog.watching():
        watchdog.moved("evaluate: likelihood")
        hang(0.35)
    # After 0.1 s, then after twice as long.
    assert len(said) == 2
    assert re.match(
        r"warning: nothing has moved for 0 s in phase 'evaluate: likelihood': test_watchdog\.py:\d+ \(hang\)", said[0]
    )


def test_who_moves_hears_nothing() -> None:
    said: list[str] = []
    watchdog = Watchdog(0.3, said.append)
    with watchdog.watching():
        for _ in range(10):
            watchdog.moved("train")
            time.sleep(0.05)
    assert said == []


def test_after_a_move_patience_begins_anew() -> None:
    said: list[str] = []
    watchdog = Watchdog(0.1, said.append)
    with watchdog.watching():
        hang(0.15)
        watchdog.moved("train")
        hang(0.15)
    assert [("'start'" in line, "'train'" in line) for line in said] == [(True, False), (False, True)]


@pytest.mark.parametrize("turns", [1, 2])
def test_it_ends_with_its_context_and_can_be_used_again(turns: int) -> None:
    said: list[str] = []
    watchdog = Watchdog(0.05, said.append)
    for _ in range(turns):
        with watchdog.watching():
            pass
    time.sleep(0.2)
    assert said == []


def test_without_patience_nobody_watches() -> None:
    said: list[str] = []
    with Watchdog(0, said.append).watching():
        time.sleep(0.05)
    assert said == []
