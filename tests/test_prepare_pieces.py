"""Sources are read in pieces by several processes, an interrupted preparation is continued, and neither shows."""

import hashlib
import itertools
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import preparing
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from preparing import WORDS, config, quietly

from ssl_jax import prepare as entry
from ssl_jax.config import Config, Source
from ssl_jax.data import formats, pieces, pipeline, processes, spool
from ssl_jax.errors import UserError


def sentence(generator):
    return " ".join(generator.choices(WORDS, k=generator.randint(2, 12)))


def rows(count, seed=0):
    generator = random.Random(seed)
    for number in range(count):
        messages = [{"role": role, "content": f"{sentence(generator)} "} for role in ("user", "assistant")]
        yield json.dumps({"messages": messages, "id": f"{seed}/{number}"})


@pytest.fixture
def settings(tmp_path):
    """A configuration of a few hundred dialogues with repeated ids, repeated texts and bad rows."""
    labeled = list(rows(200))
    unlabeled = [*rows(400, seed=1), *rows(20, seed=1), "{", *labeled[:10]]
    (tmp_path / "labeled.jsonl").write_text("\n".join(labeled))
    (tmp_path / "unlabeled.jsonl").write_text("\n".join(unlabeled))
    text = random.Random(2)
    (tmp_path / "text.txt").write_text("\n\n".join(sentence(text) for _ in range(200)))
    return {
        "data": {
            "labeled": [{"path": str(tmp_path / "labeled.jsonl")}],
            "unlabeled": [{"path": str(tmp_path / "unlabeled.jsonl")}, {"path": str(tmp_path / "text.txt")}],
            "prepared_dir": str(tmp_path / "prepared"),
        },
        "tokenizer": {"vocab_size": 320},
        "train": {"steps": 1},
    }


def content(directory):
    """All files of a prepared directory by name; what holds times of day or shard sizes of its making is left out."""
    return preparing.content(directory, without=(".npz",))


def records(prepared):
    return {
        split: [
            (one.id, one.tokens.tobytes(), one.loss_mask.tobytes(), one.reply_bytes, prepared.dialogue(split, number))
            for number, one in enumerate(prepared.encoded(split))
        ]
        for split in prepared.splits
    }


LINES = st.lists(
    st.sampled_from(["", " ", "a\tb", "c\td", "x", '{"text": "t"}', '{"text": "é\\n"}', "[", "{"]), max_size=40
)


@given(LINES, st.sampled_from(["\n", "\r\n"]), st.integers(1, 60), st.sampled_from(["messages", "text", "log"]))
def test_a_file_read_in_pieces_of_any_size_is_the_file_read_whole(lines, end, size, format):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.txt"
        file.write_text(end.join(["{}" if format == "messages" else "y\tz", *lines]), newline="")
        source = Source.model_validate({"path": str(file), "format": format})
        (whole,) = formats.units(source)
        parts = formats.cut(whole, source, size)
        read = [list(formats.read_unit(unit, source, "unlabeled", 1000)) for unit in parts]
        assert [row for part in read for row in part] == list(formats.read_unit(whole, source, "unlabeled", 1000))
        if len(lines) > 20 and size < 5 and format == "messages":
            assert len(parts) > 1


@pytest.mark.parametrize("content", [b'[{"text": "a"},\n{"text": "b"}]', b"\x1f\x8b" + b"x" * 50])
def test_arrays_and_compressed_files_are_not_cut(tmp_path, content):
    (tmp_path / "rows.json").write_bytes(content)
    source = Source(path=str(tmp_path / "rows.json"), format="messages")
    (whole,) = formats.units(source)
    assert formats.cut(whole, source, 4) == [whole]


def test_result_does_not_depend_on_the_number_of_processes_or_the_size_of_pieces(settings, tmp_path, monkeypatch):
    alone = quietly(config(settings, num_proc=1))
    assert alone.summary["rejected"] == {"duplicate id": 20, "not JSON": 1}
    monkeypatch.setattr(pieces, "_MIN_BYTES", 3000)
    many = quietly(config(settings, num_proc=2, prepared_dir=str(tmp_path / "many")))
    assert many.directory.name == alone.directory.name
    assert content(many.directory) == content(alone.directory)
    monkeypatch.setattr(pipeline, "_MIN_SHARD_BYTES", 2000)
    shards = quietly(config(settings, num_proc=2, prepared_dir=str(tmp_path / "shards")))
    assert len(list(shards.directory.rglob("*.array_record-*"))) > len(list(alone.directory.rglob("*.array_record-*")))
    assert records(shards) == records(alone)


def test_an_interrupted_preparation_is_continued_without_reading_again(settings, tmp_path, monkeypatch):
    expected = records(quietly(config(settings, prepared_dir=str(tmp_path / "undisturbed"))))
    monkeypatch.setattr(pieces, "_MIN_BYTES", 3000)
    monkeypatch.setattr(pipeline, "_MIN_SHARD_BYTES", 2000)
    read, written = [], []
    really_read, really_write = pieces.read, pipeline.shards.write_shard

    def read_counted(piece, limit):
        read.append(piece.number)
        return really_read(piece, limit)

    def write_counted(path, content):
        written.append(path.name)
        really_write(path, content)

    class Interrupted(BaseException):
        pass

    def after(calls, function):
        left = itertools.count(calls, -1)

        def interrupted(*arguments):
            if next(left) == 0:
                raise Interrupted
            return function(*arguments)

        return interrupted

    for module, name, function in (
        (pipeline.shards, "write_shard", write_counted),
        (spool.pieces, "read", read_counted),
    ):
        monkeypatch.setattr(module, name, function)
    for module, name, calls in (
        (spool.pieces, "read", 3),
        (pipeline.shards, "write_shard", 2),
        (pipeline.shards, "complete", 0),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, after(calls, getattr(module, name)))
            with pytest.raises(Interrupted):
                quietly(config(settings))
        assert not list((tmp_path / "prepared").glob("[!.]*/summary.json")), "nothing looks complete"
    assert len(read) > 5
    before = list(written)
    assert records(quietly(config(settings))) == expected
    assert sorted(set(before)) == sorted(before), "what was written is not written again"
    assert [path for path in (tmp_path / "prepared").iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("what", ["spool/0.jsonl", "spool/1.npy", "spool/1.json", "tokenizer/tokenizer.json", "shard"])
@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: content.swapcase(), lambda _: b""])
def test_what_an_interruption_left_is_made_again_where_it_is_damaged(settings, tmp_path, monkeypatch, what, damage):
    expected = records(quietly(config(settings, prepared_dir=str(tmp_path / "undisturbed"))))
    monkeypatch.setattr(pieces, "_MIN_BYTES", 3000)

    class Interrupted(BaseException):
        pass

    def interrupt(working, *_):
        path = next(working.rglob("*.array_record-*")) if what == "shard" else working / what
        path.write_bytes(damage(path.read_bytes()))
        raise Interrupted

    with monkeypatch.context() as patch:
        if what.startswith("spool"):
            rmtree = pipeline.shutil.rmtree
            patch.setattr(pipeline.shutil, "rmtree", lambda path, **_: interrupt(path.parent) or rmtree(path))
        else:
            patch.setattr(pipeline.shards, "complete", interrupt)
        with pytest.raises(Interrupted):
            quietly(config(settings))
    assert records(quietly(config(settings))) == expected


def test_a_damaged_record_of_digests_is_not_believed(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline.sources, "_CLOCK_GRAIN_NS", -(10**9))  # the files were made just now
    first = quietly(config(settings))
    remembered = tmp_path / "prepared" / "digests.json"
    digest = hashlib.sha256((tmp_path / "labeled.jsonl").read_bytes()).hexdigest()
    text = remembered.read_text()
    assert digest in text
    remembered.write_text(text.replace(digest, "0" * 64))
    assert quietly(config(settings)).directory == first.directory


def write_config(settings, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    return [sys.executable, "-m", "ssl_jax.prepare", "--config", str(tmp_path / "config.yaml")]


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_what_an_undisturbed_run_gives(settings, tmp_path):
    generator = random.Random(0)
    with open(tmp_path / "unlabeled.jsonl", "a") as file:
        file.writelines(f"\n{row}" for row in rows(60_000, seed=5))
    settings["data"]["num_proc"] = 2
    undisturbed = quietly(config(settings, prepared_dir=str(tmp_path / "undisturbed")))
    command = write_config(settings, tmp_path)
    killed = 0
    for _ in range(12):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            process.wait(generator.uniform(0.5, 6.0))
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
            deadline = time.monotonic() + 10
            while _processes_of_session(process.pid):
                assert time.monotonic() < deadline, "processes outlive the one that started them"
                time.sleep(0.1)
    assert killed >= 2
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (finished,) = (file.parent for file in (tmp_path / "prepared").glob("*/summary.json"))
    assert content(finished) == content(undisturbed.directory)


def _processes_of_session(session):
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(folder.name)
    return found


def _prepare_with_small_files(settings, limit, answer):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        quietly(config(settings))
        answer.send("done")
    except UserError as error:
        answer.send(str(error))


@pytest.mark.parametrize("limit", [3_000, 40_000])
def test_a_disk_that_is_full_is_told_and_the_work_is_continued(settings, tmp_path, limit):
    """A limit on the size of files stands for the full disk: writing fails in the same way, at another number."""
    settings["data"]["num_proc"] = 1
    expected = records(quietly(config(settings, prepared_dir=str(tmp_path / "undisturbed"))))
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_prepare_with_small_files, args=(settings, limit, theirs)
    )
    process.start()
    message = ours.recv()
    process.join()
    assert f"data.prepared_dir {tmp_path}/prepared: cannot be written" in message and "run the same" in message
    assert records(quietly(config(settings))) == expected


def test_two_at_a_time_make_it_once(settings, tmp_path):
    command = write_config(settings, tmp_path)
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("read 8" in output for output in outputs) == 1
    assert len(list((tmp_path / "prepared").glob("*/summary.json"))) == 1


def _die(task):
    if task == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_noticed():
    with pytest.raises(processes.Killed):
        list(processes.run(_die, [0, 1, 2], [1, 1, 1], num_proc=2))


def test_digests_of_unchanged_files_are_remembered_and_changed_files_are_read(settings, tmp_path, monkeypatch):
    hour_ago = time.time() - 3600
    for file in tmp_path.glob("*.*"):
        os.utime(file, (hour_ago, hour_ago))
    first = quietly(config(settings))
    monkeypatch.setattr(pipeline.sources, "_CLOCK_GRAIN_NS", -(10**9))  # the files were made just now
    assert quietly(config(settings)).directory == first.directory
    digest = pipeline.sources._digest
    monkeypatch.setattr(pipeline.sources, "_digest", lambda file: pytest.fail(f"{file} is read again"))
    assert quietly(config(settings)).directory == first.directory
    monkeypatch.setattr(pipeline.sources, "_digest", digest)
    text = (tmp_path / "labeled.jsonl").read_text()
    (tmp_path / "labeled.jsonl").write_text(text.replace("cat", "dog"))
    os.utime(tmp_path / "labeled.jsonl", (hour_ago, hour_ago))
    assert quietly(config(settings)).directory != first.directory


def test_tokenizer_is_fitted_on_an_even_part_of_much_text(settings, tmp_path):
    whole = quietly(config(settings))
    settings["tokenizer"]["fit_bytes"] = 2000
    part = quietly(config(settings))
    assert part.directory != whole.directory
    assert part.tokenizer.fingerprint != whole.tokenizer.fingerprint
    assert set(part.splits) == set(whole.splits)


def test_budget_of_a_data_set_by_name_and_of_several_files(tmp_path, monkeypatch):
    for number in range(3):
        (tmp_path / f"{number}.jsonl").write_text("\n".join(rows(10, seed=number)))
    source = Source(path=f"{tmp_path}/*.jsonl", max_dialogues=15)
    monkeypatch.setattr(pieces, "_MIN_BYTES", 100)
    (resolved,) = pipeline.sources.resolve(
        Config.model_validate({"data": {"labeled": [source.model_dump()]}, "train": {"steps": 1, "unlabeled_ratio": 0}})
    )
    (piece,) = pieces.cut([resolved])
    assert len(list(pieces.read(piece, 1000))) == 15


def test_found_again_is_told_with_the_same_tables(settings, tmp_path, capsys):
    arguments = write_config(settings, tmp_path)[3:]
    entry.main(arguments)
    first = capsys.readouterr().out
    entry.main(arguments)
    again = capsys.readouterr().out
    tables = first[first.index("prepared data") : first.index("done in")].partition("\n")[2]
    assert tables and tables in again and "(found)" in again
