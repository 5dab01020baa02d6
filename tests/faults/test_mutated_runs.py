"""Configurations that the schema accepts, through the commands themselves: what their plan and their data refuse."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mutations
import pydantic
import pytest
import tiny
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st
from test_mutated_configurations import examples, names, outcome

from ssl_jax import prepare, train
from ssl_jax.config import Config

pytestmark = pytest.mark.slow

DRY_RUNS, PREPARATIONS = 80, 100
# What of the data a mutated field would be, were it a file.
PLACES = ("nowhere", "empty", "binary", "folder", "labeled.jsonl", "labeled.jsonl/x", "*", "[", ".", "run")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a configuration, its data, prepared, and files that are no data; relative paths lead there."""
    folder = tmp_path_factory.mktemp("home")
    tiny.write_all(folder)
    (folder / "empty").touch()
    (folder / "binary").write_bytes(bytes(range(256)) * 40)
    (folder / "folder").mkdir()
    prepare.main(["--config", str(folder / "config.yaml")])
    with contextlib.chdir(folder):
        yield folder


def draw_mutated(data: st.DataObject, home: Path, sections: tuple[str, ...]) -> tuple[mutations.Field, Any]:
    """Writes `mutated.yaml`, which the schema accepts; returns what is other in it."""
    fields = [field for field in mutations.fields(Config) if field.path[0] in sections]
    field = data.draw(st.sampled_from(fields))
    value = data.draw(st.one_of(mutations.wrong_values(field), st.sampled_from(PLACES)))
    values = tiny.settings(home)
    if field.step is not None:
        step = mutations.VALID_STEPS.get(field.step, {"step": field.step})
        values = mutations.put(values, ("data", "cleaning"), [step])
    mutated = mutations.put(values, field.path, value)
    try:
        Config.model_validate(mutated)
    except pydantic.ValidationError:
        assume(False)
    (home / "mutated.yaml").write_text(yaml.safe_dump(mutated), encoding="utf-8")
    return field, value


@examples(DRY_RUNS)
@given(data=st.data())
def test_a_plan_is_made_or_the_field_named(data: st.DataObject, home: Path) -> None:
    sections = tuple(name for name in Config.model_fields if name not in ("data", "tokenizer"))
    field, value = draw_mutated(data, home, sections)
    message = outcome(train.main, ["--config", "mutated.yaml", "--dry-run"], seconds=60)
    assert message is None or names(message, field.name), f"{field.flag} = {value!r:.99}: {message}"


@examples(PREPARATIONS)
@given(data=st.data())
def test_data_are_prepared_or_the_field_or_the_file_is_named(data: st.DataObject, home: Path) -> None:
    field, value = draw_mutated(data, home, ("seed", "data", "tokenizer"))
    assume(field.name != "beam_options")
    message = outcome(prepare.main, ["--config", "mutated.yaml"], seconds=60)
    if message is not None:
        # Of rows that are wrong, or that cleaning removes, the group is named.
        named = names(message, field.name) or f"data.{field.path[1]}" in message or str(value) in message
        assert named or "data.labeled" in message, f"{field.flag} = {value!r:.99}: {message}"


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("train.sequence_length", "1048576"),
        ("optimizer.learning_rate", "1e308"),
        ("workdir", "x" * 300),
        ("data.labeled.0.path", "/dev/zero"),
        ("mesh.fsdp", "1000000"),
    ],
)
def test_the_process_itself_says_what_is_wrong(flag: str, value: str, home: Path) -> None:
    process = tiny.run_command("train", "--config", str(home / "config.yaml"), f"--{flag}", value)
    assert process.returncode == 2, process.stderr
    assert names(process.stderr, flag.split(".")[1] if "." in flag else flag)
    assert "Traceback" not in process.stderr
