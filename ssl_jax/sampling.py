"""Drawing replies from a model: prefill, then one compiled loop with a key-value cache that ends early.

`sample` draws whole replies. `start` and `advance` are its two halves, for callers that look at the replies along the
way: to show them as they grow, or to end them at a text. `refill` puts new prompts into rows that are done, so that no
row waits for the longest reply (continuous batching, Yu et al. 2022). All ways give the same replies.

The cache is a ring: step t writes slot t mod S of every row, one slice update in place, and the text of every row ends
at the newest slot, whenever its prompt was read. A row has at most P tokens of prompt and writes fewer than M new ones,
so nothing that it still sees is written over.

Axes: N prompts, R replies per prompt, B = N × R rows, P prompt places, M new tokens, S = P + M cache slots,
V padded vocabulary, H heads, K head width.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax import logits_processors, model

Array: TypeAlias = jax.Array | np.ndarray

# With so many of the likeliest tokens, finding them and drawing among them takes less time than one pass over all.
_FEW = 128

Processor: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""A custom processor: `(scores_BV, sequences_BS, lengths_B) -> scores_BV`, jittable and deterministic.

`sequences_BS` holds each row's prompt followed at once by its new tokens, the first `lengths_B` of them valid. Scores
beyond the model's real vocabulary are minus infinity and stay so.
"""


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
      min_p: keep tokens at least this many times as likely as the likeliest one; 0 keeps all.
      typical_p: keep the tokens of most typical surprise that together hold this probability.
      repetition_penalty: above 1, tokens of the prompt and of the reply so far become less likely.
      no_repeat_ngram_size: no n-gram of this size occurs twice in prompt and reply; 0 allows all.
      bad_words_ids: token sequences that never appear in a reply.
      sequence_bias: token sequences, and what is added to the logit of the token that completes one.
      suppress_tokens: tokens that never appear in a reply.
      begin_suppress_tokens: tokens that a reply does not begin with.
      forced_bos_token_id: first token of the reply to a prompt of one token.
      forced_eos_token_id: last token of a reply that reaches its row's limit.
      min_length: no end token before prompt and reply together have this many tokens.
      min_new_tokens: no end token before the reply has this many tokens.
      max_length: longest prompt and reply together, of every row; None: only `max_new_tokens` limits it. (Where both
        are given, Hugging Face ignores `max_length`; callers that want this leave it out.)
      end_ids: tokens that end a reply.
      num_beams: beams of a beam search, 1 here.
      length_penalty: of a beam search.
      early_stopping: of a beam search.
      processors: custom processors, applied in this order after all of the above but before temperature, top_k, top_p,
        min_p and typical_p.
    """

    max_new_tokens: int
    num_return_sequences: int = 1
    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    min_length: int = 0
    min_new_tokens: int = 0
    max_length: int | None = None
    end_ids: tuple[int, ...] = ()
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    processors: tuple[Processor, ...] = ()

    @property
    def reads_sequences(self) -> bool:
        """Whether a token's score depends on more of the text than its length, beyond the model's own reading."""
        return bool(
            self.repetition_penalty != 1.0
            or self.no_repeat_ngram_size
            or self.bad_words_ids
            or self.sequence_bias
            or self.processors
        )


class Replies(NamedTuple):
    """Drawn replies, row r of prompt n at n × R + r.

    Attributes:
      tokens: int32 `[B, M]`; the end token and what follows are 0.
      lengths: int32 `[B]`, tokens before the end token.
      logprobs: float32 `[B, M]`, log p of every token and of the end token under the unmodified model (nats); 0 after.
      stopped: bool `[B]`; False where the reply was cut at its limit.
    """

    tokens: Array
    lengths: Array
    logprobs: Array
    stopped: Array


class State(NamedTuple):
    """Replies under way: arrays only, so that a caller's jit may donate them and the cache is updated in place.

    Attributes:
      step: int32 scalar, steps of decoding so far; the next one writes cache slot `step` mod S.
      number_B: int32, tokens drawn so far, the end token counted.
      done_B: bool; rows that take no more tokens. All of them: the replies are complete. A caller that has read enough
        of a row sets it here, with `_replace`, and the row costs no more steps.
      last_B: int32, the tokens drawn last.
      tokens_BM: as in `Replies`, so far.
      logprobs_BM: as in `Replies`, so far.
      stopped_B: as in `Replies`, so far.
      prompt_lengths_B: int32.
      keys_B: PRNG keys.
      cache: keys and values; a row's text but its last token lies in the slots before the next one.
      sequences_BS: int32, each row's prompt followed at once by its new tokens; None where no option reads it.
    """

    step: jax.Array
    number_B: jax.Array
    done_B: jax.Array
    last_B: jax.Array
    tokens_BM: jax.Array
    logprobs_BM: jax.Array
    stopped_B: jax.Array
    prompt_lengths_B: jax.Array
    keys_B: jax.Array
    cache: model.Cache
    sequences_BS: jax.Array | None


def sample(
    shape: model.GPT2,
    options: Options,
    params: model.Params,
    prompts_NP: jax.Array,
    prompt_lengths_N: jax.Array,
    keys_B: jax.Array,
) -> Replies:
    """Draws `num_return_sequences` replies to each prompt; arguments as of `start`."""
    state = start(shape, options, params, prompts_NP, prompt_lengths_N, keys_B)
    return replies(advance(shape, options, params, state, options.max_new_tokens))


def start(
    shape: model.GPT2,
    options: Options,
    params: model.Params,
    prompts_NP: jax.Array,
    prompt_lengths_N: jax.Array,
    keys_B: jax.Array,
) -> State:
    """Reads every prompt once and draws the first token of each of its replies.

    Args:
      shape: the model.
      options: static options.
      params: parameters of the model.
      prompts_NP: int32, right-padded.
      prompt_lengths_N: int32; 0 marks an empty place of the batch, which costs no further steps.
      keys_B: one PRNG key per row: a reply depends on its own prompt and key, not on its neighbors in the batch.

    Raises:
      ValueError: the options ask for beams.
    """
    slots = prompts_NP.shape[1] + options.max_new_tokens
    return _read(shape, options, params, prompts_NP, prompt_lengths_N, keys_B, slots, jnp.int32(0))


def empty(shape: model.GPT2, options: Options, params: model.Params, rows: int, places: int) -> State:
    """A state without prompts, all rows done, for `refill` to put prompts of up to `places` tokens into."""
    prompts = rows // options.num_return_sequences
    keys_B = jax.random.split(jax.random.key(0), rows)
    prompts_NP, lengths_N = jnp.zeros((prompts, places), jnp.int32), jnp.zeros(prompts, jnp.int32)
    abstract = jax.eval_shape(functools.partial(start, shape, options), params, prompts_NP, lengths_N, keys_B)
    # There are no zeros of the type of keys.
    zeros: State = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract._replace(keys_B=abstract.step))
    return zeros._replace(keys_B=keys_B, done_B=jnp.ones(rows, bool))


def refill(
    shape: model.GPT2,
    options: Options,
    params: model.Params,
    state: State,
    rows_B: jax.Array,
    prompts_NP: jax.Array,
    prompt_lengths_N: jax.Array,
    keys_B: jax.Array,
) -> tuple[State, Replies]:
    """Puts new prompts into rows of a state and draws the first token of each of their replies.

    A row replies as it would in a batch of its own. B is here the number of rows that are filled, N × R; the state has
    more.

    Args:
      shape: the model.
      options: those that the state was started with.
      params: parameters of the model.
      state: from `start`, `empty`, `advance` or `refill`.
      rows_B: int32, where each reply goes, no number twice; those beyond the state's rows are dropped.
      prompts_NP: int32, right-padded; no longer than the prompts that the state was made for.
      prompt_lengths_N: int32.
      keys_B: as of `start`.

    Returns:
      The state, and what had been drawn in the rows before.

    Raises:
      ValueError: the ring has no room for prompts of P places.
    """
    slots = _slots(state)
    if prompts_NP.shape[1] + options.max_new_tokens > slots:
        raise ValueError(f"{prompts_NP.shape[1]} places of a prompt do not fit into {slots} slots")
    before = jax.tree.map(lambda leaf: jnp.take(leaf, rows_B, axis=0, mode="clip"), replies(state))
    fresh = _read(shape, options, params, prompts_NP, prompt_lengths_N, keys_B, slots, state.step)

    def put(old, new):
        return new if old.ndim == 0 else old.at[rows_B].set(new, mode="drop", unique_indices=True)

    return jax.tree.map(put, state, fresh), before


def advance(
    shape: model.GPT2,
    options: Options,
    params: model.Params,
    state: State,
    steps: jax.Array | int,
    enough: jax.Array | int | None = None,
) -> State:
    """Draws at most `steps` more tokens per row, fewer where enough rows are done before.

    Args:
      shape: the model.
      options: those that the state was started with.
      params: parameters of the model. Stacked ones are unstacked once per call; who calls often does that before
        (`model.unstack`, with a shape whose `scan_layers` is False).
      state: from `start`, `refill` or the last `advance`.
      steps: int32 scalar; may be traced, so that one compiled function serves all.
      enough: int32 scalar, may be traced; how many rows have to be done; all by default.
    """
    layers = model.unstack(shape, params)
    end, slots = state.step + steps, _slots(state)
    enough = state.done_B.shape[0] if enough is None else enough

    def not_finished(state):
        return (state.step < end) & (jnp.sum(state.done_B) < enough)

    def step(state):
        slot = state.step % slots
        # Rows that are done read on unheard; the table of positions may end before the longest row does.
        positions_B = jnp.minimum(state.prompt_lengths_B + state.number_B - 1, shape.n_positions - 1)
        ages_S = (slot - jnp.arange(slots)) % slots
        visible_BS = ages_S[None, :] <= positions_B[:, None]
        hidden_BD, cache = model.decode(shape, layers, state.last_B, positions_B, slot, visible_BS, state.cache)
        return _append(shape, options, layers, hidden_BD, state._replace(step=state.step + 1, cache=cache))

    # XLA's products drop the axis of a single row, and a carry that has it would be copied before every update.
    shapes = jax.tree.map(jnp.shape, state.cache)
    if state.done_B.shape[0] == 1:
        state = state._replace(cache=jax.tree.map(lambda leaf: leaf[0], state.cache))
    state = jax.lax.while_loop(not_finished, step, state)
    return state._replace(cache=jax.tree.map(jnp.reshape, state.cache, shapes))


def replies(state: State) -> Replies:
    """What has been drawn so far; of rows that are not done the beginning."""
    lengths_B = state.number_B - state.stopped_B
    return Replies(state.tokens_BM, lengths_B, state.logprobs_BM, state.stopped_B)


def _read(
    shape: model.GPT2,
    options: Options,
    params: model.Params,
    prompts_NP: jax.Array,
    prompt_lengths_N: jax.Array,
    keys_B: jax.Array,
    slots: int,
    step: jax.Array,
) -> State:
    """Reads prompts into rows of their own, whose text ends before slot `step` mod `slots`; draws the first tokens."""
    if options.num_beams > 1:
        raise ValueError(f"num_beams {options.num_beams}: sampling has no beams; see beam_search.search")
    places, repeats, new_tokens = prompts_NP.shape[1], options.num_return_sequences, options.max_new_tokens
    layers = model.unstack(shape, params)
    hidden_NPD, cache = model.prefill(shape, layers, prompts_NP, places)
    last_N = jnp.maximum(prompt_lengths_N - 1, 0)
    hidden_ND = jnp.take_along_axis(hidden_NPD, last_N[:, None, None], axis=1)[:, 0]
    lengths_B = jnp.repeat(prompt_lengths_N, repeats)
    # Which token of its prompt each slot holds; beyond the prompt's end it does not matter, since nobody sees it.
    held_BS = (jnp.arange(slots)[None] - step + lengths_B[:, None]) % slots

    def turn(leaf_NHPK):
        leaf_BHPK = jnp.repeat(leaf_NHPK, repeats, axis=0)
        return jnp.take_along_axis(leaf_BHPK, held_BS[:, None, :, None], axis=2, mode="clip")

    sequences_BS = None
    if options.reads_sequences:
        sequences_BS = jnp.repeat(jnp.pad(prompts_NP, ((0, 0), (0, slots - places))), repeats, axis=0)
    rows = lengths_B.shape[0]
    state = State(
        step=step,
        number_B=jnp.zeros(rows, jnp.int32),
        done_B=(lengths_B == 0) | (logits_processors.new_token_limits(options, lengths_B) == 0),
        last_B=jnp.zeros(rows, jnp.int32),
        tokens_BM=jnp.zeros((rows, new_tokens), jnp.int32),
        logprobs_BM=jnp.zeros((rows, new_tokens), jnp.float32),
        stopped_B=jnp.zeros(rows, bool),
        prompt_lengths_B=lengths_B,
        keys_B=keys_B,
        cache=jax.tree.map(turn, cache),
        sequences_BS=sequences_BS,
    )
    return _append(shape, options, layers, jnp.repeat(hidden_ND, repeats, axis=0), state)


def _slots(state: State) -> int:
    return jax.tree.leaves(state.cache)[0].shape[-2]


def _append(shape: model.GPT2, options: Options, layers, hidden_BD, state: State) -> State:
    """Draws the next token of the rows that are not done, from the hidden states of what stands before it."""
    grows_B = ~state.done_B
    tokens_B, log_probs_B = _choose(shape, options, layers, hidden_BD, state)
    ends_B = jnp.isin(tokens_B, jnp.array(options.end_ids, jnp.int32))
    number_B = state.number_B + grows_B
    is_over_B = ends_B | (number_B >= logits_processors.new_token_limits(options, state.prompt_lengths_B))
    is_next_BM = (jnp.arange(options.max_new_tokens)[None] == state.number_B[:, None]) & grows_B[:, None]
    written_B = jnp.where(ends_B, 0, tokens_B)
    sequences_BS = state.sequences_BS
    if sequences_BS is not None:
        text_lengths_B = state.prompt_lengths_B + state.number_B
        is_next_BS = jnp.arange(sequences_BS.shape[1])[None] == text_lengths_B[:, None]
        sequences_BS = jnp.where(is_next_BS, tokens_B[:, None], sequences_BS)
    return state._replace(
        number_B=number_B,
        done_B=state.done_B | is_over_B,
        last_B=tokens_B,
        tokens_BM=jnp.where(is_next_BM, written_B[:, None], state.tokens_BM),
        logprobs_BM=jnp.where(is_next_BM, log_probs_B[:, None], state.logprobs_BM),
        stopped_B=state.stopped_B | (ends_B & grows_B),
        sequences_BS=sequences_BS,
    )


def _choose(shape: model.GPT2, options: Options, layers, hidden_BD, state: State) -> tuple[jax.Array, jax.Array]:
    """The next token of every row, int32 `[B]`, and its log-probability under the unmodified model, float32 `[B]`."""
    logits_BV = model.logits(shape, layers, hidden_BD)
    prompt_lengths_B = state.prompt_lengths_B
    scores_BV = logits_processors.process(
        options, logits_BV, state.sequences_BS, prompt_lengths_B + state.number_B, prompt_lengths_B
    )
    scores_BV = jnp.where(jnp.isneginf(logits_BV), -jnp.inf, scores_BV)
    if options.do_sample:
        keys_B = jax.vmap(jax.random.fold_in)(state.keys_B, state.number_B)
        tokens_B = _draw(options, scores_BV, keys_B)
    else:
        tokens_B = jnp.argmax(scores_BV, axis=-1)
    chosen_B = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=1)[:, 0]
    return tokens_B.astype(jnp.int32), chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)


def _draw(options: Options, scores_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
    """A token of every row, int32 `[B]`, drawn from what `options` leaves of the scores."""
    if 0 < options.top_k <= min(_FEW, scores_BV.shape[1]):
        # What is left is among the likeliest k: the other filters and the draw need not read the whole vocabulary.
        scores_BK, tokens_BK = jax.lax.top_k(scores_BV, options.top_k)
        drawn_B = jax.vmap(jax.random.categorical)(keys_B, logits_processors.warp(options, scores_BK))
        return jnp.take_along_axis(tokens_BK, drawn_B[:, None], axis=1)[:, 0]
    return _categorical(logits_processors.warp(options, scores_BV), keys_B)


def _categorical(scores_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
    """A token of every row, int32 `[B]`, by the softmax of its scores.

    First a block of the vocabulary is drawn and then a token in it, so that 2 √V random numbers do for a row instead
    of V, which would take longer than everything else that is done with the scores.
    """
    rows, vocabulary = scores_BV.shape
    width = math.isqrt(vocabulary - 1) + 1
    padding = -vocabulary % width
    padded_BV = jnp.pad(scores_BV, ((0, 0), (0, padding)), constant_values=-jnp.inf)
    scores_BNW = padded_BV.reshape(rows, -1, width)
    keys_2B = jax.vmap(jax.random.split, out_axes=1)(keys_B)
    draw = jax.vmap(jax.random.categorical)
    block_B = draw(keys_2B[0], jax.nn.logsumexp(scores_BNW, axis=-1))
    scores_BW = jnp.take_along_axis(scores_BNW, block_B[:, None, None], axis=1)[:, 0]
    return block_B * width + draw(keys_2B[1], scores_BW)
