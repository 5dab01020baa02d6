"""Every parameter has a place on the mesh, and a mesh that does not fit says so."""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from ssl_jax import config, model, sharding
from ssl_jax.errors import UserError
from ssl_jax.optimizer import make_optimizer
from ssl_jax.step import StepSettings, init_state


def shape(scan_layers=True, padded_vocab_size=64, tied=True):
    return model.GPT2(61, padded_vocab_size, 24, 16, 2, 2, 24, scan_layers=scan_layers, tie_word_embeddings=tied)


def mesh(data, fsdp, tensor) -> Any:
    """A mesh without devices: placing is arithmetic."""
    return AbstractMesh((data, fsdp, tensor), sharding.AXES, axis_types=(AxisType.Auto,) * 3)


def abstract_params(shape):
    return jax.eval_shape(functools.partial(model.init, shape), jax.random.key(0))


@pytest.mark.parametrize(
    ("sizes", "devices", "expected"),
    [
        ((-1, 1, 1), 1, (1, 1, 1)),
        ((-1, 1, 1), 8, (8, 1, 1)),
        ((2, -1, 2), 8, (2, 2, 2)),
        ((1, 2, -1), 8, (1, 2, 4)),
        ((2, 2, 2), 8, (2, 2, 2)),
        ((8, -1, 1), 8, (8, 1, 1)),
    ],
)
def test_minus_one_takes_the_rest_of_the_devices(sizes, devices, expected):
    settings = config.Mesh(**dict(zip(sharding.AXES, sizes, strict=True)))
    assert tuple(sharding.mesh_shape(settings, devices).values()) == expected


@pytest.mark.parametrize(("sizes", "devices"), [((3, -1, 1), 8), ((2, 2, 1), 8), ((16, -1, 1), 8), ((2, 1, 1), 1)])
def test_a_mesh_that_does_not_use_all_devices_is_refused(sizes, devices):
    settings = config.Mesh(**dict(zip(sharding.AXES, sizes, strict=True)))
    with pytest.raises(UserError, match=f"mesh: data {sizes[0]} .* {devices} device"):
        sharding.mesh_shape(settings, devices)


def test_stacked_and_single_blocks_are_cut_along_the_same_axes():
    stacked = sharding.shard_params(abstract_params(shape()), mesh(2, 2, 2))
    single = sharding.shard_params(abstract_params(shape(scan_layers=False)), mesh(2, 2, 2))
    for name, leaves in single["h"]["1"].items():
        for kind, placed in leaves.items():
            assert stacked["h"][name][kind].spec == PartitionSpec(None, *placed.spec)


def test_matrix_products_pair_up_over_the_tensor_axis():
    """What a column-parallel product leaves cut, the row-parallel one after it contracts (Shoeybi et al. 2019)."""
    placed = sharding.shard_params(abstract_params(shape(scan_layers=False)), mesh(1, 2, 2))["h"]["0"]
    for first, second in (("attn_c_attn", "attn_c_proj"), ("mlp_c_fc", "mlp_c_proj")):
        assert placed[first]["kernel"].spec == PartitionSpec("fsdp", "tensor")
        assert placed[first]["bias"].spec == PartitionSpec("tensor")
        assert placed[second]["kernel"].spec == PartitionSpec("tensor", "fsdp")
        assert placed[second]["bias"].is_fully_replicated


def test_all_large_parameters_are_cut_by_both_axes():
    params = abstract_params(shape(tied=False))
    for path, placed in jax.tree.leaves_with_path(sharding.shard_params(params, mesh(1, 2, 4))):
        name = jax.tree_util.keystr(path)
        if "kernel" in name or "wte" in name or "lm_head" in name:
            assert {"fsdp", "tensor"} <= set(placed.spec), name


def test_a_parameter_without_a_rule_is_an_error():
    with pytest.raises(LookupError, match="h/attn_q/kernel"):
        sharding.shard_params({"h": {"attn_q": {"kernel": jax.ShapeDtypeStruct((4, 4), "float32")}}}, mesh(1, 1, 1))
    with pytest.raises(LookupError, match="new_wte"):  # a rule names a whole part of a path
        sharding.shard_params({"new_wte": {"embedding": jax.ShapeDtypeStruct((4, 4), "float32")}}, mesh(1, 1, 1))


@pytest.mark.parametrize(
    ("sizes", "padded", "axis", "name", "fix"),
    [
        ((1, 3, 1), 63, "fsdp", "h/attn_c_attn/kernel", "set it to a divisor of 16"),
        ((1, 1, 2), 61, "tensor", "wte/embedding", "model.vocab_multiple to a multiple of 2, or it to a divisor of 61"),
    ],
)
def test_an_axis_that_does_not_divide_a_parameter_is_named(sizes, padded, axis, name, fix):
    with pytest.raises(UserError, match=rf"mesh\.{axis} {max(sizes)} does not divide {name} of shape .*{fix}"):
        sharding.shard_params(abstract_params(shape(padded_vocab_size=padded)), mesh(*sizes))


@pytest.mark.parametrize("scan_layers", [True, False])
def test_optimizer_moments_and_averages_lie_where_their_parameters_lie(scan_layers):
    optimizer = make_optimizer(config.Optimizer())
    settings = StepSettings(objective_weights=jnp.asarray, schedule=jnp.asarray, ema_decay=0.9)
    state = jax.eval_shape(functools.partial(init_state, shape(scan_layers), optimizer, settings), jax.random.key(0))
    params = sharding.shard_params(state.params, mesh(2, 2, 2))
    placed = sharding.shard_like_params(state, params, mesh(2, 2, 2))
    assert placed.params == params and placed.ema == params
    assert placed.step.is_fully_replicated
    adam = placed.optimizer_state[1][0]
    assert adam.mu == params and adam.nu == params and adam.count.is_fully_replicated


def test_a_large_state_leaf_that_belongs_to_no_parameter_is_an_error_and_a_small_one_is_replicated():
    params = sharding.shard_params(abstract_params(shape()), mesh(1, 2, 1))
    coefficients = sharding.shard_like_params({"extra": jax.ShapeDtypeStruct((3,), "float32")}, params, mesh(1, 2, 1))
    assert coefficients["extra"].is_fully_replicated
    with pytest.raises(LookupError, match="extra"):
        sharding.shard_like_params({"extra": jax.ShapeDtypeStruct((3, 2), "float32")}, params, mesh(1, 2, 1))


def table(shape, *sizes):
    params = abstract_params(shape)
    return {
        row.name: row for row in sharding.table(sharding.place(params, sharding.shard_params(params, mesh(*sizes))))
    }


def test_the_table_says_how_parameters_lie_and_what_each_device_holds_of_them():
    rows = table(shape(), 2, 2, 4)
    assert rows["h/attn_c_attn/kernel"] == sharding.TableRow(
        "h/attn_c_attn/kernel", (2, 16, 48), "float32", "fsdp × tensor", 1, 2 * 16 * 48 * 4 // 8
    )
    assert rows["wte/embedding"].spec == "tensor × fsdp"
    assert rows["ln_f/scale"] == sharding.TableRow("ln_f/scale", (16,), "float32", "whole", 1, 16 * 4)


def test_an_axis_of_one_device_cuts_nothing():
    rows = table(shape(), 8, 1, 1)
    assert {row.spec for row in rows.values()} == {"whole"}
    assert table(shape(), 2, 4, 1)["wte/embedding"].spec == "fsdp"


def test_blocks_that_are_alike_are_one_row_which_counts_all_of_them():
    stacked, single = table(shape(), 1, 2, 2), table(shape(scan_layers=False), 1, 2, 2)
    assert single.keys() == {name.replace("h/", "h/*/") for name in stacked}
    block = single["h/*/mlp_c_fc/kernel"]
    assert (block.count, block.shape, block.spec) == (2, (16, 24), "fsdp × tensor")
    for one, other in zip(stacked.values(), single.values(), strict=True):
        assert one.bytes_per_device == other.bytes_per_device, one.name


def test_rows_are_cut_over_data_and_fsdp_only():
    assert sharding.row_shards(mesh(2, 3, 4)) == 6
    assert PartitionSpec(("data", "fsdp")) == sharding.BATCH


def test_batch_arrives_on_the_mesh_unchanged():
    real = sharding.make_mesh(config.Mesh())
    batch = {"tokens": np.arange(12, dtype=np.int32).reshape(4, 3), "stream": np.arange(4, dtype=np.int32)}
    placed = sharding.put_batch(batch, real)
    for name, array in batch.items():
        np.testing.assert_array_equal(placed[name], array)
        assert placed[name].sharding.is_equivalent_to(NamedSharding(real, sharding.BATCH), array.ndim)
    assert real.axis_names == sharding.AXES


@dataclasses.dataclass(frozen=True, eq=False)
class Spread:
    """A mesh of devices that belong to these processes, in the order of the mesh."""

    processes: tuple[int, ...]
    sizes: tuple[int, int, int]

    @property
    def shape(self):
        return dict(zip(sharding.AXES, self.sizes, strict=True))

    @property
    def devices(self):
        return np.array([SimpleNamespace(process_index=one) for one in self.processes], object).reshape(self.sizes)


@pytest.mark.parametrize(
    ("processes", "sizes", "rows"),
    [
        ((0, 0, 1, 1), (4, 1, 1), ([0, 1, 2, 3], [4, 5, 6, 7])),
        ((0, 1, 1, 0), (1, 4, 1), ([0, 1, 6, 7], [2, 3, 4, 5])),  # as TPUs of two hosts lie in a ring
        ((0, 0, 1, 1), (2, 1, 2), ([0, 1, 2, 3], [4, 5, 6, 7])),
        ((0, 1, 0, 1), (2, 1, 2), (list(range(8)), list(range(8)))),  # the hosts share every row
        ((0, 1, 0, 1), (1, 2, 2), (list(range(8)), list(range(8)))),
    ],
)
def test_a_process_reads_the_rows_that_its_devices_hold_wherever_they_lie(processes, sizes, rows):
    mesh: Any = Spread(processes, sizes)
    for process, expected in enumerate(rows):
        assert sharding.local_rows(mesh, 8, process).tolist() == expected


def test_rows_of_this_process_arrive_on_the_mesh_unchanged():
    real = sharding.make_mesh(config.Mesh())
    rows = {"tokens": np.arange(12, dtype=np.int32).reshape(4, 3), "stream": np.arange(4, dtype=np.int32)}
    for name, placed in sharding.put_rows(rows, real).items():
        np.testing.assert_array_equal(placed, rows[name])
        assert placed.sharding.is_equivalent_to(NamedSharding(real, sharding.BATCH), placed.ndim)


def test_slices_that_the_data_axis_cannot_be_spread_over_are_refused():
    devices = [SimpleNamespace(slice_index=number // 4, platform="tpu") for number in range(8)]
    with pytest.raises(UserError, match=r"mesh.data 1 is not a multiple of the 2 slices.* set it to 2"):
        sharding.make_mesh(config.Mesh(fsdp=8), devices)
