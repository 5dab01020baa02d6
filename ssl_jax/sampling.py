"""Drawing replies from a model: prefill, then one compiled loop with a key-value cache that ends early.

Axes: N prompts, R replies per prompt, B = N × R rows, P prompt places, M new tokens, S = P + M cache slots,
V padded vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax import model

Array: TypeAlias = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Options:
    """Static options of a compiled sampler, in `GenerationConfig`'s names and meaning.

    Attributes:
      max_new_tokens: places for the reply, its end token included.
      num_return_sequences: replies per prompt.
      do_sample: draw, or take the likeliest token.
      temperature: divides the logits.
      top_k: keep the k likeliest tokens; 0 keeps all.
      top_p: keep the likeliest tokens that together hold this probability.
      end_ids: tokens that end a reply.
      suppressed_ids: tokens that never appear in a reply.
    """

    max_new_tokens: int
    num_return_sequences: int = 1
    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    end_ids: tuple[int, ...] = ()
    suppressed_ids: tuple[int, ...] = ()


class Replies(NamedTuple):
    """Drawn replies, row r of prompt n at n × R + r.

    Attributes:
      tokens: int32 `[B, M]`; the end token and what follows are 0.
      lengths: int32 `[B]`, tokens before the end token.
      logprobs: float32 `[B]`, Σ log p of the reply's tokens and its end token under the unmodified model, nats.
      stopped: bool `[B]`; False where the reply was cut at `max_new_tokens`.
    """

    tokens: Array
    lengths: Array
    logprobs: Array
    stopped: Array


def sample(
    shape: model.GPT2,
    options: Options,
    params: model.Params,
    prompts_NP: jax.Array,
    prompt_lengths_N: jax.Array,
    keys_B: jax.Array,
) -> Replies:
    """Draws `num_return_sequences` replies to each prompt.

    Args:
      shape: the model.
      options: static options.
      params: parameters of the model.
      prompts_NP: int32, right-padded.
      prompt_lengths_N: int32; 0 marks an empty place of the batch, which costs no further steps.
      keys_B: one PRNG key per row: a reply depends on its own prompt and key, not on its neighbors in the batch.
    """
    repeats, new_tokens = options.num_return_sequences, options.max_new_tokens
    prompt_slots = prompts_NP.shape[1]
    layers = model.unstack(shape, params)
    embedding_VD = model.output_embedding(params, shape.dtype)
    allowed_V = jnp.arange(shape.padded_vocab_size) < shape.vocab_size
    drawable_V = allowed_V.at[jnp.array(options.suppressed_ids, jnp.int32)].set(False)

    hidden_NPD, cache = model.prefill(shape, layers, prompts_NP, prompt_slots + new_tokens)
    last_N = jnp.maximum(prompt_lengths_N - 1, 0)
    hidden_ND = jnp.take_along_axis(hidden_NPD, last_N[:, None, None], axis=1)[:, 0]
    hidden_BD = jnp.repeat(hidden_ND, repeats, axis=0)
    cache = jax.tree.map(lambda leaf: jnp.repeat(leaf, repeats, axis=0), cache)
    lengths_B = jnp.repeat(prompt_lengths_N, repeats)
    in_prompt_BS = jnp.arange(prompt_slots + new_tokens)[None, :] < lengths_B[:, None]

    def choose(hidden_BD, number):
        logits_BV = jnp.einsum("bd,vd->bv", hidden_BD, embedding_VD, preferred_element_type=jnp.float32)
        log_probs_BV = jax.nn.log_softmax(jnp.where(allowed_V[None], logits_BV, -jnp.inf))
        shaped_BV = jnp.where(drawable_V[None], log_probs_BV, -jnp.inf)
        if options.do_sample:
            shaped_BV = filter_logits(shaped_BV / options.temperature, options.top_k, options.top_p)
            step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, number)
            tokens_B = jax.vmap(jax.random.categorical)(step_keys, shaped_BV)
        else:
            tokens_B = jnp.argmax(shaped_BV, axis=-1)
        return tokens_B, jnp.take_along_axis(log_probs_BV, tokens_B[:, None], axis=1)[:, 0]

    def record(number, hidden_BD, replies, done_B):
        """Adds token `number` to the replies that are not done."""
        tokens_B, log_probs_B = choose(hidden_BD, number)
        ends_B = jnp.isin(tokens_B, jnp.array(options.end_ids, jnp.int32))
        written_B = jnp.where(done_B | ends_B, 0, tokens_B).astype(jnp.int32)
        replies = Replies(
            tokens=jax.lax.dynamic_update_slice_in_dim(replies.tokens, written_B[:, None], number, axis=1),
            lengths=replies.lengths + ~(done_B | ends_B),
            logprobs=replies.logprobs + jnp.where(done_B, 0.0, log_probs_B),
            stopped=replies.stopped | (ends_B & ~done_B),
        )
        return tokens_B, replies, done_B | ends_B

    def not_finished(carry):
        number, _, _, done_B, _ = carry
        return (number < new_tokens) & ~jnp.all(done_B)

    def next_token(carry):
        number, tokens_B, replies, done_B, cache = carry
        slot = prompt_slots + number - 1
        slots = jnp.arange(in_prompt_BS.shape[1])[None, :]
        visible_BS = in_prompt_BS | ((slots >= prompt_slots) & (slots <= slot))
        hidden_BD, cache = model.decode(shape, layers, tokens_B, lengths_B + number - 1, slot, visible_BS, cache)
        tokens_B, replies, done_B = record(number, hidden_BD, replies, done_B)
        return number + 1, tokens_B, replies, done_B, cache

    rows = lengths_B.shape[0]
    empty = Replies(
        tokens=jnp.zeros((rows, new_tokens), jnp.int32),
        lengths=jnp.zeros(rows, jnp.int32),
        logprobs=jnp.zeros(rows, jnp.float32),
        stopped=jnp.zeros(rows, bool),
    )
    tokens_B, replies, done_B = record(0, hidden_BD, empty, lengths_B == 0)
    carry = (jnp.int32(1), tokens_B, replies, done_B, cache)
    return jax.lax.while_loop(not_finished, next_token, carry)[2]


def filter_logits(logits_BV: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Sets the logits of filtered tokens to minus infinity: top-k first, then top-p (Holtzman et al. 2020).

    A token survives top-p if the tokens likelier than it hold less than `top_p`; equal tokens share their fate.
    """
    if 0 < top_k < logits_BV.shape[-1]:
        kth_B = jax.lax.top_k(logits_BV, top_k)[0][:, -1]
        logits_BV = jnp.where(logits_BV < kth_B[:, None], -jnp.inf, logits_BV)
    if top_p < 1.0:
        logits_BV = jnp.where(_in_nucleus(jax.nn.softmax(logits_BV), top_p), logits_BV, -jnp.inf)
    return logits_BV


def _in_nucleus(probabilities_BV: jax.Array, top_p: float) -> jax.Array:
    """Tokens whose likelier tokens hold less than `top_p`, bool `[B, V]`, without sorting the vocabulary.

    Bisects for the smallest probability that survives, over the bit patterns of non-negative floats, whose order is
    that of the floats: 31 passes of sums find it exactly.
    """
    patterns_BV = jax.lax.bitcast_convert_type(probabilities_BV, jnp.int32)

    def halve(_, bounds):
        low_B, high_B = bounds  # the threshold is in (low, high]
        middle_B = low_B + (high_B - low_B) // 2
        above_B = jnp.sum(jnp.where(patterns_BV > middle_B[:, None], probabilities_BV, 0.0), axis=-1)
        survives_B = above_B < top_p
        return jnp.where(survives_B, low_B, middle_B), jnp.where(survives_B, middle_B, high_B)

    rows = probabilities_BV.shape[0]
    one = jax.lax.bitcast_convert_type(jnp.float32(1.0), jnp.int32)
    bounds = (jnp.full(rows, -1, jnp.int32), jnp.full(rows, one, jnp.int32))
    _, threshold_B = jax.lax.fori_loop(0, 31, halve, bounds)
    return patterns_BV >= threshold_B[:, None]
