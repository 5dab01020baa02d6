"""What people are told about prepared data: it adds up, it is true, and it fits their terminal."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_jax import files
from ssl_jax.config import Config
from ssl_jax.data import examples, languages, report, shards
from ssl_jax.data.language_codes import code_of
from ssl_jax.data.pipeline import prepare
from ssl_jax.data.store import Prepared
from ssl_jax.dialogue import Dialogue, Turn
from ssl_jax.errors import UserError

GERMAN = "Ich habe gestern mit meinem Bruder einen langen Spaziergang durch den Wald gemacht, es war sehr schön."
ENGLISH = "I went for a long walk through the woods with my brother yesterday, and it was very nice indeed."


def labeled(number: int, **more: Any) -> dict[str, Any]:
    reply = f"answer {number}, see https://example.com/{number} !!!!!!" if number % 3 else "  the same\u00a0reply\x07 "
    question = f"question {number}" if number % 3 else "the same question"
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply}], **more}


def write(path: Path, rows: list[Any]) -> dict[str, str]:
    """A source."""
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return {"path": str(path)}


def prepared_data(folder: Path, labeled: list[Any], unlabeled: list[Any], **data: Any) -> Prepared:
    values = {
        "labeled": [write(folder / "labeled.jsonl", labeled)],
        "unlabeled": [write(folder / "unlabeled.jsonl", unlabeled)],
        "prepared_dir": str(folder / "prepared"),
        "num_proc": 1,
        **data,
    }
    config = {"data": values, "tokenizer": {"vocab_size": 300}, "train": {"steps": 1}}
    return prepare(Config.model_validate(config), say=lambda line: None)


@pytest.fixture(scope="module")
def messy(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Rows of every fate: rejected, removed by cleaning, repeated, changed, kept."""
    rows = [*(labeled(n) for n in range(40)), labeled(1, id="twice"), labeled(2, id="twice"), "{broken"]
    texts = [{"text": f"line {n}\nsecond line {n}\nthird"} for n in range(20)] + [{"text": "short"}] * 3
    cleaning = ["newlines", "unicode_nfc", "control_characters", "mask_urls", "repeated_punctuation", "strip",
                {"step": "length", "min_characters": 10}]  # fmt: skip
    return prepared_data(tmp_path_factory.mktemp("messy"), rows, texts, cleaning=cleaning, max_rejected_fraction=0.5)


def numbers(lines: list[str], words: str) -> list[int]:
    """The first number of every line with `words`."""
    return [int(line.split()[0].replace(",", "")) for line in lines if words in line]


def test_the_way_of_the_rows_is_a_sum(messy: Prepared) -> None:
    lines = list(report.tables(messy))
    (rows,), (kept,) = numbers(lines, "rows in the sources"), numbers(lines, "dialogues kept")
    lost = numbers(lines, "  rejected: ") + numbers(lines, "  removed by ")
    assert rows == 43 + 23 and len(lost) == 4 and all(count < 0 for count in lost)
    assert rows + sum(lost) == kept == sum(len(messy.lengths(split)) for split in messy.splits)


def test_what_is_kept_of_each_source_is_counted(messy: Prepared) -> None:
    summary = messy.summary
    by_file = {Path(name).name: count for name, count in summary["kept"].items()}
    assert by_file == {
        "labeled.jsonl": sum(summary["dialogues"]["labeled"].values()),
        "unlabeled.jsonl": sum(summary["dialogues"]["unlabeled"].values()),
    }
    (row,) = [line.split() for line in report.tables(messy) if line.endswith("/unlabeled.jsonl")]
    assert row[:3] == ["23", "3", "20"]


def test_turns_are_counted_by_kind_and_split(messy: Prepared) -> None:
    for kind, splits in (("labeled", ["train", "dev", "test"]), ("unlabeled", ["train"])):
        assert list(messy.summary["turns"][kind]) == splits
    assert messy.summary["turns"]["unlabeled"]["train"] == 20 * 3 == int(messy.turn_counts("raw_train").sum())
    assert messy.summary["turns"]["labeled"] == {k: 2 * n for k, n in messy.summary["dialogues"]["labeled"].items()}


def test_steps_are_told_in_the_order_in_which_they_are_applied(messy: Prepared) -> None:
    order = ["control_characters", "mask_urls", "repeated_punctuation", "strip"]
    assert list(messy.summary["changed"]) == order
    told = [line.split(":")[0] for line in report.effects(messy, 1) if " of them:" in line]
    assert told == [*order, "length", "exact_duplicates"] or told == [*order, "length", "held_out_duplicates",
                                                                     "exact_duplicates"]  # fmt: skip


def test_histograms_count_every_dialogue_in_its_bucket(messy: Prepared) -> None:
    for split, counts in messy.summary["lengths"].items():
        assert sum(counts.values()) == len(messy.lengths(split))
        low = 0
        for name, count in counts.items():
            high = int(name.removeprefix("<="))
            assert count == int(((messy.lengths(split) > low) & (messy.lengths(split) <= high)).sum())
            low = high


@given(st.lists(st.lists(st.integers(1, 2**31 - 1), min_size=1), min_size=1, max_size=3))
def test_buckets_are_powers_of_two_that_all_splits_share(lengths: list[list[int]]) -> None:
    found = shards.histograms({str(number): np.array(values, np.int32) for number, values in enumerate(lengths)})
    bounds = [int(name.removeprefix("<=")) for name in found["0"]]
    assert all(list(counts) == list(found["0"]) for counts in found.values())
    assert all(high == 2 * low for low, high in itertools.pairwise(bounds))
    everything = sorted(value for values in lengths for value in values)
    assert bounds[0] // 2 < everything[0] <= bounds[0] and bounds[-1] // 2 < everything[-1] <= bounds[-1]


def test_lines_fit_a_terminal_but_for_names(messy: Prepared) -> None:
    lines = [line for line in report.tables(messy) if not line.endswith(".jsonl")]
    assert max(map(len, lines)) <= 100


def test_a_fuller_bucket_has_a_longer_bar_and_what_is_there_can_be_seen() -> None:
    counts = {"<=1": 0, "<=2": 1, "<=4": 500, "<=8": 1000, "<=16": 10**7}
    splits = ("labeled_train", "labeled_dev", "labeled_test", "labeled_test_seen", "raw_train", "prompt_train")
    rows = [line for line in report._lengths(dict.fromkeys(splits, counts))][1:]
    assert [row.count("█") for row in rows] == [0, 0, 0, 0, 6 * 3]
    assert ["▏" in row for row in rows] == [False, True, True, True, False]
    assert max(map(len, rows)) <= 110  # six splits of ten million dialogues: the bars keep a width


def test_an_example_shows_at_once_what_changed(messy: Prepared) -> None:
    text = "\n".join(report.effects(messy, 5))
    assert "     answer 1, see [-https://example.com/1-]{+<url>+} !!!!!!" in text
    assert "[-\\x07-]" in text
    assert "  unlabeled.jsonl:21 (removed)\n   - short" in text
    changed = messy.summary["changed"]["mask_urls"]
    assert f"mask_urls: changed {changed}; 5 of them:" in text


def test_rejected_rows_are_told_with_place_and_reason(messy: Prepared) -> None:
    lines = list(report.rejected(messy, 1))
    assert lines[1] == "rejected rows: 2; the first 1:"
    assert len(lines) == 3 and "labeled.jsonl:43: not JSON (" in lines[2]
    assert "'twice' is also at labeled.jsonl:41" in list(report.rejected(messy, 9))[-1]


TEXTS = st.text(st.sampled_from("ab 你好,.\u0301\u00a0\n\x00<>-+{}[]…"), max_size=60)


@given(TEXTS, TEXTS)
def test_a_difference_contains_both_texts(old: str, new: str) -> None:
    changes = examples._changes(old, new)
    assert "".join(one for one, _ in changes) == old and "".join(other for _, other in changes) == new
    kinds = [one == other for one, other in changes]
    assert all(kind != following for kind, following in itertools.pairwise(kinds))


@given(TEXTS)
def test_everything_in_an_example_can_be_seen(text: str) -> None:
    assert examples.visible(text).replace(" ", "x").isprintable()


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("hello ", "hello", "hello[- -]"),
        ("a\r\nb", "a\nb", r"a[-\r-]\nb"),
        ("caf\u0065\u0301s", "cafés", r"caf[-e\u0301-]{+é+}s"),
        ("see https://a.b/c?d=1.", "see <url>.", "see [-https://a.b/c?d=1-]{+<url>+}."),
        ("soooooo nice!!!!!!", "sooo nice!!!", "sooo[-ooo-] nice!!![-!!!-]"),
        ("call +44 20 7946 0958 now", "call <phone> now", "call [-+44 20 7946 0958-]{+<phone>+} now"),
        ("你好。。。。我们", "你好。。我们", "你好。。[-。。-]我们"),
        ("zero\u200bwidth", "zerowidth", r"zero[-\u200b-]width"),
    ],
)  # fmt: skip
def test_the_smallest_difference_that_a_person_reads_is_marked(old: str, new: str, expected: str) -> None:
    assert list(examples.difference([old], [new])) == [expected]


@pytest.mark.parametrize("where", [0, 300, 5000])
def test_a_change_in_a_long_turn_is_shown_wherever_it_is(where: int) -> None:
    words = [f"w{number}" for number in range(where + 300)]
    before = Dialogue((Turn("text", " ".join([*words[:where], "http://x.y", *words[where:]])),))
    after = Dialogue((Turn("text", " ".join([*words[:where], "<url>", *words[where:]])),))
    shown = examples.shown(before, after)
    (line,) = examples.difference(shown["before"], shown["after"])
    assert "[-http://x.y-]{+<url>+}" in line and line.count("[-") == line.count("{+") == 1
    assert len(line) < 200 and len(json.dumps(shown)) < 1000


def test_a_turn_that_is_gone_is_marked_among_its_neighbours() -> None:
    def dialogue(*texts: str) -> Dialogue:
        return Dialogue(tuple(Turn("text", text) for text in texts), id="a")

    shown = examples.shown(dialogue("hi", "Ann joined", "hello "), dialogue("hi", "hello"))
    assert shown == {"id": "a", "before": ["Ann joined", "hello "], "after": ["hello"]}
    assert list(examples.difference(shown["before"], shown["after"])) == ["[-Ann joined-]", "[-hello -]", "{+hello+}"]
    many = dialogue(*"abcdefgh")
    assert list(examples.difference(examples.shown(many, None)["before"], None)) == [*"abcd", "… 4 more turns"]


def test_languages_are_those_that_sources_name_else_those_that_are_identified(tmp_path: Path) -> None:
    pytest.importorskip("py3langid")
    rows = [labeled(n, language=("chinese", "en-US")[n % 2]) for n in range(40) if n % 3]
    texts = [{"text": f"{GERMAN} {n}"} for n in range(6)] + [{"text": f"{ENGLISH} {n}"} for n in range(3)]
    texts += [{"text": "ok 1"}, {"text": "你好吗"}, {"text": "您好。"}]
    found = prepared_data(tmp_path, rows, texts).summary["languages"]
    assert set(found["labeled"]) == {"zh", "en"} and sum(found["labeled"].values()) == pytest.approx(1, abs=1e-3)
    assert found["unlabeled"] == {"de": 0.5, "en": 0.25, "zh": round(2 / 12, 4), "unknown": round(1 / 12, 4)}
    assert (found["sampled"], found["by"]) == (26 + 12, "metadata, py3langid")


def test_without_the_identifier_the_script_tells_chinese_and_the_report_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise UserError("py3langid is not installed")

    monkeypatch.setattr(languages, "load_identifier", missing)
    prepared = prepared_data(tmp_path, [labeled(n) for n in range(40)], [{"text": GERMAN}, {"text": "你好吗"}])
    assert prepared.summary["languages"]["unlabeled"] == {"unknown": 0.5, "zh": 0.5}
    assert prepared.summary["languages"]["by"] == "script"
    assert any("pip install 'ssl_jax[text]'" in line for line in report.tables(prepared))


def test_the_sample_is_the_same_whatever_the_order_of_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(languages, "_SAMPLE", 20)
    texts = [{"text": f"{(GERMAN, ENGLISH)[n % 2]} {n}"} for n in range(60)]
    found = []
    for name, unlabeled in (("a", texts), ("b", texts[::-1])):
        (tmp_path / name).mkdir()
        found.append(prepared_data(tmp_path / name, [labeled(n) for n in range(40)], unlabeled).summary["languages"])
    assert found[0] == found[1] and found[0]["sampled"] == 20


@pytest.mark.parametrize(
    ("name", "code"), [("English", "en"), ("zh_TW", "zh"), ("yue", "zh"), ("pt-BR", "pt"), ("Klingon", "klingon")]
)
def test_languages_have_one_code_whatever_they_are_called(name: str, code: str) -> None:
    assert code_of(name) == code


def test_annotations_are_in_the_tables(tmp_path: Path) -> None:
    pytest.importorskip("rjieba")
    texts = [{"text": "我们明天去北京大学学习"}, {"text": "我们明天去上海大学学习中文"}]
    prepared = prepared_data(tmp_path, [labeled(n) for n in range(40)], texts, annotate=["words"])
    assert any(line.startswith("annotated as zh: 2 dialogues, ") for line in report.tables(prepared))


def test_every_step_that_did_something_has_examples_and_no_other(messy: Prepared) -> None:
    stored = files.read_json(messy.directory / "examples.json")
    assert set(stored) == set(messy.summary["changed"]) | set(messy.summary["removed"])
    assert all(1 <= len(found) <= 5 for found in stored.values())
