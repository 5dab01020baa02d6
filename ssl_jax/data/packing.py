"""Cutting dialogues into windows and packing the windows into rows of fixed length, from their lengths alone.

A window is made of `tokens[:prefix]` and `tokens[start:stop]` of its dialogue. It predicts `tokens[target_start:stop]`;
what comes before is context. The last token is predicted only, so a window takes `prefix + stop - 1 - start` places of
a row. A later window of a long dialogue repeats the system turn, which holds for all of it, and some tokens of what was
said last: the form in which generation reads a dialogue that is longer than the context.

Axes: T places of a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np

Row = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows of many dialogues, as parallel int64 arrays.

    Attributes:
      record: which dialogue.
      prefix: tokens of the dialogue's beginning that are repeated; 0 where `start` is 0.
      start: first token after them that is fed.
      target_start: first token that is predicted; later than `start + 1` where the beginning is context only.
      stop: end of the tokens that are predicted.
    """

    record: np.ndarray
    prefix: np.ndarray
    start: np.ndarray
    target_start: np.ndarray
    stop: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """Places that each window takes in a row."""
        return self.prefix + self.stop - 1 - self.start

    def __len__(self) -> int:
        return len(self.record)

    def piece(
        self, index: int, tokens: np.ndarray, loss_mask: np.ndarray, context_weight: float = 0.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """A window's share of its dialogue, for `assemble`.

        Args:
          index: which window.
          tokens: of its dialogue, `[n]`.
          loss_mask: of its dialogue, `[n]`, above 0 where predicting a token counts.
          context_weight: what predicting the other tokens weighs.

        Returns:
          Its tokens and float64 loss weights, 0 for those that it only repeats; one more of each than its size.
        """
        places = np.concatenate([np.arange(self.prefix[index]), np.arange(self.start[index], self.stop[index])])
        weights = np.where(loss_mask[places] > 0, 1.0, context_weight)
        return tokens[places], weights * (places >= self.target_start[index])


def cut_windows(
    lengths: np.ndarray,
    sequence_length: int,
    *,
    overlap: int = 0,
    prefix_lengths: np.ndarray | None = None,
    first: np.ndarray | None = None,
) -> Windows:
    """Cuts dialogues into windows of at most `sequence_length` places; every token but the first is predicted once.

    Args:
      lengths: tokens per dialogue.
      sequence_length: places of a row.
      overlap: tokens that a later window repeats as context, besides the one that its first target follows.
      prefix_lengths: tokens at the beginning of each dialogue that its later windows repeat, none by default. Of a
        longer prefix the first tokens are repeated, as many as half of the places that the overlap leaves, so that a
        window advances by at least the other half.
      first: places of the first window of a dialogue that needs several (1 … sequence_length); shifting them between
        epochs shows the model its tokens at other offsets.
    """
    if not 0 <= overlap < sequence_length:
        raise ValueError(f"overlap {overlap} must be in [0, {sequence_length})")
    lengths = np.asarray(lengths, np.int64)
    targets = np.maximum(lengths - 1, 0)
    room = sequence_length - overlap
    prefix = np.zeros_like(lengths) if prefix_lengths is None else np.minimum(prefix_lengths, room // 2)
    first = np.full(len(lengths), sequence_length) if first is None else np.minimum(first, sequence_length)
    first = np.where(targets <= sequence_length, targets, first)
    stride = room - prefix
    counts = np.where(targets > 0, 1 + -(-(targets - first) // stride), 0)
    record = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(record)) - np.repeat(np.cumsum(counts) - counts, counts)
    is_first = number == 0
    prefix, stride, first = prefix[record], stride[record], first[record]
    target_start = np.where(is_first, 1, 1 + first + (number - 1) * stride)
    stop = np.where(is_first, 1 + first, np.minimum(target_start + stride, lengths[record]))
    start = target_start - 1 - overlap
    # Context that reaches back into the prefix is one piece with it.
    from_beginning = is_first | (start <= prefix)
    return Windows(
        record,
        prefix=np.where(from_beginning, 0, prefix),
        start=np.where(from_beginning, 0, start),
        target_start=target_start,
        stop=stop,
    )


@dataclasses.dataclass(frozen=True)
class PackedRows(Sequence[list[int]]):
    """Which windows share a row: as a sequence the windows of every row, in memory two int64 arrays.

    Attributes:
      members: windows of the first row, then those of the second, ….
      starts: where each row begins in `members`, and the end.
    """

    members: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, index: int) -> list[int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[int]]: ...
    def __getitem__(self, index: int | slice) -> list[int] | list[list[int]]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        return self.members[self.starts[row] : self.starts[row + 1]].tolist()


def pack(sizes: np.ndarray, capacity: int) -> PackedRows:
    """Best-fit decreasing bin packing (Johnson 1974): the windows of each row.

    Among equal sizes the given order decides, so shuffling the input shuffles who shares a row.

    Args:
      sizes: places that each window takes, at least 1.
      capacity: places of a row.

    Raises:
      ValueError: a size exceeds the capacity.
    """
    if len(sizes) and sizes.max() > capacity:
        raise ValueError(f"a window of {sizes.max()} places does not fit a row of {capacity}")
    row_of: list[int] = []  # of the windows by decreasing size
    number = 0
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by remaining places
    occupied = 0  # bit r is set where open_rows[r] is not empty: the tightest fit is one bit scan
    for size, left in _sizes_and_counts(sizes):
        while left:
            fitting = occupied >> size
            remaining = size + (fitting & -fitting).bit_length() - 1 if fitting else capacity
            # What a row has left after it took a window fits tighter than before, so it takes the next one, too. Hence
            # rows with equal places left are filled together, each with as many windows as go into it.
            each = remaining // size
            count = -(-left // each)
            if fitting:
                rows = open_rows[remaining][: -count - 1 : -1]
                del open_rows[remaining][-count:]
                if not open_rows[remaining]:
                    occupied &= ~(1 << remaining)
            else:
                rows = list(range(number, number + count))
                number += count
            placed = min(left, each * len(rows))
            row_of += rows if each == 1 else np.repeat(rows, each)[:placed].tolist()
            left -= placed
            last = remaining - size * (placed - each * (len(rows) - 1))
            for places, filled in ((remaining - size * each, rows[:-1]), (last, rows[-1:])):
                if places and filled:
                    open_rows[places] += filled
                    occupied |= 1 << places
    rows_N = np.array(row_of, np.int64)
    members = np.argsort(-np.asarray(sizes), kind="stable")[np.argsort(rows_N, kind="stable")]
    return PackedRows(members, np.concatenate([[0], np.cumsum(np.bincount(rows_N, minlength=number))]))


def _sizes_and_counts(sizes: np.ndarray) -> Iterator[tuple[int, int]]:
    """Every size, the largest first, and how many windows have it."""
    values, counts = np.unique(sizes, return_counts=True)
    return zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True)


def assemble(pieces: Sequence[tuple[np.ndarray, np.ndarray]], sequence_length: int) -> Row:
    """Lays token sequences side by side in one row.

    Args:
      pieces: `(tokens, weights)` pairs; `weights[i]` is the loss weight of predicting `tokens[i]`.
      sequence_length: places of the row; the rest is padding (zeros).

    Returns:
      int32 `tokens`, `targets`, `positions`, `segment_ids` (from 1; 0 is padding) and float32 `loss_weights`, each
      `[T]`.
    """
    row = {
        name: np.zeros(sequence_length, np.float32 if name == "loss_weights" else np.int32)
        for name in ("tokens", "targets", "positions", "segment_ids", "loss_weights")
    }
    begin = 0
    for segment, (tokens, weights) in enumerate(pieces, start=1):
        end = begin + len(tokens) - 1
        row["tokens"][begin:end] = tokens[:-1]
        row["targets"][begin:end] = tokens[1:]
        row["loss_weights"][begin:end] = weights[1:]
        row["positions"][begin:end] = np.arange(end - begin)
        row["segment_ids"][begin:end] = segment
        begin = end
    return row


def stack(rows: Sequence[Row], number: int, sequence_length: int) -> Row:
    """Stacks rows to `[number, T]` arrays, with rows of padding at the end where there are too few."""
    empty = assemble((), sequence_length)
    padded = [*rows, *[empty] * (number - len(rows))]
    return {name: np.stack([row[name] for row in padded]) for name in empty}
