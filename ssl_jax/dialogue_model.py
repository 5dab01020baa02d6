"""A model one can talk to: parameters and a tokenizer, behind text in and text out."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ssl_jax import config, model, sampling, sharding, step, workdir
from ssl_jax.checkpoint import Checkpoints
from ssl_jax.data.packing import assemble, cut_windows, pack, stack
from ssl_jax.data.tokenizer import DialogueTokenizer, EncodedDialogue
from ssl_jax.dialogue import Dialogue, Turn
from ssl_jax.errors import UserError

SMALLEST_PROMPT_BUCKET = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
    """A drawn reply.

    Attributes:
      text: without control tokens.
      tokens: how many, the end token not counted.
      logprob: sum over the reply and its end token under the unmodified model, nats.
      finish_reason: "stop", or "length" where it was cut.
    """

    text: str
    tokens: int
    logprob: float
    finish_reason: str


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
        prompt: str | Sequence[Mapping[str, str]],
        *,
        num_return_sequences: int = 1,
        seed: int = 0,
        **options: Any,
    ) -> list[str]:
        """Replies to a prompt or to a conversation that ends in the user's turn.

        Args:
          prompt: what the user says, or messages `[{"role": …, "content": …}, …]`.
          num_return_sequences: replies to draw.
          seed: decides the draw.
          **options: fields of `config.Sampling`: max_new_tokens, do_sample, temperature, top_k, top_p.

        Raises:
          UserError: an unknown option or a value out of bounds.
        """
        from ssl_jax.command_line import validate

        settings = validate(config.Sampling, options, origin="generate_response")
        dialogue = as_prompt(prompt)
        drawn = self.draw([dialogue], settings, num_return_sequences=num_return_sequences, seed=seed)
        return [reply.text for reply in drawn[0]]

    def score(self, messages: Sequence[Mapping[str, str]]) -> dict[str, float]:
        """How well the model predicts the assistant's turns of a conversation.

        Returns:
          `nll` (nats, end-of-turn tokens included) and `bits_per_byte` (of the replies' UTF-8 text).

        Raises:
          UserError: malformed messages, or no assistant turn at the end.
        """
        dialogue = _from_messages(messages)
        if dialogue.kind != "labeled":
            raise UserError("score: the conversation must end in an assistant turn")
        encoded = self.tokenizer.encode(dialogue)
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
        between: Callable[[int], None] | None = None,
    ) -> list[list[Reply]]:
        """Draws replies to many prompts, batch by batch.

        Prompt lengths and batch sizes are rounded up to powers of two, so that few shapes are compiled. A reply
        depends on its prompt, its number and the seed, not on the batch it is drawn in.

        Args:
          prompts: dialogues that end in a turn of the user.
          settings: how to draw.
          num_return_sequences: replies per prompt.
          seed: decides the draw.
          batch_size: sequences drawn at a time.
          max_prompt_tokens: longest context; the newest turns are kept.
          between: called with the number of prompts done after every batch.

        Raises:
          UserError: the model's context leaves no room for a prompt.
        """
        limit = self.prompt_limit(settings)
        limit = min(limit, max_prompt_tokens or limit)
        encoded = [self.tokenizer.encode_prompt(prompt, limit) for prompt in prompts]
        options = sampling.Options(
            **settings.model_dump(),
            num_return_sequences=num_return_sequences,
            end_ids=(self.tokenizer.end_of_turn_id, self.tokenizer.end_of_text_id),
            suppressed_ids=(self.tokenizer.pad_id, *self.tokenizer.role_ids.values()),
        )
        replies: list[list[Reply]] = [[] for _ in prompts]
        done = 0
        for bucket, members in _buckets(encoded, max(1, batch_size // num_return_sequences), limit):
            drawn = self._draw_batch(options, [encoded[i] for i in members], members, bucket, seed)
            for place, index in enumerate(members):
                start = place * num_return_sequences
                replies[index] = [self._reply(drawn, start + r) for r in range(num_return_sequences)]
            done += len(members)
            if between is not None:
                between(done)
        return replies

    def prompt_limit(self, settings: config.Sampling) -> int:
        """Tokens of the longest context that leaves room for a reply; of a longer one the newest tokens are read.

        Raises:
          UserError: there is no room for a prompt.
        """
        limit = self.shape.n_positions - settings.max_new_tokens
        if limit < SMALLEST_PROMPT_BUCKET:
            raise UserError(
                f"max_new_tokens {settings.max_new_tokens} leaves no room for a prompt in a context of "
                f"{self.shape.n_positions} tokens; at most {self.shape.n_positions - SMALLEST_PROMPT_BUCKET}"
            )
        return limit

    def score_dialogues(
        self, dialogues: Sequence[EncodedDialogue], *, rows: int = 16, overlap: int | None = None
    ) -> np.ndarray:
        """Negative log-likelihood of every dialogue's targets, float64 `[len(dialogues)]`, nats.

        A dialogue longer than the context is scored in windows.

        Args:
          dialogues: encoded, with their loss masks.
          rows: rows of a batch; all batches have this size, so that one shape is compiled.
          overlap: tokens that a window repeats of the one before as context, a quarter of the context by default.
        """
        length = self.shape.n_positions
        lengths = np.array([len(dialogue.tokens) for dialogue in dialogues], np.int64)
        windows = cut_windows(lengths, length, overlap=length // 4 if overlap is None else overlap)
        packed = pack(windows.sizes, length)
        totals = np.zeros(len(dialogues), np.float64)

        def window(index: int) -> tuple[np.ndarray, np.ndarray]:
            dialogue = dialogues[windows.record[index]]
            span, may_predict = windows.span(index)
            return dialogue.tokens[span], dialogue.loss_mask[span] * may_predict

        for first in range(0, len(packed), rows):
            group = packed[first : first + rows]
            batch = stack([assemble([window(index) for index in row], length) for row in group], rows, length)
            nll = np.asarray(_score(self.shape, self.params, self._place(batch)), np.float64) * batch["loss_weights"]
            for row, members in enumerate(group):
                for segment, index in enumerate(members, start=1):
                    in_segment = batch["segment_ids"][row] == segment
                    totals[windows.record[index]] += nll[row][in_segment].sum()
        return totals

    def _draw_batch(self, options, prompts, numbers, bucket, seed) -> sampling.Replies:
        places = _power_of_two(max(len(prompts), 1 if self.mesh is None else sharding.row_shards(self.mesh)))
        tokens = np.zeros((places, bucket), np.int32)
        lengths = np.zeros(places, np.int32)
        ids = np.zeros(places, np.int32)
        for place, (prompt, number) in enumerate(zip(prompts, numbers, strict=True)):
            tokens[place, : len(prompt)] = prompt
            lengths[place] = len(prompt)
            ids[place] = number
        batch = self._place({"tokens": tokens, "lengths": lengths, "ids": ids})
        drawn = _sample(self.shape, options, self.params, batch, np.int32(seed % 2**31))
        return sampling.Replies(*(np.asarray(array) for array in drawn))

    def _reply(self, drawn: sampling.Replies, row: int) -> Reply:
        length = int(drawn.lengths[row])
        return Reply(
            text=self.tokenizer.decode(np.asarray(drawn.tokens[row, :length])).strip(),
            tokens=length,
            logprob=float(drawn.logprobs[row]),
            finish_reason="stop" if drawn.stopped[row] else "length",
        )

    def _place(self, batch):
        return batch if self.mesh is None else sharding.put_batch(batch, self.mesh)


def load(directory: Path, *, step_number: int | None = None, mesh: jax.sharding.Mesh | None = None) -> DialogueModel:
    """The model of a work directory: its best checkpoint where the run has one, else its newest good one.

    Raises:
      UserError: no work directory, or no checkpoint in it that verifies.
    """
    settings = workdir.read_config(directory)
    checkpoints = Checkpoints(directory / workdir.CHECKPOINTS)
    if step_number is None:
        step_number = served_step(checkpoints, settings.train)
    if step_number is None:
        raise UserError(
            f"{directory} has no good checkpoint yet; run python -m ssl_jax.train --config {directory}/config.yaml "
            f"--workdir {directory}"
        )
    tokenizer = DialogueTokenizer.load(directory / workdir.TOKENIZER)
    shape = model.GPT2.from_config(settings.model, tokenizer.vocab_size)
    item = "ema" if settings.optimizer.ema_decay else "params"
    if item == "ema":
        shape = dataclasses.replace(shape, param_dtype=np.dtype(np.float32))
    abstract = jax.eval_shape(functools.partial(model.init, shape), jax.random.key(0))
    if mesh is not None:
        abstract = sharding.place(abstract, sharding.shard_params(abstract, mesh))
    return DialogueModel(shape, checkpoints.restore(step_number, {item: abstract})[item], tokenizer, mesh)


def served_step(checkpoints: Checkpoints, settings: config.Train) -> int | None:
    """The verified step that is evaluated and that answers: the best one if so configured, else the newest."""
    best = checkpoints.best() if settings.load_best_model_at_end else None
    return checkpoints.newest() if best is None else best


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sample(shape, options, params, batch, seed):
    def row_key(number, reply):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), reply)

    numbers = jax.numpy.repeat(batch["ids"], options.num_return_sequences)
    replies = jax.numpy.tile(jax.numpy.arange(options.num_return_sequences), batch["ids"].shape[0])
    keys = jax.vmap(row_key)(numbers, replies)
    return sampling.sample(shape, options, params, batch["tokens"], batch["lengths"], keys)


_score = jax.jit(step.score, static_argnums=0)


def as_prompt(prompt: str | Sequence[Mapping[str, str]]) -> Dialogue:
    """What somebody says, or a conversation so far, as a dialogue that waits for a reply.

    Raises:
      UserError: an empty prompt, malformed messages, or a conversation that ends in a reply.
    """
    if isinstance(prompt, str):
        if not prompt.strip():
            raise UserError("the prompt is empty; say something")
        return _readable(Dialogue((Turn("user", prompt.strip()),)))
    dialogue = _from_messages(prompt)
    if dialogue.kind != "prompt":
        raise UserError("the conversation must end in a user turn, so that there is something to answer")
    return dialogue


def _from_messages(messages: Sequence[Mapping[str, str]]) -> Dialogue:
    try:
        dialogue = Dialogue.from_messages(messages)
    except ValueError as error:
        raise UserError(f"messages: {error}") from None
    return _readable(dialogue)


def _readable(dialogue: Dialogue) -> Dialogue:
    """The dialogue, if every turn can be written as UTF-8: a terminal may hand over any bytes as lone surrogates."""
    for turn in dialogue.turns:
        try:
            turn.content.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the text {turn.content[:40]!r} is not valid UTF-8 (character {error.start})") from None
    return dialogue


def _buckets(prompts: Sequence[np.ndarray], batch: int, limit: int) -> Iterator[tuple[int, list[int]]]:
    """Groups prompts of like length: `(places, indices)` with at most `batch` prompts each."""
    groups: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        bucket = min(max(SMALLEST_PROMPT_BUCKET, _power_of_two(len(prompt))), limit)
        groups.setdefault(bucket, []).append(index)
    for bucket in sorted(groups):
        members = groups[bucket]
        for first in range(0, len(members), batch):
            yield bucket, members[first : first + batch]


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
