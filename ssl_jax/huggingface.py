"""Hugging Face GPT-2 directories in and out: where they are, their settings, their weights.

What transformers calls a model is known here and in `gpt2_tensors`; neither transformers nor PyTorch is needed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
from jax.sharding import Mesh

from ssl_jax import config, files, gpt2_tensors, model, tensor_files
from ssl_jax.errors import UserError

SETTINGS = "config.json"
GENERATION = "generation_config.json"

# Read from the hub: settings, weights in safetensors, tokenizer. Never a pickle.
_HUB_FILES = (
    SETTINGS,
    GENERATION,
    "model*.safetensors",
    tensor_files.INDEX,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.*",
)

_FREE_FIELDS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
"""What a user may change without contradicting the weights."""

_FIXED_FIELDS = (
    "n_layer",
    "n_head",
    "n_embd",
    "n_inner",
    "n_positions",
    "vocab_size",
    "activation_function",
    "layer_norm_epsilon",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "reorder_and_upcast_attn",
    "tie_word_embeddings",
    "initializer_range",
)

_DEFAULT_VOCAB_SIZE = 50257
"""`GPT2Config`'s; its other defaults are those of `config.Model`."""

# Names that transformers reads as others (`GPT2Config.attribute_map`), and one that old files have.
_OTHER_NAMES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "n_ctx": "n_positions",
}


def locate(name_or_path: str) -> Path:
    """The directory of a model: a local one, or the hub's files of that name, downloaded where they are missing.

    Raises:
      UserError: no such directory, and the hub does not know the name, keeps it private, or cannot be reached.
    """
    directory = Path(name_or_path).expanduser()
    if name_or_path and directory.is_dir():
        return directory
    import huggingface_hub
    from huggingface_hub import errors

    try:
        found = Path(huggingface_hub.snapshot_download(name_or_path, allow_patterns=list(_HUB_FILES)))
    except errors.HFValidationError:
        reason = "it is not a hub name (owner/name)"
    except errors.RepositoryNotFoundError:
        reason = "the hub has no public model of that name (for a private one, log in with `hf auth login`)"
    except errors.LocalEntryNotFoundError:
        reason = "the hub cannot be reached and its files are not in the local cache"
    except (OSError, errors.HTTPError, errors.XetDownloadError) as error:  # pyright: ignore[reportPrivateImportUsage]
        reason = f"the hub did not deliver it ({next(iter(str(error).splitlines()), type(error).__name__):.200})"
    else:
        if not any(found.glob("*.safetensors")):
            raise UserError(_conversion(name_or_path))
        return found
    shown = name_or_path if name_or_path.startswith((".", "/", "~")) else f"./{name_or_path}"
    raise UserError(
        f"{name_or_path}: there is no directory {shown}, and {reason}; "
        "name a local directory with config.json and model.safetensors"
    )


def _conversion(source: str) -> str:
    call = f"part.from_pretrained('{source}').save_pretrained('converted')"
    return (
        f"{source}: has no model.safetensors, and a pickle (pytorch_model.bin) can run any code; where you trust it:\n"
        'python -c "from transformers import AutoTokenizer, GPT2LMHeadModel; '
        f'[{call} for part in (GPT2LMHeadModel, AutoTokenizer)]"'
    )


def read_settings(directory: Path) -> dict[str, Any]:
    """The fields of `config.Model` that `config.json` fixes: shape and arithmetic, dropouts, initialization.

    Keys that are missing have `GPT2Config`'s defaults.

    Raises:
      UserError: no such file, not JSON, not a GPT-2 that this program computes, or a value that cannot be.
    """
    path = directory / SETTINGS
    try:
        stored = files.read_json(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {directory} is not a Hugging Face model") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); copy it again") from None
    if not isinstance(stored, dict):
        raise UserError(f"{path}: expected an object of settings; copy it again")
    _refuse_other_models(path, stored)
    for other, name in _OTHER_NAMES.items():
        if other in stored:
            stored.setdefault(name, stored[other])
    names = (*_FIXED_FIELDS, *_FREE_FIELDS)
    values = {"vocab_size": _DEFAULT_VOCAB_SIZE, **{name: stored[name] for name in names if name in stored}}
    try:
        settings = config.Model.model_validate(values, strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        got = f", got {first['input']!r:.80}" if where else ""
        raise UserError(f"{path}: {where + ': ' if where else ''}{message}{got}; correct the file") from None
    return {name: getattr(settings, name) for name in names}


def _refuse_other_models(path: Path, stored: Mapping[str, Any]) -> None:
    kind = stored.get("model_type")
    if kind != "gpt2":
        found = "is missing" if kind is None else f"is {kind!r}"
        raise UserError(f"{path}: model_type {found}, and only 'gpt2' can be read; choose a GPT-2 model")
    for key, meaning in (
        ("add_cross_attention", "a decoder that attends to an encoder"),
        ("quantization_config", "quantized weights"),
        ("pruned_heads", "a model without some of its heads"),
    ):
        if stored.get(key):
            raise UserError(f"{path}: {key} means {meaning}, which cannot be read; choose a plain GPT-2")


def read_generation(directory: Path) -> dict[str, Any]:
    """The settings of `generation_config.json`, empty where there is none; without token ids and what describes a file.

    Raises:
      UserError: the file is not JSON.
    """
    stored = _read_generation(directory)
    left_out = ("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version")
    return {name: value for name, value in stored.items() if name not in left_out and not name.startswith("_")}


def read_end_ids(directory: Path) -> tuple[int, ...]:
    """The tokens that end what the model says, as `generation_config.json` has them; empty where it has none.

    Raises:
      UserError: the file is not JSON, or has something else in their place.
    """
    stored = _read_generation(directory).get("eos_token_id")
    ids = stored if isinstance(stored, list) else [] if stored is None else [stored]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise UserError(f"{directory / GENERATION}: eos_token_id is a token id or a list of them, got {stored!r:.80}")
    return tuple(ids)


def _read_generation(directory: Path) -> dict[str, Any]:
    path = directory / GENERATION
    if not path.is_file():
        return {}
    try:
        return dict(files.read_json(path))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); copy it again or remove it") from None


def resolve(settings: config.Model) -> config.Model:
    """The settings with everything that the weights they start from decide; without `init_from` as they are.

    Headers of the weights are checked against `config.json` on the way; a value is not read yet.

    Raises:
      UserError: a field that the user set contradicts the directory (dropouts may), or the directory cannot be used.
    """
    if settings.init_from is None:
        return settings
    directory = locate(settings.init_from)
    stored = read_settings(directory)
    given = {name for name in settings.model_fields_set if getattr(settings, name) is not None}
    for name in _FIXED_FIELDS:
        wanted, there = getattr(settings, name), stored[name]
        if name == "n_inner":
            there = there or 4 * stored["n_embd"]
        if name in given and wanted != there:
            raise UserError(
                f"model.{name} is {wanted}, but {directory / SETTINGS} says {there}; leave it out, or train from "
                "scratch without model.init_from"
            )
    values = {name: value for name, value in stored.items() if name not in given}
    resolved = settings.model_copy(update=values)
    _open(directory, model.GPT2.from_config(resolved, 0))
    return resolved


def read_params(
    directory: Path,
    shape: model.GPT2,
    *,
    known_tokens: int,
    used_tokens: int | None = None,
    mesh: Mesh | None = None,
) -> model.Params:
    """The weights of a directory, cast to `shape.param_dtype`, as device arrays.

    Tokens that were added, `known_tokens <= id < used_tokens`, get the mean of the known tokens' rows. A new token is
    then never likelier than the known ones are on average, so that it disturbs no prediction; small random rows have
    logits near 0, which among a trained model's negative ones may take almost all the probability (Hewitt 2021,
    "Initializing New Word Embeddings for Pretrained Language Models"). Rows that pad the vocabulary are 0.

    Args:
      directory: from `locate`.
      shape: from `resolve`d settings and a tokenizer.
      known_tokens: ids that the model was trained with.
      used_tokens: ids that have a meaning now; rows of the directory from here on stay as they are. Absent: all.
      mesh: the arrays are cut as `sharding.shard_params` says; None for one device.

    Raises:
      UserError: files are damaged, contradict each other or `shape`, or hold values that are not finite.
    """
    used_tokens = shape.vocab_size if used_tokens is None else used_tokens
    if not 0 < known_tokens <= used_tokens <= shape.vocab_size:
        raise ValueError(f"expected 0 < known {known_tokens} <= used {used_tokens} <= rows {shape.vocab_size}")
    tensors = _open(directory, shape)
    table = tensors[gpt2_tensors.TABLE]
    if known_tokens > table.shape[0]:
        raise UserError(
            f"{table.file}: {table.name} has {table.shape[0]} rows, but the tokenizer {known_tokens} tokens; "
            "take the tokenizer that the model was trained with"
        )
    tensor_files.verify_digests(directory)
    if shape.tie_word_embeddings and gpt2_tensors.HEAD in tensors:
        gpt2_tensors.check_tied(table, tensors[gpt2_tensors.HEAD])
    return gpt2_tensors.load(tensors, shape, known_tokens, used_tokens, mesh)


def _open(directory: Path, shape: model.GPT2) -> dict[str, tensor_files.StoredTensor]:
    if not any((directory / name).is_file() for name in (tensor_files.WEIGHTS, tensor_files.INDEX)):
        raise UserError(_conversion(str(directory)))
    return gpt2_tensors.open_model(directory, shape, read_settings(directory)["vocab_size"])


def write(
    directory: Path,
    shape: model.GPT2,
    params: model.Params,
    *,
    end_ids: Sequence[int],
    end_of_text_id: int,
    pad_id: int,
    dtype: str = "float32",
    max_shard_bytes: int = 5 * 2**30,
    generation: Mapping[str, Any] | None = None,
    add_files: Callable[[Path], None] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a directory that `transformers.GPT2LMHeadModel` loads, and whatever reads a Hugging Face GPT-2.

    All files are written beside the directory, which appears, complete, at the end; `SHA256SUMS` covers them.

    Args:
      directory: new, empty, or an earlier export.
      shape: the model's shape; padding of the vocabulary is not written.
      params: the parameters.
      end_ids: tokens that end a reply.
      end_of_text_id: token between texts.
      pad_id: token that fills rows of a batch.
      dtype: type of the stored weights: float32, bfloat16 or float16.
      max_shard_bytes: weights are cut into files up to this size.
      generation: settings of `generation_config.json`, by `transformers.GenerationConfig`'s names.
      add_files: writes more files, such as the tokenizer's, into the directory it is given.
      overwrite: whether an earlier export may be replaced.

    Raises:
      UserError: the directory is in use or cannot be written, or `dtype` cannot express a weight.
    """
    check_output(directory, overwrite=overwrite)
    # The parent of a link's target is where a rename works.
    target = directory.resolve()
    staged = files.partial_path(target)
    try:
        staged.mkdir(parents=True)
        _write_weights(staged, shape, params, dtype, max_shard_bytes)
        tokens = {"bos_token_id": end_of_text_id, "eos_token_id": end_of_text_id, "pad_token_id": pad_id}
        files.write_json(staged / SETTINGS, {**_stored_settings(shape), **tokens, "dtype": dtype})
        ends = {"eos_token_id": list(end_ids) if len(end_ids) > 1 else end_ids[0]}
        files.write_json(staged / GENERATION, {**tokens, **ends, **(generation or {})})
        if add_files is not None:
            add_files(staged)
        tensor_files.write_digests(staged)
        _replace_directory(staged, target)
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error.strerror}); name another output directory") from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def check_output(directory: Path, *, overwrite: bool) -> None:
    """Checks that `write` may make or replace a directory.

    Raises:
      UserError: something is there that would be lost.
    """
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not (directory / tensor_files.DIGESTS).is_file():
        raise UserError(f"{directory}: is there and is not an earlier export; name a new directory")
    if not overwrite:
        raise UserError(f"{directory}: holds an earlier export; replace it with --overwrite or name a new directory")


def _write_weights(directory: Path, shape: model.GPT2, params: model.Params, dtype: str, max_shard_bytes: int) -> None:
    def stored(name: str) -> str:
        return name if name == gpt2_tensors.HEAD else gpt2_tensors.PREFIX + name

    shapes = {stored(name): axes for name, axes in gpt2_tensors.stored_shapes(shape).items()}
    values = {stored(name): value for name, value in gpt2_tensors.stored_values(params, shape).items()}
    tensor_files.write_tensors(directory, shapes, lambda name: values[name](), dtype, max_shard_bytes)


def _stored_settings(shape: model.GPT2) -> dict[str, Any]:
    values = {name: getattr(shape, name) for name in (*_FIXED_FIELDS, *_FREE_FIELDS)}
    # As transformers writes it: null is the usual width. n_ctx is what tools from before n_positions read.
    n_inner = None if shape.n_inner == 4 * shape.n_embd else shape.n_inner
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **values,
        "n_inner": n_inner,
        "n_ctx": shape.n_positions,
    }


def _replace_directory(staged: Path, target: Path) -> None:
    """Puts one directory in the place of another, which is moved aside until the new one stands."""
    if not target.exists():
        staged.rename(target)
        return
    aside = staged.with_suffix(".old")
    target.rename(aside)
    try:
        staged.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    shutil.rmtree(aside)
