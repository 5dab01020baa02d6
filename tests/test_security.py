"""Attacks, made for real: what strangers can put into files that we read runs nothing, leads nowhere and ends soon."""

from __future__ import annotations

import ast
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from ssl_jax import command_line, train
from ssl_jax.data import template_renderer
from ssl_jax.data.tokenizer import DialogueTokenizer
from ssl_jax.errors import UserError

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
            if name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load"):
                found.append(name)
            if parts[0] == "yaml" and parts[-1] in ("load", "load_all", "unsafe_load", "full_load"):
                loader = [ast.unparse(word) for word in (*node.args[1:], *(word.value for word in node.keywords))]
                if parts[-1] not in ("load", "load_all") or loader not in (["_StrictLoader"], ["_LOADER"]):
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


def tokenizer_with(chat_template: str) -> DialogueTokenizer:
    """A tokenizer of bytes with the chat template of a stranger."""
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(letters, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    backend.decoder = decoders.ByteLevel()  # pyright: ignore
    backend.add_special_tokens(["<s>", "</s>"])
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<s>"}
    return DialogueTokenizer(backend, template="chat_template", named_tokens=named, chat_template=chat_template)


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
    tokenizer_with(HARMLESS)  # the time that the renderer takes to start is another's
    before = time.monotonic()
    with pytest.raises(UserError, match="chat template"):
        tokenizer_with(HARMLESS + attack)
    assert time.monotonic() - before < 20
    tokenizer_with(HARMLESS)  # and what comes after is served
