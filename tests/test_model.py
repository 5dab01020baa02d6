"""The model in all its forms is one function: packed, alone, cached, scanned, unrolled, recomputed."""

import dataclasses
import functools
import typing
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax import attention, config, model

# Every layer scales its attention scores by another factor, so that a layer taken for another is noticed.
SHAPE = model.GPT2(
    vocab_size=61,
    padded_vocab_size=64,
    n_positions=24,
    n_embd=16,
    n_layer=2,
    n_head=2,
    n_inner=24,
    scale_attn_by_inverse_layer_idx=True,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
)
WITH_DROPOUT = dataclasses.replace(SHAPE, resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)

forward: Any = jax.jit(model.forward, static_argnums=0)


@pytest.fixture(scope="module")
def params():
    """Parameters without a zero or a one, so that a bias or a scale that is left out is noticed."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(functools.partial(model.init, SHAPE), jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.1, 0.2, leaf.shape), leaf.dtype), shapes)


def packed(*segments, length=16) -> tuple[Any, Any, Any]:
    """Tokens, positions and segment ids of one row, `[1, T]`."""
    tokens, positions, ids = np.zeros((3, 1, length), np.int32)
    begin = 0
    for number, segment in enumerate(segments, start=1):
        place = slice(begin, begin + len(segment))
        tokens[0, place], positions[0, place], ids[0, place] = segment, np.arange(len(segment)), number
        begin += len(segment)
    return tokens, positions, ids


SEGMENTS = ([3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8], [60, 0, 7])


# Packing --------------------------------------------------------------------------------------------------------------


def test_every_packed_segment_gives_what_it_gives_alone(params):
    together = np.asarray(forward(SHAPE, params, *packed(*SEGMENTS)))[0]
    begin = 0
    for segment in SEGMENTS:
        alone = np.asarray(forward(SHAPE, params, *packed(segment)))[0, : len(segment)]
        np.testing.assert_allclose(together[begin : begin + len(segment)], alone, rtol=1e-5, atol=1e-5)
        begin += len(segment)


@pytest.mark.parametrize(("place", "seen_by"), [(0, range(0, 5)), (6, range(6, 12)), (11, range(11, 12)), (15, [15])])
def test_a_token_reaches_itself_and_later_tokens_of_its_segment_and_nothing_else(params, place, seen_by):
    """Bitwise: other segments, earlier tokens and (from padding) all real tokens are untouched."""
    tokens, positions, ids = packed(*SEGMENTS)
    changed = tokens.copy()
    changed[0, place] = 33
    before, after = (np.asarray(forward(SHAPE, params, t, positions, ids))[0] for t in (tokens, changed))
    assert np.flatnonzero(np.any(before != after, axis=-1)).tolist() == list(seen_by)
    assert np.isfinite(after).all()


# Layouts and recomputation --------------------------------------------------------------------------------------------


def test_scanned_and_unrolled_blocks_are_the_same_function_of_the_same_parameters(params):
    unrolled = dataclasses.replace(SHAPE, scan_layers=False)
    converted = model.unstack(SHAPE, params)
    expected = jax.eval_shape(functools.partial(model.init, unrolled), jax.random.key(0))
    assert jax.tree.map(jnp.shape, converted) == jax.tree.map(jnp.shape, expected)
    np.testing.assert_allclose(
        forward(unrolled, converted, *packed(*SEGMENTS)), forward(SHAPE, params, *packed(*SEGMENTS)), atol=1e-5
    )
    assert model.unstack(unrolled, converted) is converted


def test_the_loop_over_blocks_may_be_unrolled(params):
    """The same parameters and, with dropout, the same draws."""
    keys = [jax.random.key(5)]
    looped, unrolled = (
        forward(dataclasses.replace(WITH_DROPOUT, scan_unroll=n), params, *packed(*SEGMENTS), *keys) for n in (1, 2)
    )
    np.testing.assert_allclose(unrolled, looped, atol=1e-5)


@pytest.fixture(scope="module")
def gradient(params):
    def compute(shape):
        def loss(params):
            hidden = model.forward(shape, params, *packed(*SEGMENTS), jax.random.key(5, impl="rbg"))
            return jnp.sum(jnp.sin(hidden))

        return jax.jit(jax.grad(loss))(params if shape.scan_layers else model.unstack(SHAPE, params))

    return compute


@pytest.mark.parametrize("scan_layers", [True, False])
def test_recomputation_changes_no_gradient_dropout_included(gradient, scan_layers):
    shape = dataclasses.replace(WITH_DROPOUT, scan_layers=scan_layers)
    expected = gradient(shape)
    for remat in ("dots", "full"):
        found = gradient(dataclasses.replace(shape, remat=remat))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), found, expected)


# Cache ----------------------------------------------------------------------------------------------------------------


def test_prefill_and_decode_equal_the_forward_pass_for_prompts_of_any_length(params):
    rng = np.random.default_rng(1)
    lengths, slots, new = np.array([3, 8, 5]), 8, 5
    texts = rng.integers(0, 61, (3, slots + new)).astype(np.int32)
    expected = [
        np.asarray(forward(SHAPE, params, *packed(row[: n + new].tolist())))[0, n - 1 : n + new]
        for row, n in zip(texts, lengths, strict=True)
    ]

    prompts = np.where(np.arange(slots) < lengths[:, None], texts[:, :slots], 44)  # anything behind the prompts
    layers = model.unstack(SHAPE, params)
    hidden, cache = jax.jit(model.prefill, static_argnums=(0, 3))(SHAPE, layers, prompts, slots + new)
    found = [np.asarray(hidden)[np.arange(3), lengths - 1]]
    decode: Any = jax.jit(model.decode, static_argnums=0)
    for number in range(new):
        places = np.arange(slots + new)[None]
        visible = (places < lengths[:, None]) | ((places >= slots) & (places <= slots + number))
        tokens = texts[np.arange(3), lengths + number]
        hidden, cache = decode(SHAPE, layers, tokens, lengths + number, slots + number, visible, cache)
        found.append(np.asarray(hidden))
    np.testing.assert_allclose(np.stack(found, axis=1), np.stack(expected), rtol=1e-4, atol=1e-5)
    assert decode._cache_size() == 1


# Attention scale and type, output matrix ------------------------------------------------------------------------------


@pytest.mark.parametrize(("by_width", "by_layer"), [(True, True), (True, False), (False, True)])
def test_scaled_scores_are_the_scores_of_scaled_queries(params, by_width, by_layer):
    """The factors written into the weights of each layer's queries, and the model left to scale nothing."""
    scaled = dataclasses.replace(SHAPE, scale_attn_weights=by_width, scale_attn_by_inverse_layer_idx=by_layer)
    plain = dataclasses.replace(SHAPE, scale_attn_weights=False, scale_attn_by_inverse_layer_idx=False)
    factors_L = np.array([8**-0.5 if by_width else 1.0] * 2) / (np.array([1, 2]) if by_layer else 1)
    kernel_LDE, bias_LE = (np.array(params["h"]["attn_c_attn"][kind]) for kind in ("kernel", "bias"))
    kernel_LDE[..., :16] *= factors_L[:, None, None]
    bias_LE[..., :16] *= factors_L[:, None]
    by_hand = {**params, "h": {**params["h"], "attn_c_attn": {"kernel": kernel_LDE, "bias": bias_LE}}}
    found, expected = (forward(*each, *packed(*SEGMENTS)) for each in ((scaled, params), (plain, by_hand)))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_upcast_products_are_exact_where_bfloat16_rounds_scaled_queries(params):
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.normal(0, 3, (2, 2, 9, 12)), "bfloat16").astype("float32") for _ in range(3))
    mask, scale = jnp.tri(9, dtype=bool)[None, None], 12**-0.5
    exact = attention.attend(query, key, value, mask, scale)
    half = query.astype("bfloat16"), key.astype("bfloat16"), value
    np.testing.assert_allclose(attention.attend(*half, mask, scale, upcast=True), exact, rtol=1e-5, atol=1e-5)
    assert np.abs(attention.attend(*half, mask, scale) - exact).max() > 1e-3

    shape = dataclasses.replace(SHAPE, dtype=jnp.dtype("bfloat16"))
    upcast = dataclasses.replace(shape, reorder_and_upcast_attn=True)
    large = jax.tree.map(lambda leaf: 3 * leaf, params)
    hidden, other = (forward(each, large, *packed(*SEGMENTS)) for each in (upcast, shape))
    assert hidden.dtype == jnp.bfloat16 and np.any(hidden != other)


def test_an_untied_head_is_a_table_of_its_own_that_only_the_output_reads(params):
    untied = dataclasses.replace(SHAPE, tie_word_embeddings=False, initializer_range=0.1)
    fresh = jax.jit(model.init, static_argnums=0)(untied, jax.random.key(0))
    head = fresh["lm_head"]["embedding"]
    assert head.shape == fresh["wte"]["embedding"].shape == (64, 16)
    assert float(jnp.std(head)) == pytest.approx(0.1, rel=0.1) and np.any(head != fresh["wte"]["embedding"])
    np.testing.assert_array_equal(model.output_embedding(fresh, "bfloat16"), head.astype("bfloat16"))
    np.testing.assert_array_equal(model.output_embedding(params, "float32"), params["wte"]["embedding"])
    assert model.unstack(untied, fresh)["lm_head"] is fresh["lm_head"]
    both = {**params, "lm_head": fresh["lm_head"]}
    np.testing.assert_array_equal(forward(untied, both, *packed([1, 2])), forward(SHAPE, params, *packed([1, 2])))


# Dropout --------------------------------------------------------------------------------------------------------------


class Probe(nn.Module):
    rate: float

    @nn.compact
    def __call__(self, x):
        return model._dropout(self, x, self.rate, jnp.arange(x.shape[0]))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean_and_drops_its_rate(rate):
    """Also for a width that is no multiple of the four draws in a random word."""
    kept = np.asarray(Probe(rate).apply({}, jnp.ones((200, 301)), rngs={"dropout": jax.random.key(0)}))
    dropped = round(rate * 256) / 256
    assert len(np.unique(kept)) == 2
    np.testing.assert_allclose(np.unique(kept), [0, 1 / (1 - dropped)], rtol=1e-6)
    deviation = np.sqrt(dropped / (1 - dropped) / kept.size)
    assert abs(kept.mean() - 1) < 5 * deviation
    # Every column is drawn for itself, the odd one at the end included.
    assert np.all(np.abs((kept == 0).mean(axis=0) - dropped) < 0.18)
    neighbours = np.corrcoef(kept[:, :-1].ravel(), kept[:, 1:].ravel())[0, 1]
    assert abs(neighbours) < 0.025


@pytest.mark.parametrize("field", ["resid_pdrop", "embd_pdrop", "attn_pdrop"])
def test_each_dropout_acts_with_a_key_and_only_then(params, field):
    shape = dataclasses.replace(SHAPE, **{field: 0.5})
    without = np.asarray(forward(SHAPE, params, *packed(*SEGMENTS)))
    np.testing.assert_array_equal(forward(shape, params, *packed(*SEGMENTS)), without)
    one, again, other = (np.asarray(forward(shape, params, *packed(*SEGMENTS), jax.random.key(s))) for s in (0, 0, 1))
    assert np.array_equal(one, again) and np.any(one != other) and np.any(one != without)


def test_what_a_row_draws_follows_from_its_number_whatever_is_computed_with_it(params, monkeypatch):
    """Also where a CPU attends to the rows of a large batch one by one."""
    shape = dataclasses.replace(SHAPE, resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)
    rows = [jnp.tile(array, (4, 1)) for array in packed(*SEGMENTS)]
    whole = np.asarray(forward(shape, params, *rows, jax.random.key(0)))
    assert np.any(whole[0] != whole[2])  # equal rows, different draws
    numbers = jnp.array([2, 0])
    first, second, third = (array[:2] for array in rows)
    found = np.asarray(forward(shape, params, first, second, third, jax.random.key(0), numbers))
    np.testing.assert_allclose(found, whole[[2, 0]], rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(attention, "LARGE", 0)
    one_by_one = np.asarray(model.forward(shape, params, first, second, third, jax.random.key(0), numbers))
    np.testing.assert_allclose(one_by_one, whole[[2, 0]], rtol=1e-5, atol=1e-6)


def test_layers_draw_different_dropout(params):
    """With residual projections that add 1 to everything, each element's kept count shows both layers' draws."""
    shape = dataclasses.replace(SHAPE, resid_pdrop=0.5)
    blocks = jax.tree.map(jnp.zeros_like, params["h"])
    blocks["attn_c_proj"]["bias"] += 1.0

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x, segment_ids, numbers, layers):
            scan: Any = nn.scan
            stack = scan(
                model._TrainBlock,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, nn.broadcast, 0),
                length=2,
            )
            return stack(shape, False, name="h")(x, segment_ids, numbers, layers)[0]

    sums: Any = Stack().apply(
        {"params": {"h": blocks}},
        jnp.zeros((4, 16, 16)),
        jnp.ones((4, 16), jnp.int32),
        jnp.arange(4),
        jnp.arange(2),
        rngs={"dropout": jax.random.key(0)},
    )
    assert set(np.unique(sums).tolist()) == {0.0, 2.0, 4.0}  # equal draws would never keep just one


# Types and sizes ------------------------------------------------------------------------------------------------------


def test_bfloat16_arithmetic_keeps_float32_parameters_and_gradients(params, gradient):
    shape = dataclasses.replace(SHAPE, dtype=jnp.dtype("bfloat16"))
    hidden = forward(shape, params, *packed(*SEGMENTS))
    assert hidden.dtype == jnp.bfloat16
    fresh = jax.eval_shape(functools.partial(model.init, shape), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient(shape))} == {jnp.dtype("float32")}
    exact = np.asarray(forward(SHAPE, params, *packed(*SEGMENTS)))
    np.testing.assert_allclose(hidden.astype(jnp.float32)[0, :15], exact[0, :15], atol=0.15)


def test_fresh_parameters_have_gpt2s_spread():
    """Normal with the configured deviation, residual projections smaller by √(2 L), norms and biases neutral."""
    shape = dataclasses.replace(SHAPE, n_embd=64, n_inner=256, n_layer=8, initializer_range=0.02)
    fresh = jax.jit(model.init, static_argnums=0)(shape, jax.random.key(1))
    deviations = {name: float(jnp.std(fresh["h"][name]["kernel"])) for name in fresh["h"] if "_c_" in name}
    expected = {"attn_c_attn": 0.02, "attn_c_proj": 0.005, "mlp_c_fc": 0.02, "mlp_c_proj": 0.005}
    assert deviations == pytest.approx(expected, rel=0.05)
    assert float(jnp.std(fresh["wte"]["embedding"])) == pytest.approx(0.02, rel=0.05)
    assert not np.any(fresh["h"]["attn_c_proj"]["bias"])
    assert np.all(np.asarray(fresh["h"]["ln_1"]["scale"]) == 1)
    one, other = fresh["h"]["mlp_c_fc"]["kernel"][:2]
    assert np.any(one != other), "layers start alike"


def test_config_resolves_against_tokenizer_and_backend():
    settings = config.Model(
        n_layer=2, n_head=2, n_embd=16, n_positions=32, vocab_multiple=64, activation_function="relu"
    )
    shape = model.GPT2.from_config(settings, vocab_size=65)
    assert (shape.vocab_size, shape.padded_vocab_size, shape.n_inner) == (65, 128, 64)
    assert (shape.dtype, shape.param_dtype) == (jnp.dtype("float32"), jnp.dtype("float32"))
    assert (shape.activation_function, shape.n_positions) == ("relu", 32)
    fresh = jax.eval_shape(functools.partial(model.init, shape), jax.random.key(0))
    assert fresh["wte"]["embedding"].shape == (128, 16)
    exact = model.GPT2.from_config(settings.model_copy(update={"vocab_multiple": 1, "n_inner": 24}), vocab_size=65)
    assert (exact.padded_vocab_size, exact.n_inner) == (65, 24)


@pytest.mark.parametrize(("configured", "rows", "padded"), [(None, 65, 128), (130, 130, 192), (60, 65, 128)])
def test_the_vocabulary_has_a_row_for_every_token_and_as_many_as_configured(configured, rows, padded):
    shape = model.GPT2.from_config(config.Model(vocab_size=configured), vocab_size=65)
    assert (shape.vocab_size, shape.padded_vocab_size) == (rows, padded)


def test_every_field_of_the_arithmetic_reaches_the_model():
    changed: dict[str, Any] = dict(
        scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True,
        tie_word_embeddings=False, layer_norm_epsilon=1e-3, activation_function="swish", n_inner=80, n_positions=512,
        resid_pdrop=0.2, embd_pdrop=0.3, attn_pdrop=0.4, initializer_range=0.03, n_layer=3, n_head=4, n_embd=48,
    )  # fmt: skip
    settings = config.Model(**changed)
    shape = model.GPT2.from_config(settings, vocab_size=65)
    assert {name: getattr(shape, name) for name in changed} == changed
    assert all(getattr(config.Model(), name) != value for name, value in changed.items())


def test_every_activation_that_the_configuration_offers_exists():
    offered = typing.get_args(config.Model.model_fields["activation_function"].annotation)
    assert sorted(offered) == sorted(model.ACTIVATIONS)


@pytest.mark.parametrize("name", sorted(model.ACTIVATIONS))
def test_every_activation_is_its_function(name):
    x = np.linspace(-3, 3, 7)
    erf = np.array([float(jax.scipy.special.erf(v / np.sqrt(2))) for v in x])
    expected = {
        "gelu": 0.5 * x * (1 + erf),
        "gelu_new": 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
        "quick_gelu": x / (1 + np.exp(-1.702 * x)),
        "relu": np.maximum(x, 0),
        "relu2": np.maximum(x, 0) ** 2,
        "silu": x / (1 + np.exp(-x)),
        "mish": x * np.tanh(np.log1p(np.exp(x))),
        "tanh": np.tanh(x),
    }
    same = {"gelu_python": "gelu", "swish": "silu"} | dict.fromkeys(
        ("gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh"), "gelu_new"
    )
    found = model.ACTIVATIONS[name](jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, expected[same.get(name) or name], rtol=1e-5, atol=1e-6)
