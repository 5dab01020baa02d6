"""The ChatterBot corpus (Gunther Cox and contributors; PyPI `chatterbot-corpus`): short conversations in 28 languages.

A YAML file holds the conversations of one language and topic, each a list of utterances of two speakers in turn: the
first is the user, the second the assistant. Many conversations share their opening and differ in the reply, so the
opening is their `group`: with `data.split_by: group` no opening is both learned from and tested on. The corpus has no
split of its own.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from ssl_jax.config import Source
from ssl_jax.data.formats import Rejected
from ssl_jax.data.packaged import Part, ResolvedSource, user_turns, without_roles
from ssl_jax.dialogue import Dialogue, Role, Turn
from ssl_jax.errors import UserError

UNLABELED_REGIMES = ("logs", "prompts")

ALL_LANGUAGES = "all"

# Decides which conversations a label budget takes first; the same for every run, so that budgets are nested.
_ORDER_SALT = "ssl_jax chatterbot label budget"
# The parser written in C, where PyYAML has it, takes an eighth of the time.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def data_folder() -> Path:
    """Where the package keeps a folder for each language.

    Raises:
      UserError: the package is not installed.
    """
    try:
        from chatterbot_corpus import corpus
    except ModuleNotFoundError:
        raise UserError("dataset chatterbot needs a package: pip install 'ssl_jax[demo]'") from None
    return Path(corpus.DATA_DIRECTORY)


def data_files(source: Source) -> list[Path]:
    """The files of the languages that `source` names, in the order of its languages.

    Raises:
      UserError: the package is not installed, or no or an unknown language is named.
    """
    folder = data_folder()
    known = sorted(entry.name for entry in folder.iterdir() if any(entry.glob("*.yml")))
    if not source.language:
        raise UserError(f"dataset chatterbot needs language: {ALL_LANGUAGES}, or some of {', '.join(known)}")
    for language in source.language:
        if language not in (*known, ALL_LANGUAGES):
            near = difflib.get_close_matches(language, known, n=1)
            fix = f"did you mean {near[0]}?" if near else f"use {ALL_LANGUAGES}, or some of {', '.join(known)}"
            raise UserError(f"dataset chatterbot has no language {language!r}; {fix}")
    languages = known if ALL_LANGUAGES in source.language else list(dict.fromkeys(source.language))
    return [file for language in languages for file in sorted((folder / language).glob("*.yml"))]


def dialogues(
    sources: Sequence[ResolvedSource],
) -> Iterator[tuple[ResolvedSource, Part | None, Dialogue | Rejected]]:
    """What the sources yield; see `Packaged.dialogues`.

    A labeled source with `max_dialogues` takes the first conversations of a fixed pseudo-random order that keeps
    equal openings together; a smaller budget's dialogues are part of a larger one's. An unlabeled source yields what no
    labeled source took: `logs`, complete and without roles, or `prompts`, every turn of the user alone.

    Raises:
      UserError: a file of the package cannot be read.
    """
    conversations = functools.cache(_conversations)
    reported: set[Path] = set()
    taken: set[str] = set()
    for resolved in sorted(sources, key=lambda resolved: resolved.expected != "labeled"):
        source, rows = resolved.source, []
        for file in resolved.files:
            found, rejected = conversations(file)
            rows += [dialogue for dialogue in found if dialogue.id not in taken]
            if file not in reported:
                reported.add(file)
                yield from ((resolved, None, row) for row in rejected)
        chosen = sorted(rows, key=_budget_order)[: source.max_dialogues]
        for dialogue in chosen:
            match source.regime:
                case "logs":
                    yield resolved, None, without_roles(dialogue)
                case "prompts":
                    yield from ((resolved, None, prompt) for prompt in user_turns(dialogue))
                case _:
                    yield resolved, None, _ending_in_a_reply(dialogue)
        if resolved.expected == "labeled":
            taken |= {dialogue.id for dialogue in chosen}


def _conversations(file: Path) -> tuple[list[Dialogue], list[Rejected]]:
    """The conversations of a file, and what in it is none; both by their number in the file, from 1."""
    try:
        content = yaml.load(file.read_bytes(), Loader=_LOADER)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not YAML: {' '.join(str(error).split())}; install chatterbot-corpus again") from None
    if not isinstance(content, dict) or not isinstance(content.get("conversations"), list):
        raise UserError(f"{file}: no list of conversations; install chatterbot-corpus again")
    language, topic = file.parent.name, file.stem
    dialogues, rejected = [], []
    for number, utterances in enumerate(content["conversations"], 1):
        if problem := _problem(utterances):
            rejected.append(Rejected(str(file), number, *problem))
            continue
        roles: tuple[Role, Role] = ("user", "assistant")
        turns = tuple(Turn(roles[position % 2], text) for position, text in enumerate(utterances))
        metadata = {"language": language, "category": topic, "group": f"{language}: {utterances[0].strip()}"}
        dialogues.append(Dialogue(turns, id=f"{language}/{topic}/{number}", metadata=metadata))
    return dialogues, rejected


def _problem(utterances: Any) -> tuple[str, str] | None:
    """Reason and detail of why this is no conversation."""
    if not isinstance(utterances, list):
        return "conversation is not a list", f"found {type(utterances).__name__}"
    for position, text in enumerate(utterances):
        if not isinstance(text, str):
            return "content is not text", f"utterance {position} has {type(text).__name__}"
        if not text.strip():
            return "empty turn", f"utterance {position}"
    return None if len(utterances) > 1 else ("no reply", f"{len(utterances)} utterances")


def _ending_in_a_reply(dialogue: Dialogue) -> Dialogue:
    return dialogue if dialogue.kind == "labeled" else dataclasses.replace(dialogue, turns=dialogue.turns[:-1])


def _budget_order(dialogue: Dialogue) -> tuple[bytes, str]:
    return hashlib.sha256(f"{_ORDER_SALT}/{dialogue.metadata['group']}".encode()).digest(), dialogue.id
