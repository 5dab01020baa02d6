"""A batch is a function of its step's number: not of the order of access, the processes, or where a run resumed."""

import collections
import dataclasses
import threading
import time

import numpy as np
import pytest

from ssl_jax.data import shards
from ssl_jax.data.streams import Batches, PackedStream, Phase
from ssl_jax.data.tokenizer import DialogueTokenizer, EncodedDialogue
from ssl_jax.dialogue import Dialogue, Turn

LENGTH = 16
LENGTHS = np.random.default_rng(3).integers(2, 45, 30)  # some dialogues need several windows
PREFIX_LENGTHS = np.minimum(LENGTHS, np.arange(30) % 8)


def dialogues(offset=0):
    """Token i of dialogue d is 1000 d + i (+ offset), so that a token says where it comes from."""
    rng = np.random.default_rng(4)
    return [
        EncodedDialogue(
            id=str(number),
            tokens=(offset + 1000 * number + np.arange(length)).astype(np.int32),
            loss_mask=(rng.random(length) < 0.5).astype(np.uint8),
            reply_bytes=1,
        )
        for number, length in enumerate(LENGTHS)
    ]


def stream(seed=0, offset=0, **options):
    return PackedStream(dialogues(offset), LENGTHS, sequence_length=LENGTH, seed=seed, **options)


def rows_equal(one, other):
    return all(np.array_equal(one[name], other[name]) for name in one) and one.keys() == other.keys()


def epoch_rows(packed, epoch):
    first = sum(packed.rows_in_epoch(number) for number in range(epoch))
    return [packed[first + number] for number in range(packed.rows_in_epoch(epoch))]


def test_a_row_is_the_same_whatever_was_read_before():
    in_order = stream()
    expected = [in_order[number] for number in range(150)]
    assert in_order.epoch_of(149) >= 2, "the test spans epochs"
    shuffled = stream()
    for number in np.random.default_rng(0).permutation(150).tolist():
        assert rows_equal(shuffled[number], expected[number])
    assert rows_equal(stream()[149], expected[149])


@pytest.mark.parametrize("repeated", [{}, {"overlap": 5}, {"overlap": 5, "prefix_lengths": PREFIX_LENGTHS}])
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_an_epoch_predicts_every_token_but_the_first_of_each_dialogue_once(epoch, repeated):
    rows = epoch_rows(stream(context_weight=1.0, **repeated), epoch)
    predicted = np.concatenate([row["targets"][row["loss_weights"] > 0] for row in rows])
    expected = np.concatenate([dialogue.tokens[1:] for dialogue in dialogues()])
    assert sorted(predicted.tolist()) == sorted(expected.tolist())
    for row in rows:
        learned = row["loss_weights"] > 0 if repeated else row["segment_ids"] > 0
        assert np.array_equal(row["targets"][learned], row["tokens"][learned] + 1), "a target is the next token"


def test_loss_weights_are_the_mask_and_the_context_weight_elsewhere():
    mask = {int(token): on for dialogue in dialogues() for token, on in zip(*_columns(dialogue), strict=True)}
    for row in epoch_rows(stream(context_weight=0.25), 0):
        real = row["segment_ids"] > 0
        expected = [1.0 if mask[token] else 0.25 for token in row["targets"][real].tolist()]
        np.testing.assert_allclose(row["loss_weights"][real], expected)
        assert not row["loss_weights"][~real].any()


def _columns(dialogue):
    return dialogue.tokens, dialogue.loss_mask


@pytest.mark.parametrize("overlap", [0, 4])
def test_later_windows_begin_with_the_system_turn_and_the_overlap_and_do_not_learn_them(overlap):
    """A prefix of at most 5 tokens fits into half of what the overlap leaves, so that all of it is repeated."""
    prefix_lengths = np.minimum(PREFIX_LENGTHS, 5)
    packed = stream(context_weight=0.25, overlap=overlap, prefix_lengths=prefix_lengths)
    later = 0
    for row in epoch_rows(packed, 0):
        for segment in range(1, row["segment_ids"].max() + 1):
            places = row["segment_ids"] == segment
            tokens, weights = row["tokens"][places] % 1000, row["loss_weights"][places]
            prefix = prefix_lengths[row["tokens"][places][0] // 1000]
            repeated = int(np.flatnonzero(weights)[0])  # places before the one that predicts the first target
            assert np.all(weights[repeated:] > 0), "context first, then targets"
            if repeated or tokens[0]:
                later += 1
                last = int(tokens[repeated])
                recent = range(max(0, last - overlap), last + 1)
                system = range(min(prefix, last + 1))
                assert tokens[: repeated + 1].tolist() == sorted({*system, *recent})
    assert later > 20


def test_long_dialogues_are_counted_with_the_windows_that_they_are_cut_into():
    packed = stream(overlap=5, prefix_lengths=PREFIX_LENGTHS)
    long = LENGTHS - 1 > LENGTH
    pieces = sum(int(row["segment_ids"].max()) for row in epoch_rows(packed, 1))
    assert packed.long_dialogues(1) == (long.sum(), pieces - (~long).sum())
    assert packed.long_dialogues(1)[1] > stream().long_dialogues(1)[1] > 2 * long.sum()
    short = PackedStream(dialogues()[:3], np.array([2, 9, 17]), sequence_length=LENGTH, seed=0)
    assert short.long_dialogues() == (0, 0)


def test_epochs_and_seeds_cut_and_shuffle_differently():
    first, second = epoch_rows(stream(), 0), epoch_rows(stream(), 1)
    other_seed = epoch_rows(stream(seed=1), 0)
    for one, other in ((first, second), (first, other_seed)):
        # A dialogue that fills a row by itself may come back as the same row, at another place.
        shared = {row["tokens"].tobytes() for row in one} & {row["tokens"].tobytes() for row in other}
        assert len(shared) < len(one) / 4
        assert not any(map(rows_equal, one[:10], other[:10]))
    # Long dialogues are cut at other places, not only moved.
    starts = [{int(t) for row in rows for t in row["tokens"][row["positions"] == 0]} for rows in (first, second)]
    assert starts[0] != starts[1]


def test_rows_of_an_epoch_are_counted_and_found():
    packed = stream()
    counts = [packed.rows_in_epoch(epoch) for epoch in range(3)]
    edges = np.cumsum([0, *counts])
    assert [stream().epoch_of(int(row)) for row in edges] == [0, 1, 2, 3]
    assert [stream().epoch_of(int(row) - 1) for row in edges[1:]] == [0, 1, 2]
    rows = epoch_rows(packed, 0)
    filled = np.mean([row["segment_ids"] > 0 for row in rows])
    assert packed.fill() == pytest.approx(float(filled)) and filled > 0.9


def test_the_order_of_a_seed_is_this_one():
    """Runs go on with the order that they began with: whatever changes this list breaks them."""
    packed = stream(overlap=5, prefix_lengths=PREFIX_LENGTHS)
    starts = [[row["tokens"][row["segment_ids"] == 1][0] for row in epoch_rows(packed, epoch)[:6]] for epoch in (0, 1)]
    assert starts == [[20, 12000, 12000, 22000, 22000, 5000], [23000, 13000, 16007, 25000, 27000, 7000]]


def test_passes_are_whole_at_the_end_of_an_epoch_and_grow_evenly_within_it():
    packed = stream()
    assert packed.passes(0) == 0
    first = 0
    for epoch in range(3):
        rows = packed.rows_in_epoch(epoch)
        for row in range(1, rows + 1):
            assert packed.passes(first + row) == epoch + row / rows
        first += rows


def test_threads_that_reach_an_epoch_at_once_agree_where_it_begins(monkeypatch):
    expected, packed = stream(), stream()
    make_plan = packed._make_plan
    monkeypatch.setattr(packed, "_plan", lambda epoch: (make_plan(epoch), time.sleep(0.01))[0])
    threads = [threading.Thread(target=packed.epoch_of, args=(150,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [packed.epoch_of(row) for row in range(150)] == [expected.epoch_of(row) for row in range(150)]


# Weights --------------------------------------------------------------------------------------------------------------

WEIGHTS = np.tile([0.2, 1.0, 2.5], 10)


def times_predicted(packed, epochs):
    """How often epochs together predict each token."""
    rows = [row for epoch in epochs for row in epoch_rows(packed, epoch)]
    predicted = np.concatenate([row["targets"][row["loss_weights"] > 0] for row in rows])
    return collections.Counter(predicted.tolist())


@pytest.mark.parametrize("repeated", [{}, {"overlap": 5, "prefix_lengths": PREFIX_LENGTHS}])
def test_epochs_predict_every_token_as_often_as_the_dialogues_weight_says(repeated):
    packed = stream(context_weight=1.0, weights=WEIGHTS, **repeated)
    counts = times_predicted(packed, range(10))
    expected = {int(t): 10 * w for d, w in zip(dialogues(), WEIGHTS, strict=True) for t in d.tokens[1:]}
    assert counts == expected
    in_one = times_predicted(packed, [4])
    for number, (dialogue, weight) in enumerate(zip(dialogues(), WEIGHTS, strict=True)):
        times = {in_one[int(token)] for token in dialogue.tokens[1:]}
        assert len(times) == 1 and times <= {np.floor(weight), np.ceil(weight)}, f"dialogue {number}, all of it"


def test_copies_of_a_long_dialogue_are_cut_at_different_places():
    packed = stream(weights=np.full(30, 8.0))
    stops = collections.defaultdict(set)
    for row in epoch_rows(packed, 0):
        for segment in range(1, row["segment_ids"].max() + 1):
            last = int(row["targets"][row["segment_ids"] == segment][-1])
            stops[last // 1000].add(last % 1000)
    assert all((len(stops[number]) > 3) == (length - 1 > LENGTH) for number, length in enumerate(LENGTHS))


def test_counts_of_a_weighted_epoch_are_those_of_its_rows():
    packed = stream(weights=WEIGHTS, overlap=5)
    for epoch in range(3):
        rows = epoch_rows(packed, epoch)
        tokens = sum(int((row["segment_ids"] > 0).sum()) for row in rows)
        pieces = collections.Counter(
            int(row["tokens"][row["segment_ids"] == segment][0] // 1000)
            for row in rows
            for segment in range(1, row["segment_ids"].max() + 1)
        )
        long = {number: count for number, count in pieces.items() if LENGTHS[number] - 1 > LENGTH}
        assert packed.tokens_in_epoch(epoch) == tokens
        assert packed.fill(epoch) == pytest.approx(tokens / (len(rows) * LENGTH)) and packed.fill(epoch) > 0.9
        assert packed.long_dialogues(epoch) == (len(long), sum(long.values()))


def test_weights_of_one_change_nothing():
    plain, weighted = stream(overlap=5), stream(overlap=5, weights=np.ones(30))
    assert all(rows_equal(plain[number], weighted[number]) for number in range(120))


def test_weighted_rows_are_the_same_whatever_was_read_before():
    in_order, late = stream(weights=WEIGHTS), stream(weights=WEIGHTS)
    expected = [in_order[number] for number in range(150)]
    assert all(rows_equal(late[number], expected[number]) for number in (149, 3, 90, 0))
    assert not all(rows_equal(stream(seed=1, weights=WEIGHTS)[number], expected[number]) for number in range(10))


def test_epochs_that_show_nothing_are_passed_over():
    """Three dialogues, each in one epoch of 40: nearly all epochs are empty."""
    packed = PackedStream(dialogues()[:3], LENGTHS[:3], sequence_length=64, seed=0, weights=np.full(3, 1 / 40))
    rows = [packed.rows_in_epoch(epoch) for epoch in range(80)]
    assert sum(rows) == 6 and rows.count(1) == 6
    full = [epoch for epoch, count in enumerate(rows) if count]
    assert [packed.epoch_of(row) for row in range(6)] == full
    assert [packed.passes(row + 1) for row in range(6)] == [epoch + 1 for epoch in full]
    empty = rows.index(0)
    assert (packed.fill(empty), packed.tokens_in_epoch(empty), packed.long_dialogues(empty)) == (1.0, 0, (0, 0))


@pytest.mark.parametrize("lengths", [[], [1, 1]])
def test_dialogues_that_predict_nothing_are_refused_instead_of_searched_forever(lengths):
    encoded = [EncodedDialogue(str(n), np.array([5], np.int32), np.array([0], np.uint8), 0) for n in lengths]
    with pytest.raises(ValueError, match="stream needs"):
        PackedStream(encoded, np.array(lengths, int), sequence_length=8, seed=0)


# Batches --------------------------------------------------------------------------------------------------------------

PHASE = Phase(start=10, stop=17, rows=(("labeled", 4), ("raw", 8)), first_row={"labeled": 40, "raw": 3})
STREAM_IDS = {"labeled": 0, "raw": 1}


def batches(phase=PHASE, rows=None):
    streams = {"labeled": stream(), "raw": stream(seed=0, offset=500_000)}
    return Batches(phase, streams, STREAM_IDS, sequence_length=LENGTH, rows=rows)


def test_a_batch_holds_the_next_rows_of_every_stream_in_order():
    labeled, raw = stream(), stream(offset=500_000)
    batch = batches()[2]
    expected = [labeled[40 + 2 * 4 + i] for i in range(4)] + [raw[3 + 2 * 8 + i] for i in range(8)]
    for place, row in enumerate(expected):
        assert rows_equal({name: batch[name][place] for name in row}, row)
    assert batch["stream"].tolist() == [0] * 4 + [1] * 8
    assert batch["stream"].dtype == np.int32
    assert len(batches()) == 7


@pytest.mark.parametrize("step", [10, 13, 17])
def test_passes_before_a_step_are_those_of_the_rows_drawn_until_then(step):
    expected = {"labeled": stream().passes(40 + 4 * (step - 10)), "raw": stream().passes(3 + 8 * (step - 10))}
    assert batches().passes(step) == expected
    resumed = dataclasses.replace(PHASE, start=step, first_row=PHASE.drawn_before(step))
    assert batches(resumed).passes(step) == expected


@pytest.mark.parametrize("rows", [range(12), range(3, 6), [0, 1, 10, 11], np.array([5])])
def test_a_process_reads_its_rows_of_the_global_batch(rows):
    whole, part = batches(), batches(rows=rows)
    for index in (0, 6):
        assert rows_equal(part[index], {name: array[list(rows)] for name, array in whole[index].items()})


@pytest.mark.parametrize("step", [11, 14, 16])
def test_a_run_resumed_at_any_step_reads_the_identical_rest(step):
    whole, done = batches(), step - PHASE.start
    first_row = {name: PHASE.first_row[name] + count * done for name, count in PHASE.rows}
    rest = batches(dataclasses.replace(PHASE, start=step, first_row=first_row))
    assert len(rest) == len(whole) - done
    assert all(rows_equal(rest[index], whole[done + index]) for index in range(len(rest)))


@pytest.mark.parametrize(("threads", "prefetch"), [(0, 0), (1, 1), (1, 4), (4, 4)])
def test_the_batches_are_the_same_whoever_reads_ahead(threads, prefetch):
    source = batches()
    read = list(source.read(threads=threads, prefetch=prefetch))
    assert len(read) == len(source)
    assert all(rows_equal(batch, source[index]) for index, batch in enumerate(read))


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Dialogues of a prepared directory that are read one by one from their shards."""
    rng = np.random.default_rng(0)
    records = []
    for number in range(60):
        tokens = rng.integers(0, 300, rng.integers(2, 150)).astype(np.int32)
        encoded = EncodedDialogue(str(number), tokens, np.ones(len(tokens), np.uint8), 1)
        records.append(shards.Record.of(encoded, Dialogue((Turn("text", "x"),), id=str(number))))
    tokenizer = DialogueTokenizer.fit(["some text"], 300)
    directory = tmp_path_factory.mktemp("stored") / "prepared"
    prepared = shards.write(directory, {"raw_train": records}, tokenizer, {}, [])
    split = prepared.encoded("raw_train")
    split._fits_in_memory = False
    return split, prepared.lengths("raw_train")


def test_a_run_resumed_at_fifty_moments_reads_the_identical_rest(stored):
    """From records on disk, over several epochs, whatever was read before."""
    dialogues, lengths = stored
    phase = Phase(0, 400, (("raw", 4),), {"raw": 0})

    def reader(start):
        stream = PackedStream(dialogues, lengths, sequence_length=64, seed=3, overlap=8)
        resumed = dataclasses.replace(phase, start=start, first_row={"raw": 4 * start})
        return Batches(resumed, {"raw": stream}, {"raw": 0}, sequence_length=64)

    whole = reader(0)
    for start in np.random.default_rng(0).choice(390, 50, replace=False):
        rest = reader(int(start))
        assert all(rows_equal(rest[index], whole[start + index]) for index in (0, 1, 9))
