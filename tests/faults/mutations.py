"""What people, editors and disks do to a configuration: one field, one flag or one byte that went wrong."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import functools
import itertools
import math
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pydantic
import tiny
import yaml
from hypothesis import strategies as st

from ssl_jax import evaluate, export, generate, prepare, review, train
from ssl_jax.config.cleaning import STEP_CLASSES

Schema = type[pydantic.BaseModel]

# Every command, and flags with which it is valid.
COMMANDS: dict[str, tuple[Schema, tuple[str, ...]]] = {
    "train": (train.Command, ("--train.steps", "7")),
    "prepare": (prepare.Prepare, ("--show", "2")),
    "evaluate": (evaluate.Evaluate, ("--workdir", "runs/a", "--split", "test")),
    "generate": (generate.Generate, ("--workdir", "runs/a", "--prompt", "hi", "there")),
    "review": (review.Review, ("--workdir", "runs/a", "--output", "out")),
    "export": (export.Export, ("--workdir", "runs/a", "--output", "out")),
}


@dataclasses.dataclass(frozen=True)
class Field:
    """A place in a configuration.

    Attributes:
      path: names and, for elements of lists, numbers.
      numbers: values at the edges of what its type and bounds allow, and just beyond.
      step: of cleaning, whose setting it is.
    """

    path: tuple[str | int, ...]
    numbers: tuple[float, ...] = ()
    step: str | None = None

    @property
    def flag(self) -> str:
        """As it is written on a command line, without the dashes."""
        return ".".join(map(str, self.path))

    @property
    def name(self) -> str:
        """The last name of the path, which any message about the field has."""
        return next(part for part in reversed(self.path) if isinstance(part, str))


@functools.cache
def fields(schema: Schema) -> tuple[Field, ...]:
    """Every field that a schema has, groups and elements of lists included: what is added there is found here."""
    return tuple(_walk(schema, ()))


def _walk(schema: Schema, path: tuple[str | int, ...]) -> Iterator[Field]:
    for name, info in schema.model_fields.items():
        here = (*path, info.alias or name)
        bounds = [
            bound
            for constraint in info.metadata
            for kind in ("ge", "gt", "le", "lt")
            if (bound := getattr(constraint, kind, None)) is not None
        ]
        yield Field(here, tuple(number for bound in bounds for number in (bound - 1, bound, bound + 1)))
        if here == ("data", "cleaning"):
            for step, kind in STEP_CLASSES.items():
                yield from (
                    dataclasses.replace(field, path=(*here, 0, *field.path), step=step) for field in fields(kind)
                )
        for group, is_element in _groups(info.annotation):
            yield from _walk(group, (*here, 0) if is_element else here)


def _groups(annotation: Any, is_element: bool = False) -> Iterator[tuple[Schema, bool]]:
    """The groups of fields that a value may be or, for a list, hold."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        yield annotation, is_element
    elif typing.get_origin(annotation) is not None:
        in_list = typing.get_origin(annotation) in (tuple, list)
        for member in typing.get_args(annotation):
            yield from _groups(member, is_element or in_list)


@functools.cache
def bases() -> tuple[tuple[str, dict[str, Any]], ...]:
    """Configurations that are valid: those that come with the package, and the one of the tests."""
    paths = sorted((tiny.ROOT / "configs").rglob("*.yaml"))
    shipped = [(path.name, yaml.safe_load(path.read_text(encoding="utf-8"))) for path in paths]
    return (*shipped, ("tiny.yaml", tiny.settings(Path("data"))), ("optional.yaml", _OPTIONAL))


# Groups that none of the others has, so that every field has a place where one value can be wrong alone.
_OPTIONAL: dict[str, Any] = {
    "data": {
        "labeled": [{"tfds": "dialogues", "fields": {"messages": "turns", "role": "by", "roles": {"a": "assistant"}}}],
        "unlabeled": [{"path": "threads.jsonl", "format": "forum", "posts": {"text": "body"}}],
        "keep_if": [{"field": "metadata.score", "at_least": 2}],
    },
    "pseudo_labels": {"noise": {"word_dropout": 0.1}},
}


def keys(container: Any) -> Any:
    """What leads into a mapping or a list."""
    return container.keys() if isinstance(container, dict) else range(len(container))


def has(values: Any, path: tuple[Any, ...]) -> bool:
    """Whether the group or list at a path is there."""
    for part in path:
        if not isinstance(values, dict | list) or part not in keys(values):
            return False
        values = values[part]
    return isinstance(values, dict | list)


def put(values: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """A copy of `values` with another value at a path; what is not there on the way is made."""
    values = copy.deepcopy(values)
    container: Any = values
    for part, following in itertools.pairwise(path):
        wanted = list if isinstance(following, int) else dict
        if container == []:
            container.append(wanted())
        nested = container[part] if part in keys(container) else None
        if not isinstance(nested, wanted):
            container[part] = nested = wanted()
        container = nested
    if container == []:
        container.append(None)
    container[path[-1]] = value
    return values


def leaves(values: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Paths of all keys."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for name, value in items:
        yield (*path, name)
        yield from leaves(value, (*path, name))


def renamed(values: dict[str, Any], path: tuple[str | int, ...], name: str) -> dict[str, Any]:
    """A copy of `values` in which a key has another name."""
    values = copy.deepcopy(values)
    container: Any = values
    for part in path[:-1]:
        container = container[part]
    container[name] = container.pop(path[-1])
    return values


# Steps of cleaning that have no default for everything.
VALID_STEPS = {"language": {"step": "language", "keep": ["en"]}}


def wrong_values(field: Field) -> st.SearchStrategy[Any]:
    """What somebody may put where `field` is: of another type, beyond a bound, empty, nested, huge."""
    strategies = [st.sampled_from(_SCALARS), st.sampled_from(_CONTAINERS), st.integers(), st.floats(), st.text()]
    if field.numbers:
        strategies.append(st.sampled_from(field.numbers))
    return st.one_of(strategies)


_SCALARS: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 0.5, 7.5, 1e-300, 10**9, 2**31 - 1, 2**31, 2**63, 10**30, -(10**30), 10**400,
    1e308, -1e308, 5e-324, math.inf, -math.inf, math.nan,
    "", " ", "x", "-1", "nan", "inf", "1e400", "0x10", "1_000", " 12 ", "١٢", "none", "null", "true", "yes", "auto",
    "~", "a\x00b", "a\nb", "\x1b[31mred\x1b[0m", "\ufeff", "é" * 300, "w" * 100_000, "../" * 50, "/", ".", "..",
    "/dev/null", "s3://", "gs://bucket", "ftp://x/y", "://", "*", "[", "(", "(" * 3000, "a{99999999999}", "{x}", "%s%n",
    "--",
    datetime.date(2024, 2, 29), datetime.datetime(1, 1, 1, tzinfo=datetime.UTC), b"\xff\x00",
)  # fmt: skip

_CONTAINERS: tuple[Any, ...] = (
    [], {}, [[]], [{}], [None], [0], [-1], [1, 2], [0.5, 0.25], [math.nan], ["", ""], ["a\x00"], [True], [10**400],
    {"": ""}, {"a": 1}, {"a": {"b": {"c": []}}}, {1: 2}, {"a.b": 1}, {"a\nb": 1}, {"x" * 50_000: 1}, [0] * 5000,
    functools.reduce(lambda inner, _: [inner], range(60), 0), [{"step": "strip", "x": 1}], [{"step": ["strip"]}],
    [{"step": "length", "min_turns": 10**400}], [{"step": "notices", "patterns": ["(", "a{99999999999}"]}],
    [{"step": "bots", "speakers": ["(" * 3000]}], {"step": "strip"}, [{"path": "x", "weight": math.inf}], [["x"]],
    [{"field": "turns", "at_least": math.nan}], [{"field": "metadata.", "equals": 1}], [{"field": ["turns"]}],
)  # fmt: skip


@st.composite
def misspelled(draw: st.DrawFn, name: str) -> str:
    """A name with a slip: a character more, less, another one, or all of it."""
    at = draw(st.integers(0, len(name)))
    inserted = draw(
        st.one_of(st.sampled_from(["", ".", "-", "_", "=", "0", ".0.", "é", " ", "s", "\n"]), st.text(max_size=4))
    )
    return name[:at] + inserted + name[at + draw(st.integers(0, 2)) :]


@st.composite
def damaged_text(draw: st.DrawFn, text: bytes) -> bytes:
    """A file's bytes after an accident: cut, flipped, with something foreign in it, or read as another encoding."""
    at = draw(st.integers(0, len(text)))
    kind = draw(st.sampled_from(["cut", "flip", "insert", "replace", "append", "recode"]))
    if kind == "cut":
        return text[:at]
    if kind == "flip":
        at = min(at, len(text) - 1)
        return text[:at] + bytes([text[at] ^ (1 << draw(st.integers(0, 7)))]) + text[at + 1 :]
    if kind == "insert":
        return text[:at] + draw(st.sampled_from(_FOREIGN)) + text[at:]
    if kind == "replace":
        values = [n for n in range(len(text)) if text[n : n + 2] == b": "] or [0]
        at = draw(st.sampled_from(values)) + 2
        end = text.find(b"\n", at)
        return text[:at] + draw(st.sampled_from(_FOREIGN)) + (text[end:] if end >= 0 else b"")
    if kind == "append":
        return text + draw(st.sampled_from(_FOREIGN))
    return text.decode().encode(draw(st.sampled_from(["utf-16", "utf-32", "utf-8-sig", "utf-16-le"])))


_LAUGHS = b"".join(b"l%d: &l%d [%s]\n" % (n, n, b", ".join([b"*l%d" % (n - 1)] * 9)) for n in range(1, 12))
_MERGES = b"".join(b"m%d: &m%d {<<: [*m%d, *m%d]}\n" % (n, n, n - 1, n - 1) for n in range(1, 40))

_FOREIGN = (
    b"\t", b"\x00", b"\xff\xfe", b"\xe9", b"\xef\xbb\xbf", b"\r", b"\x85", b"\x1b[2J", b"'", b'"', b"{", b"}", b"[",
    b"]", b": ", b"- ", b"? ", b"&a ", b"*a ", b"!!", b"%YAML 9.9\n---\n", b"---\n", b"...\n", b"|\n", b">9\n",
    b"!!python/object/apply:os.system ['true'] ", b"!!python/name:os.system ", b"!!binary aGk= ", b"!!binary '*' ",
    b"!!int '' ", b"!!int x ", b"!!int 0x ", b"!!float '' ", b"!!float x ", b"!!bool x ", b"!!timestamp x ",
    b"!!null x ", b"!!set {a, b} ", b"!!omap [a] ", b"!!pairs [a: 1] ", b"!!str [a] ", b"!!map [a] ", b"!!seq {a: 1} ",
    b"!unknown x ", b"2024-13-45", b"2001-12-14 21:59:43 +99:99", b"0001-01-01T00:00:00+23:59", b"1:" * 3000 + b"1",
    b"0x" + b"f" * 20_000, b"9" * 5000, b"0b" + b"1" * 40_000, b".inf", b"-.inf", b".nan", b"1e999", b"[" * 5000,
    b"{a: " * 2000, b"&a [*a]", b"&a {b: *a}", b"- " * 2000, b"\n? {a: b}\n: c\n", b"\n? [a]\n: c\n", b"\n<<: 3\n",
    b"\n<<: [3]\n", b"\n=: 3\n", b"\nnull: 3\n", b"\n1.5: 3\n", b"\n2001-01-01: x\n", b"\n'': 3\n", b"\n'a.b': 3\n",
    b'\n"a\\nb": 3\n', b'\n"\\ud800": 3\n', b"\nseed: 1\nseed: 2\n", b"\ntrain: {steps: 1, steps: 2}\n",
    b"\nl0: &l0 [x]\n" + _LAUGHS + b"seed: *l11\n", b"\nm0: &m0 {a: 1}\n" + _MERGES, b"\n" + b"k: &k {" + b", ".join(
        b"x%d: 0" % n for n in range(3000)) + b"}\n",
)  # fmt: skip


@st.composite
def flag_words(draw: st.DrawFn, field: Field) -> list[str]:
    """Words that may come after a flag: none, one, several; texts, numbers, YAML."""
    word = st.one_of(
        st.sampled_from(_SCALARS).map(str),
        st.sampled_from(_CONTAINERS).map(lambda value: yaml.safe_dump(value, default_flow_style=True)),
        st.sampled_from(_FOREIGN).map(lambda value: value.decode(errors="surrogateescape")),
        st.sampled_from(field.numbers or (0,)).map(str),
        st.text(max_size=20),
    )
    # What looks like a flag is one: it is not what this flag was given.
    words = draw(st.lists(word.filter(lambda text: not text.startswith("--")), max_size=3))
    return words


def spelled(draw: Callable[[Any], Any], field: Field) -> str:
    """A flag's name, with places in lists that may be far away, in kebab or in snake case."""
    places = st.sampled_from(["0", "1", "-1", "7", "99999999999", "9" * 5000, "٣", "²", "0x0", "", "00"])
    parts = [draw(places) if isinstance(part, int) else part for part in field.path]
    name = ".".join(parts)
    return name.replace("_", "-") if draw(st.booleans()) else name
