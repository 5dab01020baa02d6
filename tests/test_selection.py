"""What becomes of every dialogue is what a plain algorithm over all dialogues in memory decides."""

import collections
import itertools
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_jax.config import Data, Source
from ssl_jax.data import formats, pieces, selection, splits, spool
from ssl_jax.data.cleaning.apply import Counts, clean
from ssl_jax.data.duplicates import text_hash
from ssl_jax.data.formats import Accepted
from ssl_jax.data.minhash import Sketches
from ssl_jax.data.packaged import ResolvedSource
from ssl_jax.data.pieces import Item, Piece, Stretch
from ssl_jax.data.spool import Spool, View
from ssl_jax.dialogue import Dialogue, Role, Turn

SENTENCES = (
    "i would like to book a table for two people tomorrow evening",
    "the weather in these mountains always changes very quickly",
    "could you repeat where my parcel was seen last friday please",
    "nobody knows which of his songs were recorded before the war",
)


def variants(sentence):
    """Dialogues of one sentence, as the contents of their turns."""
    words = sentence.split()
    changed = " ".join([*words[:5], "three", *words[6:]])
    return (
        (sentence,),
        (changed,),
        (f"{changed} at eight",),  # resembles the first by way of the second alone
        (" ".join(words[:4]), " ".join(words[4:])),
        (" ".join(words[:4]) + "\n" + " ".join(words[4:]),),  # another one than that before, and nearly the same
        (f"{sentence} ",),  # changed by cleaning
    )


TEXTS = (*(contents for sentence in SENTENCES for contents in variants(sentence)), ("okay",), ("\x00", "removed"))
SOURCES = (
    *(ResolvedSource("labeled", Source(path=name), ()) for name in ("packaged", "a", "b")),
    ResolvedSource("unlabeled", Source(path="c"), ()),
)
PIECE = (Stretch(SOURCES, tuple(range(len(SOURCES)))),)
ENDS: dict[str, Role] = {"labeled": "assistant", "prompt": "user"}


def item(number, source, part, kind, contents, id):
    """A row as a source yields it; `metadata["number"]` says which."""
    if kind == "raw":
        turns = tuple(Turn("text", content) for content in contents)
    else:
        turns = (*(Turn("user", content) for content in contents[:-1]), Turn(ENDS[kind], contents[-1]))
    metadata = {"number": number, "time": number * 7 % 10, "group": number % 5, "source": "s"}
    dialogue = Dialogue(turns, id, metadata)
    return Item(source, part, Accepted(dialogue, f"folder/{source}", f"{source}", number), unique_id=source > 0)


# Source, part of a packaged data set's own split, kind. Most is not held out, or nothing else would ever be dropped.
PLACES = (
    *((0, part, "labeled") for part in ("train", "train", "train", "dev", "test", "test_seen", None)),
    *((1, None, "labeled"), (2, None, "labeled")),
    *((3, None, "raw"), (3, None, "prompt")) * 4,
)
ROWS = st.tuples(st.sampled_from(PLACES), st.sampled_from(TEXTS), st.sampled_from(["same", *[""] * 9]))
CORPORA = (st.lists(ROWS, max_size=12) | st.lists(ROWS, min_size=15, max_size=30)).map(
    lambda rows: [item(number, *place, text, id or f"id {number}") for number, (place, text, id) in enumerate(rows)]
)


def spooled(folder, data, rows, cuts=()):
    """A spool of rows, in pieces that end at `cuts`."""
    bounds = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    for number, (start, end) in enumerate(itertools.pairwise(bounds)):
        with mock.patch.object(pieces, "read", lambda *_, part=rows[start:end]: iter(part)):
            spool.write(folder, data, Piece(number, PIECE))
    return Spool(folder, len(bounds) - 1)


def resemble(one, other, threshold):
    first, second = (
        {text[start : start + 4] for start in range(len(text) - 3)}
        for text in (" ".join(" ".join(turn.content for turn in dialogue.turns).split()) for dialogue in (one, other))
    )
    return len(first & second) / len(first | second) >= threshold


def groups(dialogues, threshold):
    """For every dialogue the number of the first one that is alike, by comparing all pairs."""
    group = list(range(len(dialogues)))
    for low, high in itertools.combinations(range(len(dialogues)), 2):
        one, other = dialogues[low], dialogues[high]
        equal = text_hash(one) == text_hash(other) if threshold is None else resemble(one, other, threshold)
        if equal and group[low] != group[high]:
            kept, moved = sorted((group[low], group[high]))
            group = [kept if member == moved else member for member in group]
    return group


class Reference:
    """Decides about dialogues that are all in memory, one at a time."""

    def __init__(self, rows, data, seed):
        self.rejected, self.sources, self.counts = [], collections.Counter(), Counts()
        parts = collections.defaultdict(list)
        for expected, pairs in self._gather(rows).items():
            for dialogue, row in clean(pairs, self.counts, data.cleaning):
                unsplit = "unsplit" if expected == "labeled" else f"{dialogue.kind}_train"
                parts[f"labeled_{row.part}" if row.part else unsplit].append(dialogue)
        self._split(parts, data, seed)
        self.parts, self.threshold = parts, data.near_duplicate_threshold
        tests = ["labeled_test", "labeled_test_seen"]
        for drop in (self._drop_equal, *([self._drop_near] if self.threshold else [])):
            drop("labeled_dev", tests, [])
            drop("labeled_train", [*tests, "labeled_dev"], [])
            drop("raw_train", [*tests, "labeled_dev"], ["labeled_train"])
            drop("prompt_train", [*tests, "labeled_dev"], ["labeled_train"])

    def _gather(self, rows):
        gathered, seen = {"labeled": [], "unlabeled": []}, {"labeled": {}, "unlabeled": {}}
        for row in rows:
            accepted, expected = row.row, SOURCES[row.source].expected
            place = f"{accepted.name}:{accepted.line}"
            first = seen[expected].setdefault(accepted.dialogue.id, place) if row.unique_id else place
            if first != place:
                self.rejected.append(formats.duplicate_id(accepted.file, accepted.line, accepted.dialogue.id, first))
                continue
            self.sources[row.source] += 1
            gathered[expected].append((accepted.dialogue, row))
        return gathered

    def _split(self, parts, data, seed):
        unsplit = parts.pop("unsplit", [])
        alike = groups(unsplit, data.near_duplicate_threshold if data.split_by in ("hash", "fraction") else None)
        positions = [splits.position(dialogue, data.split_by) for dialogue in unsplit]
        times = [(dialogue.metadata["time"], dialogue.id) for dialogue in unsplit]
        sides = splits.assign(
            np.array(positions), np.array(alike, int), data.split_by, data.test_size, data.dev_size, seed, times
        )
        for dialogue, side in zip(unsplit, sides, strict=True):
            parts[f"labeled_{splits.SIDES[side]}"].append(dialogue)

    def _drop_equal(self, split, held_out, seen):
        refused, before = ({text_hash(d) for name in names for d in self.parts[name]} for names in (held_out, seen))
        kept = []
        for dialogue in self.parts[split]:
            if text_hash(dialogue) in refused:
                self.counts.add("held_out_duplicates", dialogue, None)
            elif text_hash(dialogue) in before:
                self.counts.add("exact_duplicates", dialogue, None)
            else:
                before.add(text_hash(dialogue))
                kept.append(dialogue)
        self.parts[split] = kept

    def _drop_near(self, split, held_out, seen):
        remaining = []
        for dialogue in self.parts[split]:
            if any(resemble(dialogue, other, self.threshold) for name in held_out for other in self.parts[name]):
                self.counts.add("held_out_near_duplicates", dialogue, None)
            else:
                remaining.append(dialogue)
        before = [dialogue for name in seen for dialogue in self.parts[name]]
        first = groups(before + remaining, self.threshold)
        self.parts[split] = []
        for number, dialogue in enumerate(remaining, len(before)):
            if first[number] == number:
                self.parts[split].append(dialogue)
            else:
                self.counts.add("near_duplicates", dialogue, None)


def numbers(dialogues):
    return [dialogue.metadata["number"] for dialogue in dialogues]


@given(
    CORPORA,
    st.lists(st.integers(0, 40), max_size=2),
    st.sampled_from(["hash", "fraction", "group", "time"]),
    st.sampled_from([None, 0.6, 0.9]),
    st.integers(0, 3),
)
def test_selection_is_that_of_a_plain_algorithm_in_memory(rows, cuts, split_by, threshold, seed):
    data = Data(test_size=0.3, dev_size=0.2, split_by=split_by, near_duplicate_threshold=threshold)
    expected = Reference(rows, data, seed)
    with tempfile.TemporaryDirectory() as folder:
        spool_of_rows = spooled(Path(folder), data, rows, cuts)
        chosen = selection.select(spool_of_rows, data, seed)
        for split, found in chosen.rows.items():
            assert numbers(spool_of_rows.dialogues(found)) == numbers(expected.parts[split])
        assert sorted(chosen.rejected, key=lambda row: row.line) == expected.rejected
        assert chosen.sources == expected.sources
        assert chosen.removed == expected.counts.removed
        assert chosen.changed == expected.counts.changed
        kept = set(np.concatenate(list(chosen.rows.values())).tolist())
        for step, found in chosen.left_out.items():
            assert len(found) == min(chosen.removed[step], 5)
            assert kept.isdisjoint(found)


@pytest.mark.parametrize("split_by", ["hash", "fraction"])
def test_near_duplicates_are_never_on_two_sides(split_by, tmp_path):
    texts = [" ".join(f"{word}{number}" for word in SENTENCES[0].split()) for number in range(40)]
    texts += [f"{text} and more" for text in texts] + [text.upper() for text in texts]
    rows = [item(number, 1, None, "labeled", (text,), f"id {number}") for number, text in enumerate(texts)]

    def sides(threshold):
        data = Data(test_size=0.3, dev_size=0.2, split_by=split_by, near_duplicate_threshold=threshold)
        chosen = selection.select(spooled(tmp_path, data, rows), data, 0)
        return {name: {number % 40 for number in found.tolist()} for name, found in chosen.rows.items() if len(found)}

    for one, other in itertools.combinations(sides(0.7).values(), 2):
        assert one and other and not one & other
    assert any(one & other for one, other in itertools.combinations(sides(None).values(), 2))


def test_a_text_is_sketched_once_however_often_it_is_there_and_compared(tmp_path, monkeypatch):
    rows = [
        item(number, number % 4, None, "raw" if number % 4 == 3 else "labeled", TEXTS[number % 4 // 3], f"id {number}")
        for number in range(60)
    ]
    data = Data(near_duplicate_threshold=0.9)
    held = spooled(tmp_path, data, rows)
    before, sketched = set(tmp_path.iterdir()), []

    def sketches(dialogues, folder):
        sketched.append(len(dialogues))
        return Sketches(dialogues, folder)

    monkeypatch.setattr(selection, "Sketches", sketches)
    chosen = selection.select(held, data, 0)
    assert sketched == [2]
    assert sum(map(len, chosen.rows.values())) == 2
    assert set(tmp_path.iterdir()) == before, "no temporary file is left behind"


def test_a_view_of_a_spool_is_a_sequence_of_its_dialogues(tmp_path):
    rows = [item(number, 3, None, "raw", (f"text {number}", "你好"), f"id {number}") for number in range(9)]
    view = View(spooled(tmp_path, Data(), rows, cuts=(2, 5)), np.array([0, 4, 2, 8, 4]))
    assert len(view) == 5
    assert numbers(view) == [view[number].metadata["number"] for number in range(5)] == [0, 4, 2, 8, 4]
    assert numbers(view[1:4]) == [4, 2, 8] and numbers([view[-1]]) == [4]
    with pytest.raises(IndexError):
        view[5]
