"""Windows cover every dialogue, rows hold every window, and nothing sees or predicts what it should not."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_jax.data.packing import assemble, cut_windows, pack, stack


@st.composite
def cuts(draw):
    sequence_length = draw(st.integers(1, 16))
    lengths = np.array(draw(st.lists(st.integers(0, 70), max_size=12)), np.int64)
    overlap = draw(st.integers(0, sequence_length - 1))

    def one_for_each(low, high):
        size = len(lengths)
        return np.array(draw(st.lists(st.integers(low, high), min_size=size, max_size=size)), np.int64)

    options = {"overlap": overlap}
    if draw(st.booleans()):
        options["first"] = one_for_each(1, sequence_length)
    if draw(st.booleans()):
        options["prefix_lengths"] = np.minimum(one_for_each(0, 70), lengths)
    return lengths, sequence_length, options


def repeated_prefixes(lengths, sequence_length, options):
    """Tokens of each system turn that later windows repeat: at most half of the places that the overlap leaves."""
    prefix_lengths = options.get("prefix_lengths", np.zeros_like(lengths))
    return np.minimum(prefix_lengths, (sequence_length - options["overlap"]) // 2)


@settings(max_examples=300, deadline=None)
@given(cuts())
def test_windows_predict_every_token_but_the_first_exactly_once_and_fit(cut):
    lengths, sequence_length, options = cut
    windows = cut_windows(lengths, sequence_length, **options)

    predicted = [[] for _ in lengths]
    for record, target_start, stop in zip(windows.record, windows.target_start, windows.stop, strict=True):
        assert target_start < stop, "a window that predicts nothing"
        predicted[record] += range(target_start, stop)
    assert predicted == [list(range(1, length)) for length in lengths]
    assert np.all((windows.sizes >= 1) & (windows.sizes <= sequence_length))
    assert len(windows) == len(windows.sizes)


@settings(max_examples=300, deadline=None)
@given(cuts())
def test_only_later_windows_repeat_context_which_is_the_system_turn_and_the_overlap(cut):
    lengths, sequence_length, options = cut
    windows = cut_windows(lengths, sequence_length, **options)
    prefixes = repeated_prefixes(lengths, sequence_length, options)
    for index, (record, target_start) in enumerate(zip(windows.record, windows.target_start, strict=True)):
        everything = np.arange(lengths[record])
        tokens, _ = windows.piece(index, everything, everything)
        context = tokens[tokens < target_start].tolist()
        if target_start == 1:
            assert context == [0]
            continue
        # The token before the first target is fed in any case; the overlap comes on top.
        recent = range(max(0, target_start - 1 - options["overlap"]), target_start)
        system = range(min(prefixes[record], target_start))
        assert context == sorted({*system, *recent}), "each once, in the order of the dialogue"


@settings(max_examples=100, deadline=None)
@given(cuts())
def test_a_system_turn_of_any_length_leaves_windows_half_of_what_the_overlap_leaves_to_advance(cut):
    lengths, sequence_length, options = cut
    windows = cut_windows(lengths, sequence_length, **options)
    inner = (windows.target_start > 1) & (windows.stop < lengths[windows.record])
    assert np.all(2 * (windows.stop - windows.target_start)[inner] >= sequence_length - options["overlap"])


@settings(max_examples=100, deadline=None)
@given(cuts())
def test_without_overlap_and_system_turn_windows_lie_end_to_end(cut):
    """Nothing is fed twice, and every window but the first and the last is full."""
    lengths, sequence_length, options = cut
    first = options.get("first", np.full(len(lengths), sequence_length))
    windows = cut_windows(lengths, sequence_length, first=first, prefix_lengths=np.zeros_like(lengths))
    expected = []
    for record, length in enumerate(lengths.tolist()):
        edges = [0, length - 1]
        if length - 1 > sequence_length:
            edges[1:1] = range(int(first[record]), length - 1, sequence_length)
        expected += [(record, 0, start, start + 1, stop + 1) for start, stop in itertools.pairwise(edges) if length > 1]
    arrays = (windows.record, windows.prefix, windows.start, windows.target_start, windows.stop)
    assert list(zip(*(array.tolist() for array in arrays), strict=True)) == expected


@settings(max_examples=200, deadline=None)
@given(cut=cuts(), context_weight=st.sampled_from([0.0, 0.5]))
def test_assembled_windows_predict_every_token_once_behind_the_tokens_before_it(cut, context_weight):
    """Token i of dialogue d is 100 d + i, so that a place of a row says where it comes from."""
    lengths, sequence_length, options = cut
    windows = cut_windows(lengths, sequence_length, **options)
    prefixes = repeated_prefixes(lengths, sequence_length, options)
    dialogues = [100 * number + np.arange(length) for number, length in enumerate(lengths)]
    masks = [tokens % 3 == 0 for tokens in dialogues]
    weights = {}
    for members in pack(windows.sizes, sequence_length):
        pieces = []
        for index in members:
            record = windows.record[index]
            pieces.append(windows.piece(index, dialogues[record], masks[record], context_weight))
            assert len(pieces[-1][0]) == windows.sizes[index] + 1
        row = assemble(pieces, sequence_length)
        for segment, index in enumerate(members, start=1):
            places = row["segment_ids"] == segment
            tokens, targets, loss_weights = (row[name][places] for name in ("tokens", "targets", "loss_weights"))
            number, target_start = windows.record[index], windows.target_start[index]
            assert np.all(targets[loss_weights > 0] == tokens[loss_weights > 0] + 1)
            predicted = targets % 100 >= target_start
            assert not loss_weights[~predicted].any(), "what a window repeats, it does not learn again"
            repeated = min(prefixes[number], target_start) if target_start > 1 else 0
            assert tokens[:repeated].tolist() == dialogues[number][:repeated].tolist(), "the system turn comes first"
            for target, weight in zip(targets[predicted].tolist(), loss_weights[predicted].tolist(), strict=True):
                assert target not in weights
                weights[target] = weight
    expected = {
        int(token): 1.0 if on else context_weight
        for tokens, mask in zip(dialogues, masks, strict=True)
        for token, on in zip(tokens[1:], mask[1:], strict=True)
    }
    assert weights == expected


def test_a_piece_weighs_what_counts_where_it_is_predicted_for_the_first_time():
    windows = cut_windows(np.array([9]), 4, overlap=1)
    tokens, weights = windows.piece(1, 10 * np.arange(9), np.array([0, 1, 1, 0, 1, 1, 0, 1, 1]))
    assert tokens.tolist() == [30, 40, 50, 60, 70]
    assert weights.tolist() == [0, 0, 1, 0, 1]


def test_windows_and_rows_cannot_be_given_other_contents():
    windows, rows = cut_windows(np.array([9]), 4), pack(np.array([1]), 4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        windows.stop = windows.start  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(dataclasses.FrozenInstanceError):
        rows.members = rows.starts  # pyright: ignore[reportAttributeAccessIssue]


def test_a_dialogue_that_fits_is_one_window_whatever_its_first_window_should_be():
    windows = cut_windows(np.array([9, 10]), 8, first=np.array([3, 3]))
    assert windows.record.tolist() == [0, 1, 1]
    assert windows.sizes.tolist() == [8, 3, 6]


@pytest.mark.parametrize("overlap", [-1, 8])
def test_overlap_must_leave_room_to_advance(overlap):
    with pytest.raises(ValueError, match="overlap"):
        cut_windows(np.array([20]), 8, overlap=overlap)


@settings(max_examples=200, deadline=None)
@given(capacity=st.integers(1, 40), data=st.data())
def test_rows_partition_the_windows_and_never_overflow(capacity, data):
    sizes = np.array(data.draw(st.lists(st.integers(1, capacity), max_size=60)), np.int64)
    rows = pack(sizes, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(sizes)))
    assert all(0 < sizes[row].sum() <= capacity for row in rows)


@settings(max_examples=300, deadline=None)
@given(capacity=st.integers(1, 40), data=st.data())
def test_every_window_goes_where_it_fits_best(capacity, data):
    """One by one, the largest first: to the row with the fewest places left that hold it, the last one changed."""
    sizes = np.array(data.draw(st.lists(st.integers(1, capacity), max_size=60)), np.int64)
    rows, left, changed = [], [], []
    for turn, index in enumerate(np.argsort(-sizes, kind="stable").tolist()):
        fitting = [row for row in range(len(rows)) if left[row] >= sizes[index]]
        best = min(fitting, key=lambda row: (left[row], -changed[row]), default=len(rows))
        if best == len(rows):
            rows.append([])
            left.append(capacity)
            changed.append(turn)
        rows[best].append(index)
        left[best] -= sizes[index]
        changed[best] = turn
    assert list(pack(sizes, capacity)) == rows


def test_packed_rows_are_a_sequence():
    rows = pack(np.array([3, 2, 4, 1]), 4)
    assert [rows[0], rows[-1], rows[1:]] == [[2], [1], [[0, 3], [1]]] and len(rows) == 3
    with pytest.raises(IndexError):
        rows[3]


@settings(max_examples=100, deadline=None)
@given(capacity=st.integers(1, 40), data=st.data())
def test_no_two_rows_could_be_one(capacity, data):
    """What best fit guarantees: a window opens a row only if it fits in none, so no two rows fit together."""
    sizes = np.array(data.draw(st.lists(st.integers(1, capacity), min_size=2, max_size=60)), np.int64)
    fills = sorted(int(sizes[row].sum()) for row in pack(sizes, capacity))
    assert len(fills) < 2 or fills[0] + fills[1] > capacity


@pytest.mark.parametrize("capacity", [256, 1024])
def test_rows_of_dialogues_like_people_have_are_97_percent_full(capacity):
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.3, 0.9, 3000).astype(int), 2, 4000)  # median 74 tokens, some beyond a row
    windows = cut_windows(lengths, capacity, first=rng.integers(1, capacity + 1, len(lengths)))
    rows = pack(windows.sizes, capacity)
    assert windows.sizes.sum() / (len(rows) * capacity) >= 0.97


def test_order_of_the_input_decides_who_shares_a_row():
    sizes = np.array([4, 4, 4, 4])
    assert list(pack(sizes, 8)) == [[0, 1], [2, 3]]


def test_a_window_beyond_the_capacity_is_an_error():
    with pytest.raises(ValueError, match="9 places does not fit a row of 8"):
        pack(np.array([3, 9]), 8)


def test_assembled_row_shifts_targets_restarts_positions_and_numbers_segments():
    row = assemble(
        [
            (np.array([10, 11, 12]), np.array([9.0, 0.0, 1.0])),
            (np.array([20, 21]), np.array([9.0, 0.5])),
        ],
        5,
    )
    expected = {
        "tokens": [10, 11, 20, 0, 0],
        "targets": [11, 12, 21, 0, 0],
        "loss_weights": [0.0, 1.0, 0.5, 0.0, 0.0],  # a first token's own weight (9) has no place
        "positions": [0, 1, 0, 0, 0],
        "segment_ids": [1, 1, 2, 0, 0],
    }
    assert {name: array.tolist() for name, array in row.items()} == expected
    assert {name: array.dtype for name, array in row.items()} == {
        name: np.float32 if name == "loss_weights" else np.int32 for name in expected
    }


def test_pieces_beyond_the_row_are_an_error_not_a_cut():
    with pytest.raises(ValueError):
        assemble([(np.arange(5), np.ones(5)), (np.arange(4), np.ones(4))], 6)


def test_stack_fills_up_with_rows_of_padding():
    row = assemble([(np.array([1, 2, 3]), np.ones(3))], 4)
    batch = stack([row], 3, 4)
    assert all(array.shape == (3, 4) for array in batch.values())
    assert batch["tokens"][0].tolist() == [1, 2, 0, 0]
    assert not any(array[1:].any() for array in batch.values())
