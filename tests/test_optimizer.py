"""AdamW by the book, on the schedule that the configuration names, decaying matrices only."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ssl_jax import model
from ssl_jax.config import Optimizer
from ssl_jax.optimizer import decay_mask, learning_rate_schedule, make_optimizer


def numpy_adamw(params, gradients, settings, rates):
    """Loshchilov & Hutter 2019, algorithm 2, in float64 with global-norm clipping; `weight` decays, `bias` not."""
    moments = {name: (np.zeros_like(value), np.zeros_like(value)) for name, value in params.items()}
    for number, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        norm = np.sqrt(sum((value**2).sum() for value in gradient.values()))
        for name in params:
            clipped = gradient[name] * min(1.0, settings.max_grad_norm / norm)
            first, second = moments[name]
            first = settings.b1 * first + (1 - settings.b1) * clipped
            second = settings.b2 * second + (1 - settings.b2) * clipped**2
            moments[name] = first, second
            update = first / (1 - settings.b1**number) / (np.sqrt(second / (1 - settings.b2**number)) + settings.eps)
            decay = settings.weight_decay if name == "kernel" else 0.0
            params[name] = params[name] - rate * (update + decay * params[name])
    return params


def test_updates_equal_adamw_written_out_by_hand():
    rng = np.random.default_rng(0)
    settings = Optimizer(learning_rate=0.02, warmup_steps=2, weight_decay=0.3, max_grad_norm=1.5, eps=1e-6)
    params = {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}
    # Some gradients are above the clipping norm, some below.
    gradients = [{name: rng.normal(size=v.shape) * size for name, v in params.items()} for size in (3, 0.1, 1, 9, 0.3)]
    schedule = learning_rate_schedule(settings, 5)
    rates = [np.asarray(schedule(jnp.int32(step))).item() for step in range(5)]
    expected = numpy_adamw(dict(params), gradients, settings, rates)

    optimizer = make_optimizer(settings)
    ours: Any = jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), params)
    state, update = optimizer.init(ours), jax.jit(optimizer.update)
    for gradient, rate in zip(gradients, rates, strict=True):
        updates, state = update(jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), gradient), state, ours)
        ours = optax.apply_updates(ours, jax.tree.map(lambda leaf, rate=rate: rate * leaf, updates))
    for name, value in expected.items():
        np.testing.assert_allclose(ours[name], value, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_decay_is_for_kernels_and_embeddings_alone_stacked_or_not(scan_layers, tied):
    shape = model.GPT2(11, 11, 8, 8, 2, 2, 16, scan_layers=scan_layers, tie_word_embeddings=tied)
    params = jax.eval_shape(lambda key: model.init(shape, key), jax.random.key(0))
    decided = {jax.tree_util.keystr(path): value for path, value in jax.tree.leaves_with_path(decay_mask(params))}
    spared = ("'bias']", "'scale']")
    assert {path for path, value in decided.items() if not value} == {p for p in decided if p.endswith(spared)}
    assert sum(decided.values()) == (2 if tied else 3) + 4 * (1 if scan_layers else 2)


def test_muon_leaves_tables_biases_and_norms_to_adam_an_untied_head_included():
    """Adam's first update has the same size for every element of an array; an orthogonalized one has not."""
    shape = model.GPT2(11, 11, 8, 8, 2, 2, 16, tie_word_embeddings=False)
    rng = np.random.default_rng(0)
    params = model.init(shape, jax.random.key(0))
    gradient = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), params)
    optimizer = make_optimizer(Optimizer(name="muon", weight_decay=0.0))
    updates, _ = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
    sizes = {jax.tree_util.keystr(path): np.abs(leaf) for path, leaf in jax.tree.leaves_with_path(updates)}
    uneven = {path for path, size in sizes.items() if np.ptp(size) > 1e-3 * size.max()}
    assert uneven == {path for path in sizes if path.endswith("['kernel']")}


def rates(steps, total, **fields):
    schedule = learning_rate_schedule(Optimizer(learning_rate=1e-2, **fields), total)
    return [np.asarray(schedule(jnp.int32(step))).item() for step in steps]


def test_warm_up_is_linear_and_its_first_step_already_moves():
    np.testing.assert_allclose(rates(range(5), 100, warmup_steps=4), [0.0025, 0.005, 0.0075, 0.01, 0.01], rtol=1e-6)


@pytest.mark.parametrize(("warmup", "steps"), [(0.1, 10), (10.0, 10), (0.999, 100), (500, 100), (1, 1)])
def test_warm_up_below_one_is_a_fraction_of_all_steps_and_never_longer_than_the_run(warmup, steps):
    values = rates(range(100), 100, warmup_steps=warmup, lr_scheduler_type="constant")
    np.testing.assert_allclose(values, [min(1.0, (s + 1) / steps) * 0.01 for s in range(100)], rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "middle", "end"), [("cosine", 0.0055, 0.001), ("linear", 0.0055, 0.001), ("constant", 0.01, 0.01)]
)
def test_decay_starts_at_the_peak_and_ends_at_the_floor(name, middle, end):
    values = rates((20, 60, 100, 1000), 100, warmup_steps=20, lr_scheduler_type=name, min_lr_ratio=0.1)
    np.testing.assert_allclose(values, [0.01, middle, end, end], rtol=1e-5)


def test_cosine_is_a_cosine():
    values = rates((45, 70, 95), 120, warmup_steps=20, min_lr_ratio=0.0)
    np.testing.assert_allclose(values, [0.01 * (1 + np.cos(np.pi * t)) / 2 for t in (0.25, 0.5, 0.75)], rtol=1e-5)


def test_without_warm_up_the_first_step_has_the_peak():
    np.testing.assert_allclose(rates((0, 50), 50, warmup_steps=0, min_lr_ratio=0.0), [0.01, 0.0], atol=1e-9)
