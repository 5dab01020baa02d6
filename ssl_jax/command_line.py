"""Command lines, configuration files and exit codes: from what the user typed to one validated object.

A command is described by a pydantic class. Its values come from the class's defaults, then the YAML file named by
`--config`, then dotted flags (`--train.steps 200`, `--data.labeled.0.path chats.jsonl`, kebab or snake case), and are
validated once, together. Help and suggestions are read off the same class.
"""

from __future__ import annotations

import atexit
import difflib
import errno
import logging
import os
import shutil
import signal
import sys
import textwrap
import traceback
import types
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import pydantic
import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ssl_jax import distributed
from ssl_jax.errors import Preempted, TrainingDiverged, UserError
from ssl_jax.shown import printable, shortened, without_controls
from ssl_jax.signals import Signals

Schema = TypeVar("Schema", bound=pydantic.BaseModel)

# What a user can do something about, wherever it happens: full, read-only, forbidden or failing storage, and a folder
# that is in the way of a file, or the other way round.
_STORAGE_REFUSES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "set permissions"),
    **dict.fromkeys((errno.EIO, errno.ESTALE), "see to the disk"),
    **dict.fromkeys((errno.EISDIR, errno.ENOTDIR), "move away what is in the way"),
}
# Of a configuration file, so that data given in its place are not read to their end; and of what is wrong with it.
_LONGEST_FILE, _LONGEST_REASON = 2**18, 600


def run(main: Callable[[Sequence[str]], None], *, goes_on: bool = False) -> None:
    """Calls `main(arguments)` and ends the process with the exit code of what happened.

    0 done, 2 the user can fix it, 3 diverged, 75 preempted, 1 a bug. Only a bug shows a traceback. Processes that have
    joined as one run end together, whichever of them it happened to.

    Args:
      main: the command.
      goes_on: whether the same command finds again whatever it has done, so that a signal may end it at any moment.
    """
    # A scheduler's SIGTERM ends whatever has no better way to end as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.addLevelName(logging.WARNING, "warning")
    code, text = 0, ""
    try:
        with Signals(patience=0.0).listen() if goes_on else Signals().listen(interrupts=True):
            main(sys.argv[1:])
            sys.stdout.flush()
    except (UserError, TrainingDiverged, Preempted) as error:
        code, text = error.exit_code, f"{'stopped' if isinstance(error, Preempted) else 'error'}: {error}"
    except KeyboardInterrupt:
        code, text = Preempted.exit_code, "stopped: interrupted"
    except BrokenPipeError:
        # Whoever read the output has left; the interpreter's last flush would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _STORAGE_REFUSES:
            name = error.filename2 or error.filename
            where = f"{name}: " if name else ""
            code = UserError.exit_code
            fix = _STORAGE_REFUSES[error.errno]
            text = f"error: {where}{error.strerror}; {fix}, then run the same command again"
        else:
            distributed.end_for_error(error)
            traceback.print_exc()
            code = 1
    # The interpreter's end takes a while, and there is nothing left that a signal could stop.
    atexit.register(distributed.ignore_signals)
    if code:
        distributed.end(code, text)
    if text:
        # A message may quote a stranger's file, which shall not give orders to the terminal.
        print(without_controls(text), file=sys.stderr)
    sys.exit(code)


def parse(schema: type[Schema], arguments: Sequence[str], *, program: str, summary: str) -> Schema:
    """Reads `--config FILE` and dotted flags into a validated `schema`.

    A flag of a boolean field may stand alone (`--json`); a flag of a list takes any number of words.

    Raises:
      UserError: an unknown flag or key (with the nearest known one), a value of the wrong type or out of bounds, a
        file that cannot be read.
      SystemExit: after `--help`.
    """
    if "-h" in arguments or "--help" in arguments:
        print(help_text(schema, program, summary))
        raise SystemExit(0)
    values: dict[str, Any] = {}
    files, overrides = [], []
    for name, words in _split_flags(arguments):
        if name != "config":
            overrides.append((name.replace("-", "_"), words))
        elif len(words) == 1:
            values = read_yaml(words[0])
            files = words
        else:
            raise UserError("--config needs one file")
    for name, words in overrides:
        path = name.split(".")
        annotation = _annotation_at(schema, path)
        # What the schema does not know is for its validation to judge: a slip, or a name from elsewhere.
        _assign(values, path, None if annotation is None else _read_words(name, words, annotation))
    origin = " and ".join([*files, *(["flags"] if overrides else [])]) or "the command line"
    return validate(schema, values, origin=origin, flags=[name for name, _ in overrides])


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML mapping.

    Raises:
      UserError: no such file, larger than any configuration, not YAML, a key given twice, not a mapping.
    """
    shown = printable(str(path), _LONGEST_REASON)
    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(_LONGEST_FILE + 1)
    except FileNotFoundError:
        raise UserError(f"--config {shown}: no such file{_nearest_file(Path(path))}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--config {shown}: cannot be read: {reason}") from None
    if len(text) > _LONGEST_FILE:
        raise UserError(
            f"--config {shown}: is larger than {_LONGEST_FILE:,} characters, so that it is no configuration"
        )
    values = _load_yaml(text, origin=shown)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{shown}: expected 'field: value' lines, found {type(values).__name__}")
    return values


def dump_yaml(values: dict[str, Any]) -> str:
    """A configuration as YAML that `read_yaml` reads as the same values."""
    return yaml.dump(values, Dumper=_ExactDumper, sort_keys=False, allow_unicode=True)


def validate(schema: type[Schema], values: dict[str, Any], *, origin: str, flags: Collection[str] = ()) -> Schema:
    """Validates `values`; the first problem becomes a one-line UserError.

    Args:
      schema: what `values` must be.
      values: as YAML gives them; numbers may be strings.
      origin: where `values` come from.
      flags: dotted paths of those values that come from flags instead.
    """
    try:
        return schema.model_validate(values)
    except pydantic.ValidationError as error:
        # A misspelled name is often also a missing value; the name is what to fix.
        first = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
        location, path = ".".join(map(str, first["loc"])), printable(".".join(map(str, first["loc"])))
        is_unknown = first["type"] == "extra_forbidden"
        is_flag = any(flag == location or (is_unknown and flag.startswith(f"{location}.")) for flag in flags)
        where = f"--{path}" if is_flag else f"{origin}: {path}" if path else origin
        if is_unknown:
            raise UserError(f"{where}: unknown field{_suggest(schema, first['loc'])}") from None
        message = printable(first["msg"].removeprefix("Value error, "), _LONGEST_REASON)
        value = "" if first["type"] in {"value_error", "missing"} else f", got {shortened(first['input'])}"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise UserError(f"{where}: {message}{value}{more}") from None


def help_text(schema: type[pydantic.BaseModel], program: str, summary: str) -> str:
    """Every field of `schema` with its type, default, bounds and meaning."""
    width = min(shutil.get_terminal_size().columns, 120)
    lines = [summary, "", f"usage: {program} [--config FILE] [--FIELD VALUE ...]", ""]
    lines += ["  --config FILE", "      YAML with the fields below; flags override it."]
    section = ""
    for path, field, default in _walk(schema):
        if "." in path and path.split(".")[0] != section:
            section = path.split(".")[0]
            lines += ["", f"{section}: {schema.model_fields[section].description or ''}".rstrip(": ")]
        limits = "".join(f", {bound}" for bound in _bounds(field))
        lines.append(f"  --{path} {_type_name(field.annotation)}  ({_default_name(default)}{limits})")
        lines += textwrap.wrap(
            field.description or "", width, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False
        )
    return "\n".join(lines)


def _split_flags(arguments: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Cuts arguments into a flag's name, without dashes, and the words up to the next flag."""
    position, behind = 0, ""
    while position < len(arguments):
        flag = arguments[position]
        position += 1
        if not flag.startswith("--") or len(flag) < 3:
            where = f" behind {printable(behind)}" if behind else ""
            raise UserError(f"unexpected argument {shortened(flag)}{where}; flags look like --name value (see --help)")
        name, equals, inline = flag[2:].partition("=")
        words = [inline] if equals else []
        # A negative number is a value, anything else that starts with two dashes is the next flag.
        while not equals and position < len(arguments) and not arguments[position].startswith("--"):
            words.append(arguments[position])
            position += 1
        behind = flag
        yield name, words


def _annotation_at(schema: type[pydantic.BaseModel], path: list[str]) -> Any:
    """The type of the field at a dotted path, None for an unknown one; a number stands for an element of a list."""
    name = printable(".".join(path))
    current: Any = schema
    for depth, part in enumerate(path):
        parent = ".".join(path[:depth])
        group, element = _group(current), _element(current)
        if group is not None:
            fields = _fields(group)
            if part not in fields:
                return None
            current = fields[part].annotation
        elif element is None:
            raise UserError(f"--{name}: {parent} has no fields of its own")
        elif _is_place(part):
            current = element
        else:
            raise UserError(f"--{name}: {parent} is a list; its elements are --{parent}.0, --{parent}.1, ...")
    if (group := _group(current)) is not None:
        raise UserError(f"--{name} is a group; set one of its fields: {', '.join(_fields(group))}")
    return current


def _read_words(name: str, words: list[str], annotation: Any) -> Any:
    """Turns the words after a flag into a value that pydantic can validate."""
    element = _element(annotation)
    if element is not None:
        # Groups can only be written as YAML. A text in brackets is a text.
        is_yaml = _group(element) is not None or (element is not str and words[:1] and words[0].startswith("["))
        return _load_yaml(" ".join(words), origin=f"--{name}") if is_yaml and words else words
    if any(get_origin(member) is dict for member in _members(annotation)) and words:
        return _load_yaml(" ".join(words), origin=f"--{name}")
    if not words and bool in _members(annotation):
        return True
    if len(words) != 1:
        found = f"got {shortened(' '.join(words))}" if words else "got none"
        raise UserError(f"--{name} takes one value, {found} (see --help)")
    return None if type(None) in _members(annotation) and words[0].lower() in {"none", "null"} else words[0]


def _assign(values: dict[str, Any], path: list[str], value: Any) -> None:
    """Sets a value in nested dicts and lists, growing them; a list grows by one element at a time."""
    container: Any = values
    for depth, part in enumerate(path):
        is_list = isinstance(container, list)
        if is_list and int(part) > len(container):
            name = printable(".".join(path))
            raise UserError(f"--{name}: the list has {len(container)} elements, counted from 0, so far")
        if is_list and int(part) == len(container):
            container.append(None)
        key: Any = int(part) if is_list else part
        if depth == len(path) - 1:
            container[key] = value
            return
        wanted = list if _is_place(path[depth + 1]) else dict
        nested = container[key] if is_list else container.get(key)
        if not isinstance(nested, wanted):
            nested = container[key] = wanted()
        container = nested


def _is_place(part: str) -> bool:
    """Whether a part of a dotted path is a number of an element; one that is longer counts more than memory holds."""
    return part.isascii() and part.isdecimal() and len(part) < 10


def _walk(
    schema: type[pydantic.BaseModel], defaults: pydantic.BaseModel | None = None, prefix: str = ""
) -> Iterator[tuple[str, FieldInfo, Any]]:
    """Every field that is not a group: path, field, default. `N` in a path stands for a place in a list."""
    for name, field in schema.model_fields.items():
        default = getattr(defaults, name) if defaults is not None else field.get_default(call_default_factory=True)
        path = prefix + (field.alias or name)
        group, element = _group(field.annotation), _group(_element(field.annotation))
        if group is not None:
            yield from _walk(group, default if isinstance(default, group) else None, f"{path}.")
        else:
            yield path, field, default
        if element is not None:
            yield from _walk(element, None, f"{path}.N.")


def _suggest(schema: type[pydantic.BaseModel], path: Sequence[str | int]) -> str:
    """The nearest field of the same group, else of any group, else what there is to choose from."""
    *parents, wrong = map(str, path)
    group: Any = schema
    for part in path[:-1]:
        group = _element(group) if isinstance(part, int) else _fields(group)[part].annotation
        group = _group(group) or group
    siblings = [".".join([*parents, name]) for name in _fields(group)]
    for known in (siblings, [name for name, _, _ in _walk(schema)]):
        by_last_name = {name.rsplit(".", 1)[-1]: name for name in reversed(known)}
        if matches := difflib.get_close_matches(wrong, by_last_name, n=1, cutoff=0.7):
            return f"; did you mean {by_last_name[matches[0]]}?"
    return f"; known here: {', '.join(_fields(group))}"


def _fields(group: type[pydantic.BaseModel]) -> dict[str, FieldInfo]:
    """A group's fields by the names that users write: the alias where a field has one."""
    return {field.alias or name: field for name, field in group.model_fields.items()}


def _members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _group(annotation: Any) -> type[pydantic.BaseModel] | None:
    """The group of fields that a type is, or may be."""
    models = (m for m in _members(annotation) if isinstance(m, type) and issubclass(m, pydantic.BaseModel))
    return next(models, None)


def _element(annotation: Any) -> Any | None:
    """The type of a list's elements, or None for what is no list."""
    lists = (member for member in _members(annotation) if get_origin(member) in (tuple, list))
    return next((get_args(member)[0] for member in lists), None)


def _type_name(annotation: Any) -> str:
    """`INT`, `TEXT | none`, `{none,dots,full}`, `FLOAT ...`."""
    names = {int: "INT", float: "FLOAT", str: "TEXT", bool: "BOOL", Path: "PATH", type(None): "none"}
    if len(members := _members(annotation)) > 1:
        return " | ".join(map(_type_name, members))
    if get_origin(annotation) is Literal:
        return "{" + ",".join(map(str, get_args(annotation))) + "}"
    if get_origin(annotation) is dict:
        return "YAML"
    if (element := _element(annotation)) is not None:
        return "YAML" if _group(element) else f"{_type_name(element)} ..."
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default_name(default: Any) -> str:
    if default is PydanticUndefined:
        return "required"
    if isinstance(default, tuple | list):
        return f"default: {' '.join(map(repr, default)) or 'empty'}"
    return f"default: {'none' if default is None else default}"


def _bounds(field: FieldInfo) -> Iterator[str]:
    for attribute, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")):
        for constraint in field.metadata:
            if (bound := getattr(constraint, attribute, None)) is not None:
                yield f"{sign} {bound}"


class _StrictLoader(yaml.SafeLoader):
    """YAML without the rule that a key's second value silently replaces its first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuses a key that was there before."""
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                shown = f"{shortened(key.value)} is there twice"
                raise yaml.constructor.ConstructorError(None, None, shown, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merges, and drops what is overridden: a merge of merges would otherwise double at every level."""
        super().flatten_mapping(node)
        keys = [(key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key) for key, _ in node.value]
        node.value = list(dict(zip(keys, node.value, strict=True)).values())


class _ExactDumper(yaml.SafeDumper):
    """YAML that escapes the line breaks of Unicode, which would be read as line feeds."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    has_breaks = any(character in text for character in "\r\x85\u2028\u2029")
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if has_breaks else None)


_ExactDumper.add_representer(str, _represent_text)


def _load_yaml(text: str, *, origin: str) -> Any:
    try:
        return yaml.load(text, _StrictLoader)
    except Exception as error:  # a tag on what it does not fit ends in any exception: KeyError, IndexError, …
        reason = str(error) if isinstance(error, yaml.YAMLError | ValueError | RecursionError) else repr(error)
        raise UserError(f"{origin}: not valid YAML: {printable(' '.join(reason.split()), _LONGEST_REASON)}") from None


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor a folder {printable(str(path.parent), _LONGEST_REASON)})"
    names = sorted(p.name for p in path.parent.glob("*.y*ml"))
    matches = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f"; did you mean {path.parent / matches[0]}?" if matches else ""
