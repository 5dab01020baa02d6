"""Rows are kept busy, and nobody can tell from a reply which way it was drawn.

Run as a program, this file draws on a mesh of eight virtual devices and prints the replies.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax import config, model, sampling, sharding
from ssl_jax.drawing import STOP_CHUNK, Drawer, Drawn

SHAPE = model.GPT2(37, 40, 64, 16, 1, 2, 32, scan_layers=False)
ENDS = (4, 20)


def random_params(seed: int) -> model.Params:
    """Wide enough that the distributions are neither flat nor certain."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(functools.partial(model.init, SHAPE), jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.0, 0.4, leaf.shape), leaf.dtype), shapes)


def random_prompts(seed: int, number: int) -> list[np.ndarray]:
    """Of 1 to 24 tokens: buckets of 16 and 24."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 25, number)
    return [rng.integers(0, 37, length).astype(np.int32) for length in lengths]


def drawer(options: sampling.Options, seed: int = 0, params: model.Params | None = None) -> Drawer:
    return Drawer(SHAPE, random_params(seed) if params is None else params, options, seed, limit=24)


def by_job(progress: Any) -> dict[tuple[int, int], Drawn]:
    """Replies by prompt and number, of which none came twice."""
    drawn = [reply for part in progress for reply in part.replies]
    found = {(reply.prompt, reply.reply): reply for reply in drawn}
    assert len(found) == len(drawn)
    return found


def assert_same(found: dict[tuple[int, int], Drawn], expected: dict[tuple[int, int], Drawn]) -> None:
    assert found.keys() == expected.keys()
    for job, reply in expected.items():
        assert np.array_equal(found[job].tokens, reply.tokens) and found[job].stopped == reply.stopped
        np.testing.assert_allclose(found[job].logprobs, reply.logprobs, rtol=1e-4, atol=1e-5)


PLAIN = sampling.Options(24, end_ids=ENDS, top_p=0.95)
ALL = sampling.Options(
    12, num_return_sequences=3, end_ids=ENDS, temperature=0.9, top_k=20, repetition_penalty=1.2,
    bad_words_ids=((3, 5),), no_repeat_ngram_size=3, sequence_bias=(((6,), 1.0),), min_new_tokens=2, max_length=30,
    begin_suppress_tokens=(9,),
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def compiles_fast() -> Iterator[None]:
    """The arithmetic is the same."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize("options", [PLAIN, ALL], ids=["plain", "all"])
def test_refilled_rows_give_the_replies_of_rows_in_step(options: sampling.Options) -> None:
    """For random models, prompts and seeds; prompts of one place and of all places share the rows."""
    for seed in range(3):
        prompts = random_prompts(seed, 21)
        one = drawer(options, seed)
        refilled = by_job(one.refilled(prompts, range(21), 6))
        assert_same(refilled, by_job(one.in_step(prompts, range(21), 21)))
        assert len({len(reply.tokens) for reply in refilled.values()}) > 3, "the replies differ in length"


def test_a_reply_in_refilled_rows_is_what_its_prompt_gets_alone() -> None:
    prompts = random_prompts(7, 12)
    together = by_job(drawer(PLAIN).draw(prompts, 6))
    assert sorted(together) == [(index, 0) for index in range(12)]
    for index in (0, 5, 11):
        assert_same(
            {job: reply for job, reply in together.items() if job[0] == index},
            by_job(drawer(PLAIN).in_step(prompts, [index], 1)),
        )


@pytest.mark.parametrize("batch_size", [3, 64])
def test_prompts_drawn_in_parts_with_their_numbers_get_what_they_get_together(batch_size: int) -> None:
    """In step and in refilled rows; without the numbers the later part would get the keys of the first."""
    prompts = random_prompts(5, 9)
    together = by_job(drawer(PLAIN).draw(prompts, batch_size))
    for part in (range(4), range(4, 9)):
        alone = by_job(drawer(PLAIN).draw([prompts[number] for number in part], batch_size, numbers=part))
        assert_same(
            {(part[prompt], reply): one for (prompt, reply), one in alone.items()},
            {job: one for job, one in together.items() if job[0] in part},
        )
    other = by_job(drawer(PLAIN).draw(prompts[4:], batch_size))
    assert any(not np.array_equal(other[n, 0].tokens, together[n + 4, 0].tokens) for n in range(5))


@pytest.mark.parametrize("batch_size", [1, 64])
def test_every_prompt_is_answered_whatever_the_batch(batch_size: int) -> None:
    prompts = random_prompts(3, 9)
    assert by_job(drawer(PLAIN).draw(prompts, batch_size)).keys() == {(index, 0) for index in range(9)}
    assert not by_job(drawer(PLAIN).draw([], batch_size))


def lengths_by_prompt(scores_BV, sequences_BS, lengths_B):
    """Lets the reply to a prompt of n tokens, which begins with its reply's length, have that length."""
    prompt_lengths_B = sequences_BS[:, 1]
    wanted_B = jnp.where(lengths_B - prompt_lengths_B == sequences_BS[:, 0], ENDS[0], 30)
    return jnp.where(jnp.arange(scores_BV.shape[1])[None] == wanted_B[:, None], 0.0, -jnp.inf)


def test_no_row_waits_for_the_longest_reply() -> None:
    """Two rows: while one gives a reply of 20 tokens, the other gives nine of one token.

    A reply of n tokens and its end take n steps, since the first token comes with the prompt.
    """
    options = sampling.Options(24, end_ids=ENDS, processors=(lengths_by_prompt,))
    lengths = [20, *[1] * 9]
    prompts = [np.array([length, 5, 1, 2, 3], np.int32) for length in lengths]
    parts = list(drawer(options).refilled(prompts, range(10), 2))
    assert {job: len(reply.tokens) for job, reply in by_job(parts).items()} == {(n, 0): lengths[n] for n in range(10)}
    assert sum(part.row_steps for part in parts) == 2 * 20
    in_step = list(drawer(options).in_step(prompts, range(10), 2))
    assert sum(part.row_steps for part in in_step) == 2 * (20 + 4)


def test_replies_are_handed_out_while_others_grow() -> None:
    """So that who waits for a signal is asked often."""
    parts = list(drawer(PLAIN).refilled(random_prompts(1, 24), range(24), 6))
    sizes = [len(part.replies) for part in parts]
    assert sum(sizes) == 24 and max(sizes) <= 6 and len(parts) > 24 // 6


def test_what_needs_no_more_is_ended_early_and_refilled() -> None:
    """The text up to where it is enough is that of the whole reply."""
    prompts = random_prompts(2, 14)

    def is_enough(tokens: sampling.Array) -> bool:
        return bool(np.isin(tokens, (7, 9, 11, 13)).any())

    whole = by_job(drawer(PLAIN).refilled(prompts, range(14), 6))
    parts = list(drawer(PLAIN).draw(prompts, 6, is_enough))
    ended = 0
    for job, reply in by_job(parts).items():
        expected = whole[job].tokens
        assert np.array_equal(reply.tokens, expected[: len(reply.tokens)])
        if len(reply.tokens) < len(expected):
            ended += 1
            assert is_enough(reply.tokens) and not is_enough(reply.tokens[: -STOP_CHUNK - 1])
    assert ended > 1


def test_few_programs_are_compiled_and_none_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """One loop, and a refill for each size of prompts."""
    traced = []

    def counted(name: str) -> Any:
        function = getattr(sampling, name)

        def call(*arguments):
            traced.append(name)
            return function(*arguments)

        return call

    for name in ("advance", "refill"):
        monkeypatch.setattr(sampling, name, counted(name))
    prompts = [np.ones(length, np.int32) for length in (3, 24, 5, 6, 21, 4, 23, 22)]
    for seed in (0, 1):
        list(drawer(sampling.Options(2, end_ids=ENDS), seed).draw(prompts, 2))
    assert sorted(traced) == ["advance", "refill", "refill"]


def test_prompts_share_a_ring_unless_it_has_twice_the_slots_that_they_need() -> None:
    prompts = [np.ones(length, np.int32) for length in (3, 64, 17, 60, 16)]

    def rings(new_tokens: int) -> list[list[int]]:
        return list(Drawer(SHAPE, {}, sampling.Options(new_tokens), 0, limit=64)._rings(prompts))

    assert rings(32) == [[1, 3, 2, 0, 4]], "64 + 32 slots are not more than twice 16 + 32"
    assert rings(31) == [[1, 3, 2], [0, 4]]


def test_a_growing_reply_is_the_one_that_is_drawn_at_once() -> None:
    prompt = random_prompts(5, 1)[0]
    *growing, (last, is_complete) = drawer(PLAIN).grow(prompt)
    assert [(len(tokens), complete) for tokens, complete in growing] == [(n + 1, False) for n in range(len(growing))]
    whole = by_job(drawer(PLAIN).draw([prompt], 1))[0, 0]
    assert is_complete and np.array_equal(last, whole.tokens)


# Meshes ---------------------------------------------------------------------------------------------------------------


def drawn_on(mesh: jax.sharding.Mesh) -> dict[str, list[int]]:
    """Replies of all rows by job."""
    params = random_params(0)
    placed = jax.device_put(params, sharding.shard_params(jax.eval_shape(lambda: params), mesh))
    return as_json(Drawer(SHAPE, placed, ALL, 0, limit=24, mesh=mesh))


def as_json(one: Drawer) -> dict[str, list[int]]:
    found = by_job(one.draw(random_prompts(0, 30), 30))
    return {f"{prompt} {reply}": np.asarray(drawn.tokens).tolist() for (prompt, reply), drawn in sorted(found.items())}


def test_eight_devices_draw_the_replies_of_one() -> None:
    """And the rows keep their layout: nothing is compiled again."""
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    environment |= {"JAX_LOG_COMPILES": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == as_json(drawer(ALL))
    for program, times in (("_advance", 1), ("_refill", 2)):
        assert done.stderr.count(f"Finished XLA compilation of jit({program})") == times


if __name__ == "__main__":
    print(json.dumps(drawn_on(sharding.make_mesh(config.Mesh(data=2, fsdp=2, tensor=2)))))
