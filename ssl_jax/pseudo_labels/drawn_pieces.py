"""Drawing in pieces that are kept, so that a round that is interrupted goes on where it was.

A piece is what a teacher drew for a fixed number of prompts. It is a JSON Lines file: a header that says what it was
drawn for, and the replies to one prompt a line. A reply depends on the number of its prompt and not on its piece, so a
round that was interrupted is the one that it would have been.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from ssl_jax import files
from ssl_jax.pseudo_labels import rounds
from ssl_jax.replies import Reply

PROMPTS_PER_PIECE = 256
# At the end of a piece, rows of the sampler wait for its last replies; this many batches make that a small part.
BATCHES_PER_PIECE = 16

DrawSome = Callable[[range], list[list[Reply]]]
"""Draws for the prompts of these numbers."""


def piece_size(batch_size: int, num_return_sequences: int) -> int:
    """Prompts of a piece: `PROMPTS_PER_PIECE` or more, in `BATCHES_PER_PIECE` whole batches of the sampler or more."""
    batch = max(1, batch_size // num_return_sequences)
    return max(-(-PROMPTS_PER_PIECE // batch), BATCHES_PER_PIECE) * batch


def draw(
    folder: Path, origin: Mapping[str, Any], total: int, size: int, draw_some: DrawSome
) -> tuple[list[list[Reply]], list[range]]:
    """Draws for `total` prompts, `size` at a time, but for those whose piece is in the folder.

    Every process draws the same, and the first one keeps it. A piece that was drawn for something else, or is not what
    was written, is drawn again.

    Args:
      folder: where pieces are kept; `rounds.write` is not concerned with it.
      origin: what decides the replies, as JSON values.
      total: number of prompts.
      size: prompts of a piece.
      draw_some: draws for some of them.

    Returns:
      The replies to every prompt, and the pieces that were not found.
    """
    pieces = [range(first, min(first + size, total)) for first in range(0, total, size)]
    paths = {piece: folder / f"piece-{piece.start:07d}.jsonl" for piece in pieces}
    found = {piece: replies for piece in pieces if (replies := _read(paths[piece], origin, piece)) is not None}
    # No process may change the folder while another one looks for what is there.
    rounds.wait_for_all(f"{folder.name} is read")
    drawn: list[list[Reply]] = []
    for piece in pieces:
        replies = found.get(piece)
        if replies is None:
            replies = draw_some(piece)
            if jax.process_index() == 0:
                _write(paths[piece], origin, piece, replies)
        drawn += replies
    return drawn, [piece for piece in pieces if piece not in found]


def _write(path: Path, origin: Mapping[str, Any], piece: range, replies: Sequence[Sequence[Reply]]) -> None:
    lines = [json.dumps([dataclasses.asdict(reply) for reply in drawn], ensure_ascii=False) for drawn in replies]
    body = "".join(f"{line}\n" for line in lines).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as stream:
        stream.write(_header(origin, piece, body) + b"\n" + body)
    files.sync(path.parent)


def _read(path: Path, origin: Mapping[str, Any], piece: range) -> list[list[Reply]] | None:
    """The replies of a piece, or None where there is no such piece."""
    if not path.is_file():
        return None
    header, _, body = path.read_bytes().partition(b"\n")
    if header != _header(origin, piece, body):
        return None
    return [[_reply(values) for values in json.loads(line)] for line in body.splitlines()]


def _header(origin: Mapping[str, Any], piece: range, body: bytes) -> bytes:
    values = {"origin": origin, "first": piece.start, "stop": piece.stop, "sha256": hashlib.sha256(body).hexdigest()}
    return json.dumps(values, sort_keys=True).encode()


def _reply(values: dict[str, Any]) -> Reply:
    lists = {name: tuple(values[name]) for name in ("token_ids", "token_logprobs")}
    return Reply(**{**values, **lists})
