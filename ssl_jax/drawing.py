"""Replies to many prompts with few rows: rows whose replies are done get the next prompts, so that none waits.

Prompts are sorted into buckets of like length, the longest first. Prompts that need at least half of its cache slots
share a ring (see `sampling`), and with it one compiled loop.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ssl_jax import beam_search, model, sampling, sharding

SMALLEST_PROMPT_BUCKET = 16
# Tokens drawn between two looks at the text, where it may end a reply.
STOP_CHUNK = 8
# Rows are filled a quarter at a time: an eighth of them wait on average, and reading a few prompts together takes
# little longer than one.
_REFILLS_PER_BATCH = 4

IsOver = Callable[[sampling.Array], bool]
"""Whether a reply that has these tokens, int32 `[n]`, needs no more."""


class Drawn(NamedTuple):
    """A reply.

    Attributes:
      prompt: place of its prompt among the prompts.
      reply: its number among the replies to the prompt.
      tokens: int32 `[n]`, the end token not among them.
      logprobs: float32 `[M]`, log p of every token and, where one followed, of the end token (nats); 0 after.
      stopped: whether an end token followed.
    """

    prompt: int
    reply: int
    tokens: sampling.Array
    logprobs: sampling.Array
    stopped: bool


class Progress(NamedTuple):
    """What has come since the last one.

    Attributes:
      replies: complete ones, in any order.
      row_steps: rows × steps of decoding that the device was asked for; without meaning for beams.
    """

    replies: list[Drawn]
    row_steps: int


@dataclasses.dataclass(frozen=True)
class Drawer:
    """Draws replies with one model, one set of options and one seed.

    A reply depends on its prompt, the number of the prompt, its own number and the seed: not on the batch that it is
    drawn in, nor on the way. A prompt's number is its place among the prompts, unless `numbers` say otherwise.

    Attributes:
      shape: of the model, with `scan_layers` False.
      layers: parameters from `model.unstack`.
      options: static options of the sampler.
      seed: decides the draw.
      limit: tokens of the longest prompt.
      mesh: where `layers` lie; None for one device.
    """

    shape: model.GPT2
    layers: model.Params
    options: sampling.Options
    seed: int
    limit: int
    mesh: jax.sharding.Mesh | None = None

    def draw(
        self,
        prompts: Sequence[np.ndarray],
        batch_size: int,
        is_over: IsOver | None = None,
        numbers: Sequence[int] | None = None,
    ) -> Iterator[Progress]:
        """Draws `num_return_sequences` replies to each prompt, in the way that takes the least time.

        Args:
          prompts: int32 `[n]` each, at most `limit` tokens.
          batch_size: rows at a time, beams counted.
          is_over: ends replies early, at most `STOP_CHUNK` tokens behind the first that makes it true.
          numbers: of each prompt, from 0, for its random key.
        """
        batch = max(1, batch_size // max(self.options.num_return_sequences, self.options.num_beams))
        for members in self._rings(prompts):
            together = len(members) <= batch and is_over is None
            if together or self.options.num_beams > 1:
                yield from self.in_step(prompts, members, batch, numbers)
            else:
                yield from self.refilled(prompts, members, batch, is_over, numbers)

    def in_step(
        self,
        prompts: Sequence[np.ndarray],
        members: Sequence[int],
        batch: int,
        numbers: Sequence[int] | None = None,
    ) -> Iterator[Progress]:
        """Answers `batch` prompts at a time; each time takes as long as the longest of their replies."""
        draw = _search if self.options.num_beams > 1 else draw_together
        for first in range(0, len(members), batch):
            chosen = members[first : first + batch]
            arrays = self._batch(prompts, chosen, self._whole(_few_sizes(len(chosen))), numbers)
            drawn = sharding.fetch(draw(self.shape, self.options, self.layers, self._place(arrays), self._seed))
            jobs = self._jobs(chosen)
            steps = int(np.max(drawn.lengths + drawn.stopped)) - 1
            yield Progress(_harvest(jobs, drawn), max(0, steps) * len(drawn.lengths))

    def refilled(
        self,
        prompts: Sequence[np.ndarray],
        members: Sequence[int],
        batch: int,
        is_over: IsOver | None = None,
        numbers: Sequence[int] | None = None,
    ) -> Iterator[Progress]:
        """Keeps the rows of `batch` prompts busy until all are answered.

        Args:
          prompts: as of `draw`.
          members: which of them to answer, in this order; few shapes are compiled where like lengths stand together.
          batch: prompts at a time.
          is_over: as of `draw`.
          numbers: as of `draw`.
        """
        repeats, new_tokens = self.options.num_return_sequences, self.options.max_new_tokens
        places = self._whole(min(batch, len(members)))
        group = self._whole(-(-places // _REFILLS_PER_BATCH))
        rows = places * repeats
        static = (self.shape, self.options, self.mesh)
        state = _empty(*static, self.layers, rows, self._places(prompts, members))
        done = np.ones(rows, bool)
        jobs = np.full((rows, 2), -1)  # prompt and number of the reply in every row; -1 for none
        waiting = collections.deque(members)
        step = steps_told = 0
        while True:
            replaced: list[tuple[np.ndarray, sampling.Replies]] = []
            while waiting and done.sum() >= (wanted := min(group, len(waiting))) * repeats:
                chosen = [waiting.popleft() for _ in range(wanted)]
                filled = np.flatnonzero(done)[: wanted * repeats]
                # Rows that do not exist take the replies of the places that no prompt is left for.
                targets = np.arange(rows, rows + group * repeats, dtype=np.int32)
                targets[: len(filled)] = filled
                arrays = self._place(self._batch(prompts, chosen, group, numbers))
                state, before = _refill(*static, self.layers, state, targets, arrays, self._seed)
                replaced.append((jobs[filled], before))
                jobs[filled], done[filled] = self._jobs(chosen), False
            if done.all():
                replies = _harvest(jobs, sharding.fetch(sampling.replies(state)))
                yield Progress(replies, rows * (step - steps_told))
                return
            chunk = new_tokens if is_over is None else STOP_CHUNK
            enough = min(group, len(waiting)) * repeats if waiting else rows
            state = _advance(*static, self.layers, state, np.int32(chunk), np.int32(enough))
            # What has been replaced is read while the device works on.
            replies = [one for old, before in replaced for one in _harvest(old, sharding.fetch(before))]
            yield Progress(replies, rows * (step - steps_told))
            steps_told = step
            arrived = sharding.fetch((state.done_B, state.step))
            done, step = np.array(arrived[0]), int(arrived[1])
            if is_over is not None:
                done |= _over(done, sharding.fetch(sampling.replies(state)), is_over)
                state = state._replace(done_B=self._place({"done": done})["done"])

    def grow(self, prompt: np.ndarray) -> Iterator[tuple[np.ndarray, bool]]:
        """The reply to a prompt after every token, int32 `[n]`, and whether it is complete."""
        shape, options = self.shape, self.options
        arrays = self._place(self._batch([prompt], [0], self._whole(1)))
        state = _start(shape, options, self.layers, arrays, self._seed)
        while True:
            drawn, done = sharding.fetch((sampling.replies(state), state.done_B))
            yield drawn.tokens[0, : drawn.lengths[0]], bool(done[0])
            if done.all():
                return
            state = _advance(shape, options, self.mesh, self.layers, state, np.int32(1), np.int32(len(done)))

    @property
    def _seed(self) -> np.int32:
        return np.int32(self.seed % 2**31)

    def _rings(self, prompts: Sequence[np.ndarray]) -> Iterator[list[int]]:
        """Which prompts are drawn in one ring, those of the longest bucket first."""
        buckets = [self._bucket(prompt) for prompt in prompts]
        new_tokens = self.options.max_new_tokens
        ring: list[int] = []
        for index in sorted(range(len(prompts)), key=lambda index: -buckets[index]):
            if ring and 2 * (buckets[index] + new_tokens) < buckets[ring[0]] + new_tokens:
                yield ring
                ring = []
            ring.append(index)
        if ring:
            yield ring

    def _bucket(self, prompt: np.ndarray) -> int:
        """Places for a prompt: few sizes, so that few shapes are compiled."""
        return min(max(SMALLEST_PROMPT_BUCKET, _power_of_two(len(prompt))), self.limit)

    def _places(self, prompts: Sequence[np.ndarray], chosen: Sequence[int]) -> int:
        """Places that the longest of the chosen prompts needs."""
        return max(self._bucket(prompts[index]) for index in chosen)

    def _batch(
        self,
        prompts: Sequence[np.ndarray],
        chosen: Sequence[int],
        places: int,
        numbers: Sequence[int] | None = None,
    ) -> dict[str, np.ndarray]:
        """Chosen prompts as arrays; what is left of the `places` stays empty."""
        tokens = np.zeros((places, self._places(prompts, chosen)), np.int32)
        lengths, ids = np.zeros(places, np.int32), np.zeros(places, np.int32)
        for place, index in enumerate(chosen):
            tokens[place, : len(prompts[index])] = prompts[index]
            lengths[place], ids[place] = len(prompts[index]), index if numbers is None else numbers[index]
        return {"tokens": tokens, "lengths": lengths, "ids": ids}

    def _jobs(self, chosen: Sequence[int]) -> np.ndarray:
        """Prompt and number of every reply to the chosen prompts, int `[B, 2]`, in the order of their rows."""
        return np.array([(prompt, reply) for prompt in chosen for reply in range(self.options.num_return_sequences)])

    def _whole(self, prompts: int) -> int:
        """The next number of prompts that can be dealt out to the devices."""
        shards = 1 if self.mesh is None else sharding.row_shards(self.mesh)
        return -(-prompts // shards) * shards

    def _place(self, batch):
        return batch if self.mesh is None else sharding.put_batch(batch, self.mesh)


def _harvest(jobs: np.ndarray, drawn: sampling.Replies) -> list[Drawn]:
    """The replies of rows that have a job; rows behind those of `jobs` are padding."""
    return [
        Drawn(prompt, reply, drawn.tokens[row, : drawn.lengths[row]], drawn.logprobs[row], bool(drawn.stopped[row]))
        for row, (prompt, reply) in enumerate(jobs.tolist())
        if prompt >= 0
    ]


def _over(done: np.ndarray, drawn: sampling.Replies, is_over: IsOver) -> np.ndarray:
    """Which rows still grow but need not, bool `[B]`."""
    over = np.zeros_like(done)
    for row in np.flatnonzero(~done):
        over[row] = is_over(drawn.tokens[row, : drawn.lengths[row]])
    return over


def _few_sizes(number: int) -> int:
    """The number itself if it is small, or else the next power of two, so that few sizes are compiled."""
    return number if number < 4 else _power_of_two(number)


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


@functools.partial(jax.jit, static_argnums=(0, 1))
def draw_together(shape, options, layers, batch, seed):
    """Replies to a batch of prompts, `sampling.Replies`; all rows start and end together."""
    keys = _row_keys(options, batch, seed)
    return sampling.sample(shape, options, layers, batch["tokens"], batch["lengths"], keys)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _search(shape, options, layers, batch, seed):
    del seed  # the likeliest replies are what they are
    return beam_search.search(shape, options, layers, batch["tokens"], batch["lengths"])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _start(shape, options, layers, batch, seed):
    keys = _row_keys(options, batch, seed)
    return sampling.start(shape, options, layers, batch["tokens"], batch["lengths"], keys)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 4, 5))
def _empty(shape, options, mesh, layers, rows, places):
    return _laid_out(shape, mesh, sampling.empty(shape, options, layers, rows, places))


# The cache, by far the largest part of the state, is updated in place.
@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _refill(shape, options, mesh, layers, state, rows, batch, seed):
    keys = _row_keys(options, batch, seed)
    state, before = sampling.refill(shape, options, layers, state, rows, batch["tokens"], batch["lengths"], keys)
    return _laid_out(shape, mesh, state), before


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _advance(shape, options, mesh, layers, state, steps, enough):
    return _laid_out(shape, mesh, sampling.advance(shape, options, layers, state, steps, enough))


def _row_keys(options, batch, seed):
    """A key for every row: of a reply's prompt, its number among the replies to that prompt, and the seed."""

    def row_key(number, reply):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), reply)

    numbers = jnp.repeat(batch["ids"], options.num_return_sequences)
    replies = jnp.tile(jnp.arange(options.num_return_sequences), batch["ids"].shape[0])
    return jax.vmap(row_key)(numbers, replies)


def _laid_out(shape, mesh, state):
    """Rows over the devices, and heads where they can be, always alike: another layout would be another program."""
    if mesh is None:
        return state
    heads = "tensor" if shape.n_head % mesh.shape["tensor"] == 0 else None

    def constrain(leaf):
        axes = PartitionSpec() if leaf.ndim == 0 else sharding.BATCH if leaf.ndim < 4 else (*sharding.BATCH, heads)
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, PartitionSpec(*axes)))

    return jax.tree.map(constrain, state)
