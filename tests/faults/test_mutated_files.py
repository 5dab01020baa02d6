"""The small files of a work directory, and files of dialogues, after an accident: well all the same, or named."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from test_mutated_configurations import examples, outcome

from ssl_jax import evaluate, export, generate, review, train

pytestmark = pytest.mark.slow

EXAMPLES = 120

NOTHING = ("--generated-replies", "0", "--recall-examples", "0", "--coherence-examples", "0")


@dataclasses.dataclass(frozen=True)
class Reader:
    """A command that reads files of a work directory.

    Attributes:
      main: of its module.
      flags: besides the work directory.
      files: what it reads.
    """

    main: Callable[[Sequence[str]], None]
    flags: tuple[str, ...]
    files: tuple[str, ...]


TOKENIZER = tuple(f"tokenizer/{name}" for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"))
ROUND = tuple(
    f"pseudo_labels/round_0/{name}" for name in ("summary.json", "manifest.json", "labels-00000.array_record")
)
READERS = {
    "generate": Reader(
        generate.main, ("--prompt", "hi", "--max-new-tokens", "4"), ("config.yaml", "data.json", *TOKENIZER)
    ),
    "evaluate": Reader(evaluate.main, NOTHING, ("config.yaml", "data.json", *TOKENIZER)),
    "compare": Reader(evaluate.main, ("--baseline", "damaged"), ("eval_test.json",)),
    "export": Reader(export.main, ("--output", "exported", "--overwrite"), ("config.yaml", *TOKENIZER)),
    "review": Reader(review.main, ("--output", "reviewed"), ("config.yaml", *ROUND)),
    "train": Reader(
        train.main, (), ("config.yaml", "data.json", "summary.json", "metrics.jsonl", "samples.jsonl", *ROUND)
    ),
}

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda content: b"",
    "cut in half": lambda content: content[: len(content) // 2],
    "zeros": lambda content: bytes(len(content)),
    "another encoding": lambda content: b"\xff\xfe\xe9" + content,
    "a list": lambda content: b"[]\n",
    "a number": lambda content: b"3\n",
    "null": lambda content: b"null\n",
    "no fields": lambda content: b"{}\n",
    "a text": lambda content: b'"x"\n',
    "nested without end": lambda content: b"[" * 100_000,
    "something else": lambda content: b'{"a": NaN}\n',
    "another type": lambda content: re.sub(rb'"([\w/]+)": [^,\[\{\n]+', rb'"\1": [7]', content, count=3),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a damaged copy of a finished run is made, again and again."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(tiny.finished(), folder / "finished")
    return folder


def damaged_copy(home: Path, file: str, damage: str) -> Path:
    """A work directory of which one file is damaged, missing, or a folder."""
    copy = home / "damaged"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(home / "finished", copy)
    if file == "eval_test.json" and not (copy / file).is_file():
        evaluate.main(["--workdir", str(copy), *NOTHING])
    path = copy / file
    content = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes(DAMAGES[damage](content))
    return copy


@examples(EXAMPLES)
@given(data=st.data())
def test_a_damaged_file_of_a_run_is_mended_or_named(data: st.DataObject, home: Path) -> None:
    name = data.draw(st.sampled_from(sorted(READERS)))
    reader = READERS[name]
    file = data.draw(st.sampled_from(reader.files))
    damage = data.draw(st.sampled_from(["missing", "a folder", *DAMAGES]))
    workdir = damaged_copy(home, file, damage)
    flags = [str(home / flag) if flag in ("damaged", "exported", "reviewed") else flag for flag in reader.flags]
    if name == "train":
        flags += ["--config", str(tiny.config_file())]
    message = outcome(reader.main, ["--workdir", str(workdir), *flags], seconds=60)
    if message is not None:
        # What is beside it may be all that is known; a file of an evaluation has the split in its name.
        known = (file.rsplit("/", 1)[-1], str((workdir / file).parent) if "/" in file else file, "eval_*.json")
        if file == "config.yaml":  # one that says nothing is that of another run
            known += ("checkpoint", "data.labeled")
        assert any(one in message for one in known), f"{name}: {file}, {damage}: {message}"


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "binary", "not JSON", "no replies"])
def test_a_file_of_dialogues_that_has_none_is_named(kind: str, home: Path) -> None:
    path = home / "dialogues.jsonl"
    contents = {"empty": b"", "binary": bytes(range(256)) * 9, "not JSON": b"{\n" * 9, "no replies": b'{"text": "a"}\n'}
    if kind == "folder":
        path = home / "empty_folder"
        path.mkdir(exist_ok=True)
    elif kind in contents:
        path.write_bytes(contents[kind])
    else:
        path.unlink(missing_ok=True)
    message = outcome(evaluate.main, ["--workdir", str(home / "finished"), "--data", str(path)], seconds=60)
    assert message is not None and str(path) in message
