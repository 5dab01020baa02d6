"""A round keeps good replies of every length, at most one per prompt, and is there whole or not at all."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_jax import pseudo_labels
from ssl_jax.config import PseudoLabels
from ssl_jax.dialogue import Dialogue, Turn
from ssl_jax.dialogue_model import Reply
from ssl_jax.pseudo_labels import Candidate, choose_prompts, filter_candidates

KEEP_ALL = PseudoLabels(keep_fraction=1.0, length_buckets=1)


def prompt(number=0, text="what do you think of the weather today"):
    return Dialogue((Turn("user", text),), id=f"p{number}")


def candidate(text, *, number=0, tokens=None, logprob=-5.0, finish_reason="stop", context=None):
    question = prompt(number) if context is None else prompt(number, context)
    return Candidate(question, reply(text, len(text.split()) if tokens is None else tokens, logprob, finish_reason))


def reply(text: str, tokens: int, logprob: float, finish_reason: str) -> Reply:
    return Reply(text, (7,) * tokens, (logprob,), finish_reason)


def texts(kept):
    return [one.reply.text for one in kept]


# Filters --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (candidate("it is rather cold here"), None),
        (candidate("it is rather cold here", finish_reason="length"), "unfinished"),
        (candidate("cold outside"), "short"),
        (candidate("", tokens=5), "short"),
        (candidate("so so cold"), None),
        (candidate("i like it i like it i like it i like it"), "repetition"),
        (candidate("what do you think of the weather today"), "copy"),
        (candidate("what do you think of the weather now my friend"), None),
        (candidate("yes it is", context="Yes it is"), "copy"),
        (candidate("我觉得今天天气很好", tokens=9), None),
        (candidate("好好好好好好好好好", tokens=9), "repetition"),
    ],
)
def test_each_filter_removes_what_it_is_for_and_says_so(reply, reason):
    kept, removed = filter_candidates([[reply]], KEEP_ALL)
    assert texts(kept) == ([] if reason else [reply.reply.text])
    assert {name: count for name, count in removed.items() if count} == ({reason: 1} if reason else {})


def test_thresholds_are_inclusive():
    """Ten words hold seven 4-grams; three of them from the context are a share of 3/7."""
    reply = candidate("the weather today is cold and i stay at home", context="so the weather today is cold and grey")
    for limit, count in ((3 / 7, 1), (3 / 7 - 0.01, 0)):
        kept, _ = filter_candidates([[reply]], KEEP_ALL.model_copy(update={"max_copy": limit}))
        assert len(kept) == count
    assert len(filter_candidates([[candidate("a b c")]], KEEP_ALL.model_copy(update={"min_reply_tokens": 3}))[0]) == 1


def test_the_best_good_reply_of_a_prompt_is_kept_and_no_other():
    drawn = [
        candidate("the sun shines all day", logprob=-9.0),
        candidate("rain falls on every roof", logprob=-2.0),
        candidate("a better but unfinished one", logprob=-1.0, finish_reason="length"),
    ]
    kept, removed = filter_candidates([drawn], KEEP_ALL)
    assert texts(kept) == ["rain falls on every roof"]
    assert (removed["not_best"], removed["unfinished"]) == (1, 1)


def test_score_is_a_mean_over_the_tokens_and_the_end():
    assert candidate("x", tokens=4, logprob=-10.0).score == -2.0


def test_the_same_reply_is_accepted_only_so_often_whatever_its_case():
    drawn = [[candidate("i do not know" if n % 2 else "I do not know", number=n)] for n in range(6)]
    drawn.append([candidate("something else entirely then", number=6)])
    kept, removed = filter_candidates(drawn, KEEP_ALL.model_copy(update={"max_duplicates": 2}))
    assert [one.prompt.id for one in kept] == ["p0", "p1", "p6"]
    assert removed["frequent"] == 4


def test_a_prompt_whose_best_reply_is_too_frequent_gets_its_second_best():
    drawn = [[candidate("i do not know", number=0)]]
    drawn.append([candidate("i do not know", number=1, logprob=-1.0), candidate("ask me again tomorrow", number=1)])
    kept, _ = filter_candidates(drawn, KEEP_ALL.model_copy(update={"max_duplicates": 1}))
    assert texts(kept) == ["i do not know", "ask me again tomorrow"]


def test_the_share_by_score_is_taken_from_every_length():
    """Short replies score better per token here; a global threshold would keep them alone."""
    replies = [(4 + n % 4 + 10 * (n >= 20), -1.0 - n) for n in range(40)]
    drawn = [
        [candidate(f"unique reply number {n}", number=n, tokens=tokens, logprob=score * (tokens + 1))]
        for n, (tokens, score) in enumerate(replies)
    ]
    kept, removed = filter_candidates(drawn, PseudoLabels(keep_fraction=0.5, length_buckets=2))
    lengths = [one.reply.tokens for one in kept]
    assert sum(length < 10 for length in lengths) == 10 and sum(length > 10 for length in lengths) == 10
    assert removed["score"] == 20
    # The best of each bucket, in the order of their prompts.
    assert [one.prompt.id for one in kept] == [f"p{n}" for n in (*range(10), *range(20, 30))]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), number=st.integers(0, 25), fraction=st.sampled_from([0.25, 0.5, 1.0]), buckets=st.integers(1, 5))
def test_at_most_one_reply_per_prompt_and_every_candidate_is_accounted_for(data, number, fraction, buckets):
    reply = st.builds(
        candidate,
        st.sampled_from(["short", "one two three four", "five six seven eight nine ten", "a a a a a a a a a"]),
        logprob=st.floats(-50, -0.1),
        finish_reason=st.sampled_from(["stop", "stop", "length"]),
    )
    drawn = [data.draw(st.lists(reply, max_size=3)) for _ in range(number)]
    drawn = [[Candidate(prompt(n), one.reply) for one in replies] for n, replies in enumerate(drawn)]
    kept, removed = filter_candidates(drawn, PseudoLabels(keep_fraction=fraction, length_buckets=buckets))
    ids = [one.prompt.id for one in kept]
    assert len(set(ids)) == len(ids)
    assert ids == sorted(ids, key=lambda name: int(name[1:]))
    assert len(kept) + sum(removed.values()) == sum(map(len, drawn))
    assert all(one in drawn[int(one.prompt.id[1:])] for one in kept)


@pytest.mark.parametrize("survivors", [1, 2, 4, 5, 12, 20, 41])
def test_the_kept_share_is_the_configured_one_within_one_reply(survivors):
    drawn = [[candidate(f"unique reply number {n}", number=n, tokens=4 + n)] for n in range(survivors)]
    kept, _ = filter_candidates(drawn, PseudoLabels(keep_fraction=0.5, length_buckets=4))
    assert abs(len(kept) - 0.5 * survivors) < 1


# Prompts --------------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(total=st.integers(1, 40), per_round=st.integers(1, 50), seed=st.integers(0, 5))
def test_all_prompts_are_answered_before_any_comes_twice(total, per_round, seed):
    chosen = PseudoLabels(prompts_per_round=per_round)
    rounds = [choose_prompts(total, chosen, number, seed) for number in range(8)]
    for answered in rounds:
        assert len(set(answered)) == len(answered) == min(per_round, total)
    if per_round <= total:
        sequence = [index for answered in rounds for index in answered]
        for first in range(0, len(sequence) - total + 1, total):
            assert sorted(sequence[first : first + total]) == list(range(total))
    assert rounds == [choose_prompts(total, chosen, number, seed) for number in range(8)]


def test_the_seed_decides_the_order_of_prompts():
    chosen = PseudoLabels(prompts_per_round=30)
    assert choose_prompts(100, chosen, 0, seed=0) != choose_prompts(100, chosen, 0, seed=1)


# Rounds ---------------------------------------------------------------------------------------------------------------


class Teacher:
    """Answers every prompt with what it was given, and remembers how it was asked."""

    def __init__(self, answers):
        self.answers = answers
        self.asked = []

    def draw(self, prompts, settings, **options):
        self.asked.append(options)
        return [self.answers(number) for number, _ in enumerate(prompts)]


def good(number):
    return [
        reply(f"reply {number} is a good one", 6, -3.0 - number, "stop"),
        reply(f"reply {number} was cut", 4, -2.0, "length"),
    ]


def hold(directory, answers, round_number=0, number=6, **changes) -> dict[str, Any]:
    teacher: Any = Teacher(answers)
    options = {"seed": 3, "step": 40, "batch_size": 8, "between": lambda done: None, **changes}
    return pseudo_labels.make_round(
        directory, round_number, teacher, [prompt(n) for n in range(number)], KEEP_ALL, **options
    )


def test_a_round_is_read_back_as_it_was_accepted(tmp_path, monkeypatch):
    monkeypatch.setattr(pseudo_labels, "RECORDS_PER_SHARD", 4)  # several shards, one of them not full
    summary = hold(tmp_path, good)
    assert (summary["prompts"], summary["generated"], summary["accepted"]) == (6, 12, 6)
    assert summary["accept_rate"] == 1.0 and summary["removed"]["unfinished"] == 6
    assert summary["teacher_step"] == 40 and summary["mean_reply_tokens"] == 6

    expected = [
        Dialogue((*prompt(n).turns, Turn("assistant", f"reply {n} is a good one")), id=f"p{n}") for n in range(6)
    ]
    assert pseudo_labels.read_round(tmp_path, 0) == expected
    stored = pseudo_labels.read_summary(tmp_path, 0)
    assert stored is not None
    assert len(stored.pop("sha256")) == 2
    assert stored == json.loads(json.dumps(summary))


def test_a_round_that_accepts_nothing_is_a_round(tmp_path):
    summary = hold(tmp_path, lambda number: [reply("cut off before the", 4, -2.0, "length")])
    assert (summary["accepted"], summary["accept_rate"], summary["mean_score"]) == (0, 0.0, None)
    assert pseudo_labels.read_round(tmp_path, 0) == []
    assert pseudo_labels.read_summary(tmp_path, 0) is not None


def test_a_round_that_fails_while_it_is_written_is_no_round_and_can_be_held_again(tmp_path, monkeypatch):
    def fail(_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Candidate, "to_dialogue", fail)
        with pytest.raises(OSError, match="disk full"):
            hold(tmp_path, good)
    assert pseudo_labels.read_summary(tmp_path, 0) is None
    assert not (tmp_path / "round_0").exists()

    hold(tmp_path, good)
    assert len(pseudo_labels.read_round(tmp_path, 0)) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["round_0"]


def test_a_finished_round_is_never_overwritten(tmp_path):
    hold(tmp_path, good)
    before = {path.name: path.read_bytes() for path in (tmp_path / "round_0").iterdir()}
    with pytest.raises(OSError):
        hold(tmp_path, lambda number: [reply("another reply than before", 4, -2.0, "stop")])
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "round_0").iterdir()}


def test_rounds_and_runs_draw_with_different_seeds_and_the_settings_of_the_run(tmp_path):
    teacher: Any = Teacher(good)
    for seed in (0, 1):
        for number in (0, 1):
            pseudo_labels.make_round(
                tmp_path / str(seed), number, teacher, [prompt()], KEEP_ALL,
                seed=seed, step=1, batch_size=8, between=print,
            )  # fmt: skip
    assert len({asked["seed"] for asked in teacher.asked}) == 4
    assert teacher.asked[0]["num_return_sequences"] == KEEP_ALL.num_return_sequences
    assert teacher.asked[0]["max_prompt_tokens"] == KEEP_ALL.max_prompt_tokens


def test_a_round_is_the_same_whenever_it_is_held(tmp_path):
    for name in ("one", "other"):
        hold(tmp_path / name, good)
    contents = [
        {path.name: path.read_bytes() for path in (tmp_path / name / "round_0").iterdir()} for name in ("one", "other")
    ]
    assert contents[0] == contents[1]
