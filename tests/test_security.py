"""Attacks, made for real: what strangers can put into files that we read runs nothing, leads nowhere and ends soon."""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import html.parser
import json
import os
import re
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from ssl_jax import checkpoint as checkpoints
from ssl_jax import (
    command_line,
    compilation_cache,
    files,
    huggingface,
    manifest,
    review_page,
    step_manifest,
    storage,
    tensor_files,
    train,
)  # fmt: skip
from ssl_jax.config import Source, TemplateName, cleaning
from ssl_jax.data import formats, named, store, template_renderer
from ssl_jax.data.cleaning.apply import step_functions
from ssl_jax.data.formats import Expected, parquet
from ssl_jax.data.tokenizer import DialogueTokenizer
from ssl_jax.dialogue import Dialogue, Turn
from ssl_jax.errors import UserError
from ssl_jax.pseudo_labels import rounds

SOURCES = sorted(
    path for folder in ("ssl_jax", "benchmarks", "launch", ".ci") for path in (tiny.ROOT / folder).rglob("*.py")
)
# What makes objects of bytes by running what the bytes say.
LOADERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle"}
# Beam hands its workers pickles whatever we do; this one carries what it carries, and is compared with its digest.
PICKLES = {"ssl_jax/data/beam_runner.py"}


def names_of(node: ast.AST) -> Iterator[str]:
    """The modules that an import names, or the dotted name of what is called."""
    match node:
        case ast.Import():
            yield from (alias.name for alias in node.names)
        case ast.ImportFrom():
            yield node.module or ""
        case ast.Call():
            yield ast.unparse(node.func)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(tiny.ROOT)))
def test_no_source_runs_what_a_file_says(path: Path) -> None:
    """No pickle and its kin, no `eval` and `exec`, no YAML but the safe kind, no code from a model's directory."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree):
        for name in names_of(node):
            parts = name.split(".")
            if parts[0] in LOADERS and path.relative_to(tiny.ROOT).as_posix() not in PICKLES:
                found.append(name)
            # `network.eval()` of PyTorch is another thing.
            is_own = path.name == "mutants.py" and name == "compile"  # a mutant of our own source, to see if it can be
            if not is_own and name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load"):
                found.append(name)
            if (
                isinstance(node, ast.Call)
                and parts[0] == "yaml"
                and parts[-1] in ("load", "load_all", "unsafe_load", "full_load")
            ):
                loader = [ast.unparse(word) for word in (*node.args[1:], *(word.value for word in node.keywords))]
                is_strict = parts[-1] == "load" and loader in (["_StrictLoader"], ["_LOADER"])
                if not (is_strict or parts[-1].startswith("safe_")):
                    found.append(ast.unparse(node))
        is_off = isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant) and node.value.value is False
        if getattr(node, "arg", None) in ("allow_pickle", "trust_remote_code", "shell") and not is_off:
            found.append(ast.unparse(node))
    assert not found


def test_a_tag_of_python_in_a_configuration_is_refused_and_runs_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    config = tmp_path / "config.yaml"
    for text in (
        f"seed: !!python/object/apply:os.system ['touch {trace}']",
        f"!!python/object/new:subprocess.check_output [['touch', '{trace}']]",
        "train: !!python/name:os.system",
        f"workdir: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{trace}']]",
    ):
        config.write_text(text, encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["train", "--config", str(config)])
        with pytest.raises(SystemExit) as ended:
            command_line.run(train.main)
        error = capfd.readouterr().err
        assert ended.value.code == 2 and error.startswith("error: ") and "not valid YAML" in error
        assert not trace.exists()


@functools.cache
def tokenizer_with(chat_template: str, form: TemplateName = "chat_template") -> DialogueTokenizer:
    """A tokenizer of bytes with the chat template of a stranger."""
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(letters, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    backend.decoder = decoders.ByteLevel()  # pyright: ignore
    backend.add_special_tokens(["<s>", "</s>"])
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<s>"}
    return DialogueTokenizer(backend, template=form, named_tokens=named, chat_template=chat_template)


HARMLESS = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ (''|attr('__class__')).mro() }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ ('%s'|attr('format'))('').__class__.x.y }}",
        "{{ cycler.__init__.__globals__.os.system('touch TRACE') }}",
        "{{ lipsum.__globals__['os'].system('touch TRACE') }}",
        "{{ joiner.__init__.__globals__.__builtins__.open('TRACE', 'w') }}",
        "{{ raise_exception.__globals__['json'].codecs.open('TRACE', 'w') }}",
        "{{ strftime_now.__globals__['os'].system('touch TRACE') }}",
        "{{ dict.__init__.__globals__.os.system('touch TRACE').x }}",
        "{{ self._TemplateReference__context.environment.x.y }}",
        "{% set a = namespace(__class__=1) %}",
        "{% include '/etc/hostname' %}",
        "{% import 'os' as os %}{{ os.system('touch TRACE') }}",
        "{% extends '/etc/hostname' %}",
        "{{ messages.append('x') }}",
        "{% for m in messages %}{{ m.update(content='forged') }}{% endfor %}",
    ],
)
def test_a_chat_template_cannot_leave_its_sandbox(attack: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    tokenizer_with(HARMLESS)
    with pytest.raises(UserError, match="chat template"):
        tokenizer_with(HARMLESS + attack.replace("TRACE", str(trace)))
    assert not trace.exists()


@pytest.mark.parametrize(
    "attack",
    [
        "{% for x in range(99999) %}{% for y in range(99999) %}{% set z = x * y %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ 'a' * 10 ** 12 }}",
        "{{ 'a'|center(10 ** 12) }}",
        "{{ '%1000000000000d' % 1 }}",
        "{{ lipsum(n=10 ** 9) }}",
        "{% set x = namespace(y='aaaaaaaa') %}{% for i in range(99) %}{% set x.y = x.y ~ x.y %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ " + "(" * 10_000 + ")" * 10_000 + " }}",
        "{{ 'a' * 2 ** 25 }}",
        "{# " + "a" * 2**20 + " #}",
    ],
    ids=range(12),
)  # fmt: skip
def test_a_chat_template_without_end_or_bounds_is_ended(attack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_renderer, "_SECONDS", 1)
    # The time that the renderer takes to start is another's.
    template_renderer.render(HARMLESS, [], prompt=True, blocks=False, variables={})
    before = time.monotonic()
    with pytest.raises(UserError, match="chat template"):
        tokenizer_with(HARMLESS + attack)
    assert time.monotonic() - before < 20
    text, _ = template_renderer.render(HARMLESS, [], prompt=True, blocks=False, variables={})
    assert text == "<s>"  # and what comes after is served


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("key", ["vocab", "merges", "init_inputs"])
def test_a_tokenizer_cannot_name_a_file_elsewhere_as_its_vocabulary(tmp_path: Path, file: str, key: str) -> None:
    secret, directory = tmp_path / "secret.txt", tmp_path / "model"
    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "hello"]
    secret.write_text("\n".join([*words, "password"]))
    directory.mkdir()
    (directory / "vocab.txt").write_text("\n".join(words))
    (directory / "config.json").write_text('{"model_type": "bert"}')
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    DialogueTokenizer.load(directory)
    value = [str(secret)] if key == "init_inputs" else str(secret)
    (directory / file).write_text(json.dumps({"tokenizer_class": "BertTokenizer", key: value}))
    with pytest.raises(UserError, match=f"{file}: {key} may name any file"):
        DialogueTokenizer.load(directory)


def test_a_models_directory_cannot_bring_code(tmp_path: Path) -> None:
    tiny.write_jsonl(tmp_path / "vocab.json", [{letter: n for n, letter in enumerate("abc")}])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "evil.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'trace')!r}).touch()\n")
    code = {"auto_map": {"AutoConfig": "evil.A", "AutoTokenizer": ["evil.A", "evil.A"], "AutoModel": "evil.A"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "A", **code}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **code}))
    for load in (DialogueTokenizer.load, huggingface.read_settings):
        with contextlib.suppress(UserError):
            load(tmp_path)
    assert not (tmp_path / "trace").exists()


DEEP = "[" * 200_000


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.json", huggingface.read_settings),
        ("generation_config.json", huggingface.read_generation),
        ("model.safetensors.index.json", tensor_files.open_tensors),
        ("tokenizer_config.json", DialogueTokenizer.load),
        ("tokenizer.json", DialogueTokenizer.load),
        ("summary.json", store.Prepared.open),
        ("features.json", named._check_feature_classes),
    ],
)
def test_json_nested_without_end_is_refused_by_its_name(tmp_path: Path, name: str, read: Callable[[Path], Any]) -> None:
    (tmp_path / name).write_text(DEEP)
    with pytest.raises(UserError, match=re.escape(name)):
        read(tmp_path)


@pytest.mark.parametrize(
    "place", ["..", "../model.safetensors", "/dev/zero", "a/../../x", "", ".", "model.safetensors\0", 3]
)
def test_an_index_of_weights_names_files_of_its_directory(tmp_path: Path, place: Any) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    (tmp_path / "model.safetensors").write_bytes(b"")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"wte": place}}))
    with pytest.raises(UserError, match=r"which is not a file of this directory|no such file"):
        tensor_files.open_tensors(directory)


def test_weights_that_are_a_pipe_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model-1.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"wte": "model-1.safetensors"}}')
    with pytest.raises(UserError, match="no such file"):
        tensor_files.open_tensors(tmp_path)


@pytest.mark.parametrize("size", [10 * 2**30, 2**63, 2**64 - 1])
def test_a_header_of_weights_that_would_fill_memory_is_refused(tmp_path: Path, size: int) -> None:
    (tmp_path / "model.safetensors").write_bytes(size.to_bytes(8, "little") + b'{"wte": ')
    with pytest.raises(UserError, match=r"model\.safetensors: truncated, damaged or not safetensors"):
        tensor_files.open_tensors(tmp_path)


def checkpoint(folder: Path) -> tuple[checkpoints.Checkpoints, Path]:
    """A step that verifies."""
    saved = checkpoints.Checkpoints(folder / "checkpoints")
    saved.save(1, {"params": {"weight": np.ones(3, np.float32)}}, {})
    assert saved.newest() == 1
    saved.close()
    return checkpoints.Checkpoints(folder / "checkpoints"), folder / "checkpoints" / "1"


def forge(step: Path, /, **changes: Any) -> None:
    """Changes a manifest as somebody does who knows that it has a digest of itself."""
    body = {**step_manifest.read(step), **changes}
    (step / "manifest.json").write_bytes(manifest.encode(body))


@pytest.mark.parametrize("name", ["../secret", "/dev/zero", "params/../../../secret", "", ".", "params/..", "a\0b"])
def test_a_manifest_does_not_make_us_read_what_is_no_part_of_its_step(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, step = checkpoint(tmp_path)
    content = b"a secret"
    (tmp_path / "checkpoints" / "secret").write_bytes(content)
    (tmp_path / "secret").write_bytes(content)
    known = step_manifest.read(step)["files"]
    forge(step, files={**known, name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}})
    monkeypatch.setattr(files, "digest", lambda path: pytest.fail(f"read {path}"))
    assert saved.newest() is None


@pytest.mark.parametrize("target", ["/dev/zero", "../../../secret", "pipe"])
def test_a_link_in_a_step_leads_nowhere(tmp_path: Path, target: str) -> None:
    saved, step = checkpoint(tmp_path)
    (tmp_path / "secret").write_bytes(b"")
    os.mkfifo(step / "pipe")
    (step / "params" / "link").symlink_to(step / "pipe" if target == "pipe" else target)
    known = step_manifest.read(step)["files"]
    forge(step, files={**known, "params/link": {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}})
    assert saved.newest() is None


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "1"},
        {"step": True},
        {"items": ["params"]},
        {"items": {"params": None}},
        {"files": None},
        {"files": {"params/x": 3}},
        {"files": {"params/x": {"bytes": 1}}},
        {"metric": "low"},
        {"meta": 1},
        {"more": 1},
    ],
    ids=str,
)
def test_a_manifest_of_other_types_is_damaged(tmp_path: Path, changes: dict[str, Any]) -> None:
    saved, step = checkpoint(tmp_path)
    forge(step, **changes)
    assert saved.newest() is None and saved.best() is None
    with pytest.raises(UserError, match="is damaged"):
        saved.meta(1)


def test_a_manifest_nested_without_end_is_damaged(tmp_path: Path) -> None:
    saved, step = checkpoint(tmp_path)
    (step / "manifest.json").write_text(DEEP)
    assert saved.newest() is None


def test_a_round_reads_shards_of_its_own_folder(tmp_path: Path) -> None:
    rounds.write(tmp_path, 0, [{"id": "a", "messages": [{"role": "user", "content": "hi"}]}], {})
    (shard,) = rounds.read_summary(tmp_path, 0)["sha256"]  # pyright: ignore[reportOptionalSubscript]
    moved = (tmp_path / "round_0" / shard).rename(tmp_path / shard)
    summary = {"sha256": {f"../{shard}": hashlib.sha256(moved.read_bytes()).hexdigest()}}
    files.write_json(tmp_path / "round_0" / "summary.json", summary)
    with pytest.raises(UserError, match="is damaged"):
        rounds.read_rows(tmp_path, 0)


@pytest.mark.parametrize("name", ["../../evil", "a/../../../evil", "a//../x"])
def test_an_object_of_a_bucket_cannot_be_copied_out_of_its_mirror(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(storage._DRIVERS, "memory", ("fsspec", "none", "ask for it"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    listed = {f"/bucket/run/{name}": {"type": "file", "size": 4, "name": name}}
    store = storage.filesystem("memory://bucket/run")
    monkeypatch.setattr(store, "find", lambda *_, **__: dict(listed))
    monkeypatch.setattr(store, "glob", lambda *_, **__: dict(listed))
    monkeypatch.setattr(store, "get", lambda *_: pytest.fail("copied"))
    with pytest.raises(UserError, match="no path within a folder"):
        storage.Bucket("memory://bucket/run", tmp_path / "mirror").pull()
    for url in ("memory://bucket/run", "memory://bucket/run/*"):
        with pytest.raises(UserError, match="no path within a folder"):
            storage.fetch(url, lambda _: True)


def test_folders_of_the_cache_are_the_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = storage.cache_folder()
    assert folder == tmp_path / "ssl_jax" / "buckets" and folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o775)  # as an earlier version left it
    assert storage.cache_folder().stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("trap", ["of others", "open to all", "a link of others"])
def test_a_folder_that_somebody_else_may_have_filled_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trap: str
) -> None:
    """Temporary folders are shared: anybody can make the one that we would use, before us."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # there is no cache
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"ssl_jax_buckets_{os.getuid()}"
    if trap == "a link of others":
        (tmp_path / "theirs").mkdir()
        folder.symlink_to(tmp_path / "theirs")
    else:
        folder.mkdir()
    folder.chmod(0o777 if trap == "open to all" else 0o755)
    if trap != "open to all":
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(UserError, match="set XDG_CACHE_HOME"):
        storage.cache_folder()


@pytest.mark.parametrize("trap", ["of others", "open to all"])
def test_compiled_programs_are_not_taken_from_a_folder_that_others_may_have_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trap: str
) -> None:
    folder = tmp_path / "ssl_jax" / "compiled"
    folder.mkdir(parents=True)
    folder.chmod(0o777 if trap == "open to all" else 0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if trap == "of others":
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    before = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        compilation_cache.enable()
        assert jax.config.jax_compilation_cache_dir is None  # pyright: ignore[reportAttributeAccessIssue]
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


CANARY = "the canary sings at night"
# Rows that are wrong in every way there is a reason for, with what somebody said where something else belongs.
BAD_ROWS: dict[str, list[Any]] = {
    "messages": [
        CANARY,
        [CANARY],
        {CANARY: 1},
        {"messages": CANARY},
        {"messages": [CANARY]},
        {"messages": [{"role": CANARY, "content": "user"}]},
        {"messages": [{"role": [CANARY], "content": "x"}]},
        {"messages": [{"role": "user", "content": [CANARY]}]},
        {"messages": [{"role": "user", "content": CANARY}]},
        {"messages": [{"role": "user", "content": CANARY}, {"role": "assistant", "content": " "}]},
        {"messages": [{"role": "user", "content": CANARY * 9000}, {"role": "assistant", "content": "x"}]},
        {"text": [CANARY]},
        {"text": CANARY},
        {"id": [CANARY], "text": "x"},
        {"id": {CANARY: CANARY}, "messages": [{"role": "user", "content": "x"}]},
        {"messages": [{"role": "user", "content": f"{CANARY} \ud800"}]},
    ],
    "prompt_completion": [{"completion": CANARY}, {"prompt": [CANARY]}, {"prompt": {CANARY: 1}, "completion": "x"}],
    "sharegpt": [{"conversations": [{"from": CANARY, "value": "x"}]}, {CANARY: []}],
    "alpaca": [{"instruction": [CANARY]}, {CANARY: "x"}],
    "review": [
        {"messages": [{"role": "assistant", "content": "x"}], "verdict": CANARY, "score": 0, "round": 0},
        {"messages": None, CANARY: 1, "verdict": None, "score": 0, "round": 0},
    ],
    "forum": [
        {CANARY: 1},
        {"id": [CANARY], "parent_id": None, "body": "x"},
        {"id": "1", "parent_id": [CANARY], "body": "x"},
        {"id": "2", "parent_id": None, "body": [CANARY]},
        {"id": "3", "parent_id": None, "body": CANARY, "created_utc": CANARY},
    ],
}
BAD_TEXTS = {
    "log": f"{CANARY}\n\nann\thi\n{CANARY}\n\n{CANARY}\tx\nb\tx\nc\tx\n",
    "parlai": f"{CANARY}\ntext:{CANARY}\tepisode_done:True\n{CANARY}\ttext:x\n",
    "whatsapp": f"{CANARY}\n12/31/23, 9:41 PM - Ann: hi\n12/31/23, 9:41 PM - {CANARY}\n",
    "messages": f'{{"text": "{CANARY}\n"{CANARY}": 1}}\n{{"text": "{CANARY}", "n": NaN}}\n{{"text": "{CANARY}" x}}\n',
    "telegram": json.dumps(
        {
            "name": "a", "type": "personal_chat", "id": 1,
            "messages": [
                CANARY,
                {"date": CANARY, "type": "message", "text": "x"},
                {"date": "2024-01-01T00:00:00", "type": "message", "from": {CANARY: 1}, "text": CANARY},
                {"date": "2024-01-01T00:00:00", "type": "message", "from": "a", "text": {"text": CANARY}},
                {"date": "2024-01-01T00:00:00", "type": "message", "from": "a", "text": [{"text": [CANARY]}]},
            ],
        }
    ),
    "discord": json.dumps(
        {
            "guild": {}, "channel": {"id": "1"},
            "messages": [
                CANARY,
                {"id": "1", "timestamp": CANARY, "content": "x", "author": {"name": "a"}},
                {"id": "1", "timestamp": "2024-01-01", "content": "x", "author": {"name": [CANARY]}},
                {"id": "1", "timestamp": "2024-01-01", "content": [CANARY], "author": {"name": "a"}},
            ],
        }
    ),
    "slack": json.dumps(
        [
            CANARY,
            {"type": "message", "ts": CANARY, "text": "x"},
            {"type": "message", "ts": "1", "text": [CANARY]},
            {"type": "message", "ts": "1", "text": "x", "user": [CANARY]},
        ]
    ),
}  # fmt: skip


def refusals(file: Path, format: str, expected: Expected) -> str:
    """All that is said about the rows of a file that are none."""
    source = Source.model_validate({"path": str(file), "format": format})
    told = []
    try:
        for row in formats.read(source, expected, 100_000):
            if isinstance(row, formats.Rejected):
                told.append(f"{row.line} {row.reason} {row.detail}")
    except UserError as error:
        told.append(str(error))
    return "\n".join(told)


@pytest.mark.parametrize("expected", ["labeled", "unlabeled"])
@pytest.mark.parametrize("format", BAD_ROWS)
def test_what_is_said_about_a_bad_row_does_not_repeat_it(tmp_path: Path, format: str, expected: Expected) -> None:
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", BAD_ROWS[format])
    told = refusals(file, format, expected)
    assert told and "canary" not in told


@pytest.mark.parametrize("expected", ["labeled", "unlabeled"])
@pytest.mark.parametrize("format", BAD_TEXTS)
def test_what_is_said_about_a_bad_text_does_not_repeat_it(tmp_path: Path, format: str, expected: Expected) -> None:
    file = tmp_path / "general" / "2024-01-01.json"
    file.parent.mkdir()
    (tmp_path / "users.json").write_text(json.dumps([CANARY, {CANARY: 1}]))
    file.write_text(BAD_TEXTS[format], encoding="utf-8")
    told = refusals(file, format, expected)
    assert told and "canary" not in told


def test_a_role_or_field_that_is_a_name_is_shown(tmp_path: Path) -> None:
    """Otherwise nobody could correct it."""
    rows = [{"messages": [{"role": "customer", "content": CANARY}]}, {"dialog": CANARY}]
    told = refusals(tiny.write_jsonl(tmp_path / "rows.jsonl", rows), "messages", "labeled")
    assert "message 0 has role 'customer'" in told and "found dialog" in told


# Found by every Python that this one starts: writes down who looks up a class on behalf of a pickle.
HOOK = """
import sys, traceback
def hook(event, arguments):
    if event == "pickle.find_class":
        frames = [frame.filename for frame in traceback.extract_stack()]
        with open(TRACE, "a") as file:
            print(*arguments, *frames, sep="|", file=file)
sys.addaudithook(hook)
"""
ALL_COMMANDS = """
import sys
from ssl_jax import command_line, evaluate, export, generate, loop, prepare, train
folder, config = sys.argv[1:]
workdir = f"{folder}/run"
prepare.main(["--config", config])
train.main(["--config", config, "--workdir", workdir])
evaluate.main(["--workdir", workdir])
generate.main(["--workdir", workdir, "--prompt", "hi", "--max-new-tokens", "1"])
export.main(["--workdir", workdir, "--output", f"{folder}/export"])
try:
    prepare.main(["--config", config, "--data.max-rejected-fraction", "0"])
except ValueError as error:
    print(error, file=sys.stderr)
sys.argv = ["train", "--config", config, "--workdir", f"{folder}/crash", "--seed", "1"]
loop.dynamics = loop.step = loop.programs = None
command_line.run(train.main)
"""
# What is there to hold dialogues: prepared data with examples of what cleaning did, rounds, answers to fixed prompts.
HOLDS_TEXT = re.compile(
    r"prepared/\w+/(dialogues/|examples\.json)|(pseudo_labels|back_translations)/(copy_of_)?round_|samples\.jsonl"
)


@pytest.fixture(scope="module")
def all_commands(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path, Path]:
    """Every command once, on dialogues each turn of which has the canary, then a run that crashes.

    Returns the process, the folder with all that it wrote, and the trace of the hook.
    """
    folder, hooks = tmp_path_factory.mktemp("commands"), tmp_path_factory.mktemp("hook")
    trace = hooks / "trace"
    (hooks / "sitecustomize.py").write_text(HOOK.replace("TRACE", repr(str(trace))))
    config = tiny.write_all(folder)
    for name in ("labeled", "raw", "prompts"):
        rows = tiny.read_jsonl(folder / f"{name}.jsonl")
        for row in rows:
            for message in row.get("messages", ()):
                message["content"] = f"{CANARY}: {message['content']}"
            if "text" in row:
                row["text"] = f"{CANARY}: {row['text']}"
        broken = [{"messages": [{"role": CANARY, "content": CANARY}]}, {CANARY: CANARY}]
        tiny.write_jsonl(folder / f"{name}.jsonl", [*rows, *broken])
    values = tiny.settings(folder)
    tiny.write_config(config, {**values, "train": {**values["train"], "steps": 8}})
    variables = {**tiny.environment(), "PYTHONPATH": os.pathsep.join([str(hooks), str(tiny.ROOT)])}
    process = subprocess.run(
        [sys.executable, "-c", ALL_COMMANDS, str(folder), str(config)],
        env=variables, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    return process, folder, trace


def test_nothing_that_was_said_is_told_or_written_where_it_was_not_asked_for(all_commands: Any) -> None:
    process, folder, _ = all_commands
    assert process.returncode == 1 and "Traceback" in process.stderr, process.stderr
    assert "2 rows" in process.stdout or "rejected 6 rows" in process.stdout, process.stdout
    assert "rows are malformed" in process.stderr
    assert "canary" not in process.stdout + process.stderr
    written = [
        path for path in folder.rglob("*") if (path.is_file() and path.suffix != ".jsonl") or path.parent != folder
    ]
    names = {path.relative_to(folder).as_posix() for path in written if path.is_file()}
    assert {"run/metrics.jsonl", "run/summary.json", "run/eval_test.json", "prepared/rejected.jsonl"} <= names
    assert any(name.startswith("run/tensorboard/") for name in names)
    silent = [name for name in names if not HOLDS_TEXT.search(name)]
    assert [name for name in silent if CANARY.encode() in (folder / name).read_bytes()] == []
    assert [name for name in names if (folder / name).stat().st_mode & stat.S_IWOTH] == []


def test_no_command_unpickles_what_a_file_holds(all_commands: Any) -> None:
    """Processes of one run may hand each other pickles, over pipes that are theirs alone."""
    trace = all_commands[2]
    looked_up = trace.read_text().splitlines() if trace.exists() else []
    strangers = [line for line in looked_up if "/multiprocessing/" not in line]
    assert strangers == []


def test_the_hook_that_watches_for_pickles_sees_one(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HOOK.replace("TRACE", repr(str(tmp_path / "trace"))))
    program = "import pickle, pathlib; pickle.loads(pickle.dumps(pathlib.Path('a')))"
    variables = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], env=variables, check=True)
    assert "Path" in (tmp_path / "trace").read_text()


def hostile_texts(size: int) -> Iterator[str]:
    """Texts that a pattern which goes back and tries again would take hours for."""
    for unit in (
        " ", "\n", "a", "1", "a.", "a@", "(", "[", "<", "<!--", "<script>", "</script", "[quote]", "[b]", "[a](", "*a",
        "_", "`", "~~a", "# ", "> ", "On 1 ", "-- \n", "12 ", "1:", "+1 ", "GB12 ", "&amp;", "http://", "x joined ",
        "é", "<a: ", "<edit", "12/31/23, ", "\u0301", "a'",
    ):  # fmt: skip
        many = unit * (size // len(unit.encode()))
        yield many
        yield f"x {many}\n!"


@pytest.mark.parametrize("step", [name for name in cleaning.STEP_CLASSES if name not in ("language", "stop_words")])
def test_no_text_keeps_a_cleaning_step_busy(step: str) -> None:
    ((_, clean),) = step_functions([cleaning.STEP_CLASSES[step](step=step)])  # pyright: ignore[reportCallIssue]
    for text in hostile_texts(2**17):
        dialogue = Dialogue((Turn("user", text), Turn("assistant", "ok")), metadata={"speakers": ["a", "b"]})
        before = time.process_time()
        clean(dialogue)
        assert time.process_time() - before < 2, text[:20]


@pytest.mark.parametrize("format", ["whatsapp", "log", "text", "parlai"])
def test_no_text_keeps_a_reader_busy(tmp_path: Path, format: str) -> None:
    begun = {"whatsapp": "12/31/23, 9:41 PM - Ann: ", "log": "ann\t", "text": "", "parlai": "text:"}[format]
    source = Source.model_validate({"path": str(tmp_path / "a.txt"), "format": format})
    for text in hostile_texts(2**17):
        (tmp_path / "a.txt").write_text(f"{begun}x{text}x\n{begun}x\n", encoding="utf-8")
        before = time.process_time()
        list(formats.read(source, "unlabeled", 10**9))
        assert time.process_time() - before < 2, text[:20]


ATTACK = '</textarea></div></script><script id=x>alert(1)</script><img src=x onerror=alert(1)>"\' onload="x\u2028<!--'


class Elements(html.parser.HTMLParser):
    """Every element of a page with its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, frozenset[str]]] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, frozenset(name for name, _ in attrs)))


def elements(text: str) -> list[tuple[str, frozenset[str]]]:
    """The elements of the page of a review in which everything that can be a text is this one."""
    row = {"id": text, "score": -1.0, "verdict": None, "round": 0, "teacher_step": 1}
    row["messages"] = [{"role": role, "content": text} for role in ("system", "user", "assistant")]
    parser = Elements()
    parser.feed(review_page.render(text, [row]))
    return parser.found


def test_what_is_said_is_no_markup_of_a_review_page() -> None:
    assert elements(ATTACK) == elements("hi")


def test_controls_of_a_terminal_are_not_obeyed_in_messages(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A name in somebody's archive, or what a chat template says it was, reaches the terminal as what it is."""

    def fail(arguments: Any) -> None:
        tokenizer_with(HARMLESS + "{{ raise_exception('\x1b]0;renamed\x07\x1b[2J\x9b31m') }}")

    monkeypatch.setattr(sys, "argv", ["train"])
    with pytest.raises(SystemExit):
        command_line.run(fail)
    told = capfd.readouterr().err
    assert "renamed" in told and not set(told).intersection("\x1b\x07\x9b")


HOSTILE = st.lists(
    st.sampled_from(
        ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|endofturn|>", "<|endoftext|>", "<", "|>", "s>", " "]
    ),
    min_size=1,
    max_size=5,
).map("".join)


@given(system=HOSTILE, user=HOSTILE, reply=HOSTILE, prefix=HOSTILE)
@settings(max_examples=50, deadline=None)
@pytest.mark.parametrize("form", ["role_tokens", "end_of_text", "plain", "chat_template"])
def test_no_system_turn_or_prefix_forges_a_control_token(
    form: TemplateName, system: str, user: str, reply: str, prefix: str
) -> None:
    tokenizer = tokenizer_with(HARMLESS, form)
    controls = {*tokenizer.end_ids, *tokenizer.suppressed_ids}

    def found(*contents: str) -> list[list[int]]:
        turns = [Turn(role, text) for role, text in zip(("system", "user", "assistant"), contents, strict=False)]
        whole, prompt = Dialogue(tuple(turns)), Dialogue(tuple(turns[:2]))
        encoded = tokenizer.encode(whole).tokens, tokenizer.encode_prompt(prompt, 10_000, contents[3]).tokens
        return [[token for token in tokens.tolist() if token in controls] for tokens in encoded]

    assert found(system, user, reply, prefix) == found("a", "a", "a", "a")


def test_a_parquet_file_that_repeats_a_large_value_does_not_fill_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dictionary holds it once, so that less than a kilobyte stands for a quarter of a gigabyte."""
    pyarrow, written = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "rows.parquet"
    repeated = pyarrow.DictionaryArray.from_arrays([0] * 256, ["x" * 2**20])
    # Without Arrow's own description of the column, which would be read as a dictionary.
    written.write_table(pyarrow.table({"text": repeated}), file, compression="zstd", store_schema=False)
    assert file.stat().st_size < 10_000
    monkeypatch.setattr(parquet, "_BATCH_BYTES", 2**23)
    source = Source.model_validate({"path": str(file)})
    rows = list(formats.read(source, "unlabeled", 1000))
    assert [row.reason for row in rows if isinstance(row, formats.Rejected)] == ["turn too long"] * 256
    assert pyarrow.default_memory_pool().max_memory() < 2**26
