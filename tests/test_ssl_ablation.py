"""The published comparison: every row is a valid, equally fed run; runs are ordered, resumed, bounded and reported."""

import dataclasses
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from ssl_jax import command_line, files
from ssl_jax.config import Config
from ssl_jax.errors import UserError

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import ablation_plots  # noqa: E402
import ablation_results  # noqa: E402
import ablation_rows  # noqa: E402
import ablation_runs  # noqa: E402
import ablation_schedule  # noqa: E402
import ablation_table  # noqa: E402
import ssl_ablation  # noqa: E402
from ablation_rows import BY_NAME, FULL, LABELS, REGIMES, ROWS  # noqa: E402
from ablation_runs import SCALES, Selection  # noqa: E402
from ablation_schedule import Outcome, Task, run_all  # noqa: E402

BASE = command_line.read_yaml(ROOT / "configs" / "ablation.yaml")
BUDGETS, SEEDS = (100, 300, 700), (0, 1, 2)
EVERYTHING = Selection((), tuple(REGIMES), BUDGETS, SEEDS, complete=True)


def configurations(scale: str, selection: Selection = EVERYTHING) -> dict[str, Config]:
    return {
        run.name: command_line.validate(
            Config,
            ablation_runs.configuration(run, BASE, SCALES[scale], Path("runs"), selection.seeds),
            origin=run.name,
        )
        for run in ablation_runs.select(selection)
    }


# Rows and runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
def test_every_row_in_every_regime_at_every_budget_is_a_valid_run_with_the_same_tokens(scale):
    known = configurations(scale)
    assert len(known) >= 400
    fed = set()
    for config in known.values():
        train = config.train
        rows = train.per_device_train_batch_size * (1 + train.unlabeled_ratio)
        passes = 2 if config.objectives.r_drop else 1
        fed.add((train.steps or 0) * round(rows * passes) * train.sequence_length)
    assert len(fed) == 1
    shapes = [config.model.model_dump(exclude={"resid_pdrop", "embd_pdrop"}) for config in known.values()]
    assert all(shape == shapes[0] for shape in shapes)
    assert len({config.tokenizer.model_dump_json() for config in known.values()}) == 1


def test_the_base_is_a_run_of_its_own_and_the_row_lm():
    config = command_line.validate(Config, dict(BASE), origin="base")
    lm = configurations("cpu")["logs-100/lm/seed-0"]
    for section in ("model", "train", "optimizer", "objectives", "distillation", "pseudo_labels", "evaluation"):
        assert getattr(config, section) == getattr(lm, section)


def test_what_learns_from_labels_alone_has_no_unlabeled_data_and_belongs_to_no_regime():
    for name, config in configurations("cpu").items():
        alone = name.startswith(f"{LABELS}-")
        assert alone == (not config.data.unlabeled) == (config.train.unlabeled_ratio == 0)
    assert [run.name for run in ablation_runs.select(Selection(("oracle",), tuple(REGIMES), BUDGETS, (4,)))] == [
        "labels-all/oracle/seed-4"
    ]


def test_made_up_contexts_and_pseudo_replies_are_asked_for_only_where_there_is_something_to_make_them_of():
    for name, config in configurations("cpu").items():
        is_prompts = name.startswith("prompts-")
        if config.train.pseudo_label_fraction or (
            config.distillation.weight and "pseudo" in config.distillation.streams
        ):
            assert is_prompts and config.pseudo_labels.rounds, name
        if config.train.back_translation_fraction:
            assert not is_prompts and config.train.backward_fraction and config.pseudo_labels.rounds, name


def test_every_part_of_the_full_method_is_left_out_once_in_every_regime_that_has_it():
    for regime, parts in FULL.items():
        full = BY_NAME["full"].recipes[regime]
        for part, recipe in parts.items():
            rest = BY_NAME[f"full_minus_{part}"].recipes[regime]
            assert rest.settings != full.settings
            assert rest.settings.keys() | recipe.settings.keys() == full.settings.keys()


def test_the_most_informative_runs_come_first_and_teachers_before_their_students():
    order = [run.name for run in ablation_runs.select(dataclasses.replace(EVERYTHING, complete=False))]
    assert order[:5] == [
        "labels-100/floor/seed-0",
        "labels-all/oracle/seed-0",
        *(f"{regime}-100/lm/seed-0" for regime in REGIMES),
    ]
    assert [name.split("/")[1] for name in order[5:8]] == ["full"] * 3
    assert len(set(order)) == len(order)
    for seed in SEEDS:
        assert order.index(f"turns-100/lm/seed-{seed}") < order.index("turns-100/ensemble_kd/seed-0")


def test_asking_for_a_student_alone_brings_its_teachers_which_its_configuration_names():
    selection = Selection(("ensemble_kd",), ("logs",), (100,), SEEDS)
    known = configurations("cpu", selection)
    teachers = [f"logs-100/lm/seed-{seed}" for seed in SEEDS]
    assert list(known) == [*teachers, "logs-100/ensemble_kd/seed-0"]
    distillation = known["logs-100/ensemble_kd/seed-0"].distillation
    assert distillation.teachers == tuple(f"runs/{name}" for name in teachers)


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (Selection(("flor",), ("logs",), (100,), (0,)), "--rows flor: not one of .*floor"),
        (Selection((), ("log",), (100,), (0,)), "--regimes log: not one of logs"),
        (Selection(("pseudo_filtered",), ("logs",), (100,), (0,)), "none applies to --regimes logs"),
    ],
)
def test_names_that_are_none_are_told_with_those_that_are(selection, message):
    with pytest.raises(UserError, match=message):
        ablation_runs.select(selection)


# Schedule -----------------------------------------------------------------------------------------------------------


def task(folder: Path, name: str, code: str, needs: tuple[str, ...] = ()) -> Task:
    """A Python program; it has done its work when it leaves the file `done`."""
    directory = folder / name
    program = f"from pathlib import Path; folder = Path({str(directory)!r})\n{code}"
    return Task(name, (sys.executable, "-c", program), directory, (directory / "done").is_file, needs)


DONE = "(folder / 'done').touch()"
LAST = "import sys; sys.stderr.write('first\\nerror: the disk is full\\n\\n'); sys.exit(7)"


def run_tasks(tasks, *, jobs=1, seconds=60.0, **more) -> tuple[dict[str, Outcome], list[str]]:
    said: list[str] = []
    outcomes: dict[str, Outcome] = {}
    run_all(tasks, jobs=jobs, seconds=seconds, outcomes=outcomes, say=said.append, **more)
    return outcomes, said


def test_a_run_that_fails_is_recorded_with_its_code_and_last_line_and_the_others_go_on(tmp_path):
    tasks = [
        task(tmp_path, "bad", LAST),
        task(tmp_path, "student", DONE, needs=("bad",)),
        task(tmp_path, "silent", ""),
        task(tmp_path, "good", DONE),
    ]
    outcomes, said = run_tasks(tasks)
    assert outcomes == {
        "bad": Outcome("failed", "error: the disk is full", 7),
        "student": Outcome("left", "needs bad"),
        "silent": Outcome("failed", "ended without its result", 0),
        "good": Outcome("done", "", 0),
    }
    assert len(said) == 6 and "failed with exit code 7: error: the disk is full" in said[1]


def test_what_is_done_is_not_repeated_and_what_was_stopped_goes_on(tmp_path):
    count = "n = folder / 'count'; n.write_text(n.read_text() + 'x' if n.exists() else 'x')\n"
    stops_once = f"{count}import sys\nif n.read_text() == 'x': sys.exit(75)\n{DONE}"
    tasks = [task(tmp_path, "whole", count + DONE), task(tmp_path, "stopped", stops_once)]
    assert run_tasks(tasks)[0]["stopped"] == Outcome("left", "stopped", 75)
    outcomes, said = run_tasks(tasks)
    assert [outcome.state for outcome in outcomes.values()] == ["done", "done"]
    assert (tmp_path / "whole" / "count").read_text() == "x" and (tmp_path / "stopped" / "count").read_text() == "xx"
    assert [line.split(":")[0] for line in said] == ["stopped", "stopped"]


def test_no_run_is_begun_that_would_not_end_in_time_and_those_that_run_are_waited_for(tmp_path):
    tasks = [
        task(tmp_path, "first", "import time; time.sleep(1.5)\n" + DONE),
        task(tmp_path, "second", DONE),
    ]
    outcomes, _ = run_tasks(tasks, seconds=1.0)
    assert outcomes == {"first": Outcome("done", "", 0), "second": Outcome("left", "out of time")}
    outcomes, _ = run_tasks(tasks, seconds=30.0, durations=[("", 20.0), ("", 40.0), ("", 90.0), ("other", 0.0)])
    assert outcomes["second"] == Outcome("left", "out of time")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not pin processes")
def test_runs_at_a_time_share_the_cores_without_overlap(tmp_path):
    wait = "import os, time\ntime.sleep(0.5)\n(folder / 'cores').write_text(str(sorted(os.sched_getaffinity(0))))\n"
    run_tasks([task(tmp_path, name, wait + DONE) for name in "ab"], jobs=2)
    shares = [set(json.loads((tmp_path / name / "cores").read_text())) for name in "ab"]
    mine = os.sched_getaffinity(0)
    if len(mine) > 1:
        assert not shares[0] & shares[1] and shares[0] | shares[1] == mine


def test_interrupted_it_asks_what_runs_to_stop_waits_for_it_and_passes_the_interruption_on(tmp_path):
    saves = (
        "import signal, sys, time\n"
        "def stop(*_): time.sleep(0.3); (folder / 'saved').touch(); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, stop); (folder / 'ready').touch(); time.sleep(60)"
    )
    outcomes: dict[str, Outcome] = {}

    def interrupt(line: str) -> None:
        if line == "run: started":
            while not (tmp_path / "run" / "ready").exists():
                time.sleep(0.01)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_all([task(tmp_path, "run", saves)], jobs=1, seconds=60, outcomes=outcomes, say=interrupt)
    assert (tmp_path / "run" / "saved").exists()
    assert outcomes == {"run": Outcome("left", "stopped", 75)}


def test_a_run_that_another_process_is_at_is_left_to_it(tmp_path):
    one = task(tmp_path, "run", DONE)
    one.folder.mkdir()
    with (one.folder / ablation_schedule._LOCK).open("wb") as lock:
        assert ablation_schedule._locked(lock)
        assert run_tasks([one])[0] == {"run": Outcome("left", "another process is at it")}
    assert run_tasks([one])[0] == {"run": Outcome("done", "", 0)}


# Tables -------------------------------------------------------------------------------------------------------------

METRICS = {
    "recall_at_1_of_20": 0.25,
    "distinct_2": 0.5,
    "entropy_4": 8.0,
    "length_ratio": 0.75,
    "repetition_4": 0.01,
}
HUMAN = {"distinct_2": 0.6, "entropy_4": 8.5, "length_ratio": 1.0, "repetition_4": 0.002}


ROUND = {
    "kind": "pseudo",
    "round": 0,
    "generated": 2048,
    "accepted": 512,
    "accept_rate": 0.25,
    "tokens_per_sec": 3210.4,
}


def results(bits: dict[str, float]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values and likelihoods of runs with these bits per byte on forty dialogues."""
    num_bytes = np.linspace(50, 150, 40)
    noise = np.random.default_rng(0).normal(1, 0.05, 40)
    runs, nll = {}, {"bytes": num_bytes}
    for name, value in bits.items():
        place, row, seed = name.split("/")
        regime, budget = place.split("-")
        nll[name] = value * np.log(2) * num_bytes * noise / (np.sum(noise * num_bytes) / num_bytes.sum())
        runs[name] = {
            "row": row,
            "regime": regime,
            "budget": None if budget == "all" else int(budget),
            "seed": int(seed.removeprefix("seed-")),
            "labeled": 2270 if budget == "all" else int(budget),
            "metrics": {"reply_bits_per_byte": value, **METRICS},
            "human": HUMAN,
            "tokens": 1_430_000,
            "seconds": 120.0,
            "rounds": [ROUND],
            "round_seconds_share": 0.125,
        }
    values = {"runs": runs, "failed": {}, "baselines": {}, "cpu": "Some CPU", "cores": 2, "gpus": [], "date": "2026-01"}
    return values, nll


KNOWN = {
    "labels-100/floor/seed-0": 2.1,
    "labels-100/floor/seed-1": 2.1,
    "labels-300/floor/seed-0": 1.9,
    "labels-all/oracle/seed-0": 1.7,
    "logs-100/lm/seed-0": 1.8,
    "logs-100/full/seed-0": 2.0,
}


def cells(text: str, title: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {title} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_table_has_the_gap_closed_the_label_equivalents_and_distances_to_human():
    text = ablation_table.table(ablation_table.Comparison(*results(KNOWN)), "logs", 100)
    row = dict(zip(ablation_table._HEADER, cells(text, "LM, jointly"), strict=True))
    assert row["reply bits/byte"] == "1.800"
    assert re.fullmatch(r"75% \(7\d% to 7\d%\)", row["gap closed"])
    # Halfway in bits between 300 and 2,270 labels is halfway in their logarithm.
    assert row["label-equivalents"] == f"{np.sqrt(300 * 2270):.0f}"
    assert row["distinct-2 − human"] == "-0.100" and row["entropy-4 − human"] == "-0.500"
    assert row["R@1/20 PMI"] == "25.0%" and row["R@1/20 forward"] == "–"
    assert row["tokens"] == "1.43M" and row["minutes"] == "2.0" and row["seeds"] == "1"
    assert cells(text, r"**labels only, tuned: the floor**")[-1] == "2"


def test_rows_that_were_not_run_or_have_failed_say_so():
    values, nll = results(KNOWN)
    values["failed"] = {"logs-100/ema/seed-0": {"exit_code": 3, "error": "diverged"}}
    comparison = ablation_table.Comparison(values, nll)
    text = ablation_table.table(comparison, "logs", 100)
    left_out = text.splitlines()[-1]
    assert left_out.startswith("Not run: ") and "+ R-Drop" in left_out and "| + R-Drop" not in text
    assert cells(text, "+ EMA consistency")[1] == "failed, exit code 3" and "EMA" not in left_out
    later = ablation_table.table(comparison, "logs", 300)
    assert "back-translation" not in later and "LM, jointly" in later.splitlines()[-1]


def test_the_gap_is_undefined_where_the_oracle_hardly_wins_and_absent_before_it_is_run():
    values, nll = results(KNOWN)
    floor, oracle = "labels-100/floor/seed-0", "labels-all/oracle/seed-0"
    del values["runs"]["labels-100/floor/seed-1"]
    nll[oracle] = nll[floor] + np.random.default_rng(1).normal(-0.1, 5, 40)
    text = ablation_table.table(ablation_table.Comparison(values, nll), "logs", 100)
    assert cells(text, "LM, jointly")[2] == "undefined"
    del values["runs"][oracle]
    text = ablation_table.table(ablation_table.Comparison(values, nll), "logs", 100)
    assert cells(text, "LM, jointly")[2] == "–"


def test_the_page_describes_every_row_and_reports_rounds_and_the_summary_has_every_regime():
    comparison = ablation_table.Comparison(*results(KNOWN))
    page = ablation_table.page(comparison, "python somewhere", ["a_plot.png"])
    assert all(f"- **{row.name}**: {row.description}" in page for row in ROWS)
    assert "![a plot](a_plot.png)" in page and "python somewhere" in page
    assert cells(page, "logs-100/full/seed-0")[1:] == ["pseudo", "0", "2,048", "512", "25.0%", "3,210", "12.5%"]
    summary = ablation_table.summary(comparison)
    assert cells(summary, "LM, jointly")[1].startswith("1.800, 75%")
    assert cells(summary, "+ pseudo-replies, by likelihood")[1] == "does not apply"


def test_plots_are_drawn_from_results_alone_and_are_the_same_each_time(tmp_path):
    pytest.importorskip("matplotlib")
    comparison = ablation_table.Comparison(*results(KNOWN))
    names = ablation_plots.draw(comparison, tmp_path / "first")
    assert names == [ablation_plots.GAP, ablation_plots.BUDGETS]
    ablation_plots.draw(comparison, tmp_path / "second")
    for name in names:
        content = (tmp_path / "first" / name).read_bytes()
        assert content.startswith(b"\x89PNG") and content == (tmp_path / "second" / name).read_bytes()


def test_rounds_of_replies_and_of_contexts_are_read_from_the_metrics(tmp_path):
    lines = [{"step": 5, "loss": 1.0}]
    lines += [
        {"step": 6, **{f"{kind}/{key}": ROUND[key] for key in ROUND if key != "kind"}} for kind in ("pseudo", "b")
    ]
    file = tiny.write_jsonl(tmp_path / "metrics.jsonl", lines)
    assert ablation_results._rounds(file) == [ROUND, {**ROUND, "kind": "b"}]


# The command --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder in which the command has trained the floor and LM on small data, for a few steps."""
    folder = tmp_path_factory.mktemp("ablation")
    tiny.write_data(folder)
    base = {"data": {"test_size": 0.4}, "evaluation": {"sample_prompts": list(tiny.SAMPLE_PROMPTS)}}
    tiny.write_config(folder / "base.yaml", {**BASE, **base})
    run_command(folder)
    return folder


def run_command(folder: Path, *more: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation_rows, "LABELED_SOURCE", {"path": str(folder / "labeled.jsonl")})
        patch.setattr(ablation_rows, "UNLABELED_SOURCES", {"logs": {"path": str(folder / "raw.jsonl")}})
        for name, value in tiny.environment().items():
            patch.setenv(name, value)
        ssl_ablation.main(arguments(folder) + list(more))


def arguments(folder: Path) -> list[str]:
    paths = ("--runs-dir", str(folder / "runs"), "--output", str(folder / "out" / "ablation.json"))
    places = ("--docs", str(folder / "docs"), "--base", str(folder / "base.yaml"))
    what = ("--rows", "floor", "lm", "--regimes", "logs", "--budgets", "100", "--seeds", "0")
    return ["--scale", "tiny", "--steps", "4", "--jobs", "2", *what, *paths, *places]


def test_the_command_trains_what_is_asked_for_and_writes_results_page_and_plots(trained):
    pytest.importorskip("matplotlib")
    values, nll = ablation_results.read(trained / "out" / "ablation.json", "tiny")
    assert set(values["runs"]) == {"labels-100/floor/seed-0", "logs-100/lm/seed-0"}
    assert {run["steps"] for run in values["runs"].values()} == {4}
    assert len({run["labeled"] for run in values["runs"].values()}) == 1
    for name, run in values["runs"].items():
        bits = nll[name].sum(dtype=np.float64) / np.log(2) / nll["bytes"].sum(dtype=np.float64)
        assert bits == pytest.approx(run["metrics"]["reply_bits_per_byte"], rel=1e-5)
        config = command_line.read_yaml(trained / "runs" / "tiny" / name / ssl_ablation.ROW_FILE)
        assert config["workdir"] == str(trained / "runs" / "tiny" / name)
    assert {row["system"] for row in values["baselines"]["logs-100"]} == {"byte 6-gram", "TF-IDF"}
    page = (trained / "docs" / "ablation.md").read_text()
    assert re.search(r"\| LM, jointly \| \d\.\d{3} \|", page) and "byte 6-gram, labeled + unlabeled" in page
    assert (trained / "docs" / ablation_plots.BUDGETS).is_file()


def test_the_command_again_runs_nothing_and_says_the_same(trained, capsys):
    before = ablation_results.read(trained / "out" / "ablation.json", "tiny")[0]
    run_command(trained)
    said = capsys.readouterr().out
    assert "3 done, 0 failed, 0 left" in said and "started" not in said
    assert ablation_results.read(trained / "out" / "ablation.json", "tiny")[0]["runs"] == before["runs"]


def test_a_finished_run_of_another_configuration_is_not_taken_for_this_one(trained):
    with pytest.raises(UserError, match=r"finished with other settings than now: .*seed-0; remove them"):
        run_command(trained, "--steps", "5")


def test_results_are_rendered_without_runs_and_into_a_readme_with_its_markers(trained, tmp_path):
    pytest.importorskip("matplotlib")
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- ablation table -->\nold\n<!-- end of ablation table -->\nafter\n")
    render = [*arguments(trained), "--render-only", "--readme", str(readme)]
    ssl_ablation.main([*render, "--runs-dir", str(tmp_path / "nowhere")])
    assert "LM, jointly" in readme.read_text() and "old" not in readme.read_text()
    readme.write_text("no markers")
    with pytest.raises(UserError, match="markers <!-- ablation table -->"):
        ssl_ablation.main(render)
    with pytest.raises(UserError, match="no results of scale gpu"):
        ssl_ablation.main([*render, "--scale", "gpu"])


def test_results_of_runs_that_are_gone_stay_and_failures_go_when_a_run_is_finished(trained, tmp_path):
    output = tmp_path / "results.json"
    gone, kept = selected()
    folder = trained / "runs" / "tiny"
    failed = {kept.name: Outcome("failed", "why", 3), "other": Outcome("failed", "why", 2)}
    ablation_results.write(output, "tiny", folder, [gone], failed, {})
    values = ablation_results.write(output, "tiny", folder, [kept], {}, {})
    assert set(values["runs"]) == {gone.name, kept.name}
    assert values["failed"] == {"other": {"exit_code": 2, "error": "why"}}
    assert set(ablation_results.read(output, "tiny")[1]) == {gone.name, kept.name, "bytes"}


def test_dialogues_that_differ_between_runs_are_not_compared(trained, tmp_path):
    run = selected()[0]
    folder = trained / "runs" / "tiny" / run.name
    copy = tmp_path / run.name
    copy.mkdir(parents=True)
    for name in (ablation_results.SUMMARY, ablation_results.EVALUATION, "data.json"):
        (copy / name).write_bytes((folder / name).read_bytes())
    output = tmp_path / "results.json"
    ablation_results.write(output, "tiny", tmp_path, [run], {}, {})
    evaluation = files.read_json(copy / ablation_results.EVALUATION)
    evaluation["dialogues"]["bytes"][0] += 1
    files.write_json(copy / ablation_results.EVALUATION, evaluation)
    with pytest.raises(UserError, match="evaluated on other dialogues"):
        ablation_results.write(output, "tiny", tmp_path, [run], {}, {})


def selected() -> list[ablation_runs.Run]:
    return ablation_runs.select(Selection(("floor", "lm"), ("logs",), (100,), (0,)))


def test_what_the_user_gives_twice_is_refused():
    with pytest.raises(UserError, match="--seeds names one twice: 1 1"):
        ssl_ablation.main(["--seeds", "1", "1"])
