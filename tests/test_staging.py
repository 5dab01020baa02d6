"""Copies that a save reads: in the same memory every time, and the arrays' own only where these are elsewhere."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ssl_jax.staging import Staging


def sharded(value: float, *axes: str | None) -> jax.Array:
    """As a run's arrays are: on a mesh, by an axis or whole on every device."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.device_put(jnp.full((8 * jax.device_count(), 4), value), NamedSharding(mesh, PartitionSpec(*axes)))


def places(tree: Any) -> list[int]:
    return [shard.data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]


@pytest.mark.parametrize("axes", [(), (None,), (None, None), ("data",), ("data", None)])
def test_every_copy_takes_the_place_of_the_one_before(axes: tuple[str | None, ...]) -> None:
    staging, kept = Staging(), []
    for value in (1.0, 2.0, 3.0):
        original = {"w": sharded(value, *axes), "step": jnp.int32(value)}
        copied = staging.copy(original)
        np.testing.assert_array_equal(copied["w"], original["w"])
        assert copied["step"] == value
        assert copied["w"].sharding.is_equivalent_to(original["w"].sharding, 2)
        assert not set(places(copied)) & set(places(original))
        kept.append(places(copied))
        del copied
    assert kept[0] == kept[1] == kept[2]


def test_originals_of_another_shape_take_memory_of_their_own() -> None:
    staging = Staging()
    for original in ([jnp.zeros(3)], [jnp.ones(4)], [jnp.ones(4, jnp.int32)], [jnp.ones(4), jnp.ones(4)]):
        for copied, one in zip(staging.copy(original), original, strict=True):
            np.testing.assert_array_equal(copied, one)
            assert copied.dtype == one.dtype


def test_what_is_no_array_of_jax_is_itself() -> None:
    array = np.ones(3)
    copied = Staging().copy({"host": array, "shape": jax.ShapeDtypeStruct((3,), np.float32)})
    assert copied["host"] is array and copied["shape"].shape == (3,)


def test_memory_that_is_given_back_is_taken_anew() -> None:
    staging, array = Staging(), jnp.ones(3)
    first = staging.copy([array])[0]
    staging.clear()
    second = staging.copy([array])[0]
    assert not first.is_deleted() and first.unsafe_buffer_pointer() != second.unsafe_buffer_pointer()
