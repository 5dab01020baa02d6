"""Apache Beam prepares the same bytes as processes do, and tells the same mistakes."""

import errno
import json
import pickle
import random
import sys
import time
from pathlib import Path

import preparing
import pytest
from preparing import WORDS, config, quietly
from pydantic import ValidationError

from ssl_jax.data import beam_runner, pieces, pipeline, shards, sources, spool
from ssl_jax.errors import UserError

ROOT = Path(__file__).parents[1]
TWO_WORKERS = ("--direct_num_workers=2", "--direct_running_mode=multi_processing")


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Some dialogues with repeated ids, repeated texts and bad rows, in about ten pieces and ten shards."""
    generator = random.Random(0)

    def dialogue(number, count):
        turns = [" ".join(generator.choices(WORDS, k=generator.randint(1, 9))) for _ in range(count)]
        roles = ("user", "assistant") * count
        messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
        return json.dumps({"id": number, "messages": messages})

    labeled = [dialogue(number % 190, 2) for number in range(200)]
    prompts = [dialogue(number, 1) for number in range(300)]
    (tmp_path / "labeled.jsonl").write_text("\n".join(labeled))
    (tmp_path / "unlabeled.jsonl").write_text("\n".join([*prompts, "{", *labeled[:10]]))
    monkeypatch.setattr(pieces, "_MIN_BYTES", 6000)
    monkeypatch.setattr(pipeline, "_MIN_SHARD_BYTES", 6000)
    return {
        "data": {
            "labeled": [{"path": str(tmp_path / "labeled.jsonl")}, {"dataset": "chatterbot", "language": "tamil"}],
            "unlabeled": [{"path": str(tmp_path / "unlabeled.jsonl")}],
            "prepared_dir": str(tmp_path / "prepared"),
            "max_rejected_fraction": 0.5,
        },
        "tokenizer": {"vocab_size": 320},
        "train": {"steps": 1},
    }


def content(prepared):
    """All files of a prepared directory by name, and the directory's name."""
    return {**preparing.content(prepared.directory), "name": prepared.directory.name}


@pytest.mark.beam
def test_prepared_directory_is_the_one_that_processes_make(settings, tmp_path):
    expected = content(quietly(config(settings, num_proc=1, prepared_dir=str(tmp_path / "processes"))))
    assert len([name for name in expected if ".array_record-" in name]) > 8
    made = content(quietly(config(settings, beam_options=[])))
    assert made.keys() == expected.keys()
    assert [name for name in made if made[name] != expected[name]] == []


@pytest.mark.beam
def test_two_workers_that_do_everything_twice_make_the_same_directory(settings, tmp_path, monkeypatch):
    """Runners may give a task to two workers, at the same time too."""
    expected = content(quietly(config(settings, num_proc=1, prepared_dir=str(tmp_path / "processes"))))
    run = beam_runner.run
    monkeypatch.setattr(
        beam_runner,
        "run",
        lambda function, tasks, *others: run(function, [task for task in tasks for _ in range(2)], *others),
    )
    assert content(quietly(config(settings, beam_options=TWO_WORKERS))) == expected


@pytest.mark.beam
def test_what_is_wrong_with_the_data_is_told_as_without_beam(settings):
    settings["data"]["split_by"] = "time"  # no dialogue has one
    with pytest.raises(UserError) as told_by_process:
        quietly(config(settings, num_proc=1))
    with pytest.raises(UserError) as told_by_beam:
        quietly(config(settings, beam_options=[]))
    assert str(told_by_beam.value) == str(told_by_process.value)


@pytest.mark.beam
@pytest.mark.parametrize("options", [(), TWO_WORKERS])
def test_mistakes_come_before_a_disk_that_is_full_and_both_arrive_as_they_were(tmp_path, options):
    def fail(task):
        raise task

    full = OSError(errno.ENOSPC, "No space left on device", "/shared/0.jsonl")
    with pytest.raises(OSError) as raised:
        beam_runner.run(fail, [full], tmp_path, options)
    assert (raised.value.errno, raised.value.filename) == (full.errno, full.filename)
    with pytest.raises(UserError, match=r"^a file of theirs\nthe fix$"):
        beam_runner.run(fail, [full, UserError("a file of theirs\nthe fix")], tmp_path, options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.beam
def test_an_interrupted_preparation_is_continued_without_reading_again(settings, tmp_path, monkeypatch):
    expected = content(quietly(config(settings, num_proc=1, prepared_dir=str(tmp_path / "processes"))))
    read, written = [], []
    really_read, really_write = pieces.read, shards.write_shard

    def read_until_the_end(piece, limit):
        if len(read) == 3:
            raise KeyError("the end")
        read.append(piece.number)
        return really_read(piece, limit)

    def write_until_the_end(path, records):
        if len(written) == 3:
            raise KeyError("the end")
        really_write(path, records)
        written.append(path)

    for module, name, function in (
        (spool.pieces, "read", read_until_the_end),
        (pipeline.shards, "write_shard", write_until_the_end),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, function)
            with pytest.raises(KeyError, match="the end"):
                quietly(config(settings, beam_options=[]))
    monkeypatch.setattr(spool.pieces, "read", lambda piece, limit: pytest.fail("read again"))
    monkeypatch.setattr(
        pipeline.shards,
        "write_shard",
        lambda path, records: pytest.fail("written again") if path in written else really_write(path, records),
    )
    assert content(quietly(config(settings, beam_options=[]))) == expected


@pytest.mark.beam
def test_description_of_the_pipeline_has_no_part_of_the_tasks(tmp_path, monkeypatch):
    make, made = beam_runner._make_pipeline, []

    def nothing(task):
        pass

    def remember(options):
        made.append(make(options))
        return made[-1]

    monkeypatch.setattr(beam_runner, "_make_pipeline", remember)
    beam_runner.run(nothing, [bytes(10_000)] * 20, tmp_path, [])
    ((_, pipeline),) = made
    assert len(pipeline.to_runner_api().SerializeToString()) < 100_000


at_work = []


def work(task):
    at_work.append(task)
    time.sleep(0.02)
    assert at_work == [task], "several at once"
    at_work.remove(task)


@pytest.mark.beam
def test_a_process_does_one_task_at_a_time_whatever_the_runner_gives_it(tmp_path):
    beam_runner.run(work, range(12), tmp_path, ["--direct_num_workers=4", "--direct_running_mode=multi_threading"])


@pytest.mark.beam
@pytest.mark.parametrize(
    "options, reason",
    [
        (["--runner=FlonkRunner"], "Unexpected pipeline runner: FlonkRunner"),
        (["--runner=apache_beam.Flonk"], "no attribute 'Flonk'"),
        (["--runner=DataflowRunner"], "Missing required option: project|please install apache_beam.gcp."),
        (["--direct_num_workers=many"], "argument --direct_num_workers: invalid int value: 'many'"),
    ],
)
def test_options_that_beam_refuses_are_told_before_any_work(settings, tmp_path, options, reason):
    with pytest.raises(UserError, match=f"^data.beam_options {options[0]}: .*({reason})"):
        quietly(config(settings, beam_options=options))
    assert not list((tmp_path / "prepared").glob(".*.incomplete"))


@pytest.mark.beam
def test_a_worker_without_the_shared_folder_says_so(tmp_path):
    with pytest.raises(UserError, match="not on this worker"):
        beam_runner._attempt(work, tmp_path / "elsewhere", "", 0)


def test_tasks_that_somebody_else_wrote_into_the_shared_folder_are_not_unpickled(tmp_path):
    class Attack:
        def __reduce__(self):
            return Path.touch, (tmp_path / "trace",)

    (tmp_path / "tasks.pickle").write_bytes(pickle.dumps([Attack()]))
    with pytest.raises(UserError, match="not what the launcher wrote"):
        beam_runner._tasks(tmp_path, "0" * 64)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("option", ["runner=FlinkRunner", "", "-r"])
def test_what_is_no_option_is_refused_with_the_configuration(settings, option):
    with pytest.raises(ValidationError, match=r"data.beam_options"):
        config(settings, beam_options=[option])


def test_without_beam_the_package_is_named_and_work_that_was_begun_is_kept(settings, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    asked = config(settings, beam_options=[])
    name = sources.content_hash(asked, sources.resolve(asked))[:16]
    begun = tmp_path / "prepared" / f".{name}.incomplete" / "spool"
    begun.mkdir(parents=True)
    with pytest.raises(UserError, match=r"^data.beam_options needs Apache Beam: pip install 'ssl_jax\[beam\]'$"):
        quietly(asked)
    assert begun.is_dir()


def test_pins_for_beam_are_those_of_all_other_tests_but_for_what_beam_holds_back():
    def pins(name):
        lines = (ROOT / name).read_text().splitlines()
        return dict(line.split("==") for line in lines if not line.startswith("#"))

    ours, others = pins("constraints-beam.txt"), pins("constraints.txt")
    assert others.keys() <= ours.keys()
    different = {package for package in others if ours[package] != others[package]}
    assert different == {"googleapis-common-protos", "protobuf", "pyarrow"}
