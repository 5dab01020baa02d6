"""The schema: what it accepts, what it refuses, and that it documents itself."""

import math
from collections.abc import Iterator
from typing import Any, get_args

import pydantic
import pytest
import yaml

from ssl_jax.config import FORMER_NAMES, MODEL_SIZES, Config, Section, Source


def fields(schema: type[pydantic.BaseModel], prefix: str = "") -> Iterator[tuple[str, pydantic.fields.FieldInfo]]:  # pyright: ignore
    """Every field of the tree, groups included, by dotted path."""
    for name, field in schema.model_fields.items():
        yield prefix + name, field
        if isinstance(field.annotation, type) and issubclass(field.annotation, pydantic.BaseModel):
            yield from fields(field.annotation, f"{prefix}{name}.")


def nested(path: str, value: Any) -> dict[str, Any]:
    for part in reversed(path.split(".")):
        value = {part: value}
    return value


def with_defaults(path: str, value: Any) -> dict[str, Any]:
    """A complete configuration with one value changed."""
    values = Config().model_dump()
    group = values
    *groups, name = path.split(".")
    for part in groups:
        group = group[part]
    group[name] = value
    return values


ALL_FIELDS = dict([*fields(Config), *fields(Source, "data.labeled.N.")])

BOUNDS = [
    (path, kind, getattr(constraint, kind))
    for path, field in fields(Config)
    for constraint in field.metadata
    for kind in ("ge", "gt", "le", "lt")
    if getattr(constraint, kind, None) is not None
]

BEYOND = {
    "ge": lambda bound: bound - 1,
    "gt": lambda bound: bound,
    "le": lambda bound: bound + 1,
    "lt": lambda bound: bound,
}


@pytest.mark.parametrize("path", ALL_FIELDS)
def test_every_field_says_what_it_means_in_a_sentence(path: str) -> None:
    description = ALL_FIELDS[path].description
    assert description
    assert description[0].isupper() or description.startswith("`")
    assert description.endswith((".", ")"))


@pytest.mark.parametrize(("path", "kind", "bound"), BOUNDS)
def test_a_value_beyond_its_bound_is_refused_and_the_field_named(path: str, kind: str, bound: float) -> None:
    with pytest.raises(pydantic.ValidationError) as caught:
        Config.model_validate(with_defaults(path, BEYOND[kind](bound)))
    assert path in {".".join(map(str, problem["loc"])) for problem in caught.value.errors()}


NUMBERS = [
    path
    for path, field in ALL_FIELDS.items()
    if field.annotation in (int, float) or set(get_args(field.annotation)) in ({int, type(None)}, {float, type(None)})
]


@pytest.mark.parametrize("path", [path for path in NUMBERS if not path.startswith("data.labeled")])
@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, 10**400, -(10**400)], ids=["nan", "inf", "-inf", "huge", "-huge"]
)
def test_every_number_refuses_what_no_computer_holds(path: str, value: float) -> None:
    with pytest.raises(pydantic.ValidationError) as caught:
        Config.model_validate(with_defaults(path, value))
    assert path in {".".join(map(str, problem["loc"])) for problem in caught.value.errors()}


@pytest.mark.parametrize("path", NUMBERS)
def test_every_number_has_a_lower_and_an_upper_bound(path: str) -> None:
    kinds = {kind for c in ALL_FIELDS[path].metadata for kind in ("ge", "gt", "le", "lt") if hasattr(c, kind)}
    assert kinds & {"ge", "gt"} and kinds & {"le", "lt"}


PATHS = ["workdir", "data.prepared_dir", "tokenizer.name_or_path", "model.init_from"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("", "the path is empty"),
        (" ", "the path is empty"),
        ("a\0b", "no control characters"),
        ("a\nb", "no control characters"),
        ("a/" + "b" * 256, "255 for each name"),
        ("é" * 128, "255 for each name"),
        ("a/" * 2048, "at most 4095 bytes"),
    ],
)
def test_a_path_that_no_file_system_takes(path: str, value: str, says: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=says):
        Config.model_validate(nested(path, value))


def test_paths_of_sources_and_teachers_are_checked_too() -> None:
    for values in ({"data": {"labeled": [{"path": "a\0"}]}}, {"distillation": {"teachers": ["ema", "a\0"]}}):
        with pytest.raises(pydantic.ValidationError, match="no control characters"):
            Config.model_validate(values)


def test_a_bias_may_ban_a_token_and_has_bounds() -> None:
    bias = {"evaluation": {"sampling": {"sequence_bias": {"a": -math.inf, "b": 1e6}}}}
    assert Config.model_validate(bias).evaluation.sampling.sequence_bias["a"] == -math.inf
    with pytest.raises(pydantic.ValidationError, match="sequence_bias of 'a'"):
        Config.model_validate(nested("evaluation.sampling.sequence_bias", {"a": -1e7}))


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("model.size", ["gpt2"], "model.size"),
        ("data.cleaning", [{"step": "notices", "patterns": ["a{99999999999}"]}], "no regular expression"),
        ("data.cleaning", [{"step": "bots", "speakers": ["(" * 5000]}], "no regular expression"),
        ("data.cleaning", [10**5000], "a step is a name or a mapping"),
        ("data.keep_if", [{"field": "turns", "equals": 10**5000}], "equals is a number below"),
        ("evaluation.sampling.suppress_tokens", [10**5000], "suppress_tokens are token ids"),
        ("pseudo_labels.rounds", [2.0] * 5000, "rounds are increasing fractions"),
    ],
)
def test_a_value_that_no_code_behind_the_schema_expects(path: str, value: Any, says: str) -> None:
    with pytest.raises(pydantic.ValidationError) as caught:
        Config.model_validate(nested(path, value))
    text = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in caught.value.errors())
    assert says in text and len(text) < 500


@pytest.mark.parametrize(
    "section", [Config, Source, *(type(v) for v in vars(Config()).values() if isinstance(v, Section))]
)
def test_every_group_refuses_unknown_keys(section: type[Section]) -> None:
    with pytest.raises(pydantic.ValidationError, match="extra_forbidden"):
        section.model_validate({"no_such_field": 1})


def test_configuration_cannot_be_changed_after_validation() -> None:
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        Config().train.steps = 5  # pyright: ignore[reportAttributeAccessIssue]


def test_a_configuration_survives_yaml() -> None:
    config = Config.model_validate({"data": {"labeled": [{"path": "a"}]}, "model": {"size": "distilgpt2"}})
    text = yaml.safe_dump(config.model_dump(mode="json"))
    assert Config.model_validate(yaml.safe_load(text)) == config


@pytest.mark.parametrize("size", MODEL_SIZES)
def test_a_size_by_name_sets_the_shape(size: str) -> None:
    model = Config.model_validate({"model": {"size": size}}).model
    assert model.model_dump(include=set(MODEL_SIZES[size])) == MODEL_SIZES[size]


def test_a_size_and_a_different_shape_contradict_each_other() -> None:
    with pytest.raises(pydantic.ValidationError, match="size gpt2 means n_layer 12; drop n_layer or drop size"):
        Config.model_validate({"model": {"size": "gpt2", "n_layer": 3}})


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"model": {"n_embd": 100, "n_head": 3}}, "n_embd 100 must be a multiple of n_head 3"),
        ({"train": {"steps": 1, "num_train_epochs": 1}}, "give steps or num_train_epochs, not both"),
        ({"data": {"test_size": 0.6, "dev_size": 0.4}}, "must leave something to train on"),
        ({"data": {"labeled": [{}]}}, "exactly one of path, dataset, tfds, huggingface; found none"),
        ({"pseudo_labels": {"rounds": [0.5, 0.2]}}, "increasing fractions"),
        ({"pseudo_labels": {"rounds": [1.0]}}, "increasing fractions"),
        ({"mesh": {"data": -1, "fsdp": -1}}, "at most one of them is -1"),
        ({"mesh": {"tensor": 0}}, "mesh sizes are positive"),
        ({"train": {"loss_spike_threshold": 6, "save_total_limit": 1}}, "keep no checkpoint from before so many steps"),
        ({"train": {"steps": 1, "sequence_length": 2048}}, "sequence_length 2048 exceeds model.n_positions 1024"),
        (
            {"model": {"n_positions": 160}, "train": {"steps": 1, "sequence_length": 64}},
            "more than model.n_positions 160",
        ),
    ],
)
def test_values_that_do_not_fit_together_are_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(pydantic.ValidationError) as caught:
        Config.model_validate(values)
    assert says in str(caught.value)


@pytest.mark.parametrize(("former", "now"), FORMER_NAMES.items())
def test_former_names_lead_to_fields_that_exist(former: str, now: str) -> None:
    assert now.split(" ")[0] in ALL_FIELDS
    assert former not in Config.model_fields


def test_defaults_are_those_of_the_recipe() -> None:
    config = Config()
    assert config.train.per_device_train_batch_size == 16
    assert config.train.per_device_eval_batch_size == 64
    assert config.data.test_size == 0.2
