"""Do a model's replies hang together with what was said, and does that last as a dialogue goes on?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ssl_jax import config, metrics, mutual_information
from ssl_jax.dialogue_model import DialogueModel
from ssl_jax.evaluation import ranking
from ssl_jax.evaluation.examples import Pair, choose


@dataclasses.dataclass(frozen=True)
class Coherence:
    """What the context of replies is worth to a model.

    Attributes:
      context_gain: bits per byte of the replies behind another dialogue's context minus those behind their own: above
        0 where the context helps. The other dialogue's context is that of a reply of the same number, for `5+` of
        about the same. None where no number has replies of two dialogues.
      by_number: for replies number `1`, `2`, `3`, `4` and `5+` of their dialogue, where there are some: `replies`,
        `reply_bits_per_byte` and `context_gain`; where rankings are asked for and there are 20 distinct replies of
        this number, also `rankings` and the values of `ranking.rank` among replies of the same number.
    """

    context_gain: float | None
    by_number: dict[str, dict[str, Any]]


def measure(
    model: DialogueModel, pairs_by_number: Mapping[str, Sequence[Pair]], settings: config.Evaluation, *, rows: int
) -> Coherence:
    """Scores some replies of every number behind their own context and behind another's.

    The other context is that of the next chosen dialogue: a fixed exchange without fixed points, the same for every
    model. Contexts are cut to `settings.max_prompt_tokens` and to half of what the model reads at a time, so the bits
    are not those of `reply_bits_per_byte` of whole dialogues; replies that do not fit behind that are left out.

    Args:
      model: what is measured.
      pairs_by_number: replies with their contexts by `examples.by_reply_number`.
      settings: how many are scored and ranked.
      rows: rows of a batch.
    """
    # Behind a long context the model would read less of a reply than behind a short one.
    limit = min(settings.max_prompt_tokens, model.shape.n_positions // 2)
    exchanged = [
        (number, context, reply, other)
        for number, pairs in pairs_by_number.items()
        for (context, reply), (other, _) in _exchanges(pairs, settings.coherence_examples)
        if len(model.tokenizer.encode_reply(reply)) <= model.shape.n_positions - limit
    ]
    own = [(context, reply) for _, context, reply, _ in exchanged]
    others = [(other, reply) for _, _, reply, other in exchanged]
    nll_2P = -mutual_information.forward(model, [*own, *others], limit, rows).reshape(2, len(own))
    bytes_P = np.array([len(reply.encode()) for _, reply in own], np.int64)
    numbers_P = np.array([number for number, *_ in exchanged], str)
    has_other_P = np.array([other is not context for _, context, _, other in exchanged], bool)
    by_number: dict[str, dict[str, Any]] = {}
    for number in dict.fromkeys(numbers_P.tolist()):
        part_P = numbers_P == number
        by_number[number] = {
            "replies": int(part_P.sum()),
            "reply_bits_per_byte": metrics.bits_per_byte(nll_2P[0, part_P], bytes_P[part_P]),
        }
        if has_other_P[part_P].all():
            by_number[number]["context_gain"] = _gain(nll_2P[:, part_P], bytes_P[part_P])
        by_number[number] |= _rank(model, pairs_by_number[number], settings, rows)
    gain = _gain(nll_2P[:, has_other_P], bytes_P[has_other_P]) if has_other_P.any() else None
    return Coherence(gain, by_number)


def _exchanges(pairs: Sequence[Pair], count: int) -> Iterator[tuple[Pair, Pair]]:
    """Chosen pairs, each with the next one, the last with the first: with itself where there is only one."""
    chosen = [pairs[index] for index in choose(len(pairs), count)]
    return zip(chosen, [*chosen[1:], *chosen[:1]], strict=True)


def _rank(model: DialogueModel, pairs: Sequence[Pair], settings: config.Evaluation, rows: int) -> dict[str, Any]:
    """Rankings among replies of one number, if they are asked for and possible."""
    examples = min(settings.coherence_rankings, len(pairs))
    if not examples or not ranking.can_rank(pairs):
        return {}
    return {"rankings": examples, **ranking.rank(model, pairs, examples, settings.max_prompt_tokens, rows=rows)}


def _gain(nll_2P: np.ndarray, bytes_P: np.ndarray) -> float:
    """Bits per byte behind another context minus those behind the own one; `nll_2P` has them as own, other, in nats."""
    return metrics.bits_per_byte(nll_2P[1] - nll_2P[0], bytes_P)
