"""What a context and a reply say about each other: log-probabilities of pairs of them under one model.

Likely replies are often dull. The mutual information of a reply with its context tells those that answer this context
from those that answer any (Li et al. 2016, arXiv:1510.03055). It needs a model of replies, the same with nothing before
the reply, and for its second form one that reads backwards (`data.directions`), which scored the replies of DialoGPT
(Zhang et al. 2020, arXiv:1911.00536). All three are the same network here.

Axes: N pairs of a context, which ends in a turn of the user, and a reply.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ssl_jax.data.directions import backward_id, backward_prompt
from ssl_jax.data.tokenizer import DialogueTokenizer, EncodedDialogue
from ssl_jax.dialogue import Dialogue

if TYPE_CHECKING:
    from ssl_jax import model as gpt2

Pairs = Sequence[tuple[Dialogue, str]]


class Scorer(Protocol):
    """What is asked of a model; `DialogueModel` is one."""

    @property
    def tokenizer(self) -> DialogueTokenizer:
        """Text to ids."""
        ...

    @property
    def shape(self) -> gpt2.GPT2:
        """The model's shape: it reads `shape.n_positions` tokens at a time."""
        ...

    def score_dialogues(self, dialogues: Sequence[EncodedDialogue], *, rows: int) -> np.ndarray:
        """Negative log-likelihood of every dialogue's targets, float64 `[len(dialogues)]`, nats."""
        ...


def forward(model: Scorer, pairs: Pairs, max_prompt_tokens: int, rows: int = 16) -> np.ndarray:
    """The log p(reply | context), the end of the reply included, float64 `[N]`, nats.

    Args:
      model: what predicts.
      pairs: contexts and replies.
      max_prompt_tokens: longest context; of a longer one the newest turns are read.
      rows: rows of a batch.

    Raises:
      UserError: `max_prompt_tokens` leaves no room for a context.
    """
    prompts: dict[int, np.ndarray] = {}  # by identity: the replies to one context come one after the other
    for context, _ in pairs:
        if id(context) not in prompts:
            prompts[id(context)] = model.tokenizer.encode_prompt(context, max_prompt_tokens).tokens
    return -model.score_dialogues([_continue(model, prompts[id(context)], text) for context, text in pairs], rows=rows)


def prior(model: Scorer, replies: Sequence[str], rows: int = 16) -> np.ndarray:
    """The log p(reply) where nothing was said before, its end included, float64 `[N]`, nats.

    Equal replies are scored once.

    Args:
      model: what predicts.
      replies: their texts.
      rows: rows of a batch.
    """
    distinct = list(dict.fromkeys(replies))
    nll = model.score_dialogues([_continue(model, model.tokenizer.reply_start, text) for text in distinct], rows=rows)
    by_reply = dict(zip(distinct, nll.tolist(), strict=True))
    return -np.array([by_reply[reply] for reply in replies], np.float64)


def backward(model: Scorer, pairs: Pairs, rows: int = 16) -> np.ndarray:
    """The log p(last turn of the context | reply), the end of that turn included, float64 `[N]`, nats.

    The model reads backwards; a reply may take half of what it reads at a time.

    Args:
      model: what predicts, trained with `train.backward_fraction`.
      pairs: contexts and replies.
      rows: rows of a batch.

    Raises:
      UserError: the tokenizer has no direction tokens.
    """
    limit = model.shape.n_positions // 2
    prompts = {
        text: backward_prompt(text, model.tokenizer, limit).tokens for text in dict.fromkeys(r for _, r in pairs)
    }
    sequences = [_continue(model, prompts[text], context.turns[-1].content) for context, text in pairs]
    return -model.score_dialogues(sequences, rows=rows)


def count_tokens(model: Scorer, texts: Sequence[str]) -> np.ndarray:
    """Tokens of turns with these texts, their end included, int64 `[N]`."""
    return np.array([len(model.tokenizer.encode_reply(text)) for text in texts], np.int64)


def combine(
    forward_N: np.ndarray,
    prior_N: np.ndarray,
    reply_tokens_N: np.ndarray,
    prior_weight: float,
    backward_N: np.ndarray,
    context_tokens_N: np.ndarray,
    backward_weight: float,
) -> np.ndarray:
    """The score of replies y to what was said, x, float64 `[N]`, nats per token.

    (log p(y | x) − w log p(y)) / |y| + v log p(x | y) / |x|. The weight w is the λ of Li et al.'s MMI-antiLM, and v is
    that of their MMI-bidi; they add a bonus for length to sums, here long and short replies compare by their means.

    Args:
      forward_N: log p(y | x).
      prior_N: log p(y).
      reply_tokens_N: |y|, at least 1.
      prior_weight: w.
      backward_N: log p(x | y).
      context_tokens_N: |x|, at least 1.
      backward_weight: v.
    """
    forward_per_token_N = (forward_N - prior_weight * prior_N) / reply_tokens_N
    return forward_per_token_N + backward_weight * backward_N / context_tokens_N


def score(
    model: Scorer,
    pairs: Pairs,
    *,
    prior_weight: float,
    backward_weight: float,
    max_prompt_tokens: int,
    rows: int = 16,
) -> np.ndarray:
    """How well each reply answers its context and no other, float64 `[N]`; see `combine`.

    What weighs nothing is not computed.

    Raises:
      UserError: `backward_weight` is above 0, but the tokenizer has no direction tokens.
    """
    check(model.tokenizer, backward_weight)
    replies = [text for _, text in pairs]
    nothing_N = np.zeros(len(pairs))
    return combine(
        forward(model, pairs, max_prompt_tokens, rows),
        prior(model, replies, rows) if prior_weight else nothing_N,
        count_tokens(model, replies),
        prior_weight,
        backward(model, pairs, rows) if backward_weight else nothing_N,
        count_tokens(model, [context.turns[-1].content for context, _ in pairs]),
        backward_weight,
    )


def check(tokenizer: DialogueTokenizer, backward_weight: float) -> None:
    """Makes sure that what weighs something can be computed.

    Raises:
      UserError: `backward_weight` is above 0, but the tokenizer has no direction tokens.
    """
    if backward_weight:
        backward_id(tokenizer)


def _continue(model: Scorer, prompt: np.ndarray, text: str) -> EncodedDialogue:
    """A turn's tokens and its end behind a prompt, cut to what the model reads at a time."""
    content = model.tokenizer.encode_reply(text)[: model.shape.n_positions - len(prompt)]
    tokens = np.concatenate([prompt, content]).astype(np.int32)
    mask = np.concatenate([np.zeros(len(prompt), np.uint8), np.ones(len(content), np.uint8)])
    return EncodedDialogue(id="", tokens=tokens, loss_mask=mask, reply_bytes=len(text.encode()))
