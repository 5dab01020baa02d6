"""Pretrained weights and what they decide: the model's shape, its tokenizer, the parameters that a run starts from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ssl_jax import config
from ssl_jax.command_line import validate
from ssl_jax.config import TemplateName
from ssl_jax.errors import UserError

if TYPE_CHECKING:
    import jax

    from ssl_jax import model
    from ssl_jax.data.tokenizer import DialogueTokenizer


def load(
    name: str, *, template: TemplateName | Literal["auto"] = "auto", mesh: jax.sharding.Mesh | None = None
) -> tuple[model.GPT2, model.Params, DialogueTokenizer]:
    """A Hugging Face GPT-2 as it is: with its own chat template, or continuing plain text where it has none.

    Raises:
      UserError: no such directory or hub name, or its files are damaged, contradict each other or are not GPT-2.
    """
    from ssl_jax import huggingface, model
    from ssl_jax.data.tokenizer import DialogueTokenizer

    directory = huggingface.locate(name)
    # One block at a time: decoding reads them unstacked.
    settings = huggingface.resolve(config.Model(init_from=str(directory), scan_layers=False))
    tokenizer = DialogueTokenizer.load(directory, template=template, fallback="plain")
    tokenizer.end_also_with(huggingface.read_end_ids(directory))
    shape = model.GPT2.from_config(settings, tokenizer.vocab_size, mesh)
    return shape, _read(directory, shape, tokenizer, mesh), tokenizer


def resolve(settings: config.Config) -> config.Config:
    """The configuration with everything that pretrained weights decide: the model's shape and its tokenizer.

    Raises:
      UserError: the configuration contradicts the weights it starts from.
    """
    if settings.model.init_from is None:
        return settings
    from ssl_jax import huggingface

    values: dict[str, Any] = settings.model_dump()
    try:
        values["model"] = huggingface.resolve(settings.model).model_dump()
    except UserError as error:
        raise UserError(f"model.init_from: {error}") from None
    if settings.tokenizer.name_or_path is None:
        values["tokenizer"]["name_or_path"] = settings.model.init_from
    return validate(config.Config, values, origin=f"model.init_from {settings.model.init_from}")


def initial_params(settings: config.Config, shape: model.GPT2, mesh: jax.sharding.Mesh) -> model.Params:
    """The weights that a run starts from, `model.init_from`; tokens that the run adds get the mean embedding.

    Raises:
      UserError: the files are damaged, or the tokenizer is not that of the weights.
    """
    from ssl_jax import huggingface
    from ssl_jax.data.tokenizer import DialogueTokenizer

    assert settings.model.init_from is not None and settings.tokenizer.name_or_path is not None
    directory = huggingface.locate(settings.model.init_from)
    tokenizer = DialogueTokenizer.load(
        settings.tokenizer.name_or_path,
        template=settings.tokenizer.template,
        direction_tokens=settings.tokenizer.direction_tokens,
    )
    return _read(directory, shape, tokenizer, mesh)


def _read(
    directory: Path, shape: model.GPT2, tokenizer: DialogueTokenizer, mesh: jax.sharding.Mesh | None
) -> model.Params:
    from ssl_jax import huggingface

    return huggingface.read_params(
        directory, shape, known_tokens=tokenizer.base_vocab_size, used_tokens=tokenizer.vocab_size, mesh=mesh
    )
