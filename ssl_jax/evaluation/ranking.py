"""Does a model find the true reply among others? Three scores of the same frozen candidates."""

from __future__ import annotations

from collections.abc import Sequence

from ssl_jax import metrics, mutual_information
from ssl_jax.dialogue_model import DialogueModel
from ssl_jax.evaluation.examples import Pair

CANDIDATES = 20


def can_rank(pairs: Sequence[Pair]) -> bool:
    """Whether there are as many distinct replies as candidates."""
    return len({reply for _, reply in pairs}) >= CANDIDATES


def rank(
    model: DialogueModel, pairs: Sequence[Pair], examples: int, max_prompt_tokens: int, *, rows: int
) -> dict[str, float]:
    """Recall and mean reciprocal rank of the true reply y to a context x among 20, as `metrics.ranking` counts them.

    The scores are those of Li et al. 2016 (arXiv:1510.03055), of `ssl_jax.mutual_information`:

    - `recall_at_1_of_20`, `mrr`: log p(y | x) - log p(y), the pointwise mutual information of reply and context. The
      likelihood alone favors short, common replies.
    - `recall_at_1_of_20_forward`, `mrr_forward`: log p(y | x).
    - `recall_at_1_of_20_backward`, `mrr_backward`: log p(last turn of x | y), where the tokenizer has a token for that
      direction.

    Args:
      model: what ranks.
      pairs: one reply of each dialogue, with its context; `can_rank` holds.
      examples: how many contexts are ranked.
      max_prompt_tokens: longest context of the forward score (newest turns).
      rows: rows of a batch.
    """
    numbers, candidates_NC = metrics.frozen_candidates(
        [reply for _, reply in pairs], examples, num_candidates=CANDIDATES
    )
    shape = candidates_NC.shape
    compared = [
        (pairs[number][0], pairs[index][1]) for number, row in zip(numbers, candidates_NC, strict=True) for index in row
    ]
    forward_NC = mutual_information.forward(model, compared, max_prompt_tokens, rows).reshape(shape)
    prior_NC = mutual_information.prior(model, [reply for _, reply in compared], rows).reshape(shape)
    scores = {"": forward_NC - prior_NC, "_forward": forward_NC}
    if model.tokenizer.backward_id is not None:
        scores["_backward"] = mutual_information.backward(model, compared, rows).reshape(shape)
    return {
        f"{name}{direction}": value
        for direction, scores_NC in scores.items()
        for name, value in metrics.ranking(scores_NC).items()
    }
