"""From layouts and contents to token ids, with what the loss counts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tokenizers

from ssl_jax.data.templates import Control, Layout, Run
from ssl_jax.data.word_cache import ID_BYTES, Encode, pack


class Assembled(NamedTuple):
    """A layout with its contents, encoded.

    Attributes:
      tokens: int32[n] ids.
      mask: uint8[n], for every id, 1 where predicting it counts. A token that is only in part text that counts
        does count.
      system_length: how many of the tokens, from the first, show the leading system turn.
      unknown_bytes: UTF-8 bytes of text that counts, spaces aside, for which there is no token but the unknown one.
    """

    tokens: np.ndarray
    mask: np.ndarray
    system_length: int
    unknown_bytes: int


def assemble(
    backend: tokenizers.Tokenizer,
    laid_out: Sequence[tuple[Layout, tuple[str, ...]]],
    *,
    encode: Encode,
    unknown_id: int | None,
    lossless: bool,
) -> list[Assembled]:
    """Ids of layouts with their contents, all of them in a few calls of the backend, which uses all cores.

    Args:
      backend: text to ids; must read control tokens in text as text.
      laid_out: layouts, and the contents of the turns that each of them names.
      encode: the same ids as `backend`, without saying which characters they stand for.
      unknown_id: the token for text that has none.
      lossless: whether every text has tokens.
    """
    layouts = {id(layout): layout for layout, _ in laid_out}  # by identity: to compare or hash one takes long
    forms = {key: _Form.of(layout, lossless) for key, layout in layouts.items()}
    quick: list[str] = []
    exact: list[list[str]] = []
    for layout, contents in laid_out:
        for _, run, aligned in forms[id(layout)].runs:
            texts = run.texts(contents)
            if aligned:
                exact.append(texts)
            else:
                quick.append(texts[0] if len(texts) == 1 else "".join(texts))
    quick_ids = iter(encode(quick))
    encodings = backend.encode_batch(["".join(texts) for texts in exact], add_special_tokens=False)
    aligned_ids = iter(zip(exact, encodings, strict=True))

    # All of it in one row: pieces of ids, the loss of each piece, and where the pieces of a dialogue begin.
    pieces: list[bytes] = []
    losses: list[bytes] = []
    starts = [0]
    aligned_masks: list[tuple[int, bytes]] = []
    in_run: list[tuple[int, int]] = []  # tokens of the system turn that share a run with others, unknown bytes
    for layout, _ in laid_out:
        form = forms[id(layout)]
        ids = form.ids.copy()
        system_length = unknown_bytes = 0
        for place, run, aligned in form.runs:
            if not aligned:
                ids[place] = next(quick_ids)
                continue
            texts, encoding = next(aligned_ids)
            ids[place] = pack(encoding.ids)
            mask, length, unknown = _align(run, texts, encoding, unknown_id)
            aligned_masks.append((len(pieces) + place, mask))
            unknown_bytes += 0 if lossless else unknown
            if place == layout.system_pieces:
                system_length = length
        pieces += ids
        losses.append(form.losses)
        starts.append(len(pieces))
        in_run.append((system_length, unknown_bytes))

    ends = np.cumsum([0, *map(len, pieces)]) // ID_BYTES
    tokens = np.frombuffer(bytearray().join(pieces), np.int32)  # a bytearray, so that they can be written to
    masks = np.repeat(np.frombuffer(b"".join(losses), np.uint8), np.diff(ends))
    for place, mask in aligned_masks:
        masks[ends[place] : ends[place + 1]] = np.frombuffer(mask, np.uint8)
    result = []
    bounds = itertools.pairwise(ends[starts].tolist())
    for (layout, _), first, (start, stop), (length, unknown) in zip(laid_out, starts, bounds, in_run, strict=False):
        if layout.system_pieces:
            length += int(ends[first + layout.system_pieces]) - start
        result.append(Assembled(tokens[start:stop], masks[start:stop], length, unknown))
    return result


class _Form(NamedTuple):
    """What all dialogues of a layout have in common.

    Attributes:
      ids: of every piece that is a control token, packed; nothing where a run is.
      losses: uint8 of every piece, the mask of each of its tokens.
      runs: every run with its place among the pieces, and whether it takes the characters of its tokens to know which
        of them count.
    """

    ids: list[bytes]
    losses: bytes
    runs: list[tuple[int, Run, bool]]

    @classmethod
    def of(cls, layout: Layout, lossless: bool) -> _Form:
        return cls(
            [pack([piece.id]) if isinstance(piece, Control) else b"" for piece in layout.pieces],
            bytes(piece.loss for piece in layout.pieces),
            [
                (place, piece, not piece.uniform or (piece.loss and not lossless))
                for place, piece in enumerate(layout.pieces)
                if isinstance(piece, Run)
            ],
        )


def _align(
    run: Run, texts: Sequence[str], encoding: tokenizers.Encoding, unknown_id: int | None
) -> tuple[bytes, int, int]:
    """A run's mask, tokens of the system turn and unknown bytes, from the characters that each token stands for."""
    counts = bytearray()
    for part, text in zip(run.parts, texts, strict=True):
        counts += bytes([part.loss]) * len(text)
    system_end = sum(len(text) for text in texts[: run.system_parts])
    expressed = bytearray(len(counts))
    mask = bytearray()
    system_length = 0
    for token, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
        stop = max(stop, start + 1)  # a token for no character belongs to the next one
        mask.append(1 in counts[start:stop])
        system_length += start < system_end
        if token != unknown_id:
            expressed[start:stop] = b"\1" * len(expressed[start:stop])
    unknown = (
        character
        for character, count, known in zip("".join(texts), counts, expressed, strict=True)
        if count and not known and not character.isspace()
    )
    return bytes(mask), system_length, len("".join(unknown).encode())
