"""How good a model is on held-out dialogues: likelihood, ranking, and the statistics of what it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ssl_jax import config, metrics
from ssl_jax.data.tokenizer import EncodedDialogue
from ssl_jax.dialogue import Dialogue
from ssl_jax.dialogue_model import DialogueModel

Progress = Callable[[str], None]

CANDIDATES = 20
# Which replies are drawn for the statistics must not depend on a run's seed.
EXAMPLE_SEED = 20


def quick(
    model: DialogueModel, encoded: Sequence[EncodedDialogue], lengths: np.ndarray, count: int, *, rows: int
) -> dict[str, float]:
    """`reply_bits_per_byte` and `reply_nll` (nats per target token) of some dialogues.

    They are the first `count` that fit into four contexts: a single endless dialogue must not decide which checkpoint
    is the best.

    Args:
      model: what is evaluated.
      encoded: random access to the dialogues.
      lengths: their tokens, int `[N]`.
      count: how many are scored.
      rows: rows of a batch.
    """
    limit = 4 * model.shape.n_positions
    fitting = [index for index, length in enumerate(lengths) if length <= limit]
    dialogues = [encoded[index] for index in fitting[:count] or range(min(count, len(encoded)))]
    return _likelihood(model.score_dialogues(dialogues, rows=rows, overlap=0), dialogues)


def full(
    model: DialogueModel,
    encoded: Sequence[EncodedDialogue],
    text_of: Callable[[int], Dialogue],
    settings: config.Evaluation,
    *,
    rows: int,
    say: Progress = lambda text: None,
) -> dict[str, Any]:
    """All metrics of a set of dialogues.

    Args:
      model: what is evaluated.
      encoded: the dialogues in the model's tokens.
      text_of: the text of dialogue number i.
      settings: how much is evaluated.
      rows: rows of a batch.
      say: called with a line of progress.

    Returns:
      `metrics`: by the names of the interface. `human`: the same statistics of the true replies. `counts`: how many
      dialogues, replies and rankings stand behind them, how many dialogues were read through a sliding window because
      they are longer than the context, and how many contexts lost their oldest turns before a reply. `dialogues`:
      per-dialogue `id`, `nll`, `bytes`, for paired comparisons between runs.
    """
    count = min(len(encoded), settings.test_dialogues or len(encoded))
    dialogues = [encoded[index] for index in range(count)]
    say(f"likelihood of {count} dialogues")
    nll = model.score_dialogues(dialogues, rows=rows)
    result: dict[str, Any] = {
        "metrics": _likelihood(nll, dialogues),
        "counts": {
            "dialogues": count,
            "longer_than_context": sum(len(dialogue.tokens) > model.shape.n_positions + 1 for dialogue in dialogues),
        },
        "dialogues": {
            "id": [dialogue.id for dialogue in dialogues],
            "nll": nll.round(4).tolist(),
            "bytes": [dialogue.reply_bytes for dialogue in dialogues],
        },
    }
    pairs_by_dialogue = [reply_pairs(text_of(index)) for index in range(count)]
    last = [pairs[-1] for pairs in pairs_by_dialogue if pairs]
    examples = min(settings.recall_examples, len(last))
    if examples and len({reply for _, reply in last}) < CANDIDATES:
        say(f"fewer than {CANDIDATES} distinct replies: no ranking")
    elif examples:
        say(f"ranking {CANDIDATES} replies to {examples} contexts")
        result["metrics"] |= rank(model, last, examples, settings.max_prompt_tokens, rows=rows)
        result["counts"]["rankings"] = examples
    pairs = [pair for pairs in pairs_by_dialogue for pair in pairs]
    if settings.generated_replies and pairs:
        chosen = choose(len(pairs), settings.generated_replies)
        say(f"drawing {len(chosen)} replies")
        references = [pairs[index][1] for index in chosen]
        drawn = model.draw(
            [pairs[index][0] for index in chosen],
            settings.sampling,
            seed=EXAMPLE_SEED,
            max_prompt_tokens=settings.max_prompt_tokens,
        )
        result["metrics"] |= metrics.text_statistics([replies[0].text for replies in drawn], references)
        result["human"] = metrics.text_statistics(references, references)
        result["counts"]["replies"] = len(chosen)
        result["counts"]["contexts_cut_before_a_reply"] = sum(replies[0].dropped_tokens > 0 for replies in drawn)
    return result


def rank(
    model: DialogueModel,
    pairs: Sequence[tuple[Dialogue, str]],
    examples: int,
    max_prompt_tokens: int,
    *,
    rows: int,
) -> dict[str, float]:
    """Recall and mean reciprocal rank of the true reply among 20; `pairs` has one reply of each dialogue.

    Replies are ranked by log p(reply | context) − log p(reply), their pointwise mutual information with the context
    (Li et al. 2016): the likelihood alone favors short, common replies.
    """
    numbers, candidates = metrics.frozen_candidates([reply for _, reply in pairs], examples, num_candidates=CANDIDATES)
    tokenizer, sequences = model.tokenizer, []
    for number, row in zip(numbers, candidates, strict=True):
        prompt = tokenizer.encode_prompt(pairs[number][0], max_prompt_tokens).tokens
        sequences += [_continue(prompt, pairs[index][1], model) for index in row]
    with_context = model.score_dialogues(sequences, rows=rows).reshape(candidates.shape)
    distinct = {int(index) for row in candidates for index in row}
    alone = sorted(distinct)
    without = model.score_dialogues(
        [_continue(tokenizer.reply_start, pairs[index][1], model) for index in alone], rows=rows
    )
    prior = dict(zip(alone, without, strict=True))
    return metrics.ranking(np.array([[prior[int(index)] for index in row] for row in candidates]) - with_context)


def reply_pairs(dialogue: Dialogue) -> list[tuple[Dialogue, str]]:
    """Every assistant turn that answers a user turn, behind the dialogue before it."""
    return [
        (Dialogue(dialogue.turns[:position], id=dialogue.id), turn.content)
        for position, turn in enumerate(dialogue.turns)
        if turn.role == "assistant" and position and dialogue.turns[position - 1].role == "user"
    ]


def choose(population: int, number: int) -> list[int]:
    """The same `number` of a population for every model and run, in order."""
    rng = np.random.default_rng(EXAMPLE_SEED)
    return sorted(rng.choice(population, min(number, population), replace=False).tolist())


def _likelihood(nll_by_dialogue: np.ndarray, dialogues: Sequence[EncodedDialogue]) -> dict[str, float]:
    nll = float(nll_by_dialogue.sum())
    targets = sum(int(dialogue.loss_mask.sum()) for dialogue in dialogues)
    return {
        "reply_bits_per_byte": metrics.bits_per_byte(nll, sum(dialogue.reply_bytes for dialogue in dialogues)),
        "reply_nll": nll / max(1, targets),
    }


def _continue(prompt: np.ndarray, reply: str, model: DialogueModel) -> EncodedDialogue:
    """The reply's tokens and its end of turn behind a prompt, cut to what the context holds."""
    content = model.tokenizer.encode_reply(reply)[: model.shape.n_positions - len(prompt)]
    tokens = np.concatenate([prompt, content]).astype(np.int32)
    mask = np.concatenate([np.zeros(len(prompt), np.uint8), np.ones(len(content), np.uint8)])
    return EncodedDialogue(id="", tokens=tokens, loss_mask=mask, reply_bytes=len(reply.encode()))
