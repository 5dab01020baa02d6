"""Which dialogues are kept: `data.keep_if`, on what the source said and on what annotation found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ssl_jax.config.annotation import Annotation, Condition
from ssl_jax.config.data import Data
from ssl_jax.data.annotation.language import language_of
from ssl_jax.data.annotation.records import annotate, annotation_of, restrict
from ssl_jax.dialogue import Dialogue
from ssl_jax.errors import UserError

_NEEDS: dict[str, Annotation] = {"words": "words", "tags": "tags", "keywords": "keywords", "entities": "entities"}


def needed_annotations(conditions: Iterable[Condition]) -> frozenset[Annotation]:
    """What `annotate` must record before `keeps` can be asked."""
    groups = {condition.field.split(".")[0] for condition in conditions}
    return frozenset(_NEEDS[group] for group in groups & set(_NEEDS))


def keeps(conditions: Iterable[Condition], dialogue: Dialogue) -> bool:
    """Whether a dialogue meets all conditions. One that asks for metadata that the dialogue lacks is not met.

    Args:
      conditions: for example `Condition(field="tags.NOUN", at_least=2)`.
      dialogue: annotated with `needed_annotations(conditions)`.

    Raises:
      UserError: a bound on metadata that is no number, or `contains` on metadata that is no text or list of texts.
      ValueError: the dialogue lacks an annotation.
    """
    return all(_holds(condition, dialogue) for condition in conditions)


def select(dialogue: Dialogue, data: Data) -> Dialogue | None:
    """Does what `data.annotate`, `data.language` and `data.keep_if` ask for.

    Returns:
      The dialogue with the annotations of `data.annotate`, or None if it does not meet the conditions.

    Raises:
      UserError: as `annotate` and `keeps`.
    """
    what = needed_annotations(data.keep_if).union(data.annotate)
    annotated = annotate(dialogue, what, data.language)
    if not keeps(data.keep_if, annotated):
        return None
    if not data.annotate:
        return dialogue
    return annotated if what == set(data.annotate) else restrict(annotated, data.annotate)


def _holds(condition: Condition, dialogue: Dialogue) -> bool:
    value = _value(condition.field, dialogue)
    if value is None:
        return False
    if condition.equals is not None and not _equals(value, condition.equals):
        return False
    if condition.at_least is not None or condition.at_most is not None:
        number = _number(condition, value, dialogue)
        if condition.at_least is not None and number < condition.at_least:
            return False
        if condition.at_most is not None and number > condition.at_most:
            return False
    if not condition.contains and not condition.lacks:
        return True
    texts = _texts(condition, value, dialogue)
    if condition.contains and not any(_is_in(text, texts) for text in condition.contains):
        return False
    return not any(_is_in(text, texts) for text in condition.lacks)


def _value(field: str, dialogue: Dialogue) -> Any:
    """A number, a text, a list of texts, or whatever metadata holds; None where metadata has no such field."""
    group, _, rest = field.partition(".")
    match group:
        case "turns":
            return len(dialogue.turns)
        case "characters":
            return sum(len(turn.content) for turn in dialogue.turns)
        case "kind":
            return dialogue.kind
        case "language":
            return annotation_of(dialogue).get("language") or language_of(dialogue)
        case "words":
            return sum(len(turn["words"]) for turn in _annotated(dialogue, "turns", "words"))
        case "tags":
            return sum(turn["tags"].count(rest) for turn in _annotated(dialogue, "turns", "tags"))
        case "keywords":
            return [keyword["phrase"] for keyword in _annotated(dialogue, "keywords")]
        case "entities":
            found = _annotated(dialogue, "entities")
            return [entity["text"] for entity in found if rest in ("", entity["type"])]
        case "metadata":
            value: Any = dialogue.metadata
            for name in rest.split("."):
                value = value.get(name) if isinstance(value, Mapping) else None
            return value
        case _:
            raise ValueError(f"no rule for field {field!r}")


def _annotated(dialogue: Dialogue, key: str, part: str = "") -> Sequence[Mapping[str, Any]]:
    record = annotation_of(dialogue).get(key)
    if record is None or (part and any(part not in turn for turn in record)):
        raise ValueError(f"dialogue {dialogue.id!r} has no annotation {part or key!r}")
    return record


def _equals(value: Any, wanted: Any) -> bool:
    # Python takes True for 1.
    return value == wanted and isinstance(value, bool) == isinstance(wanted, bool)


def _number(condition: Condition, value: Any, dialogue: Dialogue) -> float:
    if isinstance(value, list):
        return len(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    raise UserError(
        f"data.keep_if: {condition.field} is {value!r:.60} in dialogue {dialogue.id!r}, which has no size; "
        "use equals or contains"
    )


def _texts(condition: Condition, value: Any, dialogue: Dialogue) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
        return texts
    raise UserError(
        f"data.keep_if: {condition.field} is {value!r:.60} in dialogue {dialogue.id!r}, which is no text; "
        "use equals, at_least or at_most"
    )


def _is_in(sought: str, texts: Iterable[str]) -> bool:
    """Whether one of the texts has the sought one as whole words, in any case."""
    sought = " ".join(sought.casefold().split())
    return any(f" {sought} " in f" {' '.join(text.casefold().split())} " for text in texts)
