"""From settings and texts to a sampler's options, and from drawn tokens back to replies and pieces of text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence

from ssl_jax import config, sampling
from ssl_jax.data.tokenizer import DialogueTokenizer, Prompt
from ssl_jax.errors import UserError


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
    """A drawn reply.

    Attributes:
      text: without control tokens; cut before the stop string that ended it.
      token_ids: of the reply, the end token not among them.
      token_logprobs: log p of every token of `token_ids` and, where one ended the reply, of the end token, under the
        unmodified model (nats).
      finish_reason: "stop" (an end token or a stop string), or "length" where the reply was cut.
      dropped_turns: turns at the beginning of the conversation that the model did not see for lack of room.
      dropped_tokens: how many tokens these were, and what was cut from turns that were seen in part.
    """

    text: str
    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    finish_reason: str
    dropped_turns: int = 0
    dropped_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Length of the reply, the end token not counted."""
        return len(self.token_ids)

    @property
    def logprob(self) -> float:
        """Sum of `token_logprobs`, nats."""
        return math.fsum(self.token_logprobs)

    @property
    def mean_logprob(self) -> float:
        """`logprob` per token, the end counted as one, nats."""
        return mean_logprob(self.logprob, self.tokens)


def mean_logprob(logprob: float, tokens: int) -> float:
    """How certain a model was of a reply: its log-probability (nats) per token; the end of the reply counts as one."""
    return logprob / (tokens + 1)


def sampler_options(
    settings: config.Sampling,
    tokenizer: DialogueTokenizer,
    vocab_size: int,
    *,
    new_tokens: int,
    max_length: int,
    num_return_sequences: int,
    processors: Sequence[sampling.Processor],
) -> sampling.Options:
    """The static options of a sampler.

    Args:
      settings: what the user asked for.
      tokenizer: turns banned and biased texts into tokens.
      vocab_size: of the model, which may have ids that the tokenizer lacks; they are never drawn.
      new_tokens: places for the reply.
      max_length: bound of prompt and reply together.
      num_return_sequences: replies to each prompt.
      processors: functions on the scores, after all others.

    Raises:
      UserError: a token id that the model does not have, or more replies than beams.
    """
    fields = {field.name for field in dataclasses.fields(sampling.Options)} & set(config.Sampling.model_fields)
    values = settings.model_dump(include=fields)
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        _check_ids(name, values[name], vocab_size)
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        _check_ids(name, [] if values[name] is None else [values[name]], vocab_size)
    if 1 < settings.num_beams < num_return_sequences:
        raise UserError(f"num_return_sequences {num_return_sequences} exceeds num_beams {settings.num_beams}")
    values |= {
        "max_new_tokens": new_tokens,
        "max_length": max_length,
        "num_return_sequences": num_return_sequences,
        "end_ids": tokenizer.end_ids,
        "suppress_tokens": (
            *tokenizer.suppressed_ids,
            *range(tokenizer.vocab_size, vocab_size),
            *settings.suppress_tokens,
        ),
        "bad_words_ids": tuple(ids for text in settings.bad_words for ids in _spellings(tokenizer, text)),
        "sequence_bias": tuple(
            (ids, bias) for text, bias in settings.sequence_bias.items() for ids in _spellings(tokenizer, text)
        ),
        "processors": tuple(processors),
    }
    return sampling.Options(**values)


@dataclasses.dataclass(frozen=True)
class ReplyReader:
    """Reads drawn tokens as text.

    Attributes:
      tokenizer: ids to text.
      stop: strings of which the first to occur ends the reply; it is not part of the reply.
      opening: tokens that the reply was made to begin with.
    """

    tokenizer: DialogueTokenizer
    stop: tuple[str, ...] = ()
    opening: tuple[int, ...] = ()

    def find_stop(self, tokens: sampling.Array) -> int | None:
        """Where in the text of these tokens the first stop string begins, or None."""
        return self._find_stop(self._text(tokens))

    def read(self, tokens: sampling.Array, logprobs: sampling.Array, stopped: bool, prompt: Prompt) -> Reply:
        """A row of a sampler's result as a reply.

        Args:
          tokens: int32 `[n]`, the end token not among them.
          logprobs: float32 `[M]`, at n that of the end token where one followed.
          stopped: whether one followed.
          prompt: what was answered.
        """
        count, text = len(tokens), self._text(tokens)
        counted = count + stopped
        cut = self._find_stop(text)
        if cut is not None:
            # The shortest beginning of the reply that holds the string.
            count = next(n for n in range(1, count + 1) if self.find_stop(tokens[:n]) is not None)
            text, stopped, counted = text[:cut], True, count
        return Reply(
            text=text.strip(),
            token_ids=tuple(int(token) for token in tokens[:count]),
            token_logprobs=tuple(float(logprob) for logprob in logprobs[:counted]),
            finish_reason="stop" if stopped else "length",
            dropped_turns=prompt.dropped_turns,
            dropped_tokens=prompt.dropped_tokens,
        )

    def stream(self, growing: Iterable[tuple[sampling.Array, bool]]) -> Iterator[str]:
        """Pieces of a reply while it grows; together they are the text that `read` gives of the whole.

        What may still change is held back: bytes that are no whole character yet, a beginning of a stop string, and
        blanks, which a finished reply does not end in.

        Args:
          growing: all tokens so far, and whether these are all there will be.
        """
        emitted = 0
        for tokens, is_last in growing:
            text = self._text(tokens)
            cut = self._find_stop(text)
            if cut is not None:
                text = text[:cut]
            elif not is_last:
                text = self._without_beginning_of_stop(text.rstrip("\ufffd"))
            text = text.strip()
            if len(text) > emitted:
                yield text[emitted:]
                emitted = len(text)
            if cut is not None:
                return

    def _text(self, tokens: sampling.Array) -> str:
        return self.tokenizer.decode([*self.opening, *map(int, tokens)])

    def _find_stop(self, text: str) -> int | None:
        first = len(self.tokenizer.decode(self.opening)) if self.opening else 0
        return min((at for string in self.stop if (at := text.find(string, first)) >= 0), default=None)

    def _without_beginning_of_stop(self, text: str) -> str:
        """The text without the longest end that a stop string may grow from."""
        held = [n for string in self.stop for n in range(1, len(string)) if text.endswith(string[:n])]
        return text[: len(text) - max(held, default=0)]


def _spellings(tokenizer: DialogueTokenizer, text: str) -> list[tuple[int, ...]]:
    """The tokens of a text at the beginning of a reply and after a blank, which byte-level vocabularies tell apart."""
    spellings = (tuple(tokenizer.encode_text(spelling).tolist()) for spelling in (text, " " + text.lstrip()))
    return [ids for ids in dict.fromkeys(spellings) if ids]


def _check_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    for token in ids:
        if not 0 <= token < vocab_size:
            raise UserError(f"{name}: the model has no token {token}; ids are 0 to {vocab_size - 1}")
