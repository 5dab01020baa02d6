"""The device mesh and which axis of which array lies on it."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ssl_jax import config
from ssl_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))

# Parameter path → axes of the array. Paths of stacked blocks have one more, leading, axis, which stays whole.
PARTITION_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"(wte|lm_head)/embedding", PartitionSpec("tensor", "fsdp")),
    (r"wpe/embedding", PartitionSpec(None, "fsdp")),
    (r"(attn_c_attn|mlp_c_fc)/kernel", PartitionSpec("fsdp", "tensor")),
    (r"(attn_c_attn|mlp_c_fc)/bias", PartitionSpec("tensor")),
    (r"(attn_c_proj|mlp_c_proj)/kernel", PartitionSpec("tensor", "fsdp")),
    (r"(attn_c_proj|mlp_c_proj)/bias", PartitionSpec(None)),
    (r"ln_(1|2|f)/(scale|bias)", PartitionSpec(None)),
)


def mesh_shape(settings: config.Mesh, device_count: int) -> dict[str, int]:
    """Resolves -1 ("the rest") against the number of devices.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    sizes = {axis: getattr(settings, axis) for axis in AXES}
    known = math.prod(size for size in sizes.values() if size > 0)
    divides, wanted = device_count % known == 0, " × ".join(f"{axis} {size}" for axis, size in sizes.items())
    if not divides or (known < device_count and -1 not in sizes.values()):
        fix = "set one size to -1, the rest" if divides else f"set sizes whose product divides {device_count}"
        raise UserError(f"mesh: {wanted} does not use {device_count} device(s) exactly; {fix}")
    return {axis: device_count // known if size == -1 else size for axis, size in sizes.items()}


def make_mesh(settings: config.Mesh, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over `devices` (all by default) with axes data, fsdp, tensor.

    Neighbors on an axis are neighbors in the machine. Slices of TPUs, between which sending is slow, divide the data
    axis. GPUs are taken in their order, host by host, so that an axis leaves a host only if it does not fit into one,
    tensor last.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or `data` is no multiple of the slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(settings, len(devices))
    # GPUs have slices too: their hosts.
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if shape["data"] % slices:
        raise UserError(
            f"mesh.data {shape['data']} is not a multiple of the {slices} slices, between which only gradients may "
            f"travel; set it to {slices}, and mesh.fsdp and mesh.tensor to what one slice has"
        )
    if slices > 1:
        within = (shape["data"] // slices, shape["fsdp"], shape["tensor"])
        arranged = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices, allow_split_physical_axes=True)
    else:
        arranged = mesh_utils.create_device_mesh(tuple(shape.values()), devices, allow_split_physical_axes=True)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def row_shards(mesh: Mesh) -> int:
    """How many devices see different rows."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def local_rows(mesh: Mesh, total: int, process_index: int | None = None) -> np.ndarray:
    """Which of the `total` rows of a global batch the devices of a process hold, int64, rising.

    They need not follow one another: neighbors on an axis of the mesh may belong to different hosts. Processes whose
    devices share rows (tensor) have the same ones.

    Args:
      mesh: of devices of all processes.
      total: a multiple of `row_shards`.
      process_index: this process by default.
    """
    is_here = _shards_here(mesh, jax.process_index() if process_index is None else process_index)
    return np.flatnonzero(np.repeat(is_here, total // len(is_here)))


@functools.lru_cache
def _shards_here(mesh: Mesh, process_index: int) -> tuple[bool, ...]:
    """Whether a process has a device of each of the `row_shards`."""
    shards = mesh.devices.reshape(row_shards(mesh), -1)
    return tuple(any(device.process_index == process_index for device in shard) for shard in shards)


def partition_spec(path: tuple[Any, ...], ndim: int) -> PartitionSpec:
    """The axes of one parameter.

    Raises:
      LookupError: no rule matches, so that no parameter is ever replicated by accident.
    """
    name = "/".join(str(getattr(key, "key", key)) for key in path)
    for pattern, spec in PARTITION_RULES:
        if re.search(rf"(^|/){pattern}$", name):
            return PartitionSpec(*(None,) * (ndim - len(spec)), *spec)
    raise LookupError(f"no partition rule matches parameter {name!r}")


def shard_params(abstract_params: Any, mesh: Mesh) -> Any:
    """The sharding of every parameter.

    Raises:
      UserError: an axis of the mesh does not divide an axis of a parameter.
    """

    def place(path, leaf):
        spec = partition_spec(path, leaf.ndim)
        for number, (size, axis) in enumerate(zip(leaf.shape, spec, strict=True)):
            if axis is not None and size % mesh.shape[axis]:
                name = "/".join(str(key.key) for key in path)
                vocabulary = number == 0 and name.split("/")[0] in ("wte", "lm_head")
                fix = f"model.vocab_multiple to a multiple of {mesh.shape[axis]}, or it" if vocabulary else "it"
                raise UserError(
                    f"mesh.{axis} {mesh.shape[axis]} does not divide {name} of shape {leaf.shape}; set {fix} to a "
                    f"divisor of {size}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree.map_with_path(place, abstract_params)


def shard_like_params(tree: Any, param_shardings: Any, mesh: Mesh) -> Any:
    """Shardings for a tree that holds copies of the parameters' structure (optimizer moments) and scalars.

    A leaf whose path ends in a parameter's path gets that parameter's sharding; counters and coefficients, which have
    at most one axis, are replicated.

    Raises:
      LookupError: a larger leaf corresponds to no parameter.
    """
    by_path = {_path_text(path): sharding for path, sharding in jax.tree.leaves_with_path(param_shardings)}

    def place(path, leaf):
        text = _path_text(path)
        for name, sharding in by_path.items():
            if text == name or text.endswith("/" + name):
                return sharding
        if leaf.ndim < 2:
            return replicated(mesh)
        raise LookupError(f"no parameter corresponds to state leaf {text!r}")

    return jax.tree.map_with_path(place, tree)


@dataclasses.dataclass(frozen=True)
class TableRow:
    """How parameters of one kind lie on the devices.

    Attributes:
      name: path; `*` stands for the number of an unstacked block.
      shape: of each.
      dtype: of the elements.
      spec: axes of the mesh over which it is cut, such as `fsdp × tensor`; `whole` where every device has all of it.
      count: how many there are.
      bytes_per_device: of all of them together.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    spec: str
    count: int
    bytes_per_device: int


def table(abstract_params: Any) -> list[TableRow]:
    """The partition of abstract parameters with shardings, for people; blocks that are alike in one row."""
    rows: dict[str, TableRow] = {}
    for path, leaf in jax.tree.leaves_with_path(abstract_params):
        name = re.sub(r"(^|/)h/\d+/", r"\1h/*/", _path_text(path))
        axes = [axis for axis in leaf.sharding.spec if axis is not None and leaf.sharding.mesh.shape[axis] > 1]
        size = int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        old = rows.get(name)
        rows[name] = TableRow(
            name=name,
            shape=leaf.shape,
            dtype=str(leaf.dtype),
            spec=" × ".join(axes) or "whole",
            count=1 + (old.count if old else 0),
            bytes_per_device=size + (old.bytes_per_device if old else 0),
        )
    return list(rows.values())


def place(abstract: Any, shardings: Any) -> Any:
    """Shapes and types with their shardings, `jax.ShapeDtypeStruct` leaves, as a checkpoint is restored into."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings
    )


def _path_text(path: tuple[Any, ...]) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def put_rows(rows: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Places this process's rows, those of `local_rows`, where they belong in the global batch."""
    sharding, shards = NamedSharding(mesh, BATCH), row_shards(mesh)
    count = len(next(iter(rows.values())))
    total = count * shards // len(local_rows(mesh, shards))
    numbers = local_rows(mesh, total)

    def place(array: np.ndarray) -> jax.Array:
        shape = (total, *array.shape[1:])
        indices: Mapping[Any, Any] = sharding.addressable_devices_indices_map(shape)
        parts = [array[slice(*np.searchsorted(numbers, rows.indices(total)[:2]))] for rows, *_ in indices.values()]
        return jax.make_array_from_single_device_arrays(shape, sharding, jax.device_put(parts, list(indices)))

    return {name: place(array) for name, array in rows.items()}


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Places a batch that every process holds as a whole, rows over data and fsdp."""
    sharding = NamedSharding(mesh, BATCH)
    return {
        name: jax.make_array_from_callback(array.shape, sharding, functools.partial(np.ndarray.__getitem__, array))
        for name, array in batch.items()
    }


def fetch(tree: Any) -> Any:
    """Reads arrays as NumPy ones, also those of which other processes hold a part; all of them must ask for it."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)
