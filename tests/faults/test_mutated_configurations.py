"""Configurations and command lines with one thing wrong: valid all the same, or exit code 2 and a line that says it."""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
import time
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import mutations
import numpy as np
import pydantic
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssl_jax import command_line, model, optimizer, plan, sharding
from ssl_jax.config import Config
from ssl_jax.shown import printable

# A thousand and more in all; a run takes half a minute.
CONFIGURATIONS, FILES, COMMAND_LINES, NAMES = 500, 300, 500, 200
LONGEST_SECONDS = 5.0
LONGEST_MESSAGE = 1500
RECORDS = {"labeled_train": 900, "labeled_dev": 50, "raw_train": 5000, "prompt_train": 700}


_UNCHECKED = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)


def examples(count: int) -> settings:
    """Settings of a property: so many examples, however long the first one takes."""
    return settings(max_examples=count, deadline=None, suppress_health_check=_UNCHECKED)


def outcome(
    main: Callable[[Sequence[str]], None], arguments: Sequence[str], *, seconds: float = LONGEST_SECONDS
) -> str | None:
    """None where the command is well, else what it says about exit code 2; anything else fails the test.

    So does one that takes more than so many seconds of the processor. What it says while it works is not looked at.
    """
    said, started = io.StringIO(), time.process_time()
    with (
        mock.patch.object(sys, "argv", ["command", *arguments]),
        contextlib.redirect_stderr(said),
        contextlib.redirect_stdout(io.StringIO()),
        pytest.raises(SystemExit) as ended,
    ):
        command_line.run(main)
    message, taken = said.getvalue(), time.process_time() - started
    assert ended.value.code in (0, 2), message
    assert taken < seconds, f"{taken:.1f} s: {message}"
    if ended.value.code == 0:
        return None
    if not message.startswith("error: "):
        _, _, last = message.partition("\nerror: ")
        assert last, message
        message = f"error: {last}"
    assert message.endswith("\n")
    assert message.count("\n") <= 2 and "Traceback" not in message, message
    assert len(message) <= LONGEST_MESSAGE, len(message)
    assert not any(unicodedata.category(character) == "Cc" for character in message.replace("\n", "")), repr(message)
    return message


def planned(config: Config) -> None:
    """What is computed of a configuration before a device is touched, and what a run leaves of it on disk."""
    text = command_line.dump_yaml(config.model_dump(mode="json")).encode()
    json.dumps(config.model_dump(mode="json"))
    assert command_line.validate(Config, yaml.safe_load(text), origin="config.yaml") == config
    # As many devices as it asks for.
    sizes = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    mesh = sharding.mesh_shape(config.mesh, math.prod(size for size in sizes if size > 0))
    made = plan.make_plan(config, RECORDS, 40, mesh["data"] * mesh["fsdp"])
    phases = made.phases()
    assert phases[0].start == 0 and phases[-1].stop == made.total_steps
    schedule = optimizer.learning_rate_schedule(config.optimizer, made.total_steps, made.restarts)
    for step in (0, made.total_steps - 1):
        assert math.isfinite(np.asarray(schedule(step)).item())
    shape = model.GPT2.from_config(config.model, 320, sequence_length=config.train.sequence_length)
    assert 0 < plan.flops_per_token(shape, config.train.sequence_length) < 1e24


def main_of(schema: type[pydantic.BaseModel]) -> Callable[[Sequence[str]], None]:
    """A command that ends where its work would begin."""

    def main(arguments: Sequence[str]) -> None:
        parsed = command_line.parse(schema, arguments, program="command", summary="Does nothing.")
        json.dumps(parsed.model_dump(mode="json"))
        if isinstance(parsed, Config):
            planned(Config.model_validate(parsed.model_dump(include=set(Config.model_fields), exclude_unset=True)))

    return main


train_main = main_of(mutations.COMMANDS["train"][0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where an example writes its file, over that of the example before."""
    return tmp_path_factory.mktemp("mutated")


def shown(name: str) -> str:
    """A name as a message shows it, or the beginning of that."""
    return printable(name)[:60]


def names(message: str, name: str) -> bool:
    """Whether a message has a field's name, as it is written in files or in flags."""
    return name in message or name.replace("_", "-") in message


def names_part_of(message: str, field: mutations.Field) -> bool:
    """Whether a message has the field's name or, where it is in a group that no flag or file has, that of a group."""
    return any(names(message, part) for part in field.path if isinstance(part, str))


@examples(CONFIGURATIONS)
@given(data=st.data())
def test_a_field_with_another_value_is_valid_or_named(data: st.DataObject, folder: Path) -> None:
    file, values = data.draw(st.sampled_from(mutations.bases()))
    field = data.draw(st.sampled_from(mutations.fields(Config)))
    value = data.draw(mutations.wrong_values(field))
    if field.step is not None:
        step = mutations.VALID_STEPS.get(field.step, {"step": field.step})
        values = mutations.put(values, ("data", "cleaning"), [step])
    path = folder / file
    path.write_text(yaml.safe_dump(mutations.put(values, field.path, value)), encoding="utf-8")
    message = outcome(train_main, ["--config", str(path)])
    if message is not None:
        has_group = mutations.has(values, field.path[:-1])
        named = names(message, field.name) if has_group else names_part_of(message, field)
        assert named, f"{field.flag} = {value!r:.99}: {message}"


@examples(FILES)
@given(data=st.data())
def test_a_damaged_file_is_valid_or_named(data: st.DataObject, folder: Path) -> None:
    file, values = data.draw(st.sampled_from(mutations.bases()))
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode()
    path = folder / file
    path.write_bytes(data.draw(mutations.damaged_text(text)))
    message = outcome(train_main, ["--config", str(path)])
    if message is not None:
        field_names = {field.name for field in mutations.fields(Config)}
        assert str(path) in message or any(names(message, name) for name in field_names), message


@examples(NAMES)
@given(data=st.data())
def test_a_misspelled_key_is_named(data: st.DataObject, folder: Path) -> None:
    file, values = data.draw(st.sampled_from(mutations.bases()))
    path = data.draw(st.sampled_from([path for path in mutations.leaves(values) if isinstance(path[-1], str)]))
    wrong = data.draw(mutations.misspelled(str(path[-1])))
    written = folder / file
    written.write_text(yaml.safe_dump(mutations.renamed(values, path, wrong)), encoding="utf-8")
    message = outcome(train_main, ["--config", str(written)])
    if message is not None:
        assert shown(wrong) in message or names(message, str(path[-1])), f"{wrong!r}: {message}"


@examples(COMMAND_LINES)
@given(data=st.data())
def test_a_flag_with_other_words_is_valid_or_named(data: st.DataObject) -> None:
    schema, valid = mutations.COMMANDS[data.draw(st.sampled_from(sorted(mutations.COMMANDS)))]
    others = [other for other, _ in mutations.COMMANDS.values()]
    owner = data.draw(st.sampled_from([schema] * 5 + others))
    field = data.draw(st.sampled_from(mutations.fields(owner)))
    flag, words = mutations.spelled(data.draw, field), data.draw(mutations.flag_words(field))
    words = [f"--{flag}={words[0]}"] if words and data.draw(st.booleans()) else [f"--{flag}", *words]
    arguments = [*valid, *words] if data.draw(st.booleans()) else [*words, *valid]
    if {"-h", "--help"}.intersection(arguments):
        return
    message = outcome(main_of(schema), arguments)
    assert message is None or names_part_of(message, field), f"{arguments!r:.300}: {message}"


@examples(NAMES)
@given(data=st.data())
def test_a_misspelled_flag_is_named(data: st.DataObject) -> None:
    schema, valid = mutations.COMMANDS[data.draw(st.sampled_from(sorted(mutations.COMMANDS)))]
    field = data.draw(st.sampled_from(mutations.fields(schema)))
    wrong = data.draw(mutations.misspelled(f"--{field.flag}"))
    value = data.draw(st.sampled_from(["1", "0.5", "x", "none", "[1]", "{a: 1}", ""]))
    arguments = [*valid, wrong, value]
    if {"-h", "--help"}.intersection(arguments):
        return
    message = outcome(main_of(schema), arguments)
    if message is not None:
        # Its first part that is unknown is what is named.
        parts = wrong.partition("=")[0].removeprefix("--").replace("-", "_").split(".")
        spellings = [f"--{shown('.'.join(parts[: count + 1]))}" for count in range(len(parts))]
        snake = message.replace("-", "_")
        named = any(one.replace("-", "_") in snake for one in spellings)
        # Without its dashes it is one more word for the flag before it.
        named = named or (not wrong.startswith("--") and shown(wrong) in message)
        assert named or names_part_of(message, field), f"{wrong!r}: {message}"
