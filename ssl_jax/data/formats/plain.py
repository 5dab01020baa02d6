"""Formats of plain lines: raw text, logs of `speaker<TAB>text`, and ParlAI's `key:value` fields."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ssl_jax.config import Source
from ssl_jax.data.formats.lines import MAX_LINE_BYTES, Line, Span, blocks, filled_lines, joined
from ssl_jax.data.formats.rows import BadRow, Row, attempt, merge_consecutive, raw_turns, role_of
from ssl_jax.dialogue import Role, Turn

_PARLAI_KEYS = ("text", "labels", "eval_labels", "label_candidates", "episode_done", "reward", "id", "image")
_PARLAI_FIELD = re.compile(r"(?:^|\t)(\w+):")
# How ParlAI writes what would end a field: https://parl.ai/docs/tutorial_task.html
_PARLAI_ESCAPES = (("\\n", "\n"), ("\\t", "\t"), ("__PIPE__", "|"))


def read_text(file: Path, source: Source, span: Span | None = None) -> Iterator[Row | BadRow]:
    """Dialogues of raw text, a blank line between two."""
    for block in blocks(file, span):
        if isinstance(block, BadRow):
            yield block
        else:
            yield attempt(block[0].number, lambda block=block: _text(block, source))


def read_log(file: Path, source: Source, span: Span | None = None) -> Iterator[Row | BadRow]:
    """Dialogues of `speaker<TAB>text` lines, a blank line between two.

    The one who speaks first is the user, unless `source.assistant` says who the assistant is.
    """
    for block in blocks(file, span):
        if isinstance(block, BadRow):
            yield block
        else:
            yield attempt(block[0].number, lambda block=block: _log(block, source))


def _text(block: Sequence[Line], source: Source) -> Row:
    return Row(block[0].number, raw_turns(joined(block), source.split_lines))


def _log(block: Sequence[Line], source: Source) -> Row:
    utterances = []
    for line in block:
        speaker, tab, text = line.text.partition("\t")
        if not tab or not speaker.strip():
            raise BadRow("no speaker<TAB>text", f"a line of {len(line.text)} characters", line.number)
        utterances.append((speaker.strip(), text))
    speakers = list(dict.fromkeys(speaker for speaker, _ in utterances))
    if source.assistant is None and len(speakers) > 2:
        raise BadRow("more than two speakers", f"{len(speakers)}; set the source's assistant")
    assistant = source.assistant or (speakers[1] if len(speakers) == 2 else "")
    merged = merge_consecutive((role_of(speaker, assistant), text) for speaker, text in utterances)
    return Row(block[0].number, tuple(Turn(role, text) for role, text in merged), is_log=True)


def read_parlai(file: Path, source: Source) -> Iterator[Row | BadRow]:
    r"""Episodes of ParlAI's text format: `text:…<TAB>labels:…<TAB>episode_done:True`.

    `text` is what the user says and the first of `labels` (or `eval_labels`) the reply; further labels, candidates and
    the other fields become metadata. A line that is no example is rejected and ends its episode: what follows would
    answer something that is missing.
    """
    episode: list[tuple[int, Mapping[str, str]]] = []
    size = 0
    for line in filled_lines(file):
        example = attempt(line.number, lambda line=line: _parlai_fields(line))
        is_bad = isinstance(example, BadRow)
        if not is_bad:
            episode.append((line.number, example))
            size += len(line.content)
        if episode and (is_bad or size > MAX_LINE_BYTES or example.get("episode_done") == "True"):
            yield (
                _parlai_row(episode)
                if size <= MAX_LINE_BYTES
                else BadRow(
                    "dialogue too long",
                    f"an episode of {size} bytes, more than {MAX_LINE_BYTES >> 20} MiB",
                    episode[0][0],
                )
            )
            episode, size = [], 0
        if is_bad:
            yield example
    if episode:
        yield _parlai_row(episode)


def _parlai_fields(line: Line) -> Mapping[str, str]:
    text = line.text
    found = [match for match in _PARLAI_FIELD.finditer(text) if match[1] in _PARLAI_KEYS]
    ends = [*(match.start() for match in found), len(text)][1:]
    fields = {match[1]: text[match.end() : end] for match, end in zip(found, ends, strict=True)}
    if not found or found[0].start() > 0 or not (fields.get("text") or _labels(fields)):
        raise BadRow("no text:… and labels:…", f"a line of {len(text)} characters")
    return fields


def _parlai_row(episode: Sequence[tuple[int, Mapping[str, str]]]) -> Row:
    turns: list[Turn] = []
    others: dict[str, list[object]] = {"labels": [], "label_candidates": [], "reward": [], "image": []}
    for _, fields in episode:
        labels = _labels(fields)
        parts: tuple[tuple[Role, str], ...] = (
            ("user", fields.get("text", "")),
            ("assistant", labels[0] if labels else ""),
        )
        turns += [Turn(role, _parlai_text(text)) for role, text in parts if text]
        if len(labels) > 1:
            others["labels"].append([_parlai_text(label) for label in labels])
        if candidates := fields.get("label_candidates"):
            others["label_candidates"].append([_parlai_text(candidate) for candidate in candidates.split("|")])
        for key in ("reward", "image"):
            if key in fields:
                others[key].append(fields[key])
    own_id = episode[0][1].get("id")
    metadata = {key: values for key, values in others.items() if values}
    return Row(episode[0][0], tuple(turns), metadata=metadata | ({"task": own_id} if own_id else {}))


def _labels(fields: Mapping[str, str]) -> list[str]:
    joined_labels = fields.get("labels") or fields.get("eval_labels") or ""
    return [label for label in joined_labels.split("|") if label]


def _parlai_text(text: str) -> str:
    for escape, meaning in _PARLAI_ESCAPES:
        text = text.replace(escape, meaning)
    return text


def is_parlai(text: str) -> bool:
    """Whether a line is surely a ParlAI example: known fields alone, more than one."""
    found = [match[1] for match in _PARLAI_FIELD.finditer(text)]
    return len(found) > 1 and found[0] in ("text", "labels", "eval_labels", "id") and set(found) <= set(_PARLAI_KEYS)
