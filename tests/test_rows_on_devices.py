"""Losses and attention kernels on four devices: each works on its own rows, sums are added once, results are the same.

The devices are those of a process of its own, which runs this file.
"""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax import attention, config, losses, sharding
from ssl_jax.forecast.collectives import Program

MESHES = {"data 2": (2, 1, 1), "data 4": (4, 1, 1), "data 2 × fsdp 2": (2, 2, 1), "fsdp 2 × tensor 2": (1, 2, 2)}
LENGTH, WIDTH, VOCABULARY = 12, 8, 16


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    root = Path(__file__).resolve().parents[1]
    variables = {**os.environ, "JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, __file__], env=variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("rows", ["4 rows", "3 rows"])
@pytest.mark.parametrize("name", MESHES)
def test_loss_and_gradients_of_a_mesh_are_those_of_one_device(measured, name, rows):
    one, found = measured["loss"][rows]["one device"], measured["loss"][rows][name]
    assert one["arrays"].keys() == found["arrays"].keys() == {"loss", "nll", "hidden", "embedding", "token nll"}
    for key, expected in one["arrays"].items():
        np.testing.assert_allclose(found["arrays"][key], expected, rtol=1e-5, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", ["data 4", "data 2 × fsdp 2"])
def test_devices_add_up_their_sums_once_and_not_after_every_chunk(measured, name):
    sent = measured["loss"]["4 rows"][name]["sent"]
    assert measured["loss"]["4 rows"]["one device"]["sent"] == []
    assert {kind for kind, _, _ in sent} == {"all-reduce"}
    assert all(times == 1 for _, times, _ in sent)
    assert sum(size for _, _, size in sent) == 4 * (1 + VOCABULARY * WIDTH), "the loss and the embedding's gradient"


def test_token_losses_need_nothing_of_other_devices(measured):
    assert measured["token nll sent"] == []


# Of the queries that a kernel is given: rows and heads.
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("one device, 4 rows", [4, 2]),
        ("data 2, 4 rows", [2, 2]),
        ("data 4, 4 rows", [1, 2]),
        ("data 2 × fsdp 2, 4 rows", [1, 2]),
        ("fsdp 2 × tensor 2, 4 rows", [2, 1]),
        ("fsdp 2 × tensor 2, 3 rows", [3, 1]),
        ("data 4, 3 rows", [3, 2]),
    ],
)
def test_a_kernel_gets_the_rows_and_heads_of_its_device(measured, name, shape):
    found = measured["attention"][name]
    assert found["given"] == shape
    assert found["difference"] < 1e-5


def measure_loss(mesh: Any, rows: int) -> dict[str, Any]:
    """Everything the loss returns, and what the devices send each other for it: kind, how often, bytes."""
    rng = np.random.default_rng(0)
    hidden, embedding, targets, weights = (
        rng.normal(size=(rows, LENGTH, WIDTH)).astype(np.float32),
        rng.normal(size=(VOCABULARY, WIDTH)).astype(np.float32),
        rng.integers(0, VOCABULARY, (rows, LENGTH)).astype(np.int32),
        rng.uniform(0, 2, (rows, LENGTH)).astype(np.float32),
    )

    def loss(hidden, embedding):
        arrays = hidden, embedding, jnp.asarray(targets), jnp.asarray(weights)
        return losses.weighted_cross_entropy(*arrays, VOCABULARY, mesh)

    def nll_alone(hidden, embedding):
        return losses.token_nll(hidden, embedding, jnp.asarray(targets), VOCABULARY, mesh)

    with mock.patch.object(losses, "CHUNK_TOKENS", 4 * rows):  # three or more chunks
        compiled = placed(jax.value_and_grad(loss, (0, 1), has_aux=True), mesh, rows).lower(hidden, embedding).compile()
        (total, nll), (hidden_grad, embedding_grad) = compiled(hidden, embedding)
        token_nll = placed(nll_alone, mesh, rows)(hidden, embedding)
    arrays = {
        "loss": total, "nll": nll, "hidden": hidden_grad, "embedding": embedding_grad, "token nll": token_nll,
    }  # fmt: skip
    return {"arrays": {name: np.asarray(array).tolist() for name, array in arrays.items()}, "sent": sent(compiled)}


def placed(function: Any, mesh: Any, rows: int) -> Any:
    """Compiled for states whose rows lie on the devices, where they divide, and an embedding that all have."""
    if mesh is None:
        return jax.jit(function)
    whole = sharding.replicated(mesh)
    by_row = jax.sharding.NamedSharding(mesh, sharding.BATCH) if rows % sharding.row_shards(mesh) == 0 else whole
    return jax.jit(function, in_shardings=(by_row, whole))


def sent(compiled: Any) -> list[tuple[str, int, int]]:
    return [(one.kind, one.times, one.bytes) for one in Program.read(compiled.as_text(), 4).collectives()]


def token_nll_sent(mesh: Any) -> list[tuple[str, int, int]]:
    hidden, embedding = np.ones((4, LENGTH, WIDTH), np.float32), np.ones((VOCABULARY, WIDTH), np.float32)
    targets = np.zeros((4, LENGTH), np.int32)

    def nll(hidden, embedding):
        return losses.token_nll(hidden, embedding, jnp.asarray(targets), VOCABULARY, mesh)

    with mock.patch.object(losses, "CHUNK_TOKENS", 16):
        return sent(placed(nll, mesh, 4).lower(hidden, embedding).compile())


def measure_attention(mesh: Any, rows: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.normal(size=(rows, 2, LENGTH, WIDTH)), jnp.float32) for _ in range(3))
    ids = jnp.asarray(np.sort(rng.integers(1, 4, (rows, LENGTH)), axis=1), jnp.int32)
    given = []

    def kernel(query, key, value, ids):
        given.append(list(query.shape[:2]))
        return attention.attend(query, key, value, attention.segment_mask(ids), 1.0)

    found = jax.jit(functools.partial(attention.on_each_device, kernel, mesh))(query, key, value, ids)
    expected = attention.attend(query, key, value, attention.segment_mask(ids), 1.0)
    return {"given": given[-1], "difference": float(jnp.max(jnp.abs(found - expected)))}


def main() -> None:
    """Prints what the tests look at."""
    assert jax.device_count() == 4
    meshes: dict[str, Any] = {
        "one device": sharding.make_mesh(config.Mesh(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    }
    for name, sizes in MESHES.items():
        mesh = config.Mesh(**dict(zip(sharding.AXES, sizes, strict=True)))
        meshes[name] = sharding.make_mesh(mesh, jax.devices()[: math.prod(sizes)])
    result = {
        "loss": {f"{rows} rows": {name: measure_loss(mesh, rows) for name, mesh in meshes.items()} for rows in (4, 3)},
        "token nll sent": token_nll_sent(meshes["data 4"]),
        "attention": {
            f"{name}, {rows} rows": measure_attention(mesh, rows) for name, mesh in meshes.items() for rows in (4, 3)
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
