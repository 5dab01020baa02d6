"""The baselines' probabilities, cosines and report, and the provenance that goes with them."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_jax.dialogue import Dialogue, Turn
from ssl_jax.errors import UserError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from baselines import END_OF_TURN, ByteNgram, TfIdf, format_table, main, measure  # noqa: E402
from provenance import PACKAGES, provenance  # noqa: E402

texts = st.text("ab é", max_size=8)


def dialogue(*contents: str, first: int = 0) -> Dialogue:
    """Turns of user and assistant in alternation."""
    roles = ("user", "assistant")
    return Dialogue(tuple(Turn(roles[(first + index) % 2], content) for index, content in enumerate(contents)))


TRAINING = [
    dialogue("hello, how are you?", "fine, and you?", "i am well", "good to hear"),
    dialogue("do you like to read?", "yes, i read a lot", "what do you read?", "mostly old books"),
    dialogue("how is the weather?", "it is raining again", "then stay in", "i will read a book"),
]


def slow_probability(dialogues: list[Dialogue], order: int, history: bytes, byte: int) -> float:
    """Interpolated modified Kneser-Ney from dictionaries of counts, recursing as the paper writes it."""
    pad = bytes([END_OF_TURN]) * (order - 1)
    streams = [
        pad + b"".join(turn.content.encode() + bytes([END_OF_TURN]) for turn in each.turns) for each in dialogues
    ]

    def raw(length: int) -> Counter[bytes]:
        return Counter(
            stream[end - length + 1 : end + 1] for stream in streams for end in range(order - 1, len(stream))
        )

    def counts_of(length: int) -> Counter[bytes]:
        return raw(order) if length == order else Counter(gram[1:] for gram in raw(length + 1))

    def probability(length: int, context: bytes) -> float:
        if length == 0:
            return 1 / 256
        counts = counts_of(length)
        number = Counter(counts.values())
        discounts = [0, 0.5, 1, 1.5]
        if number[1] and number[2] and number[3]:
            share = number[1] / (number[1] + 2 * number[2])
            estimate = [0.0] + [c - (c + 1) * share * number[c + 1] / number[c] for c in (1, 2, 3)]
            if min(estimate) >= 0:
                discounts = estimate
        followers = {gram: count for gram, count in counts.items() if gram[:-1] == context}
        shorter = probability(length - 1, context[1:])
        if not followers:
            return shorter
        total = sum(followers.values())
        count = followers.get(context + bytes([byte]), 0)
        freed = sum(discounts[min(each, 3)] for each in followers.values())
        return (count - discounts[min(count, 3)]) / total + freed / total * shorter

    return probability(order, history[len(history) - order + 1 :])


@pytest.mark.parametrize("order", [1, 2, 3, 6, 8])
@pytest.mark.parametrize("history", [b"", b"do you re", b"i", b"never seen \xf0\x9f", b"zzzzzzzzz"])
def test_ngram_is_a_distribution_over_bytes(order: int, history: bytes) -> None:
    """After any context, seen or not, the 256 probabilities are positive and sum to 1."""
    ngram = ByteNgram.fit(TRAINING, order)
    prefix = bytes([END_OF_TURN]) * (order - 1) + history
    streams = np.array([[*prefix, byte] for byte in range(256)], np.uint8)
    log2_probabilities = np.concatenate(
        [ngram.log2_probabilities(stream, np.array([len(prefix)])) for stream in streams]
    )
    assert np.all(np.isfinite(log2_probabilities))
    assert np.sum(np.exp2(log2_probabilities)) == pytest.approx(1)


def test_counts_are_of_distinct_extensions() -> None:
    """Kneser-Ney: after an unseen context the byte seen after many contexts wins, not the one seen most often."""
    # "z" is the commonest byte but only ever follows "y"; "e" follows four different bytes.
    ngram = ByteNgram.fit([dialogue("yzyzyzyzyzyzyz", "ae be ce de")], order=2)
    stream = np.frombuffer(b"qeqz", np.uint8)
    after_e, after_z = ngram.log2_probabilities(stream, np.array([1, 3]))
    assert after_e > after_z


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(texts, min_size=2, max_size=4), min_size=1, max_size=3), st.integers(1, 4), texts, texts)
def test_ngram_agrees_with_a_slow_implementation(
    contents: list[list[str]], order: int, prompt: str, reply: str
) -> None:
    """Vectorized tables give the bits that dictionaries and recursion give."""
    dialogues = [dialogue(*each) for each in contents]
    history = bytes([END_OF_TURN]) * (order - 1) + prompt.encode() + bytes([END_OF_TURN])
    expected = 0.0
    for byte in reply.encode() + bytes([END_OF_TURN]):
        expected -= math.log2(slow_probability(dialogues, order, history, byte))
        history += bytes([byte])
    assert ByteNgram.fit(dialogues, order).reply_bits(dialogue(prompt, reply)) == pytest.approx(expected)


def test_order_one_without_smoothing_estimates_matches_a_worked_example() -> None:
    """Two "a" and two ends of turn: each (2 - 1) / 4 of its own plus 2 / 4 of the uniform 1 / 256."""
    ngram = ByteNgram.fit([dialogue("a", "a")], order=1)
    assert ngram.reply_bits(dialogue("", "a")) == pytest.approx(-2 * math.log2(1 / 4 + 2 / 4 / 256))


def test_reply_bits_are_those_of_the_assistant() -> None:
    """Bits of the replies and of the other turns add up to those of all turns."""
    ngram = ByteNgram.fit(TRAINING, order=3)
    contents = ("what do you like?", "i like old books", "why?", "")
    swapped = dialogue(*contents, first=1)
    stream = np.frombuffer(b"\xff\xff" + b"\xff".join(text.encode() for text in contents) + b"\xff", np.uint8)
    everything = -ngram.log2_probabilities(stream, np.arange(2, len(stream))).sum()
    assert ngram.reply_bits(dialogue(*contents)) + ngram.reply_bits(swapped) == pytest.approx(everything)


def test_an_empty_reply_pays_for_its_end() -> None:
    assert ByteNgram.fit(TRAINING).reply_bits(dialogue("hello", "")) > 0


def test_more_text_like_the_test_helps() -> None:
    """Training on the test's own words costs fewer bits than training on other words."""
    test = dialogue("do you read?", "i read old books")
    assert ByteNgram.fit(TRAINING[1:]).reply_bits(test) < ByteNgram.fit(TRAINING[:1]).reply_bits(test)


def test_raw_dialogues_train_and_have_no_reply() -> None:
    """Turns without roles are training text like any other; scored, they have no replies and cost nothing."""
    raw = [Dialogue(tuple(Turn("text", turn.content) for turn in each.turns)) for each in TRAINING]
    test = dialogue("do you read?", "i read old books")
    assert ByteNgram.fit(raw).reply_bits(test) == ByteNgram.fit(TRAINING).reply_bits(test)
    assert ByteNgram.fit(raw).reply_bits(raw[0]) == 0


@pytest.mark.parametrize("order", [0, 9])
def test_orders_that_do_not_fit_a_code_are_refused(order: int) -> None:
    with pytest.raises(ValueError, match="order"):
        ByteNgram.fit(TRAINING, order)


@pytest.mark.parametrize("fit", [ByteNgram.fit, TfIdf])
def test_nothing_to_fit_on_is_refused(fit) -> None:
    with pytest.raises(ValueError, match="at least one"):
        fit([])


def test_tf_idf_matches_a_worked_example() -> None:
    """Of two documents "a" is in both and "b" in one; a query of both words against "b" twice."""
    tf_idf = TfIdf(["a b", "a"])
    idf_a, idf_b = 1.0, 1 + math.log(3 / 2)
    # "b b" is a vector along b whatever its count, so the cosine is b's share of the context.
    assert tf_idf.score("a b", "b b") == pytest.approx(idf_b / math.hypot(idf_a, idf_b))
    # Sublinear: four times "a" weigh 1 + ln 4.
    assert tf_idf.score("a a a a b", "b") == pytest.approx(idf_b / math.hypot((1 + math.log(4)) * idf_a, idf_b))


@settings(deadline=None)
@given(texts, texts)
def test_tf_idf_is_a_symmetric_cosine(left: str, right: str) -> None:
    """Between 0 and 1, the same both ways, 1 with itself, 0 where no word is shared."""
    tf_idf = TfIdf(["a b", "b é", "ab"])
    assert tf_idf.score(left, right) == tf_idf.score(right, left)
    assert 0 <= tf_idf.score(left, right) <= 1 + 1e-12
    assert tf_idf.score(left, left) == pytest.approx(1 if left.split() else 0)
    assert tf_idf.score(left, "ü") == 0


def test_tf_idf_prefers_shared_rare_words() -> None:
    """A rare shared word counts more than a common one, and case does not matter."""
    tf_idf = TfIdf(["the cat", "the dog", "the axolotl", "the the"])
    assert tf_idf.score("THE axolotl?", "my axolotl") > tf_idf.score("THE axolotl?", "the cat")


def test_tf_idf_scores_are_pairwise_scores() -> None:
    """The table form equals one call per pair."""
    tf_idf = TfIdf(["hello you", "old books"])
    contexts, replies, candidates = ["hello", "books you read"], ["you", "old books", "hello"], [[0, 2], [1, 0]]
    expected = [[tf_idf.score(contexts[n], replies[c]) for c in row] for n, row in enumerate(candidates)]
    np.testing.assert_array_equal(tf_idf.scores(contexts, replies, np.array(candidates)), expected)


def topical_dialogues(count: int) -> list[Dialogue]:
    """Dialogues whose reply repeats a word of its own context and no other's."""
    return [dialogue(f"tell me about topic{number}", f"i know topic{number} well") for number in range(count)]


def test_measure_reports_every_baseline_on_every_training_set() -> None:
    """Two systems times two training sets, a gain over the first set, and perfect ranks by shared words."""
    test = topical_dialogues(25)
    reply_bytes = [len(each.turns[-1].content) for each in test]
    rows = measure(
        {"few": TRAINING, "more": [*TRAINING, *topical_dialogues(3)]}, test, reply_bytes, recall_examples=200
    )
    assert [(row["system"], row["trained_on"], row["training_dialogues"]) for row in rows] == [
        ("byte 6-gram", "few", 3),
        ("byte 6-gram", "more", 6),
        ("TF-IDF", "few", 3),
        ("TF-IDF", "more", 6),
    ]
    bits = sum(ByteNgram.fit(TRAINING).reply_bits(each) for each in test)
    assert rows[0]["reply_bits_per_byte"] == pytest.approx(bits / sum(reply_bytes))
    gain = rows[0]["reply_bits_per_byte"] - rows[1]["reply_bits_per_byte"]
    assert rows[1]["gain"]["value"] == pytest.approx(gain)
    assert 0 < rows[1]["gain"]["low"] < gain < rows[1]["gain"]["high"]
    assert rows[2]["recall_at_1_of_20"] == rows[2]["mrr"] == 1
    assert rows[2]["examples"] == 25
    assert json.loads(json.dumps(rows)) == rows
    table = format_table(rows).splitlines()
    assert len(table) == 6
    assert f"{rows[1]['reply_bits_per_byte']:.3f}" in table[2]


def test_too_few_replies_to_rank_is_the_users_to_fix() -> None:
    """The message names the field; without ranking the rest is still measured."""
    test = topical_dialogues(19)
    with pytest.raises(UserError, match=r"evaluation\.recall_examples 0"):
        measure({"few": TRAINING}, test, np.ones(19), recall_examples=5)
    assert len(measure({"few": TRAINING}, test, np.ones(19), recall_examples=0)) == 1


def test_command_measures_prepared_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a configuration and JSON Lines to the table and the file, limited to the dialogues asked for."""
    rows = [{"messages": each.to_messages()} for each in topical_dialogues(80)]
    raw = [{"text": f"i know topic{number} well"} for number in range(20)]
    for name, lines in (("labeled", rows), ("raw", raw)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    config = {
        "data": {
            "labeled": [{"path": str(tmp_path / "labeled.jsonl")}],
            "unlabeled": [{"path": str(tmp_path / "raw.jsonl")}],
            "split_by": "fraction",
            "test_size": 0.4,
            "prepared_dir": str(tmp_path / "prepared"),
        },
        "tokenizer": {"vocab_size": 300},
        "evaluation": {"test_dialogues": 25},
    }
    # JSON is YAML.
    (tmp_path / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    output = tmp_path / "new folder" / "baselines.json"
    main(["--config", str(tmp_path / "config.yaml"), "--output", str(output)])

    result = json.loads(output.read_text(encoding="utf-8"))
    assert result["dialogues"] == 25
    assert 25 * len("i know topic0 well") <= result["reply_bytes"] <= 25 * len("i know topic00 well")
    assert [row["training_dialogues"] for row in result["rows"]] == [40, 60, 40, 60]
    assert result["provenance"]["versions"]["numpy"] == np.__version__
    assert format_table(result["rows"]) in capsys.readouterr().out


def test_a_mistyped_flag_does_not_wait_for_heavy_imports() -> None:
    """The command line is checked before anything that takes seconds to import."""
    code = """
import sys
import baselines
from ssl_jax.errors import UserError
try:
    baselines.main(["--no-such-flag", "1"])
except UserError:
    print(sorted({"jax", "transformers", "tensorflow_datasets", "tensorflow"} & set(sys.modules)))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)])}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.strip() == "[]"


def test_provenance_is_json_and_complete() -> None:
    """Every promised key is there, with this interpreter's and packages' versions, and no path of the machine."""
    result = provenance()
    assert set(result) == {
        "cpu", "cores", "memory_gib", "gpus", "accelerator", "python", "versions", "commit", "dirty", "date",
    }  # fmt: skip
    assert result["python"] == ".".join(map(str, sys.version_info[:3]))
    assert tuple(result["versions"]) == PACKAGES
    assert result["versions"]["numpy"] == np.__version__
    assert result["cores"] >= 1
    assert result["cpu"]
    assert str(Path.home()) not in json.dumps(result)


def test_provenance_names_the_devices_of_a_process_that_uses_jax() -> None:
    """With JAX imported the devices are listed; without it the measurement never touches them."""
    import jax

    assert provenance()["accelerator"] == {"kinds": [jax.devices()[0].device_kind], "count": jax.device_count()}
    code = "import provenance; print(provenance.provenance()['accelerator'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=BENCHMARKS, check=True)
    assert result.stdout.strip() == "None"
