"""From layouts and contents to token ids, with what the loss counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import tokenizers

from ssl_jax.data.templates import Control, Layout, Run


class Assembled(NamedTuple):
    """A layout with its contents, encoded.

    Attributes:
      tokens: ids.
      mask: for every id, 1 where predicting it counts. A token that is only in part text that counts does count.
      system_length: how many of the tokens, from the first, show the leading system turn.
      unknown_bytes: UTF-8 bytes of text that counts, spaces aside, for which there is no token but the unknown one.
    """

    tokens: list[int]
    mask: list[int]
    system_length: int
    unknown_bytes: int


def assemble(
    backend: tokenizers.Tokenizer,
    laid_out: Sequence[tuple[Layout, tuple[str, ...]]],
    *,
    unknown_id: int | None,
    lossless: bool,
) -> list[Assembled]:
    """Ids of layouts with their contents, all of them in a few calls of the backend, which uses all cores.

    Args:
      backend: text to ids; must read control tokens in text as text.
      laid_out: layouts, and the contents of the turns that each of them names.
      unknown_id: the token for text that has none.
      lossless: whether every text has tokens.
    """

    def aligned(run: Run) -> bool:
        return not run.uniform or (run.loss and not lossless)

    quick: list[str] = []
    exact: list[list[str]] = []
    for layout, contents in laid_out:
        for piece in layout.pieces:
            if isinstance(piece, Run):
                texts = piece.texts(contents)
                if aligned(piece):
                    exact.append(texts)
                else:
                    quick.append(texts[0] if len(texts) == 1 else "".join(texts))
    quick_ids = iter([encoding.ids for encoding in backend.encode_batch_fast(quick, add_special_tokens=False)])
    encodings = backend.encode_batch(["".join(texts) for texts in exact], add_special_tokens=False)
    aligned_ids = iter(zip(exact, encodings, strict=True))

    result = []
    for layout, _ in laid_out:
        tokens: list[int] = []
        mask: list[int] = []
        system_length = unknown_bytes = 0
        for number, piece in enumerate(layout.pieces):
            before = len(tokens)
            if isinstance(piece, Control):
                tokens.append(piece.id)
                mask.append(int(piece.loss))
            elif aligned(piece):
                texts, encoding = next(aligned_ids)
                run = _align(piece, texts, encoding, unknown_id)
                tokens += run.tokens
                mask += run.mask
                unknown_bytes += 0 if lossless else run.unknown_bytes
                if number == layout.system_pieces:
                    system_length += run.system_length
            else:
                tokens += next(quick_ids)
                mask += [int(piece.loss)] * (len(tokens) - before)
            if number < layout.system_pieces:
                system_length += len(tokens) - before
        result.append(Assembled(tokens, mask, system_length, unknown_bytes))
    return result


def _align(run: Run, texts: Sequence[str], encoding: tokenizers.Encoding, unknown_id: int | None) -> Assembled:
    """A run's share of the result, from the characters that each of its tokens stands for."""
    counts = bytearray()
    for part, text in zip(run.parts, texts, strict=True):
        counts += bytes([part.loss]) * len(text)
    system_end = sum(len(text) for text in texts[: run.system_parts])
    expressed = bytearray(len(counts))
    mask: list[int] = []
    system_length = 0
    for token, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
        stop = max(stop, start + 1)  # a token for no character belongs to the next one
        mask.append(int(1 in counts[start:stop]))
        system_length += start < system_end
        if token != unknown_id:
            expressed[start:stop] = b"\1" * len(expressed[start:stop])
    unknown = (
        character
        for character, count, known in zip("".join(texts), counts, expressed, strict=True)
        if count and not known and not character.isspace()
    )
    return Assembled(encoding.ids, mask, system_length, len("".join(unknown).encode()))
