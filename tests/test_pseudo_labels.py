"""A round holds labels and where they are from, goes on where it was cut off, and is there whole or not at all."""

import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_jax import model
from ssl_jax.config import PseudoLabels, Sampling
from ssl_jax.data import directions
from ssl_jax.data.tokenizer import DialogueTokenizer
from ssl_jax.dialogue import Dialogue, Turn
from ssl_jax.dialogue_model import DialogueModel
from ssl_jax.pseudo_labels import drawn_pieces, rounds
from ssl_jax.pseudo_labels.candidates import Candidate
from ssl_jax.pseudo_labels.make import Task, _origin, choose, make_round
from ssl_jax.replies import Reply

KEEP_ALL = PseudoLabels(keep_fraction=1.0, length_buckets=1)


def prompt(number=0, text="what do you think of the weather today"):
    return Dialogue((Turn("user", text),), id=f"p{number}")


def reply(text: str, tokens: int, logprob: float, finish_reason: str) -> Reply:
    return Reply(text, (7,) * tokens, (logprob,), finish_reason)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Prompts --------------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(total=st.integers(1, 40), per_round=st.integers(1, 50), seed=st.integers(0, 5))
def test_all_prompts_are_answered_before_any_comes_twice(total, per_round, seed):
    rounds = [choose(total, per_round, number, seed) for number in range(8)]
    for answered in rounds:
        assert len(set(answered)) == len(answered) == min(per_round, total)
    if per_round <= total:
        sequence = [index for answered in rounds for index in answered]
        for first in range(0, len(sequence) - total + 1, total):
            assert sorted(sequence[first : first + total]) == list(range(total))
    assert rounds == [choose(total, per_round, number, seed) for number in range(8)]


def test_the_seed_decides_the_order_of_prompts():
    assert choose(100, 30, 0, seed=0) != choose(100, 30, 0, seed=1)


# Rounds ---------------------------------------------------------------------------------------------------------------


class Teacher:
    """Answers every prompt by its number, and remembers how it was asked."""

    def __init__(self, answers):
        self.answers = answers
        self.asked = []

    def draw(self, prompts, settings, **options):
        self.asked.append(options)
        options["between"](len(prompts))
        return [self.answers(number) for number in options["numbers"]]


def good(number):
    return [
        reply(f"reply {number} is a good one", 6, -3.0 - number, "stop"),
        reply(f"reply {number} was cut", 4, -2.0, "length"),
    ]


def hold(directory, answers, round_number=0, number=6, between=lambda done: None, **changes) -> dict[str, Any]:
    teacher: Any = answers if isinstance(answers, Teacher) else Teacher(answers)
    task = Task("replies", directory, round_number, seed=3, step=40, batch_size=8)
    prompts = [prompt(n) for n in range(number)]
    return make_round(task, teacher, prompts, KEEP_ALL.model_copy(update=changes), between)


def test_a_round_is_read_back_as_it_was_accepted(tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "RECORDS_PER_SHARD", 4)  # several shards, one of them not full
    summary = hold(tmp_path, good)
    assert (summary["prompts"], summary["generated"], summary["accepted"]) == (6, 12, 6)
    assert summary["accept_rate"] == 1.0 and summary["removed"]["unfinished"] == 6
    assert summary["teacher_step"] == 40 and summary["mean_reply_tokens"] == 6

    expected = [
        Dialogue((*prompt(n).turns, Turn("assistant", f"reply {n} is a good one")), id=f"p{n}") for n in range(6)
    ]
    assert rounds.read_round(tmp_path, 0) == expected
    stored = rounds.read_summary(tmp_path, 0)
    assert stored is not None
    assert len(stored.pop("sha256")) == 2
    timing = summary.pop("timing")
    assert all(timing[name] > 0 for name in ("generation_seconds", "scoring_seconds", "tokens_per_second"))
    assert stored == json.loads(json.dumps(summary))


def test_a_round_that_accepts_nothing_is_a_round(tmp_path):
    summary = hold(tmp_path, lambda number: [reply("cut off before the", 4, -2.0, "length")])
    assert (summary["accepted"], summary["accept_rate"], summary["mean_score"]) == (0, 0.0, None)
    assert {name: count for name, count in summary["removed"].items() if count} == {"unfinished": 6}
    assert rounds.read_round(tmp_path, 0) == []
    assert rounds.read_summary(tmp_path, 0) is not None


def test_a_round_that_fails_while_it_is_written_is_no_round_and_can_be_held_again(tmp_path, monkeypatch):
    def fail(_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Candidate, "to_dialogue", fail)
        with pytest.raises(OSError, match="disk full"):
            hold(tmp_path, good)
    assert rounds.read_summary(tmp_path, 0) is None
    assert not (tmp_path / "round_0").exists()

    hold(tmp_path, good)
    assert len(rounds.read_round(tmp_path, 0)) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy_of_round_0", "round_0"]


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
            task = Task("replies", tmp_path / str(seed), number, seed=seed, step=1, batch_size=8)
            make_round(task, teacher, [prompt()], KEEP_ALL, print)
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


def test_rows_say_where_they_are_from_and_how_they_scored(tmp_path):
    hold(tmp_path, good, number=2)
    assert rounds.read_rows(tmp_path, 0) == [
        {
            "id": f"p{n}",
            "messages": [*prompt(n).to_messages(), {"role": "assistant", "content": f"reply {n} is a good one"}],
            "score": (-3.0 - n) / 7,
            "logprob": -3.0 - n,
            "tokens": 6,
            "round": 0,
            "teacher": "ema",
            "teacher_step": 40,
            "seed": 3,
        }
        for n in range(2)
    ]


def test_a_summary_says_how_diverse_and_how_long_the_accepted_replies_are(tmp_path):
    summary = hold(tmp_path, good, number=2)
    # "reply 0 is a good one" and "reply 1 is a good one": of ten pairs of words, three occur twice.
    assert (summary["distinct_2"], summary["mean_drawn_tokens"], summary["mean_score"]) == (0.7, 6, -0.5)


def test_without_weights_the_teacher_is_asked_for_nothing_but_replies(tmp_path):
    """The teacher of these tests cannot score: a pass of its own would fail."""
    hold(tmp_path, good)
    assert not {"forward", "prior", "backward"} & rounds.read_rows(tmp_path, 0)[0].keys()


def test_shuffled_replies_are_stored_with_the_prompt_that_they_were_drawn_for(tmp_path):
    hold(tmp_path, good, shuffle_replies=True)
    rows = rounds.read_rows(tmp_path, 0)
    assert [row["id"] for row in rows] == [f"p{n}" for n in range(6)]
    for row in rows:
        assert row["messages"][-1]["content"] == f"reply {row['drawn_for'][1:]} is a good one"
        assert row["drawn_for"] != row["id"]


# Interrupted rounds ---------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    """Raised where a run would stop."""


@pytest.fixture
def pieces_of_four(monkeypatch):
    """Batches of eight sequences, two for each prompt, one batch a piece."""
    monkeypatch.setattr(drawn_pieces, "PROMPTS_PER_PIECE", 4)
    monkeypatch.setattr(drawn_pieces, "BATCHES_PER_PIECE", 1)


def interrupt(directory, after, **options) -> Path:
    """Holds a round of ten prompts until more than `after` are answered; returns what it left behind."""

    def between(done):
        if done > after:
            raise Interrupted

    with pytest.raises(Interrupted):
        hold(directory, good, number=10, between=between, **options)
    assert rounds.read_summary(directory, 0) is None
    return directory / "round_0.partial"


def asked_when_held_again(directory, **options) -> list[range]:
    teacher = Teacher(good)
    hold(directory, teacher, number=10, **options)
    return [asked["numbers"] for asked in teacher.asked]


@pytest.mark.parametrize(
    ("after", "missing"),
    [(0, [range(4), range(4, 8), range(8, 10)]), (4, [range(4, 8), range(8, 10)]), (8, [range(8, 10)])],
)
def test_an_interrupted_round_draws_only_what_is_missing_and_is_the_undisturbed_one(
    tmp_path, pieces_of_four, after, missing
):
    hold(tmp_path / "undisturbed", good, number=10)
    interrupt(tmp_path / "other", after)
    assert asked_when_held_again(tmp_path / "other") == missing
    assert contents(tmp_path / "other" / "round_0") == contents(tmp_path / "undisturbed" / "round_0")
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == ["copy_of_round_0", "round_0"]


def test_progress_counts_the_prompts_of_the_whole_round(tmp_path, pieces_of_four):
    done: list[int] = []
    hold(tmp_path, good, number=10, between=done.append)
    assert done == [4, 8, 10]


def test_a_round_whose_writing_failed_draws_nothing_again(tmp_path, pieces_of_four, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(rounds, "write", lambda *_: 1 / 0)
        hold(tmp_path, good, number=10)
    assert asked_when_held_again(tmp_path) == []
    assert len(rounds.read_round(tmp_path, 0)) == 10


@pytest.mark.parametrize(
    "damage", [lambda text: text[:-3], lambda text: text.replace(b"good", b"poor"), lambda text: b""]
)
def test_a_damaged_piece_is_drawn_again(tmp_path, pieces_of_four, damage):
    partial = interrupt(tmp_path, after=8)
    path = partial / "piece-0000004.jsonl"
    path.write_bytes(damage(path.read_bytes()))
    assert asked_when_held_again(tmp_path) == [range(4, 8), range(8, 10)]
    assert len(rounds.read_round(tmp_path, 0)) == 10


def test_pieces_of_other_settings_are_drawn_again(tmp_path, pieces_of_four):
    interrupt(tmp_path, after=8)
    changed = {"sampling": Sampling(temperature=0.5)}
    assert asked_when_held_again(tmp_path, **changed) == [range(4), range(4, 8), range(8, 10)]


@pytest.mark.parametrize("change", [{"step": 41}, {"seed": 4}, {"round_number": 1}, {"kind": "contexts"}])
def test_pieces_belong_to_one_teacher_and_one_round(tmp_path, change):
    task = Task("replies", tmp_path, 0, seed=3, step=40, batch_size=8)
    prompts = [prompt(n) for n in range(3)]
    assert _origin(task, prompts, KEEP_ALL) == _origin(task, list(prompts), KEEP_ALL)
    assert _origin(task, prompts, KEEP_ALL) != _origin(dataclasses.replace(task, **change), prompts, KEEP_ALL)
    assert _origin(task, prompts, KEEP_ALL) != _origin(task, prompts[::-1], KEEP_ALL)


@given(st.text(), st.lists(st.floats(allow_nan=False)))
@settings(max_examples=50, deadline=None)
def test_a_piece_gives_back_every_text_and_every_bit(tmp_path_factory, text, logprobs):
    folder = tmp_path_factory.mktemp("piece")
    text = text.encode(errors="replace").decode()
    replies = [[Reply(text, (1, 2), tuple(logprobs), "stop", 1, 2)], []]
    drawn, fresh = drawn_pieces.draw(folder, {"seed": 1}, 2, 2, lambda piece: replies)
    assert (drawn, fresh) == (replies, [range(2)])
    assert drawn_pieces.draw(folder, {"seed": 1}, 2, 2, lambda piece: pytest.fail("drawn again")) == (replies, [])


@given(batch=st.integers(1, 5000), repeats=st.integers(1, 64))
def test_pieces_are_whole_batches_and_many_of_them(batch, repeats):
    size, prompts = drawn_pieces.piece_size(batch, repeats), max(1, batch // repeats)
    assert size % prompts == 0 and size >= 256 and size >= 16 * prompts


def test_of_several_processes_the_first_writes_the_round_and_all_find_it(tmp_path, monkeypatch):
    """Two threads stand for two processes on one file system."""
    barrier, wrote = threading.Barrier(2, timeout=30), []
    write_shard = rounds._write_shard

    def index():
        return int(threading.current_thread().name)

    def note(path, rows):
        wrote.append((index(), path.name))
        write_shard(path, rows)

    hold(tmp_path / "one", good, number=10)
    monkeypatch.setattr(rounds, "RECORDS_PER_SHARD", 4)
    hold(tmp_path / "alone", good, number=10)
    monkeypatch.setattr(rounds, "_write_shard", note)
    monkeypatch.setattr(rounds, "wait_for_all", lambda event: barrier.wait())
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", index)
    threads = [
        threading.Thread(target=hold, args=(tmp_path / "both", good), kwargs={"number": 10}, name=str(number))
        for number in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(wrote) == [(0, f"labels-{number:05d}.array_record") for number in range(3)]
    assert contents(tmp_path / "both" / "round_0") == contents(tmp_path / "alone" / "round_0")
    assert rounds.read_round(tmp_path / "both", 0) == rounds.read_round(tmp_path / "one", 0)
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == ["copy_of_round_0", "round_0"]


# With a model ---------------------------------------------------------------------------------------------------------

QUESTIONS = ("is it cold?", "where is it?", "who said so?", "what is that?")
ANSWERS = ("yes it is", "in a small town", "nobody I know of", "not at all")


@pytest.fixture(scope="module")
def teacher() -> DialogueModel:
    """A small model with random weights, far from flat, that knows the direction tokens."""
    tokenizer = DialogueTokenizer.fit([*QUESTIONS, *ANSWERS], 300, direction_tokens=True)
    shape = model.GPT2(tokenizer.vocab_size, 320, 64, 16, 1, 2, 32, scan_layers=False)
    params = jax.jit(lambda key: jax.tree.map(lambda leaf: leaf * 8, model.init(shape, key)))(jax.random.key(0))
    return DialogueModel(shape, params, tokenizer)


def permissive(teacher: DialogueModel, **changes) -> PseudoLabels:
    """Settings under which a random model's replies pass: an end is forced upon them."""
    sampling = Sampling(max_new_tokens=8, forced_eos_token_id=teacher.tokenizer.end_ids[0], top_p=1.0)
    return PseudoLabels(
        sampling=sampling, max_prompt_tokens=48, min_reply_tokens=1, max_repetition=1.0, max_copy=1.0,
        max_duplicates=100, keep_fraction=1.0, **changes,
    )  # fmt: skip


def likelihood(teacher: DialogueModel, dialogue: Dialogue, backward: bool = False) -> float:
    encoded = teacher.tokenizer.encode(dialogue)
    encoded = directions.backward(encoded, teacher.tokenizer) if backward else encoded
    return -float(teacher.score_dialogues([encoded])[0])


def count(teacher: DialogueModel, turn: Turn) -> int:
    return len(teacher.tokenizer.encode_text(turn.content)) + 1


def test_scores_of_replies_are_mutual_information(tmp_path, teacher):
    chosen = permissive(teacher, prior_weight=0.5, backward_weight=0.25)
    prompts = [Dialogue((Turn("user", text),), id=text) for text in QUESTIONS]
    summary = make_round(Task("replies", tmp_path, 0, 0, 1, 8), teacher, prompts, chosen, lambda done: None)
    rows = rounds.read_rows(tmp_path, 0)
    assert len(rows) == summary["accepted"] > 0
    for row in rows:
        dialogue = Dialogue.from_messages(row["messages"])
        context, answer = dialogue.turns
        prior = likelihood(teacher, Dialogue((answer,)))
        assert row["forward"] == pytest.approx(likelihood(teacher, dialogue), rel=1e-5)
        assert row["prior"] == pytest.approx(prior, rel=1e-5)
        assert row["backward"] == pytest.approx(likelihood(teacher, dialogue, backward=True), rel=1e-5)
        expected = (row["forward"] - 0.5 * prior) / count(teacher, answer)
        assert row["score"] == pytest.approx(expected + 0.25 * row["backward"] / count(teacher, context), rel=1e-5)


@pytest.mark.parametrize("prior_weight", [0.0, 0.5])
def test_contexts_are_made_up_for_last_turns_and_scored_by_how_well_these_follow(tmp_path, teacher, prior_weight):
    chosen = permissive(teacher, prior_weight=prior_weight)
    prompts = [Dialogue((Turn("text", "not shown"), Turn("text", text)), id=text) for text in ANSWERS]
    task = Task("contexts", tmp_path, 0, 0, 1, 8)
    summary = make_round(task, teacher, prompts, chosen, lambda done: None)
    rows = rounds.read_rows(tmp_path, 0)
    assert len(rows) == summary["accepted"] > 0 and summary["kind"] == "contexts"
    lengths = []
    for row in rows:
        dialogue = Dialogue.from_messages(row["messages"])
        context, answer = dialogue.turns
        assert (context.role, answer) == ("user", Turn("assistant", row["id"]))
        prior = likelihood(teacher, Dialogue((answer,)))
        assert row["forward"] == pytest.approx(likelihood(teacher, dialogue), rel=1e-5)
        assert ("prior" in row) == (prior_weight > 0)
        score = (row["forward"] - prior_weight * prior) / count(teacher, answer)
        assert row["score"] == pytest.approx(score, rel=1e-5)
        lengths.append(count(teacher, answer) - 1)
    assert summary["mean_reply_tokens"] == pytest.approx(sum(lengths) / len(lengths))


@pytest.mark.parametrize("kind", ["replies", "contexts"])
def test_a_round_drawn_in_pieces_has_the_replies_of_one_drawn_at_once(tmp_path, teacher, kind, monkeypatch):
    prompts = [Dialogue((Turn("user", text),), id=text) for text in (*QUESTIONS, *ANSWERS)]

    def hold_it(name: str, batch_size: int) -> list[Dialogue]:
        task = Task(kind, tmp_path / name, 0, 0, 1, batch_size)
        make_round(task, teacher, prompts, permissive(teacher), lambda done: None)
        return rounds.read_round(task.directory, 0)

    whole = hold_it("whole", 16)
    monkeypatch.setattr(drawn_pieces, "PROMPTS_PER_PIECE", 4)
    monkeypatch.setattr(drawn_pieces, "BATCHES_PER_PIECE", 1)
    assert hold_it("pieces", 8) == whole != []
