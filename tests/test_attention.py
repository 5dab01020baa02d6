"""Attention in blocks is attention, forward and backward, and keeps no scores."""

from __future__ import annotations

import functools
import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax import attention
from ssl_jax.config import Model
from ssl_jax.errors import UserError
from ssl_jax.model import GPT2

ROWS, HEADS, WIDTH = 2, 3, 8
SCALE = WIDTH**-0.5


def packed_rows(length: int) -> tuple[list[jax.Array], jax.Array]:
    """Random queries, keys and values, and two rows of segments that end in padding."""
    rng = np.random.default_rng(length)
    arrays = [jnp.asarray(rng.normal(size=(ROWS, HEADS, length, WIDTH)), jnp.float32) for _ in range(3)]
    cuts = np.sort(rng.integers(1, length, (ROWS, 3)), axis=1)
    ids = 1 + (np.arange(length)[None, None] >= cuts[..., None]).sum(axis=1)
    return arrays, jnp.asarray(np.where(ids == 4, 0, ids), jnp.int32)


def attend_at_once(query, key, value, segment_ids):
    return attention.attend(query, key, value, attention.segment_mask(segment_ids), SCALE)


# One block, whole blocks, a last block of one, many blocks of uneven size.
@pytest.mark.parametrize("length", [5, 64, 128, 129, 333, 700])
def test_blocks_give_the_values_and_gradients_of_all_scores_at_once(length):
    arrays, ids = packed_rows(length)
    weights = jnp.sin(jnp.arange(ROWS * HEADS * length * WIDTH, dtype=jnp.float32)).reshape(arrays[0].shape)

    def results(attend):
        def total(query, key, value):
            context = attend(query, key, value, ids)
            return jnp.sum(context * weights), context

        (_, context), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*arrays)
        return context, *gradients

    in_blocks = results(functools.partial(attention.attend_causally, scale=SCALE))
    for found, expected in zip(in_blocks, results(attend_at_once), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_rows_one_by_one_give_the_same(monkeypatch):
    arrays, ids = packed_rows(100)

    def results():
        def total(query, key, value):
            context = attention.attend_causally(query, key, value, ids, SCALE)
            return jnp.sum(jnp.sin(context)), context

        (_, context), gradients = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(*arrays)
        return context, *gradients

    together = results()
    monkeypatch.setattr(attention, "LARGE", 0)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    for found, expected in zip(results(), together, strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_rows_one_by_one_draw_different_dropout(monkeypatch):
    monkeypatch.setattr(attention, "LARGE", 0)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    zeros, ones = jnp.zeros((2, 1, 64, WIDTH)), jnp.ones((2, 1, 64, WIDTH))
    context = attention.attend_causally(
        zeros, zeros, ones, jnp.ones((2, 64), int), SCALE, dropout_rate=0.5, dropout_key=jax.random.key(0)
    )
    assert np.abs(context[0] - context[1]).max() > 0.05


def test_the_mask_of_a_block_is_its_part_of_the_mask_of_all():
    _, ids = packed_rows(50)
    whole = attention.segment_mask(ids)
    assert np.array_equal(attention.segment_mask(ids, 20, 33), whole[:, :, 20:33, :33])
    assert not whole[:, :, 20:33, 33:].any()


def program(arrays, ids, **options) -> str:
    """What attention is made of, as JAX writes it."""

    def attend(query, key, value):
        return attention.attend_causally(query, key, value, ids, SCALE, **options)

    return str(jax.make_jaxpr(attend)(*arrays))


def test_rows_come_one_by_one_where_scores_are_larger_than_the_limit_and_there_are_several(monkeypatch):
    arrays, ids = packed_rows(64)
    monkeypatch.setattr(attention, "LARGE", 4 * ROWS * HEADS * 64 * 64)
    assert "scan" not in program(arrays, ids)
    monkeypatch.setattr(attention, "LARGE", 4 * ROWS * HEADS * 64 * 64 - 1)
    assert "scan" in program(arrays, ids)
    assert "scan" not in program([array[:1] for array in arrays], ids[:1])


def test_rows_come_one_by_one_on_a_single_cpu_only(monkeypatch):
    """Others have the memory, and would wait for each row."""
    arrays, ids = packed_rows(64)
    monkeypatch.setattr(attention, "LARGE", 0)

    def mesh(size: int, platform: str) -> Any:
        return types.SimpleNamespace(size=size, devices=np.array([types.SimpleNamespace(platform=platform)] * size))

    assert "scan" in program(arrays, ids, mesh=mesh(1, "cpu"))
    for other in (mesh(2, "cpu"), mesh(1, "gpu"), mesh(1, "METAL")):
        assert "scan" not in program(arrays, ids, mesh=other)
    for platform in ("gpu", "METAL"):
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        assert "scan" not in program(arrays, ids)


@pytest.mark.parametrize(
    ("length", "sizes"), [(60, [60]), (130, [64, 64, 2]), (1024, [128] * 8), (1025, [129] * 7 + [122])]
)
def test_blocks_are_at_least_64_long_and_at_most_8(monkeypatch, length, sizes):
    arrays, ids = packed_rows(length)
    attend, seen = attention.attend, []

    def noting(query, *arguments, **options):
        seen.append(query.shape[2])
        return attend(query, *arguments, **options)

    monkeypatch.setattr(attention, "attend", noting)
    program(arrays, ids)
    assert seen == sizes


def test_products_are_in_full_float32_only_when_asked():
    arrays, ids = packed_rows(5)
    arrays = [array.astype(jnp.bfloat16) for array in arrays]
    mask = attention.segment_mask(ids)
    for upcast in (False, True):

        def at_once(query, key, value, upcast=upcast):
            return attention.attend(query, key, value, mask, SCALE, upcast=upcast)

        assert ("HIGHEST" in program(arrays, ids, upcast=upcast)) == upcast
        assert ("HIGHEST" in str(jax.make_jaxpr(at_once)(*arrays))) == upcast
    assert "HIGHEST" not in program(arrays, ids)
    assert "HIGHEST" not in str(jax.make_jaxpr(functools.partial(attention.attend, mask=mask, scale=SCALE))(*arrays))


@pytest.mark.parametrize("large", [attention.LARGE, 0])
def test_a_row_s_number_decides_what_it_drops(monkeypatch, large):
    monkeypatch.setattr(attention, "LARGE", large)
    arrays, ids = packed_rows(64)

    def attend(order, numbers):
        query, key, value, segment_ids = (array[jnp.array(order)] for array in (*arrays, ids))
        return attention.attend_causally(
            query, key, value, segment_ids, SCALE, dropout_rate=0.5, dropout_key=jax.random.key(0), numbers_B=numbers
        )

    expected = attend([0, 1], None)
    np.testing.assert_array_equal(attend([0, 1], jnp.array([0, 1])), expected)
    np.testing.assert_array_equal(attend([1, 0], jnp.array([1, 0])), expected[::-1])
    assert np.any(attend([0, 1], jnp.array([7, 8])) != expected)


@pytest.mark.parametrize("large", [attention.LARGE, 0])
def test_the_backward_pass_keeps_no_scores(monkeypatch, large):
    """Of 1,024 tokens, what is saved is less than one head's scores."""
    monkeypatch.setattr(attention, "LARGE", large)
    length = 1024
    arrays, ids = packed_rows(length)

    def total(query, key, value):
        return jnp.sum(attention.attend_causally(query, key, value, ids, SCALE))

    _, backward = jax.vjp(total, *arrays)
    saved = sum(leaf.nbytes for leaf in jax.tree.leaves(backward))
    assert saved < 4 * length * length


def test_dropout_drops_the_same_probabilities_in_the_backward_pass():
    """Attention is linear in the values, so its gradient there says which probabilities were kept."""
    (query, key, value), ids = packed_rows(200)
    key_of_dropout = jax.random.key(3)

    def attend(value):
        return attention.attend_causally(query, key, value, ids, SCALE, dropout_rate=0.5, dropout_key=key_of_dropout)

    context, backward = jax.vjp(attend, value)
    (gradient,) = backward(context)
    np.testing.assert_allclose(jnp.sum(gradient * value), jnp.sum(context * context), rtol=1e-4)
    plain = attention.attend_causally(query, key, value, ids, SCALE)
    assert np.abs(context - plain).max() > 0.1


def test_blocks_draw_different_dropout():
    """Uniform attention over equal values gives the kept share; equal draws in both blocks would repeat it."""
    zeros, ones = jnp.zeros((1, 1, 128, WIDTH)), jnp.ones((1, 1, 128, WIDTH))
    ids = jnp.arange(128)[None] // 64 + 1  # the second block sees itself alone, as the first one does
    context = attention.attend_causally(
        zeros, zeros, ones, ids, SCALE, dropout_rate=0.5, dropout_key=jax.random.key(0)
    )[0, 0, :, 0]
    assert np.abs(context[:64] - context[64:]).max() > 0.05


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dtype": "bfloat16", "attn_pdrop": 0.0}, "cudnn"),
        ({"dtype": "bfloat16", "attn_pdrop": 0.1}, "einsum"),
        ({"dtype": "float32", "attn_pdrop": 0.0}, "einsum"),
        ({"dtype": "bfloat16", "attn_pdrop": 0.0, "reorder_and_upcast_attn": True}, "einsum"),
        ({"dtype": "bfloat16", "attn_pdrop": 0.0, "attn_implementation": "einsum"}, "einsum"),
    ],
)
def test_a_gpu_gets_the_fused_kernel_where_that_can_do_what_is_asked(monkeypatch, changes, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    found = GPT2.from_config(Model(**changes), vocab_size=100)
    assert (found.attn_implementation, found.scan_unroll) == (expected, 1)


@pytest.mark.parametrize(
    "changes",
    [{"attn_pdrop": 0.1}, {"attn_pdrop": 0, "reorder_and_upcast_attn": True}, {"attn_pdrop": 0, "dtype": "float32"}],
)
def test_the_fused_kernel_is_refused_where_it_cannot(changes):
    with pytest.raises(ValueError, match="attn_implementation cudnn"):
        Model(attn_implementation="cudnn", **changes)


A_GPU = {"platform": "gpu", "dtype": "bfloat16", "head_width": 64, "length": 200, "is_plain": True}
A_TPU = {"platform": "tpu", "dtype": "float32", "head_width": 64, "length": 256, "is_plain": True}


@pytest.mark.parametrize(
    ("asked", "where", "expected"),
    [
        ("auto", A_GPU, "cudnn"),
        ("auto", A_GPU | {"head_width": 128}, "cudnn"),
        ("auto", A_GPU | {"head_width": 136}, "einsum"),
        ("auto", A_GPU | {"head_width": 60}, "einsum"),
        ("auto", A_GPU | {"dtype": "float32"}, "einsum"),
        ("auto", A_GPU | {"is_plain": False}, "einsum"),
        ("einsum", A_GPU, "einsum"),
        ("cudnn", A_GPU, "cudnn"),
        ("auto", A_TPU, "splash"),
        ("auto", A_TPU | {"dtype": "bfloat16", "head_width": 60}, "splash"),
        ("auto", A_TPU | {"length": 200}, "einsum"),
        ("auto", A_TPU | {"length": None}, "splash"),
        ("splash", A_TPU, "splash"),
        ("splash", A_TPU | {"length": None}, "splash"),
        ("auto", A_GPU | {"platform": "cpu"}, "einsum"),
        # Without training, another machine answers, too.
        ("cudnn", A_TPU | {"length": None}, "einsum"),
        ("splash", A_GPU | {"length": None}, "einsum"),
    ],
)
def test_the_form_of_attention_that_is_chosen(asked, where, expected):
    assert attention.choose(asked, **where) == expected


@pytest.mark.parametrize(
    ("asked", "where", "why"),
    [
        ("cudnn", A_TPU, "a kernel of NVIDIA GPUs, and this is a tpu; set it to einsum"),
        ("splash", A_GPU, "a kernel of TPUs, and this is a gpu; set it to einsum"),
        ("cudnn", A_GPU | {"dtype": "float32"}, "set model.dtype float32 to bfloat16"),
        ("cudnn", A_GPU | {"head_width": 60}, "needs heads of 8, 16, … or 128 wide, not 60; change model.n_head"),
        ("cudnn", A_GPU | {"head_width": 136}, "needs heads of 8, 16, … or 128 wide, not 136; change model.n_head"),
        ("splash", A_TPU | {"length": 200}, "change train.sequence_length 200"),
        ("splash", A_TPU | {"is_plain": False}, "has no attn_pdrop and no reorder_and_upcast_attn; set them to 0"),
    ],
)
def test_a_kernel_that_cannot_be_had_is_refused_with_what_to_change(asked, where, why):
    with pytest.raises(UserError, match=f"^model.attn_implementation {asked} .*{re.escape(why)}, or set it to auto$"):
        attention.choose(asked, **where)


@pytest.mark.gpu
def test_the_fused_kernel_keeps_segments_apart_as_blocks_do():
    arrays, ids = packed_rows(256)
    arrays = [jnp.pad(array, ((0, 0), (0, 0), (0, 0), (0, 56))).astype(jnp.bfloat16) for array in arrays]

    def results(implementation: Any):
        def total(query, key, value):
            context = attention.attend_causally(query, key, value, ids, SCALE, implementation=implementation)
            return jnp.sum(jnp.square(context.astype(jnp.float32))), context

        (_, context), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*arrays)
        return context, *gradients

    for found, expected in zip(results("cudnn"), results("einsum"), strict=True):
        np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), rtol=0.05, atol=0.05)
