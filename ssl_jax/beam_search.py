"""Beam search with Hugging Face's rules: prefill, then one compiled loop with a key-value cache that ends early.

A beam that ends joins the finished ones, scored by its log-probability over length^`length_penalty`; as many beams as
before run on. The search of a prompt is over when no running beam can do better than the worst finished one, judged as
`early_stopping` says. It does not depend on the other prompts of the batch.

Axes: N prompts, K beams per prompt, B = N × K rows, C candidates per prompt, P prompt places, M new tokens,
S = P + M cache slots, V padded vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax import logits_processors, model
from ssl_jax.sampling import Options, Replies

_WORST = -1e9  # of what does not count: below every real score, above minus infinity, as in Hugging Face's search

Tree = TypeVar("Tree")


class _Running(NamedTuple):
    """Beams that go on, best first.

    Attributes:
      tokens_NKM: int32, of the reply so far.
      logprobs_NKM: float32, of each token under the unmodified model, nats.
      scores_NK: float32, sums of the processed log-probabilities.
    """

    tokens_NKM: jax.Array
    logprobs_NKM: jax.Array
    scores_NK: jax.Array


class _Finished(NamedTuple):
    """The best replies that are complete, best first.

    Attributes:
      tokens_NKM: as of a running beam, end token included.
      logprobs_NKM: as of a running beam.
      scores_NK: float32, after the length penalty.
      lengths_NK: int32, tokens before the end token.
      stopped_NK: bool; False where the reply was cut at its limit.
      complete_NK: bool; False of a place that no reply has taken yet.
    """

    tokens_NKM: jax.Array
    logprobs_NKM: jax.Array
    scores_NK: jax.Array
    lengths_NK: jax.Array
    stopped_NK: jax.Array
    complete_NK: jax.Array


class _Search(NamedTuple):
    """State of the search; `done_N` marks prompts whose finished replies are final."""

    running: _Running
    finished: _Finished
    done_N: jax.Array


def search(
    shape: model.GPT2,
    options: Options,
    params: model.Params,
    prompts_NP: jax.Array,
    prompt_lengths_N: jax.Array,
) -> Replies:
    """Finds the `num_return_sequences` best of `num_beams` replies to each prompt, best first.

    Args:
      shape: the model.
      options: static options, without `do_sample`.
      params: parameters of the model.
      prompts_NP: int32, right-padded.
      prompt_lengths_N: int32; 0 marks an empty place of the batch, which costs no further steps.

    Returns:
      Replies of prompt n from row n × `num_return_sequences` on.

    Raises:
      ValueError: the options ask for samples, or for more replies than beams.
    """
    beams, new_tokens = options.num_beams, options.max_new_tokens
    if options.do_sample:
        raise ValueError("beam search takes the likeliest tokens; do_sample must be False")
    if options.num_return_sequences > beams:
        raise ValueError(f"num_return_sequences {options.num_return_sequences} is more than num_beams {beams}")
    prompts, prompt_slots = prompts_NP.shape
    slots = prompt_slots + new_tokens
    layers = model.unstack(shape, params)
    limits_N = logits_processors.new_token_limits(options, prompt_lengths_N)
    lengths_B = jnp.repeat(prompt_lengths_N, beams)

    def extend(number: jax.Array | int, hidden_BD: jax.Array, state: _Search) -> tuple[_Search, jax.Array]:
        """Adds token `number` to the beams; also which of the former beams each one goes on from, int32 `[N, K]`."""
        logits_BV = model.logits(shape, layers, hidden_BD)
        log_probs_BV = jax.nn.log_softmax(logits_BV)
        sequences_BS = None
        if options.reads_sequences:
            sequences_BS = _sequences(prompts_NP, prompt_lengths_N, state.running.tokens_NKM)
        scores_BV = logits_processors.process(options, log_probs_BV, sequences_BS, lengths_B + number, lengths_B)
        scores_BV = jnp.where(jnp.isneginf(logits_BV), -jnp.inf, scores_BV)
        per_beam = (prompts, beams, -1)
        return _select(options, limits_N, number, scores_BV.reshape(per_beam), log_probs_BV.reshape(per_beam), state)

    def not_finished(carry):
        return ~jnp.all(carry[1].done_N)

    def next_token(carry):
        number, state, cache = carry
        slot = prompt_slots + number - 1
        places = jnp.arange(slots)[None]
        visible_BS = (places < lengths_B[:, None]) | ((places >= prompt_slots) & (places <= slot))
        last_B = jax.lax.dynamic_index_in_dim(state.running.tokens_NKM, number - 1, axis=2, keepdims=False).reshape(-1)
        # Prompts that are done run on unheard; the table of positions may end before the others do.
        positions_B = jnp.minimum(lengths_B + number - 1, shape.n_positions - 1)
        hidden_BD, cache = model.decode(shape, layers, last_B, positions_B, slot, visible_BS, cache)
        state, origins_NK = extend(number, hidden_BD, state)
        return number + 1, state, _follow(cache, origins_NK, prompt_slots)

    hidden_NPD, cache = model.prefill(shape, layers, prompts_NP, slots)
    last_N = jnp.maximum(prompt_lengths_N - 1, 0)
    hidden_ND = jnp.take_along_axis(hidden_NPD, last_N[:, None, None], axis=1)[:, 0]
    cache = jax.tree.map(lambda leaf: jnp.repeat(leaf, beams, axis=0), cache)
    state = _nothing_yet(prompts, beams, new_tokens)._replace(done_N=limits_N * prompt_lengths_N == 0)
    # All beams of a prompt have the same cache so far, whichever they go on from.
    state, _ = extend(0, jnp.repeat(hidden_ND, beams, axis=0), state)
    _, state, _ = jax.lax.while_loop(not_finished, next_token, (jnp.int32(1), state, cache))
    return _replies(state.finished, options.num_return_sequences)


def _nothing_yet(prompts: int, beams: int, new_tokens: int) -> _Search:
    """No token, no finished reply. Beams are told apart by the first one alone being possible."""
    tokens_NKM = jnp.zeros((prompts, beams, new_tokens), jnp.int32)
    logprobs_NKM = jnp.zeros((prompts, beams, new_tokens), jnp.float32)
    worst_NK = jnp.full((prompts, beams), _WORST, jnp.float32)
    false_NK = jnp.zeros((prompts, beams), bool)
    return _Search(
        running=_Running(tokens_NKM, logprobs_NKM, worst_NK.at[:, 0].set(0.0)),
        finished=_Finished(tokens_NKM, logprobs_NKM, worst_NK, jnp.zeros_like(worst_NK, jnp.int32), false_NK, false_NK),
        done_N=jnp.zeros(prompts, bool),
    )


def _select(
    options: Options,
    limits_N: jax.Array,
    number: jax.Array | int,
    scores_NKV: jax.Array,
    log_probs_NKV: jax.Array,
    state: _Search,
) -> tuple[_Search, jax.Array]:
    """One step of the search: which beams go on and which are finished, and which beams the former come from."""
    beams = scores_NKV.shape[1]
    lengths_M = np.arange(1, options.max_new_tokens + 1, dtype=np.float64)
    divisors_M = jnp.asarray(lengths_M**options.length_penalty, jnp.float32)
    at_limit_N = number + 1 >= limits_N

    candidates, origins_NC = _candidates(options, number, scores_NKV, log_probs_NKV, state.running)
    tokens_NC = jax.lax.dynamic_index_in_dim(candidates.tokens_NKM, number, axis=2, keepdims=False)
    stopped_NC = jnp.isin(tokens_NC, jnp.array(options.end_ids, jnp.int32))
    complete_NC = stopped_NC | at_limit_N[:, None]

    running_NC = candidates.scores_NK + jnp.where(complete_NC, _WORST, 0.0)
    running_NK, chosen_NK = jax.lax.top_k(running_NC, beams)
    running = _take(candidates, chosen_NK)._replace(scores_NK=running_NK)

    # Only the best `beams` candidates may become replies; the others are there to go on from.
    counts_NC = complete_NC & (jnp.arange(complete_NC.shape[1]) < beams)[None]
    new = _Finished(
        tokens_NKM=candidates.tokens_NKM,
        logprobs_NKM=candidates.logprobs_NKM,
        scores_NK=candidates.scores_NK / divisors_M[number] + jnp.where(counts_NC, 0.0, _WORST),
        lengths_NK=number + (~stopped_NC).astype(jnp.int32),
        stopped_NK=stopped_NC,
        complete_NK=counts_NC,
    )
    finished = _merge(state.finished, new, state.done_N)

    # May the best running beam still do better than the worst finished one?
    optimistic = options.early_stopping == "never" and options.length_penalty > 0
    divisors_N = divisors_M[limits_N - 1] if optimistic else divisors_M[number]
    all_complete_N = finished.complete_NK.all(axis=1)
    worst_N = jnp.where(all_complete_N, finished.scores_NK.min(axis=1), _WORST)
    done_N = state.done_N | at_limit_N | (running_NK[:, 0] / divisors_N <= worst_N)
    if options.early_stopping is True:
        done_N |= all_complete_N
    return _Search(running, finished, done_N), jnp.take_along_axis(origins_NC, chosen_NK, axis=1)


def _candidates(
    options: Options, number: jax.Array | int, scores_NKV: jax.Array, log_probs_NKV: jax.Array, running: _Running
) -> tuple[_Running, jax.Array]:
    """The best C continuations of the running beams by one token, best first, and the beams that they continue."""
    prompts, beams, vocabulary = scores_NKV.shape
    # Every beam may end in each of the end tokens; as many as before remain to go on from.
    number_of_candidates = max(2, 1 + len(options.end_ids)) * beams
    totals_NKV = scores_NKV + running.scores_NK[:, :, None]
    totals_NC, choices_NC = jax.lax.top_k(totals_NKV.reshape(prompts, -1), number_of_candidates)
    log_probs_NC = jnp.take_along_axis(log_probs_NKV.reshape(prompts, -1), choices_NC, axis=1)
    origins_NC, tokens_NC = choices_NC // vocabulary, choices_NC % vocabulary
    former = _take(running, origins_NC)

    def with_last(values_NCM, last_NC):
        return jax.lax.dynamic_update_slice_in_dim(values_NCM, last_NC[:, :, None], number, axis=2)

    tokens_NCM = with_last(former.tokens_NKM, tokens_NC)
    return _Running(tokens_NCM, with_last(former.logprobs_NKM, log_probs_NC), totals_NC), origins_NC


def _merge(finished: _Finished, new: _Finished, done_N: jax.Array) -> _Finished:
    """The best K of the finished replies and the new ones; of prompts that are done, the finished ones as they are."""
    merged = jax.tree.map(lambda old, added: jnp.concatenate([old, added], axis=1), finished, new)
    beams = finished.scores_NK.shape[1]
    _, chosen_NK = jax.lax.top_k(merged.scores_NK, beams)
    # The places of the finished ones come first in `merged`.
    return _take(merged, jnp.where(done_N[:, None], jnp.arange(beams)[None], chosen_NK))


def _take(beams: Tree, indices_NC: jax.Array) -> Tree:
    """Of every prompt the beams with these indices."""

    def take(leaf):
        return jnp.take_along_axis(leaf, jnp.expand_dims(indices_NC, range(2, leaf.ndim)), axis=1)

    return jax.tree.map(take, beams)


def _follow(cache: model.Cache, origins_NK: jax.Array, prompt_slots: int) -> model.Cache:
    """The cache in the order of the new beams. The prompt's slots are the same in all beams and stay where they are."""
    prompts, beams = origins_NK.shape
    rows_B = (jnp.arange(prompts)[:, None] * beams + origins_NK).reshape(-1)
    return jax.tree.map(lambda leaf: leaf.at[:, :, prompt_slots:].set(leaf[:, :, prompt_slots:][rows_B]), cache)


def _sequences(prompts_NP: jax.Array, prompt_lengths_N: jax.Array, tokens_NKM: jax.Array) -> jax.Array:
    """Each beam's prompt followed at once by its reply, int32 `[B, S]`."""
    prompts, beams, new_tokens = tokens_NKM.shape
    slots = prompts_NP.shape[1] + new_tokens
    places_NS = jnp.arange(slots)[None] - prompt_lengths_N[:, None]  # in the reply
    reply_NKS = jnp.take_along_axis(tokens_NKM, jnp.clip(places_NS, 0, new_tokens - 1)[:, None], axis=2)
    prompts_NS = jnp.pad(prompts_NP, ((0, 0), (0, new_tokens)))
    return jnp.where(places_NS[:, None] < 0, prompts_NS[:, None], reply_NKS).reshape(prompts * beams, slots)


def _replies(finished: _Finished, number: int) -> Replies:
    """The `number` best finished replies of every prompt."""
    best = jax.tree.map(lambda leaf: leaf[:, :number].reshape(-1, *leaf.shape[2:]), finished)
    before_end_BM = jnp.arange(best.tokens_NKM.shape[1])[None] < best.lengths_NK[:, None]
    return Replies(
        tokens=jnp.where(before_end_BM, best.tokens_NKM, 0),
        lengths=best.lengths_NK,
        logprobs=best.logprobs_NKM,
        stopped=best.stopped_NK,
    )
