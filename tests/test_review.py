"""What a teacher was least sure of goes to a person and comes back as labels."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import run_command, write_jsonl

from ssl_jax import review, review_page
from ssl_jax.config import Config
from ssl_jax.data import formats, pipeline
from ssl_jax.data.formats import Rejected
from ssl_jax.data.store import Prepared
from ssl_jax.dialogue import Dialogue
from ssl_jax.errors import UserError
from ssl_jax.pseudo_labels import rounds

HOSTILE = "</textarea></script><script>alert('x')</script> & \"quotes\" \u2028 نعم"

# What the page's script needs of a browser; a click on each row's buttons, an edited text area, then on saving.
STAND_IN = """
const element = fields => ({...fields, setAttribute() {}, addEventListener(name, act) { this[name] = act; }});
const stored = %s;
const pages = JSON.parse(stored).map(() => {
  const buttons = ["accept", "reject"].map(value => element({value}));
  const area = element({value: "hello", defaultValue: "hello"});
  return {buttons, area, querySelectorAll: () => buttons, querySelector: () => area};
});
const named = {rows: {textContent: stored}, counts: {}, save: element({})};
globalThis.document = {
  getElementById: id => named[id],
  querySelectorAll: selector => selector === "article" ? pages : [],
  createElement: () => ({click() {}}),
};
globalThis.window = element({});
globalThis.Blob = class { constructor(lines) { process.stdout.write(lines.join("")); } };
URL.createObjectURL = () => "";
{%s}
pages[0].buttons[0].click();
pages[1].area.value = "mine";
pages[1].buttons[0].click();
pages[2].buttons[1].click();
pages[3].buttons[1].click();
pages[3].buttons[1].click();
console.error(named.counts.textContent);
named.save.click();
"""


def row(number: int, *, logprob: float, tokens: int = 3, reply: str = "it is red", **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"is number {number} red?"}, {"role": "assistant", "content": reply}]
    return {"id": f"p{number}", "messages": messages, "score": 9.0, "logprob": logprob, "tokens": tokens, **fields}


def make_workdir(folder: Path, *all_rows: list[dict[str, Any]]) -> Path:
    """A work directory that is nothing but its rounds."""
    workdir = folder / "run"
    workdir.mkdir()
    (workdir / "config.yaml").write_text(yaml.safe_dump(Config().model_dump(mode="json")), encoding="utf-8")
    for number, rows in enumerate(all_rows):
        rounds.write(workdir / "pseudo_labels", number, rows, {"teacher_step": 7 + number, "removed": {"copy": 4}})
    return workdir


def write_review(workdir: Path, *flags: str) -> list[dict[str, Any]]:
    """Runs the command; the rows that it wrote."""
    output = workdir.parent / "review"
    review.main(["--workdir", str(workdir), "--output", str(output), *flags])
    return read_rows(output / "review.jsonl")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, whose texts may hold other ends of lines than that of JSON Lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def dialogues(prepared: Prepared, split: str) -> dict[str, Dialogue]:
    """The dialogues of a split by their replies."""
    found = (prepared.dialogue(split, index) for index in range(len(prepared.lengths(split))))
    return {dialogue.turns[-1].content: dialogue for dialogue in found}


def refused(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        review.main(arguments)
    assert str(caught.value).count("\n") <= 1
    return str(caught.value)


def reviewed(verdict: Any, **fields: Any) -> dict[str, Any]:
    """A row of a review file."""
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    return {"id": "p", "messages": messages, "score": -1.0, "round": 0, "teacher_step": 5, "verdict": verdict, **fields}


def configuration(folder: Path, rows: list[dict[str, Any]], **data: Any) -> Config:
    """Twenty labeled dialogues and a review file."""
    labeled = [
        {"messages": [{"role": "user", "content": f"how are you, {n}?"}, {"role": "assistant", "content": f"fine {n}"}]}
        for n in range(20)
    ]
    sources = [
        {"path": str(write_jsonl(folder / "labeled.jsonl", labeled))},
        {"path": str(write_jsonl(folder / "review.jsonl", rows)), "format": "review"},
    ]
    return Config.model_validate(
        {
            "data": {"labeled": sources, "prepared_dir": str(folder / "prepared"), "num_proc": 1, **data},
            "tokenizer": {"vocab_size": 300},
            "train": {"unlabeled_ratio": 0},
        }
    )


# Writing --------------------------------------------------------------------------------------------------------------


def test_the_least_certain_replies_come_first_by_mean_log_probability_of_a_token(tmp_path: Path) -> None:
    """The end of a reply counts as a token; the score that a round's filters used does not matter."""
    drawn = [row(0, logprob=-8.0, tokens=7), row(1, logprob=-6.0, tokens=1), row(2, logprob=-8.0, tokens=3)]
    written = write_review(make_workdir(tmp_path, drawn), "--count", "2")
    assert [(one["id"], one["score"]) for one in written] == [("p1", -3.0), ("p2", -2.0)]
    assert written[0] == {
        "id": "p1", "messages": drawn[1]["messages"], "score": -3.0, "round": 0, "teacher_step": 7, "verdict": None,
    }  # fmt: skip


def test_the_newest_finished_round_is_written_unless_another_is_asked_for(tmp_path: Path) -> None:
    workdir = make_workdir(tmp_path, [row(0, logprob=-1.0)], [row(1, logprob=-1.0)])
    (workdir / "pseudo_labels" / "round_2.tmp").mkdir()
    (newest,) = write_review(workdir)
    (asked,) = write_review(workdir, "--round", "0")
    assert [(one["id"], one["round"], one["teacher_step"]) for one in (newest, asked)] == [("p1", 1, 8), ("p0", 0, 7)]


def test_random_order_is_decided_by_the_seed_and_not_by_certainty(tmp_path: Path) -> None:
    workdir = make_workdir(tmp_path, [row(number, logprob=-1.0 - number) for number in range(40)])
    first, again, other = (write_review(workdir, "--order", "random", "--count", "8", "--seed", s) for s in "001")
    least = write_review(workdir, "--count", "8")
    assert first == again != other
    assert {one["id"] for one in first} != {one["id"] for one in least}


def test_the_page_escapes_what_strangers_wrote_and_loads_nothing() -> None:
    rows = [
        reviewed(
            None, id="<b>", messages=[{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": HOSTILE}]
        )
    ]
    page = review_page.render("<title> of round", rows)
    assert page.count("<script") == page.count("</script>") == 2
    assert page.count("</textarea>") == 1 and "<b>" not in page and "alert(&#x27;x&#x27;)" in page
    assert "default-src 'none'" in page and not re.search(r"(src|href)=", page.replace("default-src=", ""))
    assert page.count('dir="auto"') == 3


def test_the_pages_script_has_the_rows_exactly_and_its_text_areas_begin_with_the_replies() -> None:
    """A browser drops one line break after the tag; the one that is there is not the reply's."""
    rows = [
        reviewed(None, messages=[{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": "\nhello"}])
    ]
    page = review_page.render("t", rows)
    stored = re.search(r'<script type="application/json" id="rows">(.*?)</script>', page, re.DOTALL)
    assert stored and json.loads(stored[1]) == rows
    assert re.search(r"<textarea[^>]*>\n\nhello</textarea>", page)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js")
def test_the_pages_script_gives_the_rows_back_with_verdicts_and_what_was_edited() -> None:
    rows = [reviewed(None, id=id) for id in ("kept", "edited", "dropped", "undone")]
    script = re.findall(r"<script>(.*?)</script>", review_page.render("t", rows), re.DOTALL)[0]
    process = subprocess.run(
        ["node", "-"],
        input=STAND_IN % (json.dumps(json.dumps(rows)), script),
        text=True,
        check=True,
        capture_output=True,
    )
    kept, edited, dropped, undone = map(json.loads, process.stdout.splitlines())
    assert kept == {**rows[0], "verdict": "accept"}
    assert edited["messages"] == [rows[1]["messages"][0], {"role": "assistant", "content": "mine"}]
    assert (edited["verdict"], dropped["verdict"]) == ("accept", "reject")
    assert undone == rows[3]
    assert process.stderr == "2 accepted, 1 rejected, 1 to do\n"


# A person's work ------------------------------------------------------------------------------------------------------


def test_a_review_with_verdicts_is_not_overwritten_unless_asked(tmp_path: Path) -> None:
    workdir = make_workdir(tmp_path, [row(0, logprob=-1.0, reply=HOSTILE)])
    output = tmp_path / "review"
    write_review(workdir)
    (untouched,) = write_review(workdir)
    write_jsonl(output / "review.jsonl", [{**untouched, "verdict": "reject"}])
    assert "has verdicts" in refused("--workdir", str(workdir), "--output", str(output))
    assert read_rows(output / "review.jsonl")[0]["verdict"] == "reject"
    (output / "review.jsonl").write_text("half a li", encoding="utf-8")
    assert "is not as it was written" in refused("--workdir", str(workdir), "--output", str(output))
    assert write_review(workdir, "--overwrite") == [untouched]


def test_what_cannot_be_reviewed_is_refused_with_the_fix(tmp_path: Path) -> None:
    workdir = make_workdir(tmp_path)
    arguments = ("--workdir", str(workdir), "--output", str(tmp_path / "out"))
    assert "no finished round (" in refused(*arguments)
    (workdir / "pseudo_labels" / "round_0").mkdir(parents=True)
    assert "no finished round (" in refused(*arguments)
    (workdir / "pseudo_labels" / "round_0").rmdir()
    rounds.write(workdir / "pseudo_labels", 0, [], {"teacher_step": 1, "removed": {"copy": 4, "short": 0}})
    assert "round 0 kept no reply (copy 4)" in refused(*arguments)
    assert "--round 3" in refused(*arguments, "--round", "3")
    assert "finished: 0" in refused(*arguments, "--round", "3")
    assert "does not exist" in refused("--workdir", str(tmp_path / "none"), "--output", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    workdir = make_workdir(tmp_path, [row(0, logprob=-1.0)])
    assert "cannot be" in refused("--workdir", str(workdir), "--output", str(workdir / "config.yaml"))


# Reading back ---------------------------------------------------------------------------------------------------------


def read(folder: Path, rows: list[Any], format: str = "review", expected: Any = "labeled") -> list[Any]:
    path = write_jsonl(folder / "rows.jsonl", rows)
    source = Config.model_validate({"data": {"labeled": [{"path": str(path), "format": format}]}}).data.labeled[0]
    return list(formats.read(source, expected, 1000))


def test_accepted_rows_are_dialogues_and_the_others_are_left_out_without_being_malformed(tmp_path: Path) -> None:
    emptied = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}]
    rows = [reviewed("accept"), reviewed("reject", id="q", messages=emptied), reviewed(None, id="r")]
    for format in ("review", "auto"):
        (dialogue,) = read(tmp_path, rows, format)
        assert dialogue.id == "p/round_0" and dialogue.kind == "labeled"
        assert dialogue.metadata["reviewed"] is True and dialogue.metadata["score"] == -1.0
        assert "verdict" not in dialogue.metadata


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (reviewed("maybe"), "unknown verdict"),
        (reviewed(["accept"]), "unknown verdict"),
        (reviewed(True), "unknown verdict"),
        ({"verdict": "accept", "text": "hello"}, "no messages"),
        (reviewed("accept", messages=[{"role": "user", "content": "hi"}]), "no reply"),
        (reviewed("accept", messages=[{"role": "assistant", "content": " "}]), "empty reply"),
        ("accept", "not an object"),
    ],
)
def test_a_row_that_no_review_has_is_rejected_by_line_and_reason(tmp_path: Path, bad: Any, reason: str) -> None:
    found = read(tmp_path, [reviewed("accept", id="first"), bad])
    assert [(one.line, one.reason) for one in found if isinstance(one, Rejected)] == [(2, reason)]


def test_data_with_verdicts_of_their_own_are_no_reviews(tmp_path: Path) -> None:
    own = {"messages": [{"role": "assistant", "content": "innocent"}], "verdict": "guilty"}
    (dialogue,) = read(tmp_path, [own], "auto")
    assert dialogue.metadata["verdict"] == "guilty"


def test_two_rounds_may_answer_the_same_prompt(tmp_path: Path) -> None:
    rows = [reviewed("accept"), reviewed("accept", round=1), reviewed("accept", round=1)]
    first, second, repeated = read(tmp_path, rows)
    assert (first.id, second.id, repeated.reason) == ("p/round_0", "p/round_1", "duplicate id")


def test_many_honest_rejections_do_not_stop_preparation_and_no_review_is_held_out(tmp_path: Path) -> None:
    """Of one half of the replies, accepted, none is in dev or test, whatever the fractions."""

    def said(number: int) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": f"label {number}"}]

    verdicts = ["accept"] * 20 + ["reject"] * 15 + [None] * 5
    rows = [reviewed(verdict, id=str(n), messages=said(n)) for n, verdict in enumerate(verdicts)]
    config = configuration(tmp_path, rows, test_size=0.3, dev_size=0.3, max_rejected_fraction=0.0)
    prepared = pipeline.prepare(config, say=lambda line: None)
    assert prepared.summary["removed"] == {"review_rejected": 15, "review_pending": 5}
    assert prepared.summary["rejected"] == {}
    assert len(prepared.splits) == 3
    for split in prepared.splits:
        labels = {reply for reply in dialogues(prepared, split) if reply.startswith("label")}
        assert labels == ({f"label {n}" for n in range(20)} if split == "labeled_train" else set())


def test_a_review_repeats_no_id_of_unlabeled_prompts_and_its_limit_counts_accepted_rows(tmp_path: Path) -> None:
    rows = [
        reviewed("reject", id="a"),
        reviewed("accept", id="b"),
        reviewed("accept", id="c"),
        reviewed("accept", id="d"),
    ]
    for number, one in enumerate(rows):
        one["messages"] = [{"role": "user", "content": f"q {number}"}, {"role": "assistant", "content": f"r {number}"}]
    prompts = [
        {"id": f"{name}/round_0", "messages": [{"role": "user", "content": f"what is {name}?"}]} for name in "bc"
    ]
    config = configuration(tmp_path, rows, unlabeled=[{"path": str(write_jsonl(tmp_path / "prompts.jsonl", prompts))}])
    limited = config.data.labeled[1].model_copy(update={"max_dialogues": 2})
    data = config.data.model_copy(update={"labeled": (config.data.labeled[0], limited)})
    prepared = pipeline.prepare(config.model_copy(update={"data": data}), say=lambda line: None)
    replies = {reply for reply in dialogues(prepared, "labeled_train") if reply.startswith("r ")}
    assert replies == {"r 1", "r 2"}
    assert prepared.summary["rejected"] == {} and len(prepared.lengths("prompt_train")) == 2


# As a user types it ---------------------------------------------------------------------------------------------------


def test_from_a_run_over_a_person_back_to_labels(tmp_path: Path) -> None:
    drawn = [row(number, logprob=-1.0 - number, reply=f"reply {number}") for number in range(6)]
    workdir = make_workdir(tmp_path, drawn)
    output = tmp_path / "review"
    process = run_command("review", "--workdir", str(workdir), "--output", str(output), "--count", "3")
    assert process.returncode == 0, process.stderr
    assert "the least certain first" in process.stdout and "format: review" in process.stdout
    assert (output / "review.html").read_text(encoding="utf-8").count("<article>") == 3
    kept, edited, dropped = read_rows(output / "review.jsonl")
    edited["messages"][-1]["content"] = "what a person would say"
    verdicts = [{**kept, "verdict": "accept"}, {**edited, "verdict": "accept"}, {**dropped, "verdict": "reject"}]
    config = configuration(tmp_path, verdicts)
    prepared = pipeline.prepare(config, say=lambda line: None)
    labeled = dialogues(prepared, "labeled_train")
    for reply in ("reply 5", "what a person would say"):
        assert labeled[reply].metadata["reviewed"] is True
    assert not {"reply 4", "reply 3"} & labeled.keys()
    assert prepared.summary["removed"]["review_rejected"] == 1
    process = run_command("review", "--workdir", str(tmp_path / "nothing"), "--output", str(output))
    assert process.returncode == 2 and "Traceback" not in process.stderr
