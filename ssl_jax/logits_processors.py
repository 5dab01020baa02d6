"""What changes the next token's scores before one is chosen, in Hugging Face's names, semantics and order.

Every function is pure, works on rows of different lengths and has static shapes, so that it runs inside the compiled
loop of `sampling` and `beam_search`. A row behaves as it would alone: what Hugging Face says of `input_ids` holds here
of the row's own prompt and new tokens.

Axes: B rows, S places of a sequence, V padded vocabulary (its pad has the score minus infinity and keeps it),
W windows, N token sequences of an option, K places of a prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from ssl_jax.sampling import Options

_WILDCARD, _NOTHING = -1, -2  # equal to every token; equal to none


def process(
    options: Options,
    scores_BV: jax.Array,
    sequences_BS: jax.Array | None,
    lengths_B: jax.Array,
    prompt_lengths_B: jax.Array,
) -> jax.Array:
    """Applies what `options` asks for whether a token is drawn or the likeliest is taken, in Hugging Face's order.

    Args:
      options: static options of the sampler.
      scores_BV: float32 logits, or log-probabilities in beam search.
      sequences_BS: int32, each row's prompt followed at once by its new tokens, then anything. May be None unless
        `options.reads_sequences`.
      lengths_B: int32, how many tokens of prompt and reply a row has.
      prompt_lengths_B: int32, how many of them are the prompt's.

    Raises:
      ValueError: an option that reads the sequences gets None, or as in `sequence_bias`.
    """
    new_tokens_B = lengths_B - prompt_lengths_B
    if options.reads_sequences:
        if sequences_BS is None:
            raise ValueError("the options read the sequences, but there are none")
        scores_BV = _process_sequences(options, scores_BV, sequences_BS, lengths_B)
    if options.min_new_tokens > 0:  # takes precedence over min_length
        scores_BV = min_new_tokens(scores_BV, new_tokens_B, options.end_ids, options.min_new_tokens)
    elif options.min_length > 0:
        scores_BV = min_length(scores_BV, lengths_B, options.end_ids, options.min_length)
    if options.forced_bos_token_id is not None:
        scores_BV = forced_bos(scores_BV, lengths_B, options.forced_bos_token_id)
    if options.forced_eos_token_id is not None:
        limits_B = prompt_lengths_B + new_token_limits(options, prompt_lengths_B)
        scores_BV = forced_eos(scores_BV, lengths_B, options.forced_eos_token_id, limits_B)
    if options.suppress_tokens:
        scores_BV = suppress(scores_BV, options.suppress_tokens)
    if options.begin_suppress_tokens:
        # After a prompt of one token the forced token comes first; the reply begins behind it.
        forced = options.forced_bos_token_id is not None
        begun_B = new_tokens_B - (prompt_lengths_B == 1) if forced else new_tokens_B
        scores_BV = begin_suppress(scores_BV, options.begin_suppress_tokens, begun_B)
    for processor in options.processors:
        scores_BV = processor(scores_BV, sequences_BS, lengths_B)  # pyright: ignore[reportArgumentType]
    return scores_BV


def _process_sequences(
    options: Options, scores_BV: jax.Array, sequences_BS: jax.Array, lengths_B: jax.Array
) -> jax.Array:
    """The first part of `process`: what depends on the tokens so far."""
    if options.sequence_bias:
        scores_BV = sequence_bias(scores_BV, sequences_BS, lengths_B, options.sequence_bias)
    if options.repetition_penalty != 1.0:
        scores_BV = repetition_penalty(scores_BV, sequences_BS, lengths_B, options.repetition_penalty)
    if options.no_repeat_ngram_size > 0:
        scores_BV = no_repeat_ngram(scores_BV, sequences_BS, lengths_B, options.no_repeat_ngram_size)
    if options.bad_words_ids:
        scores_BV = bad_words(scores_BV, sequences_BS, lengths_B, options.bad_words_ids, options.end_ids)
    return scores_BV


def warp(options: Options, scores_BV: jax.Array) -> jax.Array:
    """Applies what `options` asks for where a token is drawn, in Hugging Face's order; float32 `[B, V]`."""
    if options.temperature != 1.0:
        scores_BV = temperature(scores_BV, options.temperature)
    if options.top_k > 0:
        scores_BV = top_k(scores_BV, options.top_k)
    if options.top_p < 1.0:
        scores_BV = top_p(scores_BV, options.top_p)
    if options.min_p:
        scores_BV = min_p(scores_BV, options.min_p)
    if options.typical_p < 1.0:
        scores_BV = typical_p(scores_BV, options.typical_p)
    return scores_BV


def new_token_limits(options: Options, prompt_lengths_B: jax.Array) -> jax.Array:
    """Most tokens of each row's reply, int32 `[B]`: `max_new_tokens`, or what the prompt leaves of `max_length`."""
    if options.max_length is None:
        return jnp.full_like(prompt_lengths_B, options.max_new_tokens)
    return jnp.clip(options.max_length - prompt_lengths_B, 0, options.max_new_tokens)


# What has been said so far --------------------------------------------------------------------------------------------


def repetition_penalty(
    scores_BV: jax.Array, sequences_BS: jax.Array, lengths_B: jax.Array, penalty: float | jax.Array
) -> jax.Array:
    """Divides positive and multiplies negative scores of tokens in the row by `penalty` (Keskar et al. 2019)."""
    valid_BS = jnp.arange(sequences_BS.shape[1])[None] < lengths_B[:, None]
    penalized_BV = jnp.where(scores_BV < 0, scores_BV * penalty, scores_BV / penalty)
    return jnp.where(_tokens_where(valid_BS, sequences_BS, scores_BV.shape[1]), penalized_BV, scores_BV)


def no_repeat_ngram(scores_BV: jax.Array, sequences_BS: jax.Array, lengths_B: jax.Array, size: int) -> jax.Array:
    """Bans tokens that would complete an n-gram of `size` tokens that the row already holds (Paulus et al. 2017)."""
    windows = sequences_BS.shape[1] - size + 1
    if windows < 1:
        return scores_BV
    # Rows too short for a tail of `size` - 1 tokens have no complete window either.
    tail_BK = _tail(sequences_BS, lengths_B, size - 1)
    matches_BW = jnp.arange(windows)[None] + size <= lengths_B[:, None]
    for place in range(size - 1):
        matches_BW &= sequences_BS[:, place : place + windows] == tail_BK[:, place, None]
    banned_BV = _tokens_where(matches_BW, sequences_BS[:, size - 1 :], scores_BV.shape[1])
    return jnp.where(banned_BV, -jnp.inf, scores_BV)


def sequence_bias(
    scores_BV: jax.Array,
    sequences_BS: jax.Array,
    lengths_B: jax.Array,
    biases: Sequence[tuple[tuple[int, ...], float]],
) -> jax.Array:
    """Adds a bias to the last token of every sequence whose other tokens end the row.

    Args:
      scores_BV: float32.
      sequences_BS: int32.
      lengths_B: int32.
      biases: token sequences and what each adds; of equal sequences the last one counts. Their number costs the size
        of arrays, not operations.

    Raises:
      ValueError: a sequence is empty or holds an id outside the vocabulary.
    """
    vocabulary = scores_BV.shape[1]
    by_sequence = dict(biases)
    for sequence in by_sequence:
        if not sequence or not all(0 <= token < vocabulary for token in sequence):
            raise ValueError(f"sequence {sequence} is empty or has an id outside the vocabulary of {vocabulary}")
    bias_V = np.zeros(vocabulary, np.float32)
    for sequence, bias in by_sequence.items():
        if len(sequence) == 1:
            bias_V[sequence[0]] = bias
    longer = {sequence: bias for sequence, bias in by_sequence.items() if len(sequence) > 1}
    if not longer:
        return scores_BV + bias_V[None]

    places = max(map(len, longer)) - 1
    prefixes_NK = np.full((len(longer), places), _WILDCARD, np.int32)
    for row, sequence in enumerate(longer):
        prefixes_NK[row, places - len(sequence) + 1 :] = sequence[:-1]
    last_N = np.array([sequence[-1] for sequence in longer], np.int32)
    bias_N = np.array(list(longer.values()), np.float32)

    tail_B1K = _tail(sequences_BS, lengths_B, places)[:, None]
    matches_BN = jnp.all((prefixes_NK[None] == tail_B1K) | (prefixes_NK == _WILDCARD)[None], axis=-1)
    bias_BV = jnp.broadcast_to(bias_V[None], scores_BV.shape)
    return scores_BV + bias_BV.at[:, last_N].add(jnp.where(matches_BN, bias_N[None], 0.0))


def bad_words(
    scores_BV: jax.Array,
    sequences_BS: jax.Array,
    lengths_B: jax.Array,
    bad_words_ids: Sequence[tuple[int, ...]],
    end_ids: Sequence[int],
) -> jax.Array:
    """Bans the last token of every bad word whose other tokens end the row; an end token alone is no bad word.

    Raises:
      ValueError: as in `sequence_bias`.
    """
    ends = {(token,) for token in end_ids}
    biases = [(word, -np.inf) for word in bad_words_ids if word not in ends]
    return sequence_bias(scores_BV, sequences_BS, lengths_B, biases) if biases else scores_BV


# What may be said at this place ---------------------------------------------------------------------------------------


def suppress(scores_BV: jax.Array, token_ids: Sequence[int]) -> jax.Array:
    """Bans tokens; ids outside the vocabulary are ignored."""
    return jnp.where(_is_one_of(token_ids, scores_BV.shape[1])[None], -jnp.inf, scores_BV)


def begin_suppress(scores_BV: jax.Array, token_ids: Sequence[int], new_tokens_B: jax.Array) -> jax.Array:
    """Bans tokens as the first of a reply."""
    return jnp.where((new_tokens_B == 0)[:, None], suppress(scores_BV, token_ids), scores_BV)


def forced_bos(scores_BV: jax.Array, lengths_B: jax.Array, token_id: int) -> jax.Array:
    """Makes `token_id`, with score 0, the only choice after a prompt of one token."""
    return jnp.where((lengths_B == 1)[:, None], _only((token_id,), scores_BV.shape[1])[None], scores_BV)


def forced_eos(
    scores_BV: jax.Array, lengths_B: jax.Array, token_id: int | Sequence[int], limits_B: jax.Array
) -> jax.Array:
    """Makes the end tokens `token_id`, with score 0, the only choice for the last of `limits_B` tokens."""
    token_ids = (token_id,) if isinstance(token_id, int) else token_id
    return jnp.where((lengths_B == limits_B - 1)[:, None], _only(token_ids, scores_BV.shape[1])[None], scores_BV)


def min_length(scores_BV: jax.Array, lengths_B: jax.Array, end_ids: Sequence[int], min_length: int) -> jax.Array:
    """Bans the end tokens while prompt and reply together are shorter than `min_length` tokens."""
    return jnp.where((lengths_B < min_length)[:, None], suppress(scores_BV, end_ids), scores_BV)


def min_new_tokens(
    scores_BV: jax.Array, new_tokens_B: jax.Array, end_ids: Sequence[int], min_new_tokens: int
) -> jax.Array:
    """Bans the end tokens while the reply is shorter than `min_new_tokens` tokens."""
    return jnp.where((new_tokens_B < min_new_tokens)[:, None], suppress(scores_BV, end_ids), scores_BV)


# What may be drawn ----------------------------------------------------------------------------------------------------


def temperature(scores_BV: jax.Array, temperature: float | jax.Array) -> jax.Array:
    """Divides the scores: below 1 likely tokens become likelier."""
    return scores_BV / temperature


def top_k(scores_BV: jax.Array, top_k: int | jax.Array) -> jax.Array:
    """Keeps the `top_k` likeliest tokens and what ties with the last of them (Fan et al. 2018)."""
    keys_BV = _ordered(scores_BV)
    least_B1 = _smallest(keys_BV, lambda low_BV: jnp.sum(~low_BV, axis=-1) < top_k)
    return jnp.where(keys_BV < least_B1, -jnp.inf, scores_BV)


def top_p(scores_BV: jax.Array, top_p: float | jax.Array) -> jax.Array:
    """Keeps the likeliest tokens that together hold `top_p` (Holtzman et al. 2020); equal tokens share their fate."""
    probabilities_BV = jax.nn.softmax(scores_BV)
    keys_BV = _ordered(probabilities_BV)
    # The sum runs from the small end, where float32 is fine enough for a top_p close to one.
    least_B1 = _smallest(keys_BV, lambda low_BV: _sum_where(low_BV, probabilities_BV) > 1.0 - top_p)
    return jnp.where(keys_BV < least_B1, -jnp.inf, scores_BV)


def min_p(scores_BV: jax.Array, min_p: float | jax.Array) -> jax.Array:
    """Keeps tokens at least `min_p` times as likely as the likeliest one (Nguyen et al. 2024)."""
    probabilities_BV = jax.nn.softmax(scores_BV)
    least_B1 = min_p * probabilities_BV.max(axis=-1, keepdims=True)
    return jnp.where(probabilities_BV < least_B1, -jnp.inf, scores_BV)


def typical_p(scores_BV: jax.Array, typical_p: float | jax.Array) -> jax.Array:
    """Keeps the tokens closest in surprise to the entropy that together hold `typical_p` (Meister et al. 2023)."""
    log_probs_BV = jax.nn.log_softmax(scores_BV)
    probabilities_BV = jnp.exp(log_probs_BV)
    # 0 log 0 is 0 here.
    terms_BV = probabilities_BV * jnp.where(probabilities_BV > 0, log_probs_BV, 0.0)
    keys_BV = _ordered(jnp.abs(log_probs_BV - terms_BV.sum(axis=-1, keepdims=True)))
    furthest_B1 = _smallest(keys_BV, lambda low_BV: _sum_where(low_BV, probabilities_BV) >= typical_p)
    return jnp.where(keys_BV > furthest_B1, -jnp.inf, scores_BV)


# Parts ----------------------------------------------------------------------------------------------------------------


def _tail(sequences_BS: jax.Array, lengths_B: jax.Array, places: int) -> jax.Array:
    """The last `places` tokens of every row, int32 `[B, K]`; places before its first token hold `_NOTHING`."""
    indices_BK = lengths_B[:, None] - places + jnp.arange(places)[None]
    tokens_BK = jnp.take_along_axis(sequences_BS, jnp.maximum(indices_BK, 0), axis=1)
    return jnp.where(indices_BK >= 0, tokens_BK, _NOTHING)


def _tokens_where(chosen_BS: jax.Array, tokens_BS: jax.Array, vocabulary: int) -> jax.Array:
    """Which tokens stand at a chosen place of their row, bool `[B, V]`."""
    rows = tokens_BS.shape[0]
    columns_BS = jnp.where(chosen_BS, tokens_BS, vocabulary)
    empty_BV = jnp.zeros((rows, vocabulary), bool)
    return empty_BV.at[jnp.arange(rows)[:, None], columns_BS].set(True, mode="drop")


def _is_one_of(token_ids: Sequence[int], vocabulary: int) -> np.ndarray:
    """Which tokens are in `token_ids`, bool `[V]`: a constant of the compiled program."""
    return np.isin(np.arange(vocabulary), np.array(token_ids, np.int64))


def _only(token_ids: Sequence[int], vocabulary: int) -> np.ndarray:
    """Scores `[V]` that leave nothing but `token_ids`."""
    return np.where(_is_one_of(token_ids, vocabulary), np.float32(0.0), np.float32(-np.inf))


def _sum_where(chosen_BV: jax.Array, values_BV: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(chosen_BV, values_BV, 0.0), axis=-1)


def _ordered(values_BV: jax.Array) -> jax.Array:
    """Integers in the order of the values: the bits of float32, those of negative values turned round; int32."""
    bits_BV = jax.lax.bitcast_convert_type(jnp.where(values_BV == 0, 0.0, values_BV), jnp.int32)  # one zero, not two
    return jnp.where(bits_BV < 0, bits_BV ^ np.int32(0x7FFFFFFF), bits_BV)


def _smallest(keys_BV: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The smallest key of each row up to which the row has enough, else its largest key; int32 `[B, 1]`.

    Bisects over all integers instead of sorting the vocabulary: 32 passes over it find the key exactly, and take a
    tenth of the time of a sort.

    Args:
      keys_BV: int32.
      enough: whether a set of keys, bool `[B, V]`, is enough, bool `[B]`; true of every set that holds an enough one,
        and false of the empty set.
    """

    def halve(_, bounds):
        low_B1, high_B1 = bounds  # what is looked for is in (low, high]
        middle_B1 = (low_B1 & high_B1) + ((low_B1 ^ high_B1) >> 1)  # their mean without overflow
        enough_B1 = enough(keys_BV <= middle_B1)[:, None]
        return jnp.where(enough_B1, low_B1, middle_B1), jnp.where(enough_B1, middle_B1, high_B1)

    bounds = (keys_BV.min(axis=-1, keepdims=True) - 1, keys_BV.max(axis=-1, keepdims=True))
    return jax.lax.fori_loop(0, 32, halve, bounds)[1]
