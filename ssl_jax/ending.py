"""Several processes end together: with one exit code, one message and within a minute, whatever happened to one.

A process that fails says so in the key-value store of JAX's coordination service before it ends; a thread in every
other process waits for that and ends it too, wherever its work hangs. A process that dies without a word is missed by
the coordination service's heartbeats, or sooner by whoever talks to it: then all that are left answer a call, and
process 0 knows who is gone. If it is process 0 itself, in which the service runs, everybody notices at once.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import dataclasses
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from ssl_jax.errors import Preempted

_END, _ANSWER, _VERDICT, _ALIVE = "ssl_jax/end", "ssl_jax/answer", "ssl_jax/verdict", "ssl_jax/alive"
_FOREVER_MILLISECONDS = 30 * 24 * 3600 * 1000
# Who does not answer for so long is gone.
_ANSWER_SECONDS = 10.0
# How long somebody who fails may take to say so after the connection to it broke, and process 0 to fail as others did.
_REASON_SECONDS = 2.0
# JAX reports a lost process with a page of its own, which should not come last.
_REPORT_SECONDS = 1.0
_LOOK_SECONDS = 1.0
# Less than JAX's own patience (half of its heartbeat timeout), after which it aborts.
_SILENCE_SECONDS = 12.0

# What collectives (Gloo, NCCL) and the coordination service say of a process that they do not reach.
_LOSS = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|socket closed|heartbeat|coordination.?service"
    r"|barrier (failed|timed out)",
    re.IGNORECASE,
)


def is_loss(error: BaseException) -> bool:
    """Whether an error says that another process is not reached; it does not say why."""
    return isinstance(error, RuntimeError | ValueError) and _LOSS.search(str(error)) is not None


@dataclasses.dataclass(frozen=True)
class End:
    """Why a run ends.

    Attributes:
      code: exit code of all processes.
      text: for people; empty where there is nothing to say.
      process: whose word this is.
      is_suspicion: another process may be gone, in which case that is the reason.
    """

    code: int
    text: str
    process: int
    is_suspicion: bool = False

    @classmethod
    def read(cls, text: str) -> End:
        """What `write` has written."""
        return cls(**json.loads(text))

    def write(self) -> str:
        """As a value of the key-value store."""
        return json.dumps(dataclasses.asdict(self))


class Watch:
    """Connects the end of this process with that of the others."""

    def __init__(self, client: Any, process: int, count: int) -> None:
        """Begins to watch.

        Args:
          client: JAX's connection to the coordination service.
          process: number of this process.
          count: of all of them.
        """
        self._client, self._process, self._count = client, process, count
        # Only one thread ends the process. Closing is the good end, and done when all have come to it.
        self._leaving, self._closing, self._closed = threading.Lock(), threading.Event(), threading.Event()
        self._heard = 0
        self._threads = [
            threading.Thread(target=watch, daemon=True)
            for watch in (self._watch_words, self._watch_silence, self._watch_lives)
        ]
        _make_aborts_wait()
        atexit.register(self._close)
        for thread in self._threads:
            thread.start()

    def end(self, code: int, text: str) -> NoReturn:
        """Ends all processes with this code, or with that of whoever was first. Process 0 prints the text."""
        self._leave(self._tell(End(code, text, self._process)))

    def end_for_error(self, error: BaseException, code: int) -> NoReturn:
        """Ends all processes for an error that another one's death may have caused, with this code if none is dead."""
        # Somebody who failed may be about to say so.
        time.sleep(_REASON_SECONDS)
        text = f"error: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self._leave(self._tell(End(code, text, self._process, is_suspicion=True)))

    def _tell(self, own: End) -> End:
        """Says why this process ends; returns the reason that counts: what was said first, by whichever process."""
        with contextlib.suppress(Exception):  # somebody was first, or process 0 is gone
            self._client.key_value_set(_END, own.write())
        try:
            first = End.read(self._client.key_value_try_get(_END))
        except Exception:
            return own
        # Where all fail alike, each has the words for it.
        return own if own.code == first.code and not own.is_suspicion and not first.is_suspicion else first

    def _watch_words(self) -> None:
        """Ends this process when another one has said why it ends, or nothing is heard of process 0 any more."""
        while not self._closed.wait(_LOOK_SECONDS):
            try:
                said = End.read(self._client.key_value_try_get(_END))
            except Exception as error:
                if "NOT_FOUND" in str(error):
                    self._heard += 1
                    continue
                # The thread that watches lives may know more; in process 0 it does.
                if not self._closing.wait(2 * _REPORT_SECONDS) and self._process != 0:
                    self._leave_the_dead([0])
                return
            if self._process == 0:
                time.sleep(_REASON_SECONDS)
            self._leave(said)

    def _watch_silence(self) -> None:
        """Ends this process when process 0 is silent although the connection to it stands: its machine hangs."""
        heard, looks = 0, 0
        # Looks are counted, not seconds: a process that was itself halted meanwhile has not waited for anybody.
        while looks * _LOOK_SECONDS < _SILENCE_SECONDS:
            if self._closing.wait(_LOOK_SECONDS):
                return
            heard, looks = self._heard, looks + 1 if heard == self._heard else 0
        self._leave_the_dead([0])

    def _watch_lives(self) -> None:
        """Ends this process when the coordination service misses another one."""
        # A barrier of all at which only this one ever arrives fails with the first that is lost.
        try:
            self._client.wait_at_barrier(f"{_ALIVE}/{self._process}", _FOREVER_MILLISECONDS, list(range(self._count)))
        except Exception as error:
            if not self._closing.wait(_REPORT_SECONDS):
                named = {int(number) for number in re.findall(r"[Tt]ask:? (\d+)", str(error))} - {self._process}
                self._leave_the_dead(sorted(named) if named or self._process == 0 else [0])

    def _leave_the_dead(self, dead: list[int]) -> NoReturn:
        """Ends this process; the others know what it knows, and JAX's connection to them may be stuck already."""
        self._leaving.acquire()
        self._exit(End(Preempted.exit_code, _obituary(dead, self._count), self._process))

    def _leave(self, why: End) -> NoReturn:
        """Prints what is to be printed, and ends this process without waiting for what it was doing."""
        # Whoever comes second waits for the process's end.
        self._leaving.acquire()
        self._exit(self._as_primary(why) if self._process == 0 else self._as_other(why))

    def _exit(self, why: End) -> NoReturn:
        if why.text:
            print(why.text, file=sys.stderr)
        for child in multiprocessing.active_children():
            child.kill()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(why.code)

    def _as_primary(self, why: End) -> End:
        """In process 0, which goes last: waits until the others go, finds who does not answer, decides."""
        silent = set(range(1, self._count))
        deadline = time.monotonic() + _ANSWER_SECONDS
        while silent and time.monotonic() < deadline:
            with contextlib.suppress(Exception):
                silent -= {int(key.rsplit("/", 1)[1]) for key, _ in self._client.key_value_dir_get(_ANSWER)}
            time.sleep(0.05)
        if why.is_suspicion:
            if silent:
                why = End(Preempted.exit_code, _obituary(sorted(silent), self._count), 0)
            with contextlib.suppress(Exception):
                self._client.key_value_set(_VERDICT, why.write())
            time.sleep(_REPORT_SECONDS)
        if why.process and why.text:
            why = dataclasses.replace(why, text=f"process {why.process} of {self._count} (numbered from 0): {why.text}")
        return why

    def _as_other(self, why: End) -> End:
        """In the other processes: tells process 0 that this one goes, and leaves the word to it if it is there."""

        def answer() -> None:
            self._client.key_value_set(f"{_ANSWER}/{self._process}", "")

        def verdict() -> End:
            return End.read(self._client.blocking_key_value_get(_VERDICT, int(2000 * _ANSWER_SECONDS)))

        try:
            _within(_ANSWER_SECONDS, answer)
            if why.is_suspicion:
                why = _within(2 * _ANSWER_SECONDS, verdict)
        except Exception:
            return End(Preempted.exit_code, _obituary([0], self._count), self._process) if why.is_suspicion else why
        return dataclasses.replace(why, text="")

    def _close(self) -> None:
        """At a good end: leaves the others when all of them are done."""
        self._closing.set()
        from jax import distributed

        # A process that is lost now has done its part.
        with contextlib.suppress(Exception):
            distributed.shutdown()
        self._closed.set()
        for thread in self._threads:
            thread.join(5)


def _within(seconds: float, work: Callable[[], Any]) -> Any:
    """What `work` returns; an exception if it raises one or takes longer."""
    results: list[Any] = []

    def do() -> None:
        with contextlib.suppress(Exception):
            results.append(work())

    thread = threading.Thread(target=do, daemon=True)
    thread.start()
    thread.join(seconds)
    if not results:
        raise TimeoutError
    return results[0]


def _obituary(dead: list[int], count: int) -> str:
    who = f"process {', '.join(map(str, dead))} of {count} (numbered from 0)" if dead else f"one of {count} processes"
    return (
        f"stopped: {who} is gone: killed, out of memory, or its machine or network failed; its log may say more\n"
        "run the same command again on all processes: the run goes on from its last checkpoint"
    )


def _make_aborts_wait() -> None:
    """Makes an abort of this process wait for six seconds.

    JAX aborts the process when process 0 or a heartbeat is lost, from a thread of its own, and its hook for another
    reaction cannot be written in Python (jaxlib 0.10: `std::bad_cast`). The C library's `sleep` as the handler of
    SIGABRT, whose argument is then the signal's number, gives the threads that watch time to say what happened and to
    end the process with the right code. Other aborts come to the same end as without it, later.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    libc.signal(int(signal.SIGABRT), ctypes.cast(libc.sleep, ctypes.c_void_p))
