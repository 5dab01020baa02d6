"""Chat templates rendered in a process of their own, with little time and memory.

A template is a program of whoever made the tokenizer. transformers renders it in Jinja's sandbox, which keeps it away
from Python and files, but not from a loop without end or a text without bounds. So it runs in a child that the
operating system ends after `_SECONDS`, and that gets no more than `_MEMORY_BYTES`. It never sees a user's text.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import IO, Any

# A template of a known model takes a millisecond and less than a megabyte; the largest have 20 kB.
_SECONDS = 10
_MEMORY_BYTES = 2**29
_SOURCE_CHARACTERS = 2**20
_TEXT_CHARACTERS = 2**24


class RenderError(Exception):
    """The template failed, refused what it was given, or took more than it may."""


def render(
    source: str, messages: Sequence[Mapping[str, str]], *, prompt: bool, blocks: bool, variables: Mapping[str, Any]
) -> tuple[str, list[tuple[int, int]]]:
    """The text that a template makes of messages.

    Args:
      source: the Jinja template.
      messages: `role` and `content` of every turn.
      prompt: whether a reply is to follow.
      blocks: whether the template has `{% generation %}` blocks.
      variables: what else it may write.

    Returns:
      The text, and where in it those blocks lie.

    Raises:
      RenderError: see there.
    """
    if len(source) > _SOURCE_CHARACTERS:
        raise RenderError(f"it has {len(source)} characters, more than {_SOURCE_CHARACTERS}")
    answer = _child.ask([source, list(messages), prompt, blocks, dict(variables), _SECONDS])
    if isinstance(answer, str):
        raise RenderError(answer)
    text, found = answer
    return text, [(start, stop) for start, stop in found]


class _Child:
    """The process, which is started when it is first needed, and again after it was ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: Any) -> Any:
        with self._lock:
            process = self._process = self._process or _start()
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
            if answer := process.stdout.readline():
                return json.loads(answer)
            self._end()
            return f"it was ended, having taken {_SECONDS} seconds, or failed for lack of memory"

    def end(self) -> None:
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _start() -> subprocess.Popen[bytes]:
    # The packages that are found here, and none (-P) that only lie in the current folder.
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=variables
    )


_child = _Child()
atexit.register(_child.end)


def _serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answers requests until there are no more: a line with `[text, blocks]`, or with what went wrong."""
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_memory()
    for line in requests:
        source, messages, prompt, blocks, variables, seconds = json.loads(line)
        signal.alarm(seconds)  # nobody handles it, so it ends the process, whatever the template does
        try:
            texts, found = render_jinja_template(
                [messages],
                chat_template=source,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=blocks,
                **variables,
            )
            answer: Any = [texts[0], found[0] if blocks else []]
            if len(texts[0]) > _TEXT_CHARACTERS:
                answer = f"it writes {len(texts[0])} characters"
        except Exception as error:  # of a stranger's program: any
            answer = " ".join(str(error).split())[:300] or type(error).__name__
        signal.alarm(0)
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def _limit_memory() -> None:
    with contextlib.suppress(OSError, ValueError):  # there is no such limit everywhere
        with open("/proc/self/statm") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + _MEMORY_BYTES, taken + _MEMORY_BYTES))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asks decides
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    _serve(sys.stdin.buffer, sys.stdout.buffer)
