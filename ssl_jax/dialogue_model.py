"""A model one can talk to: parameters and a tokenizer, behind text in and text out."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from ssl_jax import beam_search, config, model, sampling, sharding, step
from ssl_jax.conversation import Messages, as_labeled, as_prompt
from ssl_jax.data.packing import assemble, cut_windows, pack, stack
from ssl_jax.data.tokenizer import DialogueTokenizer, EncodedDialogue, Prompt
from ssl_jax.dialogue import Dialogue
from ssl_jax.errors import UserError
from ssl_jax.replies import Reply, ReplyReader, sampler_options

SMALLEST_PROMPT_BUCKET = 16
# Tokens drawn between two looks at the text, where strings may end a reply.
STOP_CHUNK = 8

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class DialogueModel:
    """Draws replies and scores dialogues.

    Attributes:
      shape: the model's shape.
      params: its parameters, possibly sharded.
      tokenizer: text to ids.
      mesh: where `params` lie; None for one device.
    """

    shape: model.GPT2
    params: model.Params
    tokenizer: DialogueTokenizer
    mesh: jax.sharding.Mesh | None = None

    def generate_response(
        self,
        prompt: str | Messages,
        *,
        num_return_sequences: int = 1,
        seed: int = 0,
        reply_prefix: str = "",
        logits_processor: Sequence[sampling.Processor] = (),
        **options: Any,
    ) -> list[str]:
        """Replies to a prompt or to a conversation that ends in the user's turn.

        A conversation that is too long for the context loses its oldest turns, which is logged as a warning.

        Args:
          prompt: what the user says, or messages `[{"role": …, "content": …}, …]`.
          num_return_sequences: replies to draw.
          seed: decides the draw.
          reply_prefix: how every reply begins.
          logits_processor: functions `(scores_BV, sequences_BS, lengths_B) -> scores_BV` on the scores of the next
            token, applied inside the compiled loop; `sequences_BS` holds prompt and reply so far, `lengths_B` tokens
            of it.
          **options: fields of `config.Sampling`: max_new_tokens, do_sample, temperature, top_k, top_p, ….

        Raises:
          UserError: an unknown option or a value out of bounds.
        """
        settings = _sampling(options, "generate_response")
        (replies,) = self.draw(
            [as_prompt(prompt)],
            settings,
            num_return_sequences=num_return_sequences,
            seed=seed,
            reply_prefix=reply_prefix,
            logits_processor=logits_processor,
        )
        _warn_of_dropped(replies[0])
        return [reply.text for reply in replies]

    def stream_response(
        self, prompt: str | Messages, *, seed: int = 0, reply_prefix: str = "", **options: Any
    ) -> Iterator[str]:
        """The reply that `generate_response` gives, in pieces, each as soon as its tokens are drawn.

        Raises:
          UserError: as `generate_response`; or beams, of which none is final before the end.
        """
        settings = _sampling(options, "stream_response")
        if settings.num_beams > 1:
            raise UserError("stream_response: num_beams: a beam search has nothing to show before its end; use 1")
        limit = self.prompt_limit(settings)
        (encoded,) = self._encode_prompts([as_prompt(prompt)], settings, limit, reply_prefix)
        _warn_of_dropped(encoded)
        options_ = self._options([encoded], settings, 1, ())
        bucket = _bucket(len(encoded.tokens), limit)
        growing = self._grow(options_, self._batch([encoded], [0], bucket), seed, 1)
        rows = ((drawn.tokens[0, : drawn.lengths[0]], bool(done[0])) for drawn, done in growing)
        return self._reader(settings, reply_prefix).stream(rows)

    def score(self, messages: Messages) -> dict[str, float]:
        """How well the model predicts the assistant's turns of a conversation.

        A conversation longer than the context is read through a window that slides over it (`score_dialogues`).

        Returns:
          `nll` (nats, end-of-turn tokens included) and `bits_per_byte` (of the replies' UTF-8 text).

        Raises:
          UserError: malformed messages, or no assistant turn at the end.
        """
        encoded = self.tokenizer.encode(as_labeled(messages))
        nll = float(self.score_dialogues([encoded], rows=1)[0])
        return {"nll": nll, "bits_per_byte": nll / math.log(2) / max(1, encoded.reply_bytes)}

    def draw(
        self,
        prompts: Sequence[Dialogue],
        settings: config.Sampling,
        *,
        num_return_sequences: int = 1,
        seed: int = 0,
        batch_size: int = 64,
        max_prompt_tokens: int | None = None,
        reply_prefix: str = "",
        logits_processor: Sequence[sampling.Processor] = (),
        between: Callable[[int], None] | None = None,
    ) -> list[list[Reply]]:
        """Draws replies to many prompts, batch by batch.

        Prompt lengths and batch sizes are rounded up to powers of two, so that few shapes are compiled. A reply
        depends on its prompt, its number and the seed, not on the batch it is drawn in.

        Args:
          prompts: dialogues that end in a turn of the user.
          settings: how to draw.
          num_return_sequences: replies per prompt; of beams, the best ones, the best first.
          seed: decides the draw.
          batch_size: sequences drawn at a time.
          max_prompt_tokens: longest context; the newest turns are kept, and `Reply` says how much was dropped.
          reply_prefix: how every reply begins.
          logits_processor: as in `generate_response`.
          between: called with the number of prompts done after every batch.

        Raises:
          UserError: the model's context or `max_length` leaves no room for a prompt or for a reply to it.
        """
        limit = self.prompt_limit(settings)
        limit = min(limit, max_prompt_tokens or limit)
        encoded = self._encode_prompts(prompts, settings, limit, reply_prefix)
        options = self._options(encoded, settings, num_return_sequences, logits_processor)
        reader = self._reader(settings, reply_prefix)
        replies: list[list[Reply]] = [[] for _ in prompts]
        done = 0
        rows_per_prompt = max(num_return_sequences, settings.num_beams)
        for bucket, members in _buckets(encoded, max(1, batch_size // rows_per_prompt), limit):
            batch = self._batch([encoded[i] for i in members], members, bucket)
            drawn = self._draw_batch(options, batch, seed, reader)
            for place, index in enumerate(members):
                first = place * num_return_sequences
                replies[index] = [
                    reader.read(
                        drawn.tokens[row, : drawn.lengths[row]],
                        drawn.logprobs[row],
                        bool(drawn.stopped[row]),
                        encoded[index],
                    )
                    for row in range(first, first + num_return_sequences)
                ]
            done += len(members)
            if between is not None:
                between(done)
        return replies

    def prompt_limit(self, settings: config.Sampling) -> int:
        """Tokens of the longest context that leaves room for a reply; of a longer one the newest tokens are read.

        Raises:
          UserError: there is no room for a prompt.
        """
        context = self.shape.n_positions
        if settings.bounded_by_max_length:
            limit, setting = min(context, settings.new_tokens) - 1, f"max_length {settings.max_length}"
            way_out = f"at least {SMALLEST_PROMPT_BUCKET + 1}"
        else:
            limit, setting = context - settings.new_tokens, f"max_new_tokens {settings.new_tokens}"
            way_out = f"at most {context - SMALLEST_PROMPT_BUCKET}"
        if limit < SMALLEST_PROMPT_BUCKET:
            raise UserError(f"{setting} leaves no room for a prompt in a context of {context} tokens; {way_out}")
        return limit

    def score_dialogues(
        self, dialogues: Sequence[EncodedDialogue], *, rows: int = 16, overlap: int | None = None
    ) -> np.ndarray:
        """Negative log-likelihood of every dialogue's targets, float64 `[len(dialogues)]`, nats.

        A dialogue longer than the context is scored whole, by a window that slides over it: every target counts once,
        in the window that predicts it, which begins with the system turn (of a long one, the beginning) and repeats
        `overlap` tokens of what came before it. So every target behind the first window has at least `overlap` tokens
        of context; more of them cost more windows. Text that the tokenizer cannot express costs 8 bits for each byte.

        Args:
          dialogues: encoded, with their loss masks.
          rows: rows of a batch; all batches have this size, so that one shape is compiled.
          overlap: tokens that a window repeats of the one before as context, a quarter of the context by default.
        """
        length = self.shape.n_positions
        windows = cut_windows(
            np.array([len(dialogue.tokens) for dialogue in dialogues], np.int64),
            length,
            overlap=length // 4 if overlap is None else overlap,
            prefix_lengths=np.array([dialogue.prefix_length for dialogue in dialogues], np.int64),
        )
        packed = pack(windows.sizes, length)
        totals = math.log(256) * np.array([dialogue.unknown_bytes for dialogue in dialogues], np.float64)

        def window(index: int) -> tuple[np.ndarray, np.ndarray]:
            dialogue = dialogues[windows.record[index]]
            return windows.piece(index, dialogue.tokens, dialogue.loss_mask)

        for first in range(0, len(packed), rows):
            group = packed[first : first + rows]
            batch = stack([assemble([window(index) for index in row], length) for row in group], rows, length)
            nll = np.asarray(_score(self.shape, self.params, self._place(batch)), np.float64) * batch["loss_weights"]
            for row, members in enumerate(group):
                for segment, index in enumerate(members, start=1):
                    in_segment = batch["segment_ids"][row] == segment
                    totals[windows.record[index]] += nll[row][in_segment].sum()
        return totals

    def _encode_prompts(
        self, prompts: Sequence[Dialogue], settings: config.Sampling, limit: int, reply_prefix: str
    ) -> list[Prompt]:
        encoded = [self.tokenizer.encode_prompt(prompt, limit, reply_prefix) for prompt in prompts]
        if settings.bounded_by_max_length and limit == self.prompt_limit(settings):
            for prompt in encoded:
                if prompt.dropped_tokens:
                    raise UserError(
                        f"max_length {settings.max_length} counts the prompt too, and one has "
                        f"{len(prompt.tokens) + prompt.dropped_tokens} tokens; raise it (the context has "
                        f"{self.shape.n_positions}), or give max_new_tokens instead"
                    )
        return encoded

    def _options(
        self,
        prompts: Sequence[Prompt],
        settings: config.Sampling,
        num_return_sequences: int,
        processors: Sequence[sampling.Processor],
    ) -> sampling.Options:
        max_length, new_tokens = self.shape.n_positions, settings.new_tokens
        if settings.bounded_by_max_length:
            max_length = min(max_length, settings.new_tokens)
            shortest = min((len(prompt.tokens) for prompt in prompts), default=0)
            # In steps, so that prompts of like length share a compiled program.
            new_tokens = -(-(max_length - shortest) // SMALLEST_PROMPT_BUCKET) * SMALLEST_PROMPT_BUCKET
        return sampler_options(
            settings,
            self.tokenizer,
            self.shape.vocab_size,
            new_tokens=new_tokens,
            max_length=max_length,
            num_return_sequences=num_return_sequences,
            processors=processors,
        )

    def _reader(self, settings: config.Sampling, reply_prefix: str) -> ReplyReader:
        return ReplyReader(self.tokenizer, settings.stop, tuple(self.tokenizer.encode_text(reply_prefix).tolist()))

    def _batch(self, prompts: Sequence[Prompt], numbers: Sequence[int], bucket: int) -> dict[str, np.ndarray]:
        """Prompts and their numbers as arrays, padded to a power of two of places."""
        places = _power_of_two(max(len(prompts), 1 if self.mesh is None else sharding.row_shards(self.mesh)))
        tokens = np.zeros((places, bucket), np.int32)
        lengths = np.zeros(places, np.int32)
        ids = np.zeros(places, np.int32)
        for place, (prompt, number) in enumerate(zip(prompts, numbers, strict=True)):
            tokens[place, : len(prompt.tokens)] = prompt.tokens
            lengths[place] = len(prompt.tokens)
            ids[place] = number
        return {"tokens": tokens, "lengths": lengths, "ids": ids}

    def _draw_batch(
        self, options: sampling.Options, batch: dict[str, np.ndarray], seed: int, reader: ReplyReader
    ) -> sampling.Replies:
        if options.num_beams > 1:
            drawn = _search(self.shape, options, self.params, self._place(batch))
            return sampling.Replies(*(np.asarray(array) for array in drawn))
        if not reader.stop:
            drawn = _sample(self.shape, options, self.params, self._place(batch), np.int32(seed % 2**31))
            return sampling.Replies(*(np.asarray(array) for array in drawn))
        for drawn, done in self._grow(options, batch, seed, STOP_CHUNK):
            growing = np.flatnonzero(~done)
            if all(reader.find_stop(drawn.tokens[row, : drawn.lengths[row]]) is not None for row in growing):
                return drawn
        raise AssertionError("the last replies that grow are complete")

    def _grow(
        self, options: sampling.Options, batch: dict[str, np.ndarray], seed: int, chunk: int
    ) -> Iterator[tuple[sampling.Replies, np.ndarray]]:
        """The replies after every `chunk` tokens, and which of them are complete, bool `[B]`; ends when all are."""
        # Blocks are taken apart once, not again for every piece of the reply.
        shape, params = dataclasses.replace(self.shape, scan_layers=False), _unstack(self.shape, self.params)
        state = _start(shape, options, params, self._place(batch), np.int32(seed % 2**31))
        while True:
            done = np.asarray(state.done_B)
            yield sampling.Replies(*(np.asarray(array) for array in sampling.replies(state))), done
            if done.all():
                return
            state = _advance(shape, options, params, state, np.int32(chunk))

    def _place(self, batch):
        return batch if self.mesh is None else sharding.put_batch(batch, self.mesh)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sample(shape, options, params, batch, seed):
    keys = _row_keys(options, batch, seed)
    return sampling.sample(shape, options, params, batch["tokens"], batch["lengths"], keys)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _start(shape, options, params, batch, seed):
    keys = _row_keys(options, batch, seed)
    return sampling.start(shape, options, params, batch["tokens"], batch["lengths"], keys)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _search(shape, options, params, batch):
    return beam_search.search(shape, options, params, batch["tokens"], batch["lengths"])


# The cache, by far the largest part of the state, is updated in place.
_advance = jax.jit(sampling.advance, static_argnums=(0, 1), donate_argnums=3)
_unstack = jax.jit(model.unstack, static_argnums=0)
_score = jax.jit(step.score, static_argnums=0)


def _row_keys(options, batch, seed):
    """A key for every row: of a reply's prompt, its number among the replies to that prompt, and the seed."""

    def row_key(number, reply):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), reply)

    numbers = jax.numpy.repeat(batch["ids"], options.num_return_sequences)
    replies = jax.numpy.tile(jax.numpy.arange(options.num_return_sequences), batch["ids"].shape[0])
    return jax.vmap(row_key)(numbers, replies)


def _sampling(options: dict[str, Any], caller: str) -> config.Sampling:
    from ssl_jax.command_line import validate

    return validate(config.Sampling, options, origin=caller)


def _warn_of_dropped(what: Prompt | Reply) -> None:
    if what.dropped_tokens:
        _log.warning(describe_dropped(what.dropped_turns, what.dropped_tokens))


def describe_dropped(turns: int, tokens: int) -> str:
    """What a model did not see of a conversation, for a person."""
    whole = f"the oldest {turns} turns" if turns != 1 else "the oldest turn"
    what = f"{whole} ({tokens} tokens) were" if turns else f"the beginning of a turn ({tokens} tokens) was"
    return f"the conversation is longer than the context: {what} left out"


def _buckets(prompts: Sequence[Prompt], batch: int, limit: int) -> Iterator[tuple[int, list[int]]]:
    """Groups prompts of like length: `(places, indices)` with at most `batch` prompts each."""
    groups: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(_bucket(len(prompt.tokens), limit), []).append(index)
    for bucket in sorted(groups):
        members = groups[bucket]
        for first in range(0, len(members), batch):
            yield bucket, members[first : first + batch]


def _bucket(length: int, limit: int) -> int:
    return min(max(SMALLEST_PROMPT_BUCKET, _power_of_two(length)), limit)


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
