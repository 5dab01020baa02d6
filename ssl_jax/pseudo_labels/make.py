"""Rounds in which a teacher labels: draw, score, filter, write.

A teacher answers prompts without replies, or makes up contexts for real replies (back-translation: Edunov et al. 2018,
arXiv:1808.09381; curated as in Li et al. 2024, arXiv:2308.06259). A run only ever adds rounds. Since a round is a
function of (configuration, seed, teacher), a round that is found complete when a run comes by again is the one it would
have made.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ssl_jax import config, mutual_information
from ssl_jax.data.directions import backward_prompt
from ssl_jax.dialogue import Dialogue, Turn
from ssl_jax.dialogue_model import DialogueModel
from ssl_jax.metrics import distinct
from ssl_jax.pseudo_labels import drawn_pieces, rounds
from ssl_jax.pseudo_labels.candidates import Candidate, Kind, Scores, screen, select, shuffled
from ssl_jax.replies import Reply


@dataclasses.dataclass(frozen=True)
class Task:
    """What a round is made of, beside its prompts.

    Attributes:
      kind: replies to prompts, or contexts of real replies.
      directory: where its rounds are kept.
      round_number: from 0.
      seed: of the run.
      step: of the teacher.
      batch_size: sequences drawn at a time, on all devices.
    """

    kind: Kind
    directory: Path
    round_number: int
    seed: int
    step: int
    batch_size: int


def choose(total: int, number: int, round_number: int, seed: int) -> list[int]:
    """Which of `total` dialogues a round asks for: the next `number` of an order that the seed decides.

    All come before any comes twice.
    """
    order = np.random.default_rng((seed, 1)).permutation(total)
    first = round_number * number
    return [int(order[(first + index) % total]) for index in range(min(number, total))]


def make_round(
    task: Task,
    teacher: DialogueModel,
    prompts: Sequence[Dialogue],
    settings: config.PseudoLabels,
    between: Callable[[int], None],
) -> dict[str, Any]:
    """Draws, filters and writes one round.

    Args:
      task: which round.
      teacher: who labels.
      prompts: what is answered or, for contexts, dialogues whose last turn is a real reply; the ids differ.
      settings: how.
      between: called with the number of prompts done so far; may raise to stop.

    Returns:
      The round's summary, as in its `summary.json`, and `timing`, which is not in the file: the same round is the same
      file.
    """
    given = [_given(task.kind, prompt) for prompt in prompts]
    partial = task.directory / f"round_{task.round_number}.partial"
    clock = _Clock()
    drawn, pieces = drawn_pieces.draw(
        partial,
        _origin(task, given, settings),
        len(given),
        drawn_pieces.piece_size(task.batch_size, settings.num_return_sequences),
        lambda piece: _draw(task, teacher, given, piece, settings, between),
    )
    drawn_now = sum(reply.tokens for piece in pieces for number in piece for reply in drawn[number])
    generation_seconds = clock.lap()
    passed, removed = screen(_candidates(task.kind, teacher, given, drawn), settings)
    if task.kind == "contexts" or settings.prior_weight or settings.backward_weight:
        passed = _scored(task, teacher, passed, settings, lambda: between(len(prompts)))
    scoring_seconds = clock.lap()
    accepted, removed_by_choice = select(passed, settings)
    if settings.shuffle_replies:
        accepted = shuffled(accepted, _draw_seed(task))
    summary = {
        "kind": task.kind,
        **_provenance(task, settings),
        "prompts": len(prompts),
        "generated": sum(len(replies) for replies in drawn),
        # Of these the teacher saw the newest part only.
        "prompts_cut": sum(replies[0].dropped_tokens > 0 for replies in drawn),
        "generated_tokens": sum(reply.tokens for replies in drawn for reply in replies),
        "accepted": len(accepted),
        "accept_rate": len(accepted) / max(1, len(prompts)),
        "removed": removed | removed_by_choice,
        "mean_score": _mean([candidate.score for candidate in accepted]),
        "mean_reply_tokens": _mean([candidate.reply_tokens for candidate in accepted]),
        "mean_drawn_tokens": _mean([candidate.reply.tokens for candidate in accepted]),
        "distinct_2": distinct([candidate.reply.text for candidate in accepted], 2),
        "settings": settings.model_dump(mode="json"),
    }
    rows = [_row(candidate) | _provenance(task, settings) for candidate in accepted]
    rounds.write(task.directory, task.round_number, rows, summary)
    if jax.process_index() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    timing = {
        "generation_seconds": generation_seconds,
        "scoring_seconds": scoring_seconds,
        "tokens_per_second": drawn_now / generation_seconds,
    }
    return summary | {"timing": timing}


def _given(kind: Kind, prompt: Dialogue) -> Dialogue:
    """What the teacher is given of a prompt: all of it, or its last turn, as a reply."""
    if kind == "replies":
        return prompt
    return Dialogue((Turn("assistant", prompt.turns[-1].content),), id=prompt.id)


def _origin(task: Task, given: Sequence[Dialogue], settings: config.PseudoLabels) -> dict[str, Any]:
    """All that decides what is drawn, as JSON values."""
    content = json.dumps([[prompt.id, prompt.to_messages()] for prompt in given]).encode()
    return {
        "kind": task.kind,
        **_provenance(task, settings),
        "prompts": hashlib.sha256(content).hexdigest(),
        "settings": settings.model_dump(mode="json"),
    }


def _provenance(task: Task, settings: config.PseudoLabels) -> dict[str, Any]:
    return {
        "round": task.round_number,
        "teacher": settings.teacher,
        "teacher_step": task.step,
        "seed": task.seed,
    }


def _draw_seed(task: Task) -> int:
    """Another one for every round of a run, whatever its kind."""
    return task.seed * 1009 + task.round_number + (1 if task.kind == "replies" else 505)


def _draw(
    task: Task,
    teacher: DialogueModel,
    given: Sequence[Dialogue],
    piece: range,
    settings: config.PseudoLabels,
    between: Callable[[int], None],
) -> list[list[Reply]]:
    """Draws for one piece of what is given."""
    chosen = [given[number] for number in piece]
    options: dict[str, Any] = {
        "num_return_sequences": settings.num_return_sequences,
        "seed": _draw_seed(task),
        "batch_size": task.batch_size,
        "numbers": piece,
        "between": lambda done: between(piece.start + done),
    }
    if task.kind == "replies":
        return teacher.draw(chosen, settings.sampling, max_prompt_tokens=settings.max_prompt_tokens, **options)
    limit = _prompt_limit(teacher, settings)
    prompts = [backward_prompt(reply.turns[-1].content, teacher.tokenizer, limit) for reply in chosen]
    return teacher.draw_encoded(prompts, settings.sampling, max_prompt_tokens=limit, **options)


def _prompt_limit(teacher: DialogueModel, settings: config.PseudoLabels) -> int:
    return min(settings.max_prompt_tokens, teacher.prompt_limit(settings.sampling))


def _candidates(
    kind: Kind, teacher: DialogueModel, given: Sequence[Dialogue], drawn: Sequence[Sequence[Reply]]
) -> list[list[Candidate]]:
    """What was drawn for every prompt."""
    given_tokens = [0] * len(given)
    if kind == "contexts":
        end = 1
        texts = [reply.turns[-1].content for reply in given]
        given_tokens = (mutual_information.count_tokens(teacher, texts) - end).tolist()
    return [
        [Candidate(prompt, reply, kind, tokens) for reply in replies]
        for prompt, tokens, replies in zip(given, given_tokens, drawn, strict=True)
    ]


def _scored(
    task: Task,
    teacher: DialogueModel,
    candidates: Sequence[Sequence[Candidate]],
    settings: config.PseudoLabels,
    between: Callable[[], None],
) -> list[list[Candidate]]:
    """The candidates of every prompt with their scores; `between` is called now and then, and may raise."""
    scored: list[list[Candidate]] = []
    for first in range(0, len(candidates), drawn_pieces.PROMPTS_PER_PIECE):
        group = candidates[first : first + drawn_pieces.PROMPTS_PER_PIECE]
        scores = iter(_scores(task, teacher, [candidate for drawn in group for candidate in drawn], settings))
        scored += [[dataclasses.replace(candidate, scores=next(scores)) for candidate in drawn] for drawn in group]
        between()
    return scored


def _scores(
    task: Task, teacher: DialogueModel, candidates: Sequence[Candidate], settings: config.PseudoLabels
) -> list[Scores]:
    """How well context and reply go together; a context was drawn by its backward score, which is not counted twice."""
    if not candidates:
        return []
    backward_weight = settings.backward_weight if task.kind == "replies" else 0.0
    pairs = [candidate.pair for candidate in candidates]
    contexts, replies = [context.turns[-1].content for context, _ in pairs], [reply for _, reply in pairs]
    rows, nothing_N = task.batch_size, np.zeros(len(pairs))
    forward_N = mutual_information.forward(teacher, pairs, _prompt_limit(teacher, settings), rows)
    prior_N = mutual_information.prior(teacher, replies, rows) if settings.prior_weight else None
    backward_N = mutual_information.backward(teacher, pairs, rows) if backward_weight else None
    score_N = mutual_information.combine(
        forward_N,
        nothing_N if prior_N is None else prior_N,
        mutual_information.count_tokens(teacher, replies),
        settings.prior_weight,
        nothing_N if backward_N is None else backward_N,
        mutual_information.count_tokens(teacher, contexts),
        backward_weight,
    )
    columns = [[None] * len(pairs) if values is None else values.tolist() for values in (prior_N, backward_N)]
    return [Scores(*values) for values in zip(score_N.tolist(), forward_N.tolist(), *columns, strict=True)]


def _row(candidate: Candidate) -> dict[str, Any]:
    """A candidate as it is stored: `logprob` and `tokens` are those of what was drawn."""
    scores = candidate.scores._asdict() if candidate.scores else {"score": candidate.score}
    row = {
        "id": candidate.prompt.id,
        "messages": candidate.to_dialogue().to_messages(),
        **scores,
        "logprob": candidate.reply.logprob,
        "tokens": candidate.reply.tokens,
        "drawn_for": candidate.drawn_for,
    }
    return {name: value for name, value in row.items() if value is not None}


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


class _Clock:
    """Seconds since the last lap."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def lap(self) -> float:
        last, self._last = self._last, time.monotonic()
        return self._last - last
