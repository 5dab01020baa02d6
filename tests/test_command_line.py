"""From what the user typed to a validated configuration, or to one line that names the fix."""

import errno
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, get_args, get_origin

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_jax.command_line import dump_yaml, help_text, parse, read_yaml, run, validate
from ssl_jax.config import FORMER_NAMES, Config, Source
from ssl_jax.errors import Preempted, TrainingDiverged, UserError

ROOT = Path(__file__).parent.parent


def read(*arguments: str) -> Config:
    return parse(Config, arguments, program="train", summary="Trains.")


def refused(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        read(*arguments)
    message = str(caught.value)
    assert "Traceback" not in message
    assert message.count("\n") <= 1
    return message


@pytest.fixture
def yaml_file(tmp_path: Path) -> Any:
    def write(text: str, name: str = "run.yaml") -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def leaf_fields(schema: type[pydantic.BaseModel], prefix: str = "") -> list[str]:
    """Dotted paths of all fields that are not groups, found independently of the code under test."""
    paths = []
    for name, field in schema.model_fields.items():
        options = [option for option in get_args(field.annotation) if option is not type(None)]
        inner = options[0] if get_origin(field.annotation) is types.UnionType else field.annotation
        if isinstance(inner, type) and issubclass(inner, pydantic.BaseModel):
            paths += leaf_fields(inner, f"{prefix}{name}.")
        else:
            paths.append(prefix + name)
    return paths


def test_flags_override_the_file_and_the_file_overrides_defaults(yaml_file: Any) -> None:
    config = read("--config", yaml_file("seed: 3\ntrain: {steps: 7}\n"), "--train.steps", "9")
    assert (config.seed, config.train.steps, config.mesh.data) == (3, 9, -1)


def test_kebab_and_snake_case_and_equals_sign_mean_the_same() -> None:
    spellings = (["--data.test-size", "0.3"], ["--data.test_size", "0.3"], ["--data.test-size=0.3"])
    assert [read(*arguments).data.test_size for arguments in spellings] == [0.3] * 3


def test_negative_numbers_are_values_and_not_flags() -> None:
    assert read("--mesh.data", "1", "--mesh.fsdp", "-1").mesh.fsdp == -1


def test_last_of_equal_flags_wins() -> None:
    assert read("--seed", "1", "--seed", "2").seed == 2


def test_none_unsets_an_optional_field(yaml_file: Any) -> None:
    config = read("--config", yaml_file("train: {steps: 5}"), "--train.steps", "none", "--train.num_train_epochs", "2")
    assert (config.train.steps, config.train.num_train_epochs) == (None, 2)


def test_list_flags_take_words_or_yaml_and_may_be_empty() -> None:
    assert read("--pseudo_labels.rounds", "0.2", "0.4").pseudo_labels.rounds == (0.2, 0.4)
    assert read("--pseudo_labels.rounds", "[0.2, 0.4]").pseudo_labels.rounds == (0.2, 0.4)
    assert read("--pseudo_labels.rounds").pseudo_labels.rounds == ()


def test_texts_in_brackets_are_texts() -> None:
    assert read("--evaluation.sample_prompts", "[laughs]").evaluation.sample_prompts == ("[laughs]",)


def test_list_of_groups_is_given_as_yaml() -> None:
    assert read("--data.labeled", "[{path: a.jsonl}]").data.labeled == (Source(path="a.jsonl"),)


def test_one_element_of_a_list_in_the_file_can_be_overridden(yaml_file: Any) -> None:
    path = yaml_file("data: {labeled: [{path: a, format: log}, {path: b}]}\n")
    config = read("--config", path, "--data.labeled.0.path", "X", "--data.labeled.1.format", "text")
    assert config.data.labeled == (Source(path="X", format="log"), Source(path="b", format="text"))


def test_elements_are_appended_to_a_list_one_by_one(yaml_file: Any) -> None:
    config = read("--config", yaml_file("data: {labeled: [{path: a}]}\n"), "--data.labeled.1.path", "b")
    assert [source.path for source in config.data.labeled] == ["a", "b"]
    assert "--data.labeled.2.path" in refused("--data.labeled.2.path", "c")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--train.stepz", "3"], "train.steps"),
        (["--steps", "3"], "train.steps"),
        (["--learning-rate-max", "3"], "optimizer.learning_rate"),
        (["--data.labeled.0.pth", "x"], "data.labeled.0.path"),
        (["--nothing_like_it", "3"], "known here: seed, workdir"),
    ],
)
def test_unknown_flags_are_answered_with_what_there_is(arguments: list[str], named: str) -> None:
    message = refused(*arguments)
    assert message.startswith(arguments[0].replace("-rate-max", "_rate_max"))
    assert named in message


@pytest.mark.parametrize("path", leaf_fields(Config))
def test_every_misspelled_key_is_answered_with_the_right_one(path: str) -> None:
    *groups, name = path.split(".")
    values: dict[str, Any] = {name + "x": 1}
    for group in reversed(groups):
        values = {group: values}
    with pytest.raises(
        UserError, match=rf"run.yaml: {re.escape(path)}x: unknown field; did you mean {re.escape(path)}\?"
    ):
        validate(Config, values, origin="run.yaml")


@pytest.mark.parametrize("name", FORMER_NAMES)
def test_former_names_are_answered_with_the_new_ones_as_keys_and_as_flags(name: str, yaml_file: Any) -> None:
    answer = f"'{name}' is called {FORMER_NAMES[name]} here"
    assert answer in refused("--config", yaml_file(f"{name}: x\n"))
    assert answer in refused(f"--{name}", "x")
    assert answer in refused(f"--{name.replace('_', '-')}")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run.yaml"], "unexpected argument 'run.yaml'"),
        (["--"], "unexpected argument '--'"),
        (["--config"], "--config needs one file"),
        (["--train.steps"], "--train.steps takes one value, got none"),
        (["--train.steps", "1", "2"], "--train.steps takes one value, got '1 2'"),
        (["--train.steps", "0"], "--train.steps: Input should be greater than or equal to 1, got '0'"),
        (["--train.steps", "many"], "--train.steps: Input should be a valid integer"),
        (["--train", "3"], "--train is a group"),
        (["--data.labeled.0", "x"], "--data.labeled.0 is a group"),
        (["--data.labeled.path", "x"], "data.labeled is a list"),
        (["--seed.x", "3"], "seed has no fields of its own"),
        (["--data.labeled", "[{path:"], "--data.labeled: not valid YAML"),
        (["--pseudo_labels.rounds", "[0.5"], "--pseudo_labels.rounds: not valid YAML"),
        (["--data.labeled", "chats.jsonl"], "--data.labeled: Input should be a valid tuple"),
        (["--data.labeled." + "9" * 5000 + ".path", "x"], "data.labeled is a list"),
        (["--data.labeled.99999999999.path", "x"], "data.labeled is a list"),
        (["--data.labeled.999.path", "x"], "the list has 0 elements"),
        (["--data.labeled.\u0663.path", "x"], "data.labeled is a list"),
        (["--data.labeled.-1.path", "x"], "data.labeled is a list"),
        (["--nothing." + "9" * 5000, "x"], "--nothing: unknown field"),
        (["--seed=1", "2"], "unexpected argument '2' behind --seed=1"),
        (["x" * 5000], "unexpected argument 'xxx"),
        (["--train.steps", "x" * 100_000], "--train.steps: Input should be a valid integer"),
        (["--a\x1b[2J\nb", "x"], "--a\\x1b[2J\\nb: unknown field"),
        (["--seed", "\udcff"], "--seed: Input should be a valid"),
        (["--data.labeled.0.path", "x", "--data.labeled.0.tfds", "y"], "names exactly one of path, dataset, tfds"),
    ],
)
def test_what_a_user_can_get_wrong_is_said_in_one_line(arguments: list[str], says: str) -> None:
    assert says in refused(*arguments)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train: {steps: 5", "not valid YAML"),
        ("- 1\n", "expected 'field: value' lines, found list"),
        ("seed: 1\nseed: 2\n", "'seed' is there twice"),
        ("train: {steps: 1, steps: 2}\n", "'steps' is there twice"),
        ("seed: &a [*a]\n", "seed: Input should be a valid integer"),
        ("1: 2\n", "Keys should be strings"),
        ("workdir: 2024-13-45\n", "not valid YAML"),
        ("? {a: b}\n: c\n", "not valid YAML"),
        ("seed: " + "[" * 3000, "not valid YAML"),
        ("train: 3\n", "train: Input should be a valid dictionary"),
        ("!!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("seed: !!int ''\n", "not valid YAML"),
        ("seed: !!bool x\n", "not valid YAML"),
        ("seed: !!timestamp x\n", "not valid YAML"),
        ("seed: 0x" + "f" * 20_000, "seed: Input should be less than 2147483648, got a number of 80000 bits"),
        ("train: {a.b: 1}\n", "train.a.b: unknown field"),
        ('"a\\nb": 1\n', "a\\nb: unknown field"),
        ("x" * 900 + ": 1\n", "x…: unknown field"),
        ("workdir: '" + "x" * 200_000 + "'\n", "workdir: a path has at most"),
        ("seed: [" + "0, " * 50_000 + "]\n", "seed: Input should be a valid integer, got [0, 0, 0, 0, 0, 0, ...]"),
        ("#" * 300_000, "is larger than 262,144 characters"),
        ("a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}]\n" for n in range(1, 30)), "unknown field"),
        (
            "m0: &m0 {a: 1}\n" + "".join(f"m{n}: &m{n} {{<<: [*m{n - 1}, *m{n - 1}]}}\n" for n in range(1, 60)),
            "unknown",
        ),
        ("seed: {" + ", ".join(f"k{n}: 0" for n in range(15_000)) + "}\n", "seed: Input should be a valid integer"),
    ],
)
def test_a_bad_file_is_named_with_the_reason(text: str, says: str, yaml_file: Any) -> None:
    message = refused("--config", yaml_file(text))
    assert "run.yaml: " in message
    assert says in message
    assert len(message) < 1200 and message.isprintable()


def test_a_mapping_that_was_merged_before_it_was_built_repeats_no_key(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("w: &first {a: 1}\nx: &base {<<: *first, a: 2}\ny: {<<: *base, b: 3}\n")
    assert read_yaml(tmp_path / "a.yaml")["y"] == {"a": 2, "b": 3}


@pytest.mark.parametrize(
    "text", ["a\x85b", "a\u2028b", "\u2029", "a\r\nb", "你好 é", "\ufeff", "no", "1e3", " a\n\nb ", "\x1b"]
)
def test_a_configuration_is_read_as_it_was_written(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(dump_yaml({"x": [text], text: {"y": text}}), encoding="utf-8")
    assert read_yaml(path) == {"x": [text], text: {"y": text}}


def test_merge_keys_of_yaml_still_override(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("x: &base {a: 1, b: 2}\ny: {<<: *base, b: 3}\n")
    assert read_yaml(tmp_path / "a.yaml")["y"] == {"a": 1, "b": 3}


def test_a_missing_file_is_answered_with_the_nearest_one(yaml_file: Any, tmp_path: Path) -> None:
    path = yaml_file("", "quickstart.yaml")
    assert path in refused("--config", str(tmp_path / "quikstart.yaml"))
    assert "nor a folder" in refused("--config", str(tmp_path / "nowhere" / "x.yaml"))
    assert "cannot be read" in refused("--config", str(tmp_path))
    (tmp_path / "latin.yaml").write_bytes(b"workdir: \xe9t\xe9\n")
    assert "cannot be read" in refused("--config", str(tmp_path / "latin.yaml"))


def test_an_empty_file_is_the_defaults(yaml_file: Any) -> None:
    assert read("--config", yaml_file("# nothing yet\n")) == Config()


def test_a_misspelled_name_is_reported_before_the_value_that_it_leaves_missing() -> None:
    class Needs(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid")
        workdir: str

    with pytest.raises(UserError, match=r"--workdri: unknown field; did you mean workdir\?"):
        parse(Needs, ["--workdri", "x"], program="p", summary="s")
    with pytest.raises(UserError, match="workdir: Field required"):
        parse(Needs, [], program="p", summary="s")


def test_boolean_flags_may_stand_alone() -> None:
    class Switches(pydantic.BaseModel):
        json_lines: bool = False
        seed: int = 0

    given_flags = parse(Switches, ["--json-lines", "--seed", "2"], program="p", summary="s")
    assert (given_flags.json_lines, given_flags.seed) == (True, 2)
    assert not parse(Switches, ["--json-lines", "false"], program="p", summary="s").json_lines


def test_help_lists_every_field_with_type_default_bounds_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read("--train.steps", "3", "--help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for path in [*leaf_fields(Config), *leaf_fields(Source, "data.labeled.N.")]:
        assert re.search(rf"^  --{re.escape(path)} \S.*\(default: .*\)\n      \S", text, re.MULTILINE), path
    assert "--train.steps INT | none  (default: none, >= 1, <= 1000000000)" in text
    assert "--config FILE" in text
    one_line = " ".join(text.split())
    for section in Config.model_fields.values():
        assert (section.description or "") in one_line


def test_help_marks_fields_without_a_default() -> None:
    class Needs(pydantic.BaseModel):
        workdir: Path = pydantic.Field(description="Where.")

    assert "--workdir PATH  (required)" in help_text(Needs, "p", "s")


REAL_FLAGS = [f"--{path}" for path in leaf_fields(Config)] + [f"--data.labeled.{i}.path" for i in range(3)]
VALUES = [
    "1",
    "0",
    "-1",
    "0.5",
    "1e400",
    "nan",
    "none",
    "",
    "true",
    "gpt2",
    "x",
    "[0.1, 0.2]",
    "[{path: a}]",
    "[",
    "{a: }",
]


@st.composite
def mutated_flag(draw: st.DrawFn) -> str:
    flag = draw(st.sampled_from(REAL_FLAGS))
    at = draw(st.integers(0, len(flag)))
    return (
        flag[:at]
        + draw(st.sampled_from(["", ".", "-", "=", "0", ".0.", "é", " "]))
        + flag[at + draw(st.integers(0, 2)) :]
    )


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(REAL_FLAGS), mutated_flag(), st.sampled_from(VALUES), st.text(max_size=6))))
def test_any_command_line_gives_a_valid_configuration_or_a_user_error(arguments: list[str]) -> None:
    if {"-h", "--help"}.intersection(arguments):
        return
    try:
        config = read(*arguments)
    except UserError as error:
        assert 1 <= len(str(error).splitlines()) <= 2
    else:
        assert Config.model_validate(config.model_dump()) == config


AGAIN = ", then run the same command again"


@pytest.mark.parametrize(
    ("raised", "code", "on_stderr"),
    [
        (None, 0, ""),
        (UserError("fix the thing"), 2, "error: fix the thing\n"),
        (TrainingDiverged("nan"), 3, "error: nan\n"),
        (Preempted("saved"), 75, "stopped: saved\n"),
        (KeyboardInterrupt(), 75, "stopped: interrupted\n"),
        (OSError(errno.ENOSPC, "No space left", "a/b"), 2, f"error: a/b: No space left; make room{AGAIN}\n"),
        (PermissionError(errno.EACCES, "Permission denied"), 2, f"error: Permission denied; set permissions{AGAIN}\n"),
        (
            IsADirectoryError(errno.EISDIR, "Is a directory", "a"),
            2,
            f"error: a: Is a directory; move away what is in the way{AGAIN}\n",
        ),
    ],
)
def test_what_happened_decides_the_exit_code(
    raised: BaseException | None, code: int, on_stderr: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(arguments: Any) -> None:
        if raised is not None:
            raise raised

    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == code
    assert capsys.readouterr().err == on_stderr


@pytest.mark.parametrize("raised", [IndexError(), FileNotFoundError(errno.ENOENT, "No such file", "a/b")])
def test_a_bug_shows_its_traceback(raised: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def main(arguments: Any) -> None:
        raise raised

    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == 1
    assert "Traceback" in (err := capsys.readouterr().err)
    assert type(raised).__name__ in err


def test_a_reader_that_left_is_no_traceback() -> None:
    """As with `... | head -1`: the output fails at the last flush, after main has returned."""
    program = "from ssl_jax.command_line import run; run(lambda _: print('x' * 100))"
    read_end, write_end = os.pipe()
    os.close(read_end)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=write_end, stderr=subprocess.PIPE, cwd=ROOT, env=buffered
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (128 + 13, b"")


def test_ground_floor_imports_no_heavy_library() -> None:
    """A wrong flag is answered at once: nothing has loaded JAX by then."""
    program = (
        "import sys, ssl_jax.command_line, ssl_jax.config, ssl_jax.dialogue, ssl_jax.logbook, ssl_jax.checkpoint;"
        "print(sorted({'jax', 'flax', 'numpy', 'orbax', 'transformers', 'tensorflow', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
