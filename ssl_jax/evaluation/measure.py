"""How good a model is on held-out dialogues: likelihood, ranking, coherence, and the statistics of what it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ssl_jax import config, metrics
from ssl_jax.data.tokenizer import EncodedDialogue
from ssl_jax.dialogue import Dialogue
from ssl_jax.dialogue_model import DialogueModel
from ssl_jax.evaluation import coherence, ranking, self_chat
from ssl_jax.evaluation.examples import EXAMPLE_SEED, Pair, by_reply_number, choose, reply_pairs

Progress = Callable[[str], None]

# Metrics of what the model says, the same ones of people, and counts.
_Spoken = tuple[dict[str, float], dict[str, float], dict[str, int]]


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
      `metrics`: by the names of the interface; those of the rankings by `ranking.rank`, `context_gain` by `coherence`,
      those of conversations with itself by `self_chat.statistics`. `human`: the same statistics of the true replies,
      and `distance_to_human`: the model's minus theirs. `coherence`: `Coherence.by_number`. `counts`: how many
      dialogues, replies, rankings and chats stand behind them, how many dialogues were read through a sliding window
      because they are longer than the context, and how many contexts lost their oldest turns before a reply.
      `dialogues`: per-dialogue `id`, `nll`, `bytes`, for paired comparisons between runs.
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
    texts = [text_of(index) for index in range(count)]
    pairs_by_dialogue = [reply_pairs(dialogue) for dialogue in texts]
    last = [pairs[-1] for pairs in pairs_by_dialogue if pairs]
    examples = min(settings.recall_examples, len(last))
    if examples and not ranking.can_rank(last):
        say(f"fewer than {ranking.CANDIDATES} distinct replies: no ranking")
    elif examples:
        say(f"ranking {ranking.CANDIDATES} replies to {examples} contexts")
        result["metrics"] |= ranking.rank(model, last, examples, settings.max_prompt_tokens, rows=rows)
        result["counts"]["rankings"] = examples
    pairs = [pair for pairs in pairs_by_dialogue for pair in pairs]
    if settings.coherence_examples and pairs:
        say("replies behind their own context and behind another")
        coherent = coherence.measure(model, by_reply_number(pairs_by_dialogue), settings, rows=rows)
        if coherent.context_gain is not None:
            result["metrics"]["context_gain"] = coherent.context_gain
        result["coherence"] = coherent.by_number
    spoken = []
    if settings.generated_replies and pairs:
        spoken.append(_draw_replies(model, pairs, settings, say))
    if settings.self_chats:
        spoken.append(_chat(model, texts, settings, say))
    for values, human, counts in spoken:
        result["metrics"] |= values
        result["counts"] |= counts
        result["human"] = result.get("human", {}) | human
    if "human" in result:
        result["distance_to_human"] = {name: result["metrics"][name] - value for name, value in result["human"].items()}
    return result


def _draw_replies(model: DialogueModel, pairs: Sequence[Pair], settings: config.Evaluation, say: Progress) -> _Spoken:
    """Statistics of replies that are drawn."""
    chosen = choose(len(pairs), settings.generated_replies)
    say(f"drawing {len(chosen)} replies")
    references = [pairs[index][1] for index in chosen]
    drawn = model.draw(
        [pairs[index][0] for index in chosen],
        settings.sampling,
        seed=EXAMPLE_SEED,
        max_prompt_tokens=settings.max_prompt_tokens,
    )
    values = metrics.text_statistics([replies[0].text for replies in drawn], references)
    cut = sum(replies[0].dropped_tokens > 0 for replies in drawn)
    counts = {"replies": len(chosen), "contexts_cut_before_a_reply": cut}
    return values, metrics.text_statistics(references, references), counts


def _chat(model: DialogueModel, dialogues: Sequence[Dialogue], settings: config.Evaluation, say: Progress) -> _Spoken:
    """Statistics of chats of the model with itself; people's are absent where no dialogue is long enough."""
    openings, people = self_chat.choose_openings(dialogues, settings.self_chats)
    if not openings:
        say("no dialogue begins with a user's turn: no chat with itself")
        return {}, {}, {}
    say(f"{len(openings)} chats with itself")
    chats = self_chat.hold(model, openings, settings.sampling, settings.max_prompt_tokens)
    human = self_chat.statistics(people) if people else {}
    return self_chat.statistics(chats), human, {"self_chats": len(chats)}


def _likelihood(nll_by_dialogue: np.ndarray, dialogues: Sequence[EncodedDialogue]) -> dict[str, float]:
    nll = float(nll_by_dialogue.sum())
    targets = sum(int(dialogue.loss_mask.sum()) for dialogue in dialogues)
    return {
        "reply_bits_per_byte": metrics.bits_per_byte(nll, sum(dialogue.reply_bytes for dialogue in dialogues)),
        "reply_nll": nll / max(1, targets),
    }
