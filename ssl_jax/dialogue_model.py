"""A model one can talk to: parameters and a tokenizer, behind text in and text out."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from ssl_jax import config, model, mutual_information, sampling, sharding, step
from ssl_jax.conversation import Messages, as_labeled, as_prompt
from ssl_jax.data.packing import assemble, cut_windows, pack, stack
from ssl_jax.data.tokenizer import DialogueTokenizer, EncodedDialogue, Prompt
from ssl_jax.dialogue import Dialogue
from ssl_jax.drawing import SMALLEST_PROMPT_BUCKET, Drawer
from ssl_jax.errors import UserError
from ssl_jax.replies import Reply, ReplyReader, sampler_options

_log = logging.getLogger(__name__)

S = TypeVar("S", bound=config.Section)
_NO_RERANKING = config.Reranking()
_SCORED_ROWS = 16  # of a batch on each device


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
        candidates: int = 1,
        prior_weight: float = 0.5,
        backward_weight: float = 0.0,
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
          candidates: replies drawn for every one that is given; given are the best by mutual information with the
            prompt, the best first (`mutual_information.score`). 1: all that are drawn, in their order.
          prior_weight: how much the score of a candidate is lowered by its likelihood without the prompt.
          backward_weight: how much it is raised by the likelihood of what was said last, given the candidate.
          **options: fields of `config.Sampling`: max_new_tokens, do_sample, temperature, top_k, top_p, ….

        Raises:
          UserError: an unknown option, a value out of bounds, or a `backward_weight` for a model that cannot read
            backwards.
        """
        settings = _sampling(options, "generate_response")
        weights = {"candidates": candidates, "prior_weight": prior_weight, "backward_weight": backward_weight}
        (replies,) = self.draw(
            [as_prompt(prompt)],
            settings,
            num_return_sequences=num_return_sequences,
            seed=seed,
            reply_prefix=reply_prefix,
            logits_processor=logits_processor,
            reranking=_validate(config.Reranking, weights, "generate_response"),
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
        drawer = self._drawer(self._options([encoded], settings, 1, ()), seed, limit)
        return self._reader(settings, reply_prefix).stream(drawer.grow(encoded.tokens))

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
        reranking: config.Reranking = _NO_RERANKING,
        between: Callable[[int], None] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[list[Reply]]:
        """Draws replies to many prompts; a reply that is complete makes room for the next one (`drawing`).

        A reply depends on its prompt, the number of the prompt, its own number and the seed, not on the batch it is
        drawn in.

        Args:
          prompts: dialogues that end in a turn of the user.
          settings: how to draw.
          num_return_sequences: replies per prompt; of beams, the best ones, the best first.
          seed: decides the draw.
          batch_size: sequences drawn at a time.
          max_prompt_tokens: longest context; the newest turns are kept, and `Reply` says how much was dropped.
          reply_prefix: how every reply begins.
          logits_processor: as in `generate_response`.
          reranking: how many more are drawn than are given, and which are given.
          between: called with the number of prompts done, each time that some rows are, and at the end.
          numbers: as of `draw_encoded`.

        Raises:
          UserError: the model's context or `max_length` leaves no room for a prompt or for a reply to it, or
            candidates are asked for that cannot be drawn or scored.
        """
        self._check_reranking(reranking, settings)
        limit = self.prompt_limit(settings)
        limit = min(limit, max_prompt_tokens or limit)
        drawn = self.draw_encoded(
            self._encode_prompts(prompts, settings, limit, reply_prefix),
            settings,
            num_return_sequences=num_return_sequences * reranking.candidates,
            seed=seed,
            batch_size=batch_size,
            max_prompt_tokens=limit,
            reply_prefix=reply_prefix,
            logits_processor=logits_processor,
            between=between,
            numbers=numbers,
        )
        if reranking.candidates == 1:
            return drawn
        pairs = [(prompt, one.text) for prompt, replies in zip(prompts, drawn, strict=True) for one in replies]
        scores = mutual_information.score(
            self,
            pairs,
            prior_weight=reranking.prior_weight,
            backward_weight=reranking.backward_weight,
            max_prompt_tokens=limit,
            rows=_SCORED_ROWS if self.mesh is None else _SCORED_ROWS * sharding.row_shards(self.mesh),
        ).reshape(len(drawn), -1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :num_return_sequences]
        return [[replies[place] for place in places] for replies, places in zip(drawn, best.tolist(), strict=True)]

    def draw_encoded(
        self,
        encoded: Sequence[Prompt],
        settings: config.Sampling,
        *,
        num_return_sequences: int = 1,
        seed: int = 0,
        batch_size: int = 64,
        max_prompt_tokens: int | None = None,
        reply_prefix: str = "",
        logits_processor: Sequence[sampling.Processor] = (),
        between: Callable[[int], None] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[list[Reply]]:
        """Draws what continues prompts that are tokens already; arguments as of `draw`, but for these.

        Args:
          encoded: the prompts.
          settings: as of `draw`.
          num_return_sequences: as of `draw`.
          seed: as of `draw`.
          batch_size: as of `draw`.
          max_prompt_tokens: no prompt is longer.
          reply_prefix: how every reply begins; the prompts end in its tokens.
          logits_processor: as of `draw`.
          between: as of `draw`.
          numbers: of each prompt, from 0, in place of its place among the prompts: many prompts that are drawn in
            parts, with the numbers that they have among all, get what they get together.

        Raises:
          UserError: the model's context or `max_length` leaves no room for a prompt or for a reply to it.
          ValueError: a prompt is longer than `max_prompt_tokens` or leaves no room for a reply.
        """
        limit = self.prompt_limit(settings)
        limit = min(limit, max_prompt_tokens or limit)
        if (longest := max((len(prompt.tokens) for prompt in encoded), default=0)) > limit:
            raise ValueError(f"a prompt has {longest} tokens; there is room for {limit}")
        options = self._options(encoded, settings, num_return_sequences, logits_processor)
        reader = self._reader(settings, reply_prefix)
        is_over = (lambda tokens: reader.find_stop(tokens) is not None) if reader.stop else None
        drawer = self._drawer(options, seed, limit)
        replies: list[dict[int, Reply]] = [{} for _ in encoded]
        done = 0
        for progress in drawer.draw([prompt.tokens for prompt in encoded], batch_size, is_over, numbers):
            for one in progress.replies:
                drawn = replies[one.prompt]
                drawn[one.reply] = reader.read(one.tokens, one.logprobs, one.stopped, encoded[one.prompt])
                done += len(drawn) == num_return_sequences
            if between is not None:
                between(done)
        return [[drawn[number] for number in range(num_return_sequences)] for drawn in replies]

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
        self, dialogues: Sequence[EncodedDialogue], *, rows: int = _SCORED_ROWS, overlap: int | None = None
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
            nll = sharding.fetch(_score(self.shape, self.params, self._place(batch))).astype(np.float64)
            nll *= batch["loss_weights"]
            for row, members in enumerate(group):
                for segment, index in enumerate(members, start=1):
                    in_segment = batch["segment_ids"][row] == segment
                    totals[windows.record[index]] += nll[row][in_segment].sum()
        return totals

    def _check_reranking(self, reranking: config.Reranking, settings: config.Sampling) -> None:
        if reranking.candidates > 1 and not settings.do_sample:
            raise UserError(
                f"candidates {reranking.candidates} are drawn, and without do_sample (beams included) nothing is; "
                "set do_sample true, or candidates 1"
            )
        mutual_information.check(self.tokenizer, reranking.backward_weight)

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

    def _drawer(self, options: sampling.Options, seed: int, limit: int) -> Drawer:
        shape = dataclasses.replace(self.shape, scan_layers=False)
        return Drawer(shape, self._layers, options, seed, limit, self.mesh)

    @functools.cached_property
    def _layers(self) -> model.Params:
        """The parameters as drawing reads them, taken apart once."""
        return _unstack(self.shape, self.params)

    def _place(self, batch):
        return batch if self.mesh is None else sharding.put_batch(batch, self.mesh)


_unstack = jax.jit(model.unstack, static_argnums=0)
_score = jax.jit(step.score, static_argnums=0)


def _sampling(options: dict[str, Any], caller: str) -> config.Sampling:
    return _validate(config.Sampling, options, caller)


def _validate(section: type[S], options: dict[str, Any], caller: str) -> S:
    from ssl_jax.command_line import validate

    return validate(section, options, origin=caller)


def _warn_of_dropped(what: Prompt | Reply) -> None:
    if what.dropped_tokens:
        _log.warning(describe_dropped(what.dropped_turns, what.dropped_tokens))


def describe_dropped(turns: int, tokens: int) -> str:
    """What a model did not see of a conversation, for a person."""
    whole = f"the oldest {turns} turns" if turns != 1 else "the oldest turn"
    what = f"{whole} ({tokens} tokens) were" if turns else f"the beginning of a turn ({tokens} tokens) was"
    return f"the conversation is longer than the context: {what} left out"
