"""Every term of the loss equals its formula on full distributions; what is off leaves no trace in the step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax import config, distillation, model, objectives, step, terms
from ssl_jax.optimizer import make_optimizer

SHAPE = model.GPT2(61, 64, 12, 16, 2, 2, 32, initializer_range=0.2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
DROPPING = model.GPT2(61, 64, 12, 16, 2, 2, 32, initializer_range=0.2, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.0)
OTHER = model.GPT2(61, 61, 12, 24, 1, 2, 48, initializer_range=0.2)
OPTIMIZER = make_optimizer(config.Optimizer(eps=1e-3))
KEY = jax.random.key(3)
STREAMS = (0, 0, 1, 1, 2, 2)


def make_batch(streams=STREAMS):
    rng = np.random.default_rng(0)
    rows = len(streams)
    integers = {
        "tokens": rng.integers(0, 61, (rows, 12)),
        "targets": rng.integers(0, 61, (rows, 12)),
        "positions": np.tile(np.r_[np.arange(9), 0, 0, 0], (rows, 1)),
        "segment_ids": np.tile(np.r_[[1] * 9, 0, 0, 0], (rows, 1)),
    }
    weights = rng.choice([0.0, 0.5, 1.0], (rows, 12)) * (integers["segment_ids"] > 0)
    batch = {name: jnp.asarray(array, jnp.int32) for name, array in integers.items()}
    return {**batch, "loss_weights": jnp.asarray(weights, jnp.float32), "stream": jnp.array(streams, jnp.int32)}


def settings(teaching=None, **fields):
    return step.StepSettings(
        objective_weights=lambda at: jnp.array([1.0, 0.5, 0.25, 0.0, 0.0]),
        schedule=lambda at: 1e-2,
        ema_decay=0.5,
        teaching=teaching,
        **fields,
    )


def teaching(*shapes, rows=4, streams=(1, 2), weight=0.7, **rule):
    return terms.Teaching(shapes, rows, streams, lambda at: jnp.float32(weight), distillation.Rule(**rule), 0.9)


def fresh(using, shape=SHAPE):
    return step.init_state(shape, OPTIMIZER, using, jax.random.key(0))


def take(using, state, batch=None, teachers=(), shape=SHAPE):
    """One step, compiled fast rather than well: the arithmetic is the same."""
    options = {"xla_backend_optimization_level": 0}
    function = jax.jit(functools.partial(step.train_step, shape, OPTIMIZER, using), compiler_options=options)
    return function(state, make_batch() if batch is None else batch, KEY, teachers)


def log_probabilities(shape, params, batch):
    """float64 `[B, T, V]`."""
    hidden = model.forward(shape, params, batch["tokens"], batch["positions"], batch["segment_ids"])
    logits = np.asarray(model.logits(shape, params, hidden.reshape(-1, hidden.shape[-1])), np.float64)[:, :61]
    logits -= logits.max(axis=-1, keepdims=True)
    return (logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))).reshape(*hidden.shape[:2], -1)


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(other))


def test_soft_labels_add_the_weighted_mean_divergence_of_the_taught_rows():
    using = settings(teaching(None, OTHER))
    teacher = model.init(OTHER, jax.random.key(5))
    state = fresh(using)
    state = dataclasses.replace(state, ema=model.init(SHAPE, jax.random.key(9)))
    batch = make_batch()
    _, metrics = take(using, state, batch, (teacher,))
    student = log_probabilities(SHAPE, state.params, batch)
    taught = [np.exp(log_probabilities(*one, batch)) for one in ((SHAPE, state.ema), (OTHER, teacher))]
    label = (taught[0] + taught[1]) / 2
    counted = np.asarray(batch["loss_weights"], np.float64) * np.isin(STREAMS, (1, 2))[:, None]
    divergence = ((label * (np.log(label) - student)).sum(axis=-1) * counted).sum() / counted.sum()
    assert float(metrics["loss/distillation"]) == pytest.approx(divergence, rel=1e-5)
    assert float(metrics["tokens/distillation"]) == counted.sum()
    confidence = label.max(axis=-1)[counted > 0].mean()
    assert float(metrics["distillation/confidence"]) == pytest.approx(confidence, rel=1e-5)
    _, plain = take(settings(), fresh(settings()), batch)
    assert float(metrics["loss"]) == pytest.approx(float(plain["loss"]) + 0.7 * divergence, rel=1e-5)
    for name in objectives.NAMES:
        assert float(metrics[f"loss/{name}"]) == pytest.approx(float(plain[f"loss/{name}"]), rel=1e-5)


def test_gradients_reach_the_student_and_never_a_teacher():
    """A student that equals its only teacher stays where the labels of the text leave it."""
    taught, plain = settings(teaching(None)), settings()
    with_teacher, _ = take(taught, fresh(taught))
    without, _ = take(plain, fresh(plain))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), with_teacher.params, without.params)


def test_rows_outside_the_last_are_read_by_no_teacher():
    """The teacher reads two rows; what stands in the others cannot matter to it."""
    using = settings(teaching(None, rows=2, streams=(2,)))
    batch = make_batch()
    other = {**batch, "tokens": batch["tokens"].at[:4].set(1)}
    values = []
    for one in (batch, other):
        state = dataclasses.replace(fresh(using), ema=model.init(SHAPE, jax.random.key(9)))
        values.append(float(take(using, state, one)[1]["loss/distillation"]))
    assert values[0] == pytest.approx(values[1], rel=1e-5) and values[0] > 0


@pytest.mark.parametrize("weighting", ["freematch", "softmatch"])
def test_confidence_is_averaged_over_steps_and_stays_when_a_step_is_skipped(weighting):
    using = settings(teaching(None, weighting=weighting))
    state, metrics = take(using, fresh(using))
    expected = 0.9 / 61 + 0.1 * float(metrics["distillation/confidence"])
    assert float(state.confidence.mean) == pytest.approx(expected, rel=1e-5)
    bad = {**make_batch(), "loss_weights": jnp.full((6, 12), jnp.inf)}
    after, _ = take(using, state, bad)
    equal(after.confidence, state.confidence)


@pytest.mark.parametrize("accumulation", [2, 3])
def test_accumulated_micro_batches_are_one_large_batch_with_teachers_and_r_drop(accumulation):
    results = []
    for number in (1, accumulation):
        using = settings(teaching(None, rows=6, streams=(0, 1, 2)), r_drop=1.0, accumulation=number)
        state = dataclasses.replace(fresh(using), ema=model.init(SHAPE, jax.random.key(9)))
        results.append(take(using, state))
    (one, one_metrics), (many, many_metrics) = results
    for name, value in one_metrics.items():
        np.testing.assert_allclose(many_metrics[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-6, rtol=1e-5), many.params, one.params)


def test_r_drop_feeds_every_row_twice_and_adds_half_its_weight_times_the_mean_divergence():
    batch = {**make_batch(), "fed": make_batch()["tokens"], "number": jnp.arange(6)}
    batch["factors"] = objectives.token_weights(batch["stream"], batch["loss_weights"], jnp.ones(5))
    params = model.init(DROPPING, jax.random.key(0))
    key = jax.random.key(8)
    sums = terms.total(DROPPING, params, batch, key, r_drop=0.6)

    twice = {name: jnp.repeat(array, 2, axis=0) for name, array in batch.items()}
    hidden = model.forward(DROPPING, params, twice["fed"], twice["positions"], twice["segment_ids"], key)
    logits = np.asarray(model.logits(DROPPING, params, hidden.reshape(-1, 16)), np.float64)[:, :61]
    logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    first, second = np.moveaxis(logs.reshape(6, 2, 12, 61), 1, 0)
    factors = np.asarray(batch["factors"], np.float64)
    targets = np.asarray(batch["targets"])[..., None]
    nll = [-np.take_along_axis(one, targets, axis=-1)[..., 0] for one in (first, second)]
    divergence = 0.5 * ((np.exp(first) - np.exp(second)) * (first - second)).sum(axis=-1)
    expected = (factors * (0.5 * (nll[0] + nll[1]) + 0.5 * 0.6 * divergence)).sum()
    assert float(sums.loss) == pytest.approx(expected, rel=1e-5)
    assert float(sums.r_drop) == pytest.approx((divergence * np.asarray(batch["loss_weights"])).sum(), rel=1e-4)
    assert float(sums.r_drop) > 0.1


def test_r_drop_without_dropout_is_the_step_without_it():
    plain, dropped = settings(), settings(r_drop=1.0)
    (one, one_metrics), (other, metrics) = take(plain, fresh(plain)), take(dropped, fresh(dropped))
    assert float(metrics["loss/r_drop"]) == pytest.approx(0.0, abs=1e-6)
    assert float(metrics["loss"]) == pytest.approx(float(one_metrics["loss"]), rel=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), one.params, other.params)


def test_methods_that_are_off_leave_no_trace_in_the_program():
    """Equal programs give equal bits: the step with everything off is compiled from the same operations."""

    def lowered(using):
        function = functools.partial(step.train_step, SHAPE, OPTIMIZER, using)
        return jax.jit(function).lower(fresh(using), make_batch(), KEY).as_text()

    off = settings(teaching=None, r_drop=0.0, token_replacement=0.0)
    assert lowered(off) == lowered(settings())
    assert "distillation/confidence" not in take(off, fresh(off))[1]
    assert lowered(settings(r_drop=1.0)) != lowered(settings())


@pytest.mark.parametrize("weighting", ["none", "fixmatch", "freematch", "softmatch"])
def test_a_teacher_of_weight_zero_gives_the_bits_of_no_teacher(weighting):
    """All rows taught, so that both losses are cut into the same chunks."""
    off = settings()
    using = settings(teaching(None, rows=6, streams=(0, 1, 2), weight=0.0, weighting=weighting))
    (one, _), (other, _) = take(off, fresh(off)), take(using, fresh(using))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6), one.params, other.params)


def test_a_new_students_average_is_young_again():
    using = settings(births=(3,))
    state = dataclasses.replace(fresh(using), step=jnp.int32(3))
    before = jax.device_get(state.ema)
    state, _ = take(using, state)
    expected = jax.tree.map(lambda old, new: old + 0.9 * (new - old), before, jax.device_get(state.params))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), state.ema, expected)
