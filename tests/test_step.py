"""One step is the optimizer's step on Σ weight × mean loss, however the batch is cut and wherever it is computed.

Run as a program, this file trains five steps on every mesh of eight virtual devices and prints the loss curves.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax import config, model, objectives, sharding, step
from ssl_jax.optimizer import learning_rate_schedule, make_optimizer

SHAPE = model.GPT2(61, 64, 12, 16, 2, 2, 32, initializer_range=0.1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
# A large epsilon: Adam would blow up the rounding of gradients that are zero in theory, as that of the keys' bias.
OPTIMIZER_SETTINGS = config.Optimizer(learning_rate=1e-2, warmup_steps=2, weight_decay=0.1, eps=1e-3)
OBJECTIVES = config.Objectives(supervised=1.0, lm=0.5, pseudo=0.7)
TOTAL_STEPS = 20
EMA_DECAY = 0.5
OPTIMIZER = make_optimizer(OPTIMIZER_SETTINGS)
MIXES = ([0, 0, 0, 1, 1, 1, 1, 2], [0] * 8, [0, 0, 1, 1, 1, 1, 1, 1])


def settings(**fields):
    return step.StepSettings(
        objective_weights=functools.partial(objectives.weights, OBJECTIVES, first_round=1, total_steps=TOTAL_STEPS),
        schedule=learning_rate_schedule(OPTIMIZER_SETTINGS, TOTAL_STEPS),
        **{"ema_decay": EMA_DECAY, **fields},
    )


def make_batch(number=0, streams=MIXES[0]):
    """Rows of two segments and some padding; tokens that can be learned."""
    rng = np.random.default_rng(number)
    tokens = (rng.integers(0, 20, (8, 1)) + 3 * np.arange(13)) % 61
    positions = np.tile(np.r_[np.arange(5), np.arange(4), 0, 0, 0], (8, 1))
    segment_ids = np.tile(np.r_[[1] * 5, [2] * 4, [0] * 3], (8, 1))
    weights = rng.choice([0.0, 0.5, 1.0], (8, 12)) * (segment_ids > 0)
    integers = {"tokens": tokens[:, :12], "targets": tokens[:, 1:], "positions": positions, "segment_ids": segment_ids}
    batch = {name: array.astype(np.int32) for name, array in integers.items()}
    return {**batch, "loss_weights": weights.astype(np.float32), "stream": np.array(streams, np.int32)}


def compiled(**fields):
    """The step, compiled fast rather than well: the arithmetic is the same."""
    options = {"xla_backend_optimization_level": 0}
    function = functools.partial(step.train_step, SHAPE, OPTIMIZER, settings(**fields))
    return jax.jit(function, donate_argnums=0, compiler_options=options)


KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def train_step():
    return compiled()


@pytest.fixture(scope="module")
def fresh():
    """The state before the first step, anew at every call, since a step consumes it."""
    host = jax.device_get(jax.jit(functools.partial(step.init_state, SHAPE, OPTIMIZER, settings()))(jax.random.key(0)))
    return lambda: jax.tree.map(jnp.array, host)


@pytest.fixture(scope="module")
def nll_of():
    """Per-token losses `[B, T]`, for sums by hand."""
    score = jax.jit(step.score, static_argnums=0)
    return lambda params, batch: np.asarray(score(SHAPE, params, batch), np.float64)


def close(one, other, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), one, other)


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(other))


def test_a_fresh_state_averages_from_its_own_parameters(fresh):
    state = fresh()
    equal(state.ema, state.params)
    assert (int(state.step), int(state.skipped)) == (0, 0)
    assert (
        jax.eval_shape(functools.partial(step.init_state, SHAPE, OPTIMIZER, settings(ema_decay=0.0)), KEY).ema is None
    )


@pytest.mark.parametrize("streams", MIXES)
def test_loss_is_the_weighted_sum_of_each_objectives_mean(train_step, fresh, nll_of, streams):
    batch = make_batch(3, streams)
    state = fresh()
    nll = nll_of(state.params, batch) * batch["loss_weights"]
    weights = np.asarray(settings().objective_weights(state.step))
    _, metrics = train_step(state, batch, KEY)
    expected = 0.0
    for number, name in enumerate(objectives.NAMES):
        members = np.array(streams) == number
        tokens = batch["loss_weights"][members].sum()
        mean = nll[members].sum() / tokens if tokens else 0.0
        assert float(metrics[f"tokens/{name}"]) == tokens
        assert float(metrics[f"weight/{name}"]) == pytest.approx(weights[number])
        assert float(metrics[f"loss/{name}"]) == pytest.approx(mean, rel=1e-5)
        expected += weights[number] * mean
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["lr"]) == pytest.approx(float(settings().schedule(jnp.int32(0))))
    assert int(metrics["skipped"]) == 0


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulated_micro_batches_are_one_large_batch(train_step, fresh, accumulation):
    """Though micro-batches hold very different shares of every objective's tokens."""
    batch = make_batch(1)
    whole, whole_metrics = train_step(fresh(), batch, KEY)
    parts, parts_metrics = compiled(accumulation=accumulation)(fresh(), batch, KEY)
    close(parts_metrics, whole_metrics, rtol=1e-5, atol=1e-6)
    close((parts.params, parts.ema), (whole.params, whole.ema), rtol=1e-5, atol=2e-6)


def test_a_step_without_a_finite_loss_changes_nothing_and_is_counted(train_step, fresh):
    good, bad = make_batch(0), make_batch(0)
    bad["loss_weights"] = np.where(bad["loss_weights"] > 0, np.float32("inf"), np.float32(0))
    state, _ = train_step(fresh(), good, KEY)
    before = jax.device_get(state)
    for times in (1, 2):
        state, metrics = train_step(state, bad, KEY)
        assert not np.isfinite(metrics["loss"])
        assert int(metrics["skipped"]) == int(state.skipped) == times
        equal((state.params, state.ema, state.optimizer_state), (before.params, before.ema, before.optimizer_state))
    assert int(state.step) == 3
    state, metrics = train_step(state, good, KEY)
    assert int(metrics["skipped"]) == 0
    assert np.any(state.params["wpe"]["embedding"] != before.params["wpe"]["embedding"])


def test_average_follows_quickly_at_first_and_then_at_its_decay(train_step, fresh):
    state = fresh()
    for number in range(12):
        before = jax.device_get(state.ema)
        state, _ = train_step(state, make_batch(number), KEY)
        decay = min(EMA_DECAY, (1 + number) / (10 + number))
        expected = jax.tree.map(lambda old, new, d=decay: d * old + (1 - d) * new, before, jax.device_get(state.params))
        close(state.ema, expected, rtol=1e-5, atol=1e-7)
    assert decay == EMA_DECAY, "the test reaches the plateau"


def test_training_lowers_the_loss_and_compiles_once_whatever_the_mix_of_streams(train_step, fresh):
    state, losses = fresh(), []
    for number in range(15):
        state, metrics = train_step(state, make_batch(number, MIXES[number % 3]), KEY)
        losses.append(float(metrics["loss/supervised"]))
    assert losses[-1] < 0.8 * losses[0]
    assert train_step._cache_size() == 1


def test_the_old_state_is_donated(train_step, fresh):
    state = fresh()
    train_step(state, make_batch(), KEY)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.ema, state.optimizer_state)))


def test_replaced_tokens_follow_from_seed_and_step(fresh):
    @functools.partial(jax.jit, static_argnums=0)
    def loss(rate, state, at, key):
        state = dataclasses.replace(state, step=at)
        metrics = step.train_step(SHAPE, OPTIMIZER, settings(token_replacement=rate), state, make_batch(), key)[1]
        return metrics["loss/supervised"]

    cases = ((0.0, 0, 7), (0.3, 0, 7), (0.3, 1, 7), (0.3, 0, 8))
    values = [float(loss(rate, fresh(), jnp.int32(at), jax.random.key(seed))) for rate, at, seed in (*cases, cases[1])]
    assert len(set(values[:4])) == 4
    assert values[4] == values[1]


# Meshes ---------------------------------------------------------------------------------------------------------------

MESHES = ((8, 1, 1), (1, 8, 1), (2, 2, 2))


def loss_curve(sizes, devices):
    """Losses of five steps with everything placed as a run places it, and how many parameters are really cut."""
    mesh = sharding.make_mesh(config.Mesh(**dict(zip(sharding.AXES, sizes, strict=True))), devices)
    init = functools.partial(step.init_state, SHAPE, OPTIMIZER, settings())
    abstract = jax.eval_shape(init, KEY)
    placed = sharding.shard_like_params(abstract, sharding.shard_params(abstract.params, mesh), mesh)
    train_step: Any = jax.jit(
        functools.partial(step.train_step, SHAPE, OPTIMIZER, settings()),
        donate_argnums=0,
        out_shardings=(placed, sharding.replicated(mesh)),
    )
    # The same initial values for every mesh: drawing them in place is another test.
    state = jax.device_put(jax.device_get(jax.jit(init)(KEY)), placed)
    curve = []
    for number in range(5):
        state, metrics = train_step(state, sharding.put_batch(make_batch(number), mesh), KEY)
        curve.append(float(metrics["loss"]))
    cut = [not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves((state.params, state.ema))]
    return {"losses": curve, "cut": sum(cut), "compilations": train_step._cache_size()}


@pytest.mark.slow
def test_every_mesh_of_eight_devices_gives_the_loss_curve_of_one():
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout.splitlines()[-1])
    expected = results.pop("(1, 1, 1)")
    assert results.keys() == {str(sizes) for sizes in MESHES}
    assert expected["losses"][-1] < expected["losses"][0]
    for name, result in results.items():
        np.testing.assert_allclose(result["losses"], expected["losses"], rtol=2e-5, err_msg=name)
        assert result["compilations"] == 1, name
    assert results["(8, 1, 1)"]["cut"] == 0
    assert results["(1, 8, 1)"]["cut"] == 2 * 6 and results["(2, 2, 2)"]["cut"] == 2 * 8


if __name__ == "__main__":
    assert jax.device_count() == 8
    curves = {str(sizes): loss_curve(sizes, jax.devices()) for sizes in MESHES}
    print(json.dumps({"(1, 1, 1)": loss_curve((1, 1, 1), jax.devices()[:1]), **curves}))
