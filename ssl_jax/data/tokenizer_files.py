"""A tokenizer's files: what is in a Hugging Face directory or on the hub, and what other tools need to read ours."""

from __future__ import annotations

import dataclasses
import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models

from ssl_jax import files
from ssl_jax.errors import UserError
from ssl_jax.shown import shortened

# Our own key in tokenizer_config.json; other tools ignore it.
_TEMPLATE_KEY = "dialogue_template"
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Arguments of transformers' classes that may be paths, or stand for such arguments.
_NOT_SETTINGS = {"vocab", "merges", "init_inputs", "tokenizer_object"}
# Each set makes a tokenizer; the first file names it in a message.
_FILE_SETS = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
    ("tokenizer.model",),
    ("spiece.model",),
)


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """What the files of a tokenizer say.

    Attributes:
      backend: text to ids.
      named_tokens: spelling of the tokens that have a part (`eos_token`, …).
      chat_template: its Jinja chat template.
      template: the dialogue template that we recorded, where the files are ours.
    """

    backend: tokenizers.Tokenizer
    named_tokens: Mapping[str, str]
    chat_template: str | None = None
    template: str | None = None


def read(directory_or_name: str | Path) -> TokenizerFiles:
    """Reads a directory, or a name on the hub.

    Raises:
      UserError: there is no tokenizer, a file of it is missing or damaged, or it has no fast version.
    """
    directory = Path(directory_or_name)
    if not directory.is_dir():
        return _read_with_transformers(
            str(directory_or_name), missing="not a tokenizer directory and not on the hub (or the hub is out of reach)"
        )
    settings = _read_json(directory / "tokenizer_config.json")
    if settings.get(_TEMPLATE_KEY):
        return _read_own(directory, settings)
    _check_files(directory, settings)
    if not settings and not (directory / "config.json").is_file() and (directory / "tokenizer.json").is_file():
        # Nothing says what kind of tokenizer it is, so the file speaks for itself.
        return TokenizerFiles(_read_backend(directory / "tokenizer.json"), {})
    return _read_with_transformers(str(directory), missing="its tokenizer files cannot be read")


def write(directory: str | Path, tokenizer: TokenizerFiles, *, control_tokens: list[str]) -> None:
    """Writes a directory that `read` and `transformers.AutoTokenizer` understand.

    Args:
      directory: where; made if missing.
      tokenizer: what.
      control_tokens: spelling of control tokens besides the named ones.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokenizer.named_tokens,
        "additional_special_tokens": control_tokens,
        "clean_up_tokenization_spaces": False,
        _TEMPLATE_KEY: tokenizer.template,
    }
    files.write_text(directory / "tokenizer_config.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    files.write_text(directory / "tokenizer.json", tokenizer.backend.to_str(pretty=True))
    files.write_text(directory / "chat_template.jinja", tokenizer.chat_template or "")
    if isinstance(tokenizer.backend.model, models.BPE | models.WordPiece):
        try:
            tokenizer.backend.model.save(str(directory))
        except Exception as error:  # the Rust library raises nothing more specific
            raise OSError(errno.EIO, str(error), str(directory)) from error


def _read_own(directory: Path, settings: Mapping[str, Any]) -> TokenizerFiles:
    for name in ("tokenizer.json", "chat_template.jinja"):
        if not (directory / name).is_file():
            raise UserError(f"{directory}: {name} is missing; copy the whole tokenizer directory")
    named = {name: settings[name] for name in _NAMED_TOKENS if settings.get(name)}
    for name, value in (*named.items(), (_TEMPLATE_KEY, settings[_TEMPLATE_KEY])):
        if not isinstance(value, str):
            where = directory / "tokenizer_config.json"
            raise UserError(f"{where}: {name} is a text, got {shortened(value)}; copy the tokenizer again")
    template = directory / "chat_template.jinja"
    try:
        chat_template = template.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{template}: cannot be read: {error}; copy the tokenizer again") from None
    return TokenizerFiles(_read_backend(directory / "tokenizer.json"), named, chat_template, settings[_TEMPLATE_KEY])


def _read_backend(file: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust library raises nothing more specific
        raise UserError(f"{file}: not a tokenizer file: {error}") from None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        settings = files.read_json(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{file}: not a JSON object")
    return settings


def _check_files(directory: Path, settings: Mapping[str, Any]) -> None:
    """Refuses a directory that lacks files; transformers would make an empty tokenizer of it."""
    present = [[name for name in names if (directory / name).is_file()] for names in _FILE_SETS]
    if any(len(found) == len(names) for found, names in zip(present, _FILE_SETS, strict=True)):
        return
    for found, names in zip(present, _FILE_SETS, strict=True):
        if found:
            missing = next(name for name in names if name not in found)
            raise UserError(f"{directory}: {missing} is missing; {found[0]} alone is no tokenizer")
    declared = settings.get("tokenizer_class") or _read_json(directory / "config.json").get("tokenizer_class")
    if declared and str(declared).startswith("Bert"):
        raise UserError(f"{directory}: vocab.txt is missing, which a {declared} needs")
    raise UserError(
        f"{directory} holds no tokenizer: there is no tokenizer.json, no vocab.json with merges.txt, and no vocab.txt; "
        "copy them there, or name another directory in tokenizer.name_or_path"
    )


def _refuse_paths(name: str) -> None:
    """Refuses settings by which transformers would read a vocabulary from wherever they say.

    Args:
      name: of a directory, or of files of the hub that have been downloaded.

    Raises:
      UserError: there are some.
    """
    from transformers.utils.hub import cached_file

    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        found = cached_file(name, file, local_files_only=True, _raise_exceptions_for_missing_entries=False)
        settings = _read_json(Path(found)) if found else {}
        for key in sorted(_NOT_SETTINGS.intersection(settings)):
            raise UserError(f"{found}: {key} may name any file, and is no setting of a tokenizer; remove it")


def _read_with_transformers(name: str, *, missing: str) -> TokenizerFiles:
    import transformers

    if Path(name).is_dir():
        _refuse_paths(name)
    try:
        loaded = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # damaged files end in any exception: of Rust, of JSON, of a missing key
        detail = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"tokenizer {name}: {missing} ({detail})") from None
    if not Path(name).is_dir():  # what came from the hub is here now
        _refuse_paths(name)
    if not loaded.is_fast:
        raise UserError(f"tokenizer {name}: has no fast version (tokenizer.json)")
    if loaded.backend_tokenizer.get_vocab_size() <= len(loaded.all_special_tokens):
        raise UserError(f"tokenizer {name}: holds no vocabulary; its tokenizer files are missing")
    chat_template = loaded.chat_template
    if isinstance(chat_template, dict):
        chat_template = chat_template.get("default")
    return TokenizerFiles(
        # A copy: the backend stays transformers' otherwise, and is changed by its calls.
        tokenizers.Tokenizer.from_str(loaded.backend_tokenizer.to_str()),
        {name: token for name, token in loaded.special_tokens_map.items() if name in _NAMED_TOKENS},
        chat_template,
        loaded.init_kwargs.get(_TEMPLATE_KEY),
    )
