"""Rounds in which a teacher answers prompts without replies: draw, score, filter, write.

A round is an artifact: `pseudo_labels/round_<n>/` appears whole or not at all, is never changed, and says where it
comes from. A run only ever adds rounds. Since a round is a function of (configuration, seed, teacher), a round that is
found complete when a run comes by again is the one it would have made.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl_jax import config, files
from ssl_jax.dialogue import Dialogue, Turn
from ssl_jax.dialogue_model import DialogueModel, Reply
from ssl_jax.errors import UserError
from ssl_jax.metrics import repetition, words

RECORDS_PER_SHARD = 4096


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """A drawn reply to a prompt."""

    prompt: Dialogue
    reply: Reply

    @property
    def score(self) -> float:
        """Mean log-probability per token, the end token counted, under the teacher (nats)."""
        return self.reply.logprob / (self.reply.tokens + 1)

    def to_dialogue(self) -> Dialogue:
        """The prompt with the reply as its last turn."""
        return Dialogue((*self.prompt.turns, Turn("assistant", self.reply.text)), id=self.prompt.id)


def choose_prompts(total: int, settings: config.PseudoLabels, round_number: int, seed: int) -> list[int]:
    """Which prompts a round answers: the next ones of an order that the seed decides, all before any comes twice."""
    order = np.random.default_rng((seed, 1)).permutation(total)
    first = round_number * settings.prompts_per_round
    return [int(order[(first + index) % total]) for index in range(min(settings.prompts_per_round, total))]


def filter_candidates(
    candidates: Sequence[Sequence[Candidate]], settings: config.PseudoLabels
) -> tuple[list[Candidate], dict[str, int]]:
    """Keeps good replies, at most one per prompt.

    Every candidate passes the tests for its end, length, repetition, copying and frequency; the best of a prompt's
    survivors goes on; of those, the best `keep_fraction` by score within every bucket of like length stay, so that
    selection by likelihood does not shorten the replies.

    Args:
      candidates: the drawn replies of every prompt.
      settings: thresholds.

    Returns:
      The accepted candidates in the order of their prompts, and how many candidates each filter removed.
    """
    removed = collections.Counter(
        {name: 0 for name in ("unfinished", "short", "repetition", "copy", "frequent", "not_best", "score")}
    )
    survivors: list[Candidate] = []
    taken: collections.Counter[str] = collections.Counter()
    for drawn in candidates:
        good = []
        for candidate in drawn:
            reason = _reject(candidate, settings)
            if reason is None and taken[candidate.reply.text.lower()] >= settings.max_duplicates:
                reason = "frequent"
            if reason is None:
                good.append(candidate)
            else:
                removed[reason] += 1
        if good:
            best = max(good, key=lambda candidate: candidate.score)
            taken[best.reply.text.lower()] += 1
            survivors.append(best)
            removed["not_best"] += len(good) - 1
    kept = _best_of_buckets(survivors, settings)
    removed["score"] = len(survivors) - len(kept)
    return kept, dict(removed)


def make_round(
    directory: Path,
    round_number: int,
    teacher: DialogueModel,
    prompts: Sequence[Dialogue],
    settings: config.PseudoLabels,
    *,
    seed: int,
    step: int,
    batch_size: int,
    between: Callable[[int], None],
) -> dict[str, Any]:
    """Draws, filters and writes one round.

    Args:
      directory: `pseudo_labels` of the work directory.
      round_number: from 0.
      teacher: who answers.
      prompts: what is answered, from `choose_prompts`.
      settings: how.
      seed: of the run.
      step: of the teacher, for the record.
      batch_size: sequences drawn at a time.
      between: called with the number of prompts answered so far; may raise to stop.

    Returns:
      The round's summary, as in its `summary.json`.
    """
    drawn = teacher.draw(
        prompts,
        settings.sampling,
        num_return_sequences=settings.num_return_sequences,
        seed=seed * 1009 + round_number + 1,
        batch_size=batch_size,
        max_prompt_tokens=settings.max_prompt_tokens,
        between=between,
    )
    candidates = [
        [Candidate(prompt, reply) for reply in replies] for prompt, replies in zip(prompts, drawn, strict=True)
    ]
    accepted, removed = filter_candidates(candidates, settings)
    lengths = [candidate.reply.tokens for candidate in accepted]
    summary = {
        "round": round_number,
        "teacher": settings.teacher,
        "teacher_step": step,
        "seed": seed,
        "prompts": len(prompts),
        "generated": sum(len(replies) for replies in drawn),
        # Contexts of which the teacher saw the newest turns only.
        "prompts_cut": sum(replies[0].dropped_tokens > 0 for replies in drawn),
        "generated_tokens": sum(reply.tokens for replies in drawn for reply in replies),
        "accepted": len(accepted),
        "accept_rate": len(accepted) / max(1, len(prompts)),
        "removed": removed,
        "mean_score": float(np.mean([c.score for c in accepted])) if accepted else None,
        "mean_reply_tokens": float(np.mean(lengths)) if lengths else None,
        "settings": settings.model_dump(mode="json"),
    }
    _write(directory / f"round_{round_number}", accepted, summary)
    return summary


def read_summary(directory: Path, round_number: int) -> dict[str, Any] | None:
    """The summary of a finished round, or None if there is none."""
    path = directory / f"round_{round_number}" / "summary.json"
    return files.read_json(path) if path.is_file() else None


def read_round(directory: Path, round_number: int) -> list[Dialogue]:
    """The pseudo-labeled dialogues of a finished round.

    Raises:
      UserError: a shard is missing or not what was written.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    folder = directory / f"round_{round_number}"
    summary = read_summary(directory, round_number)
    assert summary is not None, f"{folder} is not finished"
    dialogues = []
    for name, expected in summary["sha256"].items():
        shard = folder / name
        if not shard.is_file() or hashlib.sha256(shard.read_bytes()).hexdigest() != expected:
            raise UserError(f"{shard} is damaged; remove {folder} and run the same command to make the round again")
        reader = ArrayRecordReader(str(shard))
        rows = [json.loads(record) for record in reader.read_all()]
        reader.close()
        dialogues += [Dialogue.from_messages(row["messages"], id=row["id"]) for row in rows]
    return dialogues


def _reject(candidate: Candidate, settings: config.PseudoLabels) -> str | None:
    """Why a reply is no label, or None."""
    reply_words = words(candidate.reply.text)
    if candidate.reply.finish_reason != "stop":
        return "unfinished"
    if candidate.reply.tokens < settings.min_reply_tokens or not reply_words:
        return "short"
    if repetition([candidate.reply.text], 4) > settings.max_repetition:
        return "repetition"
    grams = _grams(reply_words)
    context = {gram for turn in candidate.prompt.turns for gram in _grams(words(turn.content))}
    if grams and sum(gram in context for gram in grams) > settings.max_copy * len(grams):
        return "copy"
    return None


def _grams(tokens: Sequence[str]) -> list[tuple[str, ...]]:
    """4-grams, or the whole of a shorter text as one."""
    if len(tokens) <= 4:
        return [tuple(tokens)] if tokens else []
    return list(zip(*(tokens[offset:] for offset in range(4)), strict=False))


def _best_of_buckets(candidates: Sequence[Candidate], settings: config.PseudoLabels) -> list[Candidate]:
    by_length = sorted(range(len(candidates)), key=lambda index: (candidates[index].reply.tokens, index))
    kept: list[int] = []
    seen = 0
    for bucket in np.array_split(np.array(by_length, int), settings.length_buckets):
        ranked = sorted(bucket.tolist(), key=lambda index: (-candidates[index].score, index))
        # Rounding what is kept so far, not every bucket, keeps the share right however small the buckets are.
        quota = round(settings.keep_fraction * (seen + len(ranked))) - round(settings.keep_fraction * seen)
        kept += ranked[:quota]
        seen += len(ranked)
    return [candidates[index] for index in sorted(kept)]


def _write(directory: Path, accepted: Sequence[Candidate], summary: dict[str, Any]) -> None:
    """Writes shards and summary beside `directory`, then moves them into place."""
    from array_record.python.array_record_module import ArrayRecordWriter

    temporary = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    hashes = {}
    for number, first in enumerate(range(0, len(accepted), RECORDS_PER_SHARD)):
        path = temporary / f"labels-{number:05d}.array_record"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for candidate in accepted[first : first + RECORDS_PER_SHARD]:
            row = {
                "id": candidate.prompt.id,
                "messages": candidate.to_dialogue().to_messages(),
                "score": candidate.score,
                "logprob": candidate.reply.logprob,
                "tokens": candidate.reply.tokens,
            }
            writer.write(json.dumps(row, ensure_ascii=False).encode())
        writer.close()
        files.sync(path)
        hashes[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    files.write_json(temporary / "summary.json", {**summary, "sha256": hashes})
    files.sync(temporary)
    temporary.rename(directory)
