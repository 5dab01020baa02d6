"""Ranking, coherence, chats of a model with itself, and comparisons of evaluations."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from ssl_jax import config, evaluate, metrics, train
from ssl_jax.config import Evaluation
from ssl_jax.data.tokenizer import DialogueTokenizer, EncodedDialogue
from ssl_jax.dialogue import Dialogue
from ssl_jax.dialogue_model import DialogueModel
from ssl_jax.errors import UserError
from ssl_jax.evaluation import coherence, comparison, ranking, self_chat, tables
from ssl_jax.evaluation.examples import Pair, by_reply_number, choose, reply_pairs

WORDS = [f"word{number}" for number in range(30)]


@dataclasses.dataclass
class Stub:
    """A model whose target costs 1 nat where its token was there before and 3 where not; it says what it is told to."""

    tokenizer: DialogueTokenizer
    shape: Any = dataclasses.field(default_factory=lambda: SimpleNamespace(n_positions=64))
    says: Any = None
    drawn: list[tuple[list[Dialogue], int]] = dataclasses.field(default_factory=list)

    def score_dialogues(self, dialogues: Sequence[EncodedDialogue], *, rows: int) -> np.ndarray:
        return np.array([cost(dialogue.tokens.tolist(), dialogue.loss_mask.tolist()) for dialogue in dialogues])

    def draw(self, prompts: Sequence[Dialogue], settings: config.Sampling, *, seed: int, **_: Any) -> list[list[Any]]:
        self.drawn.append((list(prompts), seed))
        return [[SimpleNamespace(text=self.says(prompt), dropped_tokens=0)] for prompt in prompts]


def cost(tokens: list[int], mask: list[int]) -> float:
    return sum(1.0 if token in tokens[:at] else 3.0 for at, token in enumerate(tokens) if mask[at])


@pytest.fixture(scope="module")
def tokenizer() -> DialogueTokenizer:
    return DialogueTokenizer.fit([" ".join(WORDS)] * 3, 700)


def talk(*contents: str, id: str = "", first: int = 0) -> Dialogue:
    roles = ("user", "assistant")
    messages = [{"role": roles[(first + at) % 2], "content": content} for at, content in enumerate(contents)]
    return Dialogue.from_messages(messages, id=id)


def stub(tokenizer: DialogueTokenizer, **fields: Any) -> DialogueModel:
    return cast(DialogueModel, Stub(tokenizer, **fields))


def cost_of_reply(tokenizer: DialogueTokenizer, context: Sequence[int], reply: str) -> float:
    content = tokenizer.encode_reply(reply).tolist()
    return cost([*context, *content], [0] * len(context) + [1] * len(content))


def test_reply_pairs_are_the_answers_to_user_turns() -> None:
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("assistant", "c"), ("user", "d"), ("assistant", "e")]
    dialogue = Dialogue.from_messages([{"role": role, "content": content} for role, content in turns], id="x")
    assert [(len(context.turns), reply) for context, reply in reply_pairs(dialogue)] == [(2, "b"), (5, "e")]


def test_the_choice_of_replies_is_the_same_for_every_run_and_in_order() -> None:
    chosen = choose(1000, 50)
    assert chosen == choose(1000, 50) == sorted(set(chosen)) and len(chosen) == 50
    assert choose(3, 50) == [0, 1, 2]


def test_replies_by_number_have_one_of_a_dialogue_each() -> None:
    """Of the fifth and later replies the middle one; a number that no dialogue reaches is empty."""
    short = talk("q", "first", "q", "second")
    long = talk(*(text for number in range(1, 8) for text in ("q", f"reply {number}")))
    found = by_reply_number([reply_pairs(short), reply_pairs(long)])
    assert {number: [reply for _, reply in pairs] for number, pairs in found.items()} == {
        "1": ["first", "reply 1"],
        "2": ["second", "reply 2"],
        "3": ["reply 3"],
        "4": ["reply 4"],
        "5+": ["reply 6"],
    }
    assert by_reply_number([reply_pairs(short)])["3"] == []


@pytest.mark.parametrize("direction", ["", "_forward", "_backward"])
def test_rankings_are_those_of_the_three_scores(
    tokenizer: DialogueTokenizer, monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    """Each score, computed here pair by pair, ranks the same frozen candidates."""
    rng = np.random.default_rng(0)
    pairs = [
        (talk(" ".join(rng.choice(WORDS, 3))), " ".join(rng.choice(WORDS, int(rng.integers(1, 4))))) for _ in range(60)
    ]
    model = stub(tokenizer)

    def backward(model: DialogueModel, pairs: Sequence[Pair], rows: int) -> np.ndarray:
        return np.array([len({*context.turns[-1].content.split()} & {*reply.split()}) for context, reply in pairs])

    monkeypatch.setattr(tokenizer, "backward_id", 1)
    monkeypatch.setattr(ranking.mutual_information, "backward", backward)
    values = ranking.rank(model, pairs, 40, 32, rows=4)

    def score(context: Dialogue, reply: str) -> float:
        if direction == "_backward":
            return float(backward(model, [(context, reply)], 1)[0])
        forward = -cost_of_reply(tokenizer, tokenizer.encode_prompt(context, 32).tokens.tolist(), reply)
        alone = cost_of_reply(tokenizer, tokenizer.reply_start.tolist(), reply)
        return forward + (0 if direction else alone)

    examples, candidates = metrics.frozen_candidates([reply for _, reply in pairs], 40, 20)
    scores = [
        [score(pairs[example][0], pairs[index][1]) for index in row]
        for example, row in zip(examples, candidates, strict=True)
    ]
    expected = metrics.ranking(scores)
    assert 0 < expected["mrr"] < 1
    assert {name: values[f"{name}{direction}"] for name in expected} == pytest.approx(expected)


def test_without_a_backward_token_there_is_no_backward_ranking(tokenizer: DialogueTokenizer) -> None:
    pairs = [(talk(word), word) for word in WORDS]
    names = ("recall_at_1_of_20", "mrr", "recall_at_1_of_20_forward", "mrr_forward")
    assert tuple(ranking.rank(stub(tokenizer), pairs, 5, 32, rows=4)) == names
    assert not ranking.can_rank([*pairs[:19], pairs[0]]) and ranking.can_rank(pairs[:20])


def test_context_gain_is_the_bits_that_the_own_context_saves(tokenizer: DialogueTokenizer) -> None:
    """Replies that repeat their context save bits, those that repeat another's lose them; by number and overall."""
    talks = [talk(f"{one} {two}", f"{one} {two}", "and now", WORDS[at]) for at, (one, two) in
             enumerate(zip(WORDS[:6], WORDS[6:12], strict=True))]  # fmt: skip
    pairs = by_reply_number([reply_pairs(dialogue) for dialogue in talks])
    found = coherence.measure(stub(tokenizer), pairs, Evaluation(coherence_examples=4, max_prompt_tokens=32), rows=4)
    saved, sizes = {}, {}
    for number in ("1", "2"):
        chosen = [pairs[number][index] for index in choose(6, 4)]
        own, other = (
            [
                cost_of_reply(tokenizer, tokenizer.encode_prompt(context, 32).tokens.tolist(), reply)
                for (context, _), (_, reply) in zip(contexts, chosen, strict=True)
            ]
            for contexts in (chosen, [*chosen[1:], chosen[0]])
        )
        saved[number], sizes[number] = sum(other) - sum(own), sum(len(reply) for _, reply in chosen)
        values = found.by_number[number]
        assert values["replies"] == 4
        assert values["reply_bits_per_byte"] == pytest.approx(sum(own) / math.log(2) / sizes[number])
        assert values["context_gain"] == pytest.approx(saved[number] / math.log(2) / sizes[number])
    assert list(found.by_number) == ["1", "2"] and found.by_number["1"]["context_gain"] > 0
    assert found.context_gain == pytest.approx(sum(saved.values()) / math.log(2) / sum(sizes.values()))


def test_a_number_that_one_dialogue_reaches_has_bits_but_no_gain(tokenizer: DialogueTokenizer) -> None:
    pairs = by_reply_number([reply_pairs(talk("word1", "word2"))])
    found = coherence.measure(stub(tokenizer), pairs, Evaluation(coherence_examples=4), rows=4)
    assert found.context_gain is None and set(found.by_number["1"]) == {"replies", "reply_bits_per_byte"}


def test_replies_that_are_not_read_whole_are_left_out_of_coherence(tokenizer: DialogueTokenizer) -> None:
    """Behind contexts of different lengths different parts of them would be compared."""
    talks = [talk("hi", "word1"), talk("hi", "word2"), talk("hi", " ".join(WORDS * 3))]
    pairs = by_reply_number([reply_pairs(dialogue) for dialogue in talks])
    found = coherence.measure(stub(tokenizer), pairs, Evaluation(coherence_examples=4), rows=4)
    assert found.by_number["1"]["replies"] == 2


def test_rankings_by_number_need_twenty_replies(tokenizer: DialogueTokenizer) -> None:
    talks = [talk(word, word, *(("and", f"{word} too") if at < 19 else ())) for at, word in enumerate(WORDS)]
    pairs = by_reply_number([reply_pairs(dialogue) for dialogue in talks])
    settings = Evaluation(coherence_examples=2, coherence_rankings=5, max_prompt_tokens=32)
    found = coherence.measure(stub(tokenizer), pairs, settings, rows=4).by_number
    assert found["1"]["rankings"] == 5 and {"recall_at_1_of_20", "mrr_forward"} <= found["1"].keys()
    assert set(found["2"]) == {"replies", "reply_bits_per_byte", "context_gain"}


def test_in_a_chat_with_itself_the_model_is_always_the_assistant(tokenizer: DialogueTokenizer) -> None:
    """Every prompt ends in a user's turn, roles alternate, a system turn stays, and each turn has its own seed."""
    model = Stub(tokenizer, says=lambda prompt: f"reply to {prompt.turns[-1].content}")
    opening = Dialogue.from_messages([{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}])
    chats = self_chat.hold(cast(DialogueModel, model), [opening, talk("yo")], config.Sampling(), 32)
    assert [len(chat) for chat in chats] == [6, 6] and chats[1][:2] == ["reply to yo", "reply to reply to yo"]
    (third, other), _ = model.drawn[2]
    assert [turn.role for turn in third.turns] == ["system", "user", "assistant", "user"]
    assert [turn.content for turn in third.turns[1:]] == ["hi", *chats[0][:2]]
    assert [turn.role for turn in other.turns] == ["user", "assistant", "user"]
    assert [turn.role for turn in model.drawn[1][0][1].turns] == ["assistant", "user"]
    assert len({seed for _, seed in model.drawn}) == len(model.drawn) == 6


def test_openings_are_those_that_people_went_on_from() -> None:
    """Where no dialogue is long enough any opening will do, and people have no statistic."""
    long = talk(*(f"turn {at}" for at in range(9)))
    short, by_assistant = talk("hi", "hello"), talk("welcome", "hi", "so", first=1)
    openings, people = self_chat.choose_openings([short, by_assistant, long], 5)
    assert [opening.turns for opening in openings] == [long.turns[:1]]
    assert people == [[f"turn {at}" for at in range(1, 7)]]
    openings, people = self_chat.choose_openings([short, by_assistant], 5)
    assert [opening.turns for opening in openings] == [short.turns[:1]] and people == []


def test_self_chat_statistics_match_a_worked_example() -> None:
    """Six bigrams of which three differ; the second reply's only 4-gram was said before."""
    found = self_chat.statistics([["a b c d", "a b c d"]])
    assert found == {"self_chat_repetition": 1.0, "self_chat_distinct_2": 3 / 6}


def evaluated(nll: Sequence[float], **values: float) -> dict[str, Any]:
    ids = [f"dialogue {number}" for number in range(len(nll))]
    return {
        "metrics": {"reply_bits_per_byte": sum(nll) / math.log(2) / (4 * len(nll)), **values},
        "dialogues": {"id": ids, "nll": list(nll), "bytes": [4] * len(nll)},
    }


FLOOR, METHOD, ORACLE = [9.0, 8.0, 9.5, 8.5], [7.5, 6.5, 8.0, 7.0], [6.0, 5.0, 6.5, 5.5]


def write(folder: Path, result: dict[str, Any], name: str = "eval_test.json") -> str:
    folder.mkdir()
    (folder / name).write_text(json.dumps(result), encoding="utf-8")
    return str(folder)


def test_a_comparison_says_the_difference_and_the_gap_that_is_closed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The method goes half of the way from the floor to the oracle; what was in the file stays there."""
    method = write(tmp_path / "method", evaluated(METHOD, mrr=0.5, only_here=1.0))
    floor = write(tmp_path / "floor", evaluated(FLOOR, mrr=0.25))
    oracle = write(tmp_path / "oracle", evaluated(ORACLE, mrr=0.75))
    evaluate.main(["--workdir", method, "--baseline", floor, "--oracle", oracle])
    written = json.loads((tmp_path / "method" / "eval_test.json").read_text(encoding="utf-8"))
    found = written.pop("comparison")
    assert written == evaluated(METHOD, mrr=0.5, only_here=1.0)
    assert (found["baseline"], found["oracle"]) == (floor, oracle)
    difference = -1.5 / math.log(2) / 4
    assert found["differences"] == pytest.approx({"reply_bits_per_byte": difference, "mrr": 0.25})
    assert [*found["reply_bits_per_byte"].values()] == pytest.approx([difference] * 3)
    assert [*found["gap_closed"]["fraction"].values()] == pytest.approx([0.5] * 3)
    printed = capsys.readouterr().out
    assert f"{difference:+.4f} to {difference:+.4f}" in printed and "gap closed: 50.0%, 50.0% to 50.0%" in printed


def test_a_gap_that_is_noise_is_called_so() -> None:
    found = comparison.compare(evaluated(METHOD), evaluated(FLOOR), evaluated(FLOOR))
    assert found["gap_closed"]["fraction"] is None
    assert "gap closed: undefined" in "\n".join(tables.comparison_lines(found))
    assert "gap_closed" not in comparison.compare(evaluated(METHOD), evaluated(FLOOR))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--workdir", "{a}", "--baseline", "{none}"], r"--baseline .* has no eval_test.json; make it with python -m "
         r"ssl_jax.evaluate --workdir .* --split test"),
        (["--workdir", "{none}", "--baseline", "{a}"], "--workdir .* has no eval_test.json"),
        (["--workdir", "{a}", "--baseline", "{other}"], "--baseline: its evaluation is of other dialogues"),
        (["--workdir", "{a}", "--baseline", "{a}", "--oracle", "{other}"], "--oracle: its evaluation is of other"),
        (["--workdir", "{a}", "--baseline", "{a}", "--weights", "int8"], "eval_test_int8.json; .* --weights int8"),
        (["--workdir", "{a}", "--oracle", "{a}"], "give --baseline"),
        (["--workdir", "{a}", "--baseline", "{a}", "--self-chats", "3"], "drop --self-chats"),
        (["--model", "gpt2", "--data", "x", "--baseline", "{a}"], "give --workdir"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(tmp_path: Path, arguments: list[str], expected: str) -> None:
    named = {
        "a": write(tmp_path / "a", evaluated(METHOD)),
        "other": write(tmp_path / "other", evaluated(METHOD[:3])),
        "none": str(tmp_path / "none"),
    }
    with pytest.raises(UserError, match=expected):
        evaluate.main([argument.format(**named) for argument in arguments])


def test_the_end_of_training_shows_the_distance_to_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = {
        "split": "labeled_test",
        "evaluation": {"mrr": 0.5, "distinct_2": 0.25},
        "human": {"distinct_2": 0.75},
        "tokens_by_stream": {"labeled": 1000},
        "checkpoint": 3,
        "steps": 4,
    }
    train.show(summary, str(tmp_path))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[:3]]
    assert lines == [["metric", "test", "human", "distance"], ["mrr", "0.5000"],
                     ["distinct_2", "0.2500", "0.7500", "-0.5000"]]  # fmt: skip
