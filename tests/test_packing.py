"""Windows cover every dialogue, rows hold every window, and nothing sees or predicts what it should not."""

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
    first = None
    if draw(st.booleans()):
        size = len(lengths)
        first = np.array(draw(st.lists(st.integers(1, sequence_length), min_size=size, max_size=size)), np.int64)
    return lengths, sequence_length, overlap, first


@settings(max_examples=300, deadline=None)
@given(cuts())
def test_windows_predict_every_token_but_the_first_exactly_once_and_fit(cut):
    lengths, sequence_length, overlap, first = cut
    windows = cut_windows(lengths, sequence_length, overlap=overlap, first=first)

    predicted = [[] for _ in lengths]
    for record, target_start, stop in zip(windows.record, windows.target_start, windows.stop, strict=True):
        assert target_start < stop, "a window that predicts nothing"
        predicted[record] += range(target_start, stop)
    assert predicted == [list(range(1, length)) for length in lengths]
    assert np.all((windows.sizes >= 1) & (windows.sizes <= sequence_length))
    assert len(windows) == len(windows.sizes)


@settings(max_examples=300, deadline=None)
@given(cuts())
def test_only_later_windows_repeat_context_and_exactly_the_overlap_of_it(cut):
    lengths, sequence_length, overlap, first = cut
    windows = cut_windows(lengths, sequence_length, overlap=overlap, first=first)
    context = windows.target_start - 1 - windows.start
    is_first = windows.target_start == 1
    assert not np.any(context[is_first])
    # Where the dialogue has not yet had as many tokens as the overlap, all of them are repeated.
    assert np.array_equal(context[~is_first], np.minimum(overlap, windows.target_start[~is_first] - 1))


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
    assert pack(sizes, 8) == [[0, 1], [2, 3]]


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
