"""What becomes of the dialogues of a spool: their split, or why they are left out. Texts are not needed for that."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np

from ssl_jax.config import Data
from ssl_jax.data import formats, splits
from ssl_jax.data.duplicates import first_equal, near_duplicates, near_leaks
from ssl_jax.data.formats import Rejected
from ssl_jax.data.minhash import Sketches
from ssl_jax.data.spool import SECTIONS, Spool, View
from ssl_jax.data.store import UNLABELED_SPLITS

_EXAMPLES = 5


@dataclasses.dataclass
class Selection:
    """Dialogues by what becomes of them.

    Attributes:
      rows: by split the numbers of its dialogues in `Spool.keys`, in order.
      rejected: rows that repeat an id.
      sources: by number of the source, the rows of it that are dialogues.
      changed: by step of cleaning, how many dialogues it changed.
      removed: by step, how many it removed.
      left_out: by step, numbers of the first dialogues that this module removed.
    """

    rows: dict[str, np.ndarray]
    rejected: list[Rejected]
    sources: dict[int, int]
    changed: collections.Counter[str]
    removed: collections.Counter[str]
    left_out: dict[str, list[int]]

    def _drop(self, split: str, drops: np.ndarray, step: str) -> None:
        """Takes the rows of `split` out at which `drops` (bool[N]) is true."""
        if dropped := self.rows[split][drops].tolist():
            self.rows[split] = self.rows[split][~drops]
            self.removed[step] += len(dropped)
            shown = self.left_out.setdefault(step, [])
            shown += dropped[: _EXAMPLES - len(shown)]


def select(spool: Spool, data: Data, seed: int) -> Selection:
    """Decides about every dialogue of `spool`.

    A held-out dialogue is in no other split; of equal ones the first is kept. A prompt may repeat raw text: the two are
    learned from in different ways.

    Raises:
      UserError: the times of a split by time cannot be compared.
    """
    keys = spool.keys
    rejected, present = _unique_ids(spool)
    changed, removed = spool.effects(present)
    sources = dict(collections.Counter(keys["source"][present].tolist()))
    sections = {name: present[keys["section"][present] == number] for number, name in enumerate(SECTIONS)}
    sections = {name: rows[~keys["removed"][rows]] for name, rows in sections.items()}

    text = first_equal(keys["text"])
    threshold = data.near_duplicate_threshold
    near = None if threshold is None else _Resemblance(spool, text, np.concatenate([*sections.values()]), threshold)

    rows = {f"labeled_{part}": sections[part] for part in ("train", "dev", "test", "test_seen")}
    unsplit = sections["unsplit"]
    sides = _sides(spool, unsplit, near, data, seed)
    for number, side in enumerate(splits.SIDES):
        rows[f"labeled_{side}"] = np.concatenate([rows[f"labeled_{side}"], unsplit[sides == number]])
    rows |= {"raw_train": sections["raw"], "prompt_train": sections["prompt"]}
    selection = Selection(rows, rejected, sources, changed, removed, {})
    _drop_equal(selection, text)
    if near:
        _drop_near(selection, near)
    return selection


class _Resemblance:
    """Which dialogues are nearly equal; every text is sketched once, whatever it is compared with."""

    def __init__(self, spool: Spool, text: np.ndarray, rows: np.ndarray, threshold: float) -> None:
        """Reads dialogues by number, int64[N]; `text` numbers the texts of all dialogues of the spool."""
        firsts = np.unique(text[rows])
        self._sketches = Sketches(View(spool, firsts), spool.folder)
        self._number = np.searchsorted(firsts, text)
        self._threshold = threshold

    def groups(self, rows: np.ndarray) -> np.ndarray:
        """For every dialogue the place in `rows` of the first one of its group, int64[N]; see `near_duplicates`."""
        return near_duplicates(self._sketches, self._number[rows], self._threshold)

    def leaks(self, rows: np.ndarray, held_out: np.ndarray) -> np.ndarray:
        """Whether a dialogue of `rows` resembles one of `held_out`, bool[N]; see `near_leaks`."""
        return near_leaks(self._sketches, self._number[rows], self._number[held_out], self._threshold)


def _unique_ids(spool: Spool) -> tuple[list[Rejected], np.ndarray]:
    """Rows that repeat an id of the labeled ones, or of the unlabeled ones; and the others."""
    keys, rejected = spool.keys, []
    is_repeated = np.zeros(len(keys), bool)
    labeled = np.isin(keys["section"], [SECTIONS.index(name) for name in ("train", "unsplit")])
    for side in (labeled, ~labeled):
        rows = np.flatnonzero(keys["unique_id"] & side)
        first = rows[first_equal(keys["id"][rows])]
        is_repeated[rows] = first != rows
        repeated, originals = rows[first != rows], first[first != rows]
        for row, original, id in zip(repeated.tolist(), originals.tolist(), spool.ids(repeated), strict=True):
            file, _, line = spool.place(row)
            _, name, first_line = spool.place(original)
            rejected.append(formats.duplicate_id(file, line, id, f"{name}:{first_line}"))
    return rejected, np.flatnonzero(~is_repeated)


def _sides(spool: Spool, rows: np.ndarray, near: _Resemblance | None, data: Data, seed: int) -> np.ndarray:
    """`splits.assign` of dialogues that no packaged data set has split."""
    keys, times = spool.keys[rows], []
    if data.split_by == "time":
        labeled = (spool.keys["section"] == SECTIONS.index("unsplit")) & ~spool.keys["removed"]
        time_of = dict(zip(np.flatnonzero(labeled).tolist(), spool.times, strict=True))
        times = [(time_of[row], id) for row, id in zip(rows.tolist(), spool.ids(rows), strict=True)]
    # The others follow what the metadata says, whatever the texts.
    alike = near.groups(rows) if near and data.split_by in ("hash", "fraction") else first_equal(keys["text"])
    return splits.assign(keys["position"], alike, data.split_by, data.test_size, data.dev_size, seed, times)


def _drop_equal(selection: Selection, text: np.ndarray) -> None:
    """Drops what is held out, then what repeats; `text` numbers the texts of all dialogues."""

    def texts(*names: str) -> np.ndarray:
        there = np.zeros(len(text), bool)
        for name in names:
            there[text[selection.rows[name]]] = True
        return there

    def drop(split: str, held_out: np.ndarray, seen: np.ndarray) -> None:
        selection._drop(split, held_out[text[selection.rows[split]]], "held_out_duplicates")
        ours = text[selection.rows[split]]
        repeats = np.ones(len(ours), bool)
        repeats[np.unique(ours, return_index=True)[1]] = False
        selection._drop(split, repeats | seen[ours], "exact_duplicates")

    nothing = np.zeros(len(text), bool)
    drop("labeled_dev", texts("labeled_test", "labeled_test_seen"), nothing)
    held_out = texts("labeled_test", "labeled_test_seen", "labeled_dev")
    drop("labeled_train", held_out, nothing)
    for split in UNLABELED_SPLITS:
        drop(split, held_out, texts("labeled_train"))


def _drop_near(selection: Selection, near: _Resemblance) -> None:
    """The same for what is nearly equal."""

    def drop(split: str, held_out: tuple[str, ...], seen: tuple[str, ...]) -> None:
        others = np.concatenate([selection.rows[name] for name in held_out])
        selection._drop(split, near.leaks(selection.rows[split], others), "held_out_near_duplicates")
        before = np.concatenate([np.empty(0, np.int64), *(selection.rows[name] for name in seen)])
        groups = near.groups(np.concatenate([before, selection.rows[split]]))
        repeats = groups != np.arange(len(groups))
        selection._drop(split, repeats[len(before) :], "near_duplicates")

    tests = ("labeled_test", "labeled_test_seen")
    drop("labeled_dev", tests, ())
    drop("labeled_train", (*tests, "labeled_dev"), ())
    for split in UNLABELED_SPLITS:
        drop(split, (*tests, "labeled_dev"), ("labeled_train",))
