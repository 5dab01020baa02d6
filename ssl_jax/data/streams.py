"""Streams of packed rows, and the batch of every step as a function of the step's number.

A row of a stream is addressed by number: the packing plan of an epoch follows from the stored lengths, the sequence
length, the seed and the epoch. So a data position is a step number: resuming needs nothing saved, and order does not
depend on hosts, threads or workers.

Axes: B rows of this process, T places of a row.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import threading
from collections.abc import Iterator, Mapping, Sequence

import grain.python as grain
import numpy as np

from ssl_jax.data.mixture import Mixture
from ssl_jax.data.packing import PackedRows, Row, Windows, assemble, cut_windows, pack, stack
from ssl_jax.data.tokenizer import EncodedDialogue


@dataclasses.dataclass(frozen=True)
class _EpochPlan:
    """What an epoch shows: windows, which of them share a row, and the rows' order, int64."""

    windows: Windows
    rows: PackedRows
    order: np.ndarray


class PackedStream:
    """An endless stream of packed rows over a set of dialogues, shuffled anew every epoch.

    Args:
      dialogues: random access to encoded dialogues.
      lengths: tokens per dialogue.
      sequence_length: places of a row.
      seed: of the shuffle.
      prefix_lengths: tokens of each dialogue's system turn, which all windows of a long dialogue begin with; none by
        default.
      overlap: tokens of context that a later window of a long dialogue repeats (`train.window_overlap`).
      context_weight: loss weight of a dialogue's tokens that are not targets (`objectives.prompt_loss_weight`).
      weights: how many times an epoch shows each dialogue on average (`Source.weight`); once by default.
    """

    def __init__(
        self,
        dialogues: Sequence[EncodedDialogue],
        lengths: np.ndarray,
        *,
        sequence_length: int,
        seed: int,
        prefix_lengths: np.ndarray | None = None,
        overlap: int = 0,
        context_weight: float = 0.0,
        weights: np.ndarray | None = None,
    ):
        if not np.any(np.asarray(lengths) > 1):  # otherwise every epoch is empty, and row 0 is never reached
            raise ValueError("a stream needs at least one dialogue with a token to predict")
        self._dialogues = dialogues
        self._lengths = np.asarray(lengths)
        self._prefix_lengths = prefix_lengths
        self._overlap = overlap
        self._sequence_length = sequence_length
        self._seed = seed
        self._context_weight = context_weight
        self._mixture = None if weights is None else Mixture(weights, seed)
        self._first_rows = [0]  # row number at which each epoch starts
        self._growing = threading.Lock()  # the loop asks for the epoch of a row while a thread reads ahead
        self._plan = functools.lru_cache(maxsize=2)(self._make_plan)

    def rows_in_epoch(self, epoch: int) -> int:
        """Packed rows that an epoch takes; 0 where the weights are so small that it shows no dialogue."""
        self._reach_epoch(epoch)
        return self._first_rows[epoch + 1] - self._first_rows[epoch]

    def tokens_in_epoch(self, epoch: int = 0) -> int:
        """Tokens that an epoch feeds, those counted again that later windows of long dialogues repeat."""
        return int(self._plan(epoch).windows.sizes.sum())

    def fill(self, epoch: int = 0) -> float:
        """Fraction of the places of an epoch's rows that hold tokens; 1 where there are no rows."""
        places = self.rows_in_epoch(epoch) * self._sequence_length
        return self.tokens_in_epoch(epoch) / places if places else 1.0

    def long_dialogues(self, epoch: int = 0) -> tuple[int, int]:
        """How many of an epoch's dialogues are longer than a row, and into how many windows it cuts them.

        A dialogue that the epoch shows several times is one, the windows of all its copies count.
        """
        windows = self._plan(epoch).windows
        records = windows.record[self._lengths[windows.record] - 1 > self._sequence_length]
        return len(np.unique(records)), len(records)

    def passes(self, rows: int) -> float:
        """Passes over the dialogues that the first `rows` rows make; a whole number where an epoch ends."""
        if rows == 0:
            return 0.0
        epoch = self.epoch_of(rows - 1)
        return epoch + (rows - self._first_rows[epoch]) / self.rows_in_epoch(epoch)

    def epoch_of(self, row: int) -> int:
        """Which pass over the dialogues a row number belongs to."""
        while self._first_rows[-1] <= row:
            self._reach_epoch(len(self._first_rows) - 1)
        return bisect.bisect_right(self._first_rows, row) - 1

    def __getitem__(self, number: int) -> Row:
        """The row with that number, `[T]` arrays as in `packing.assemble`."""
        windows, members = self._members(number)
        return assemble([self._piece(windows, index) for index in members], self._sequence_length)

    def dialogue_ids(self, number: int) -> list[str]:
        """Ids of the dialogues that share a row, in their order."""
        windows, members = self._members(number)
        return [self._dialogues[int(windows.record[index])].id for index in members]

    def _members(self, number: int) -> tuple[Windows, list[int]]:
        """The windows of a row's epoch, and which of them share the row."""
        epoch = self.epoch_of(number)
        plan = self._plan(epoch)
        return plan.windows, plan.rows[plan.order[number - self._first_rows[epoch]]]

    def _piece(self, windows: Windows, index: int) -> tuple[np.ndarray, np.ndarray]:
        dialogue = self._dialogues[int(windows.record[index])]
        return windows.piece(index, dialogue.tokens, dialogue.loss_mask, self._context_weight)

    def _reach_epoch(self, epoch: int) -> None:
        with self._growing:
            while len(self._first_rows) <= epoch + 1:
                rows = len(self._plan(len(self._first_rows) - 1).rows)
                self._first_rows.append(self._first_rows[-1] + rows)

    def _make_plan(self, epoch: int) -> _EpochPlan:
        rng = np.random.default_rng((self._seed, epoch))
        shown = np.arange(len(self._lengths)) if self._mixture is None else self._mixture.shown(epoch)
        windows = cut_windows(
            self._lengths[shown],
            self._sequence_length,
            overlap=self._overlap,
            prefix_lengths=None if self._prefix_lengths is None else self._prefix_lengths[shown],
            first=rng.integers(1, self._sequence_length + 1, len(shown)),
        )
        windows = dataclasses.replace(windows, record=shown[windows.record])
        shuffled = rng.permutation(len(windows))
        rows = pack(windows.sizes[shuffled], self._sequence_length)
        order = np.arange(len(rows))
        rng.shuffle(order)
        return _EpochPlan(windows, PackedRows(shuffled[rows.members], rows.starts), order)


@dataclasses.dataclass(frozen=True)
class Phase:
    """Steps that draw the same number of rows from every stream.

    Attributes:
      start: first step.
      stop: end of the steps.
      rows: `(stream, rows of the global batch)` in batch order.
      first_row: row number of each stream at `start`.
    """

    start: int
    stop: int
    rows: tuple[tuple[str, int], ...]
    first_row: Mapping[str, int]

    def drawn_before(self, step: int) -> dict[str, int]:
        """Rows of every stream that the steps before `step`, which is in `[start, stop]`, have drawn."""
        return {**self.first_row, **{name: self.first_row[name] + n * (step - self.start) for name, n in self.rows}}


class Batches:
    """The batches of one phase as a Grain source: element `i` is the batch of step `phase.start + i`.

    Args:
      phase: which rows.
      streams: the streams by name.
      stream_ids: number of each stream, for the batch's `stream` array.
      sequence_length: places of a row.
      rows: which rows of the global batch this process reads; all by default.
    """

    def __init__(
        self,
        phase: Phase,
        streams: Mapping[str, PackedStream],
        stream_ids: Mapping[str, int],
        *,
        sequence_length: int,
        rows: Sequence[int] | np.ndarray | None = None,
    ):
        self._phase = phase
        self._streams = streams
        self._stream_ids = stream_ids
        self._sequence_length = sequence_length
        self._rows = range(sum(count for _, count in phase.rows)) if rows is None else rows

    def __len__(self) -> int:
        return self._phase.stop - self._phase.start

    def __getitem__(self, index: int) -> Row:
        """This process's rows of a step, `[B, T]` arrays, and int32 `stream` `[B]`."""
        whole = self._places(index)
        places = [whole[row] for row in self._rows]
        batch = stack([self._streams[name][row] for name, row in places], len(places), self._sequence_length)
        batch["stream"] = np.array([self._stream_ids[name] for name, _ in places], np.int32)
        return batch

    def dialogue_ids(self, step: int) -> dict[str, list[str]]:
        """By stream, the dialogues of all processes' rows of a step in `[start, stop)`."""
        found: dict[str, list[str]] = {}
        for name, row in self._places(step - self._phase.start):
            found.setdefault(name, []).extend(self._streams[name].dialogue_ids(row))
        return found

    def _places(self, index: int) -> list[tuple[str, int]]:
        """Stream and row number of every row of the global batch."""
        return [
            (name, self._phase.first_row[name] + index * count + position)
            for name, count in self._phase.rows
            for position in range(count)
        ]

    def passes(self, step: int) -> dict[str, float]:
        """Passes over every stream that the steps before `step`, which is in `[start, stop]`, have made."""
        drawn = self._phase.drawn_before(step)
        return {name: stream.passes(drawn[name]) for name, stream in self._streams.items()}

    def read(self, *, threads: int = 1, prefetch: int = 4) -> Iterator[Row]:
        """The batches in order, whoever makes them.

        Args:
          threads: that read ahead; with 0 every batch is made when it is asked for.
          prefetch: batches that are ready before they are asked for.
        """
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch if threads else 0)
        return iter(grain.MapDataset.source(self).to_iter_dataset(options))
