"""Which of a teacher's drafts become labels: tests, scores, quotas by length. Pure functions.

A draft is a reply to a prompt, or a context that was made up for a real reply (back-translation). Both pass the same
tests; what was given to the teacher and what it drew change places.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from ssl_jax import config
from ssl_jax.dialogue import Dialogue, Turn
from ssl_jax.metrics import repetition, words

if TYPE_CHECKING:
    from ssl_jax.replies import Reply

Kind = Literal["replies", "contexts"]


class Scores(NamedTuple):
    """What a model says about a reply and its context; log-probabilities in nats, None where nobody asked.

    Attributes:
      score: `mutual_information.combine` of the others.
      forward: log p(reply | context).
      prior: log p(reply).
      backward: log p(context | reply).
    """

    score: float
    forward: float
    prior: float | None = None
    backward: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """What a teacher drew.

    Attributes:
      prompt: what it was given: a dialogue that waits for a reply or, for contexts, a real reply as its only turn.
      reply: what it drew.
      kind: whether that is the reply or its context.
      given_tokens: for contexts, tokens of the real reply.
      scores: what else the teacher says about it.
      drawn_for: id of another prompt that it was drawn for, of a shuffled candidate.
    """

    prompt: Dialogue
    reply: Reply
    kind: Kind = "replies"
    given_tokens: int = 0
    scores: Scores | None = None
    drawn_for: str | None = None

    @property
    def score(self) -> float:
        """What it is chosen by: of `scores`, or the mean log-probability per token (nats)."""
        return self.reply.mean_logprob if self.scores is None else self.scores.score

    @property
    def reply_tokens(self) -> int:
        """Tokens of the dialogue's reply, drawn or real, without its end."""
        return self.reply.tokens if self.kind == "replies" else self.given_tokens

    @property
    def pair(self) -> tuple[Dialogue, str]:
        """Context and reply."""
        if self.kind == "replies":
            return self.prompt, self.reply.text
        return Dialogue((Turn("user", self.reply.text),), id=self.prompt.id), self.prompt.turns[-1].content

    def to_dialogue(self) -> Dialogue:
        """Context and reply, one of them drawn, under the prompt's id."""
        context, reply = self.pair
        return Dialogue((*context.turns, Turn("assistant", reply)), id=self.prompt.id)


def screen(
    candidates: Sequence[Sequence[Candidate]], settings: config.PseudoLabels
) -> tuple[list[list[Candidate]], dict[str, int]]:
    """Candidates that pass the tests of themselves: end, length, repetition, copying.

    Returns:
      Those of every prompt, and how many each test removed.
    """
    removed = collections.Counter({name: 0 for name in ("unfinished", "short", "repetition", "copy")})
    passed = []
    for drawn in candidates:
        reasons = [_reject(candidate, settings) for candidate in drawn]
        passed.append([candidate for candidate, reason in zip(drawn, reasons, strict=True) if reason is None])
        removed.update(reason for reason in reasons if reason is not None)
    return passed, dict(removed)


def select(
    candidates: Sequence[Sequence[Candidate]], settings: config.PseudoLabels
) -> tuple[list[Candidate], dict[str, int]]:
    """Keeps at most one candidate per prompt, and the better part of these.

    The best of a prompt goes on, unless its text was taken too often by prompts before; of those, the best
    `keep_fraction` by score within every bucket of like length stay, so that selection by likelihood does not shorten
    the replies.

    Args:
      candidates: of every prompt, from `screen`.
      settings: thresholds.

    Returns:
      The accepted candidates in the order of their prompts, and how many candidates each filter removed.
    """
    removed = {"frequent": 0, "not_best": 0}
    survivors: list[Candidate] = []
    taken: collections.Counter[str] = collections.Counter()
    for drawn in candidates:
        good = [candidate for candidate in drawn if taken[candidate.reply.text.lower()] < settings.max_duplicates]
        removed["frequent"] += len(drawn) - len(good)
        if good:
            best = max(good, key=lambda candidate: candidate.score)
            taken[best.reply.text.lower()] += 1
            survivors.append(best)
            removed["not_best"] += len(good) - 1
    kept = _best_of_buckets(survivors, settings)
    removed["score"] = len(survivors) - len(kept)
    return kept, removed


def shuffled(candidates: Sequence[Candidate], seed: int) -> list[Candidate]:
    """Gives everything that was drawn to another prompt: a control, as right in its words and wrong in its place.

    The prompts form one random cycle, so that of two or more none keeps its own; a single one has no other.

    Args:
      candidates: one per prompt.
      seed: decides the cycle.

    Returns:
      As many, in the order of their prompts; scores go with what was drawn.
    """
    cycle = np.random.default_rng(seed).permutation(len(candidates))
    exchanged = list(candidates)
    for place, other in zip(cycle.tolist(), np.roll(cycle, 1).tolist(), strict=True):
        target, source = candidates[place], candidates[other]
        exchanged[place] = dataclasses.replace(
            source, prompt=target.prompt, given_tokens=target.given_tokens, drawn_for=source.prompt.id
        )
    return exchanged


def _reject(candidate: Candidate, settings: config.PseudoLabels) -> str | None:
    """Why a draft is no label, or None."""
    drawn = words(candidate.reply.text)
    if candidate.reply.finish_reason != "stop":
        return "unfinished"
    if candidate.reply.tokens < settings.min_reply_tokens or not drawn:
        return "short"
    if repetition([candidate.reply.text], 4) > settings.max_repetition:
        return "repetition"
    grams = _grams(drawn)
    given = {gram for turn in candidate.prompt.turns for gram in _grams(words(turn.content))}
    if grams and sum(gram in given for gram in grams) > settings.max_copy * len(grams):
        return "copy"
    return None


def _grams(tokens: Sequence[str]) -> list[tuple[str, ...]]:
    """4-grams, or the whole of a shorter text as one."""
    if len(tokens) <= 4:
        return [tuple(tokens)] if tokens else []
    return list(zip(*(tokens[offset:] for offset in range(4)), strict=False))


def _best_of_buckets(candidates: Sequence[Candidate], settings: config.PseudoLabels) -> list[Candidate]:
    by_length = sorted(range(len(candidates)), key=lambda index: (candidates[index].reply_tokens, index))
    kept: list[int] = []
    seen = 0
    for bucket in np.array_split(np.array(by_length, int), settings.length_buckets):
        ranked = sorted(bucket.tolist(), key=lambda index: (-candidates[index].score, index))
        # Rounding what is kept so far, not every bucket, keeps the share right however small the buckets are.
        quota = round(settings.keep_fraction * (seen + len(ranked))) - round(settings.keep_fraction * seen)
        kept += ranked[:quota]
        seen += len(ranked)
    return [candidates[index] for index in sorted(kept)]
