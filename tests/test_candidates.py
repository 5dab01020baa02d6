"""Of what a teacher drew, good drafts of every length become labels, at most one per prompt; each filter counts."""

import dataclasses

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ssl_jax.config import PseudoLabels
from ssl_jax.dialogue import Dialogue, Turn
from ssl_jax.pseudo_labels.candidates import Candidate, Scores, screen, select, shuffled
from ssl_jax.replies import Reply

KEEP_ALL = PseudoLabels(keep_fraction=1.0, length_buckets=1)


def filter_candidates(drawn, chosen):
    passed, removed = screen(drawn, chosen)
    kept, removed_by_choice = select(passed, chosen)
    return kept, removed | removed_by_choice


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
        # Words that come again in threes, but not in fours.
        (candidate("one two three four one two three five one two three six one two three"), None),
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


def test_the_best_of_a_bucket_are_kept_wherever_they_stand():
    logprobs = [-7.0, -2.0, -9.0, -1.0, -5.0, -3.0]
    drawn = [[candidate(f"unique reply number {n}", number=n, logprob=logprob)] for n, logprob in enumerate(logprobs)]
    kept, _ = filter_candidates(drawn, PseudoLabels(keep_fraction=0.5, length_buckets=1))
    assert [one.prompt.id for one in kept] == ["p1", "p3", "p5"]


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


# Scores, kinds, the control -------------------------------------------------------------------------------------------


def made_up(text, reply, *, given_tokens=4, **options):
    """A context that was made up for a real reply."""
    real = Dialogue((Turn("assistant", reply),), id="real")
    return dataclasses.replace(candidate(text, **options), prompt=real, kind="contexts", given_tokens=given_tokens)


def test_scores_of_a_model_go_before_the_likelihood_of_the_draw():
    drawn = [
        dataclasses.replace(candidate("rain falls on every roof", logprob=-2.0), scores=Scores(-1.5, -3.0)),
        dataclasses.replace(candidate("the sun shines all day", logprob=-9.0), scores=Scores(-1.0, -4.0)),
    ]
    kept, removed = filter_candidates([drawn], KEEP_ALL)
    assert texts(kept) == ["the sun shines all day"] and removed["not_best"] == 1


@pytest.mark.parametrize(
    ("text", "options", "reason"),
    [
        ("how is the weather there", {}, None),
        ("how is the weather there", {"finish_reason": "length"}, "unfinished"),
        ("the weather", {}, "short"),
        ("so what so what so what so what", {}, "repetition"),
        ("It is rather cold here", {}, "copy"),
    ],
)
def test_made_up_contexts_pass_the_same_filters(text, options, reason):
    kept, removed = filter_candidates([[made_up(text, "it is rather cold here", **options)]], KEEP_ALL)
    assert len(kept) == (reason is None)
    assert {name: count for name, count in removed.items() if count} == ({reason: 1} if reason else {})


def test_a_made_up_context_stands_before_the_real_reply():
    dialogue = made_up("how is it there", "cold").to_dialogue()
    assert dialogue == Dialogue((Turn("user", "how is it there"), Turn("assistant", "cold")), id="real")


def test_the_length_of_a_candidate_is_that_of_its_reply_drawn_or_real():
    assert candidate("a drawn reply", tokens=4).reply_tokens == 4
    assert made_up("a drawn context", "a real reply", tokens=4, given_tokens=9).reply_tokens == 9


def test_a_candidate_stays_as_it_was_drawn():
    with pytest.raises(dataclasses.FrozenInstanceError):
        candidate("a drawn reply").drawn_for = "another prompt"  # pyright: ignore[reportAttributeAccessIssue]


def test_made_up_contexts_are_chosen_within_buckets_of_the_reply_s_length():
    drawn = [
        [made_up(f"a made-up context {n}", "some reply", given_tokens=4 + 10 * (n >= 4), logprob=-1.0 - n)]
        for n in range(8)
    ]
    kept, removed = filter_candidates(drawn, PseudoLabels(keep_fraction=0.5, length_buckets=2))
    assert [one.given_tokens for one in kept] == [4, 4, 14, 14] and removed["score"] == 4


@settings(max_examples=50, deadline=None)
@given(number=st.integers(0, 30), seed=st.integers(0, 2**31))
@example(number=2, seed=0)
def test_shuffled_replies_are_a_permutation_in_which_none_keeps_its_prompt(number, seed):
    drawn = [candidate(f"reply {n}", number=n, logprob=-1.0 - n) for n in range(number)]
    exchanged = shuffled(drawn, seed)
    assert [one.prompt for one in exchanged] == [one.prompt for one in drawn]
    assert sorted(texts(exchanged)) == sorted(texts(drawn))
    for one in exchanged:
        assert (
            one.reply.text == f"reply {str(one.drawn_for)[1:]}"
            and one.score == drawn[int(str(one.drawn_for)[1:])].score
        )
        assert number == 1 or one.drawn_for != one.prompt.id
    assert shuffled(drawn, seed) == exchanged


def test_the_seed_decides_who_gets_which_reply():
    drawn = [candidate(f"reply {n}", number=n) for n in range(20)]
    assert shuffled(drawn, 0) != shuffled(drawn, 1)
