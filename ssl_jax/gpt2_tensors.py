"""GPT-2's parameters under the names of `GPT2LMHeadModel`, between safetensors and device arrays.

Kernels are `[in, out]` there as here. A model is never in host memory twice: every device's part of every layer is read
on its own, straight into its place.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from ssl_jax import model, sharding, tensor_files
from ssl_jax.errors import UserError
from ssl_jax.tensor_files import StoredTensor

PREFIX = "transformer."
HEAD = "lm_head.weight"
TABLE = "wte.weight"

_MODULES = {
    "ln_1": "ln_1",
    "attn_c_attn": "attn.c_attn",
    "attn_c_proj": "attn.c_proj",
    "ln_2": "ln_2",
    "mlp_c_fc": "mlp.c_fc",
    "mlp_c_proj": "mlp.c_proj",
}
# Causal masks, which old releases stored.
_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")

# Rows of a table in memory at a time, so that it is not there twice on its way to the device.
_CHUNK_ROWS = 4096

Read = Callable[[tuple[slice, ...], Any], np.ndarray]
"""Values of a tensor at slices with both ends, in a type."""


def open_model(directory: Path, shape: model.GPT2, rows: int) -> dict[str, StoredTensor]:
    """The tensors of a directory by their names without prefix, all of them compared with `shape`; no value is read.

    Args:
      directory: holds safetensors.
      shape: whose tables may have other rows than the directory's, which are `rows`.
      rows: tokens in the directory's tables.

    Raises:
      UserError: a tensor is missing, unexpected, of another shape or not of a float type; or a file is damaged.
    """
    tensors: dict[str, StoredTensor] = {}
    for tensor in tensor_files.open_tensors(directory).values():
        name = tensor.name.removeprefix(PREFIX)
        if _BUFFER.fullmatch(name):
            continue
        if name in tensors:
            raise UserError(f"{tensor.file}: has {name} with and without the prefix {PREFIX!r}; save the model again")
        tensors[name] = tensor
    expected = stored_shapes(dataclasses.replace(shape, vocab_size=rows, padded_vocab_size=rows))
    optional = {HEAD: expected[TABLE]} if shape.tie_word_embeddings else {}
    for name, tensor in tensors.items():
        _check(tensor, (expected | optional).get(name), shape)
    for name, wanted in expected.items():
        if name not in tensors:
            raise UserError(
                f"{directory}: the safetensors lack {name} of shape {list(wanted)}; config.json says n_layer "
                f"{shape.n_layer}, tie_word_embeddings {str(shape.tie_word_embeddings).lower()}: one of them is wrong"
            )
    return tensors


def _check(tensor: StoredTensor, wanted: tuple[int, ...] | None, shape: model.GPT2) -> None:
    if wanted is None:
        raise UserError(
            f"{tensor.file}: {tensor.name} has no place in a GPT-2 language model of {shape.n_layer} layers; "
            "correct config.json or choose another model"
        )
    if tensor.shape != wanted:
        raise UserError(
            f"{tensor.file}: {tensor.name} has shape {list(tensor.shape)}, but config.json means {list(wanted)}; "
            "one of the two files is not of this model"
        )
    if tensor.dtype not in tensor_files.FLOAT_TYPES:
        raise UserError(
            f"{tensor.file}: {tensor.name} is of type {tensor.dtype}, expected one of "
            f"{', '.join(tensor_files.FLOAT_TYPES)}; save the model in one of these"
        )


def check_tied(table: StoredTensor, head: StoredTensor) -> None:
    """Compares the values of the token table with those of a head that should be the same.

    Raises:
      UserError: they differ.
    """
    for chunk in _chunks(0, table.shape[0]):
        index = (chunk, slice(0, table.shape[1]))
        if not np.array_equal(table.read(index, np.float32), head.read(index, np.float32)):
            raise UserError(
                f"{head.file}: {head.name} differs from {table.name}, but config.json says that they are one; "
                "set tie_word_embeddings to false there if the model has a head of its own"
            )


def load(
    tensors: Mapping[str, StoredTensor], shape: model.GPT2, known_tokens: int, used_tokens: int, mesh: Mesh | None
) -> model.Params:
    """Device arrays in the structure of `model.init`; see `huggingface.read_params`.

    Raises:
      UserError: a file cannot be read, or holds values that are not finite.
    """
    abstract = jax.eval_shape(functools.partial(model.init, shape), jax.random.key(0))
    if mesh is None:
        places = jax.tree.map(lambda _: SingleDeviceSharding(jax.local_devices()[0]), abstract)
    else:
        places = sharding.shard_params(abstract, mesh)

    def read(path: tuple[Any, ...], leaf: Any, place: Sharding) -> jax.Array:
        names = stored_names(path, shape.n_layer)
        parts = [tensors[name] for name in names]
        if names[0] in (TABLE, HEAD):
            return _load(leaf, place, functools.partial(_read_tokens, parts[0], known_tokens, used_tokens))
        if _is_stacked(path):
            return _load_stacked(leaf, place, parts)
        return _load(leaf, place, parts[0].read)

    # Tables are the largest tensors: while one is on its way to the device, little else should be there.
    leaves, structure = jax.tree.flatten_with_path(abstract)
    work = list(zip(range(len(leaves)), leaves, jax.tree.leaves(places), strict=True))
    work.sort(key=lambda item: item[1][0][0].key == "h")
    loaded = {number: read(path, leaf, place) for number, (path, leaf), place in work}
    return jax.tree.unflatten(structure, [loaded[number] for number in range(len(leaves))])


def _load(leaf: Any, place: Sharding, read: Read) -> jax.Array:
    """An array whose parts are read where they go."""

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None, "only arrays of no axes have no index"
        spans = (slice(*cut.indices(size)[:2]) for cut, size in zip(index, leaf.shape, strict=True))
        return read(tuple(spans), leaf.dtype)

    return jax.block_until_ready(jax.make_array_from_callback(leaf.shape, place, part, dtype=leaf.dtype))


def _load_stacked(leaf: Any, place: Sharding, parts: Sequence[StoredTensor]) -> jax.Array:
    """Layers under a leading axis, each written into its place of one buffer as it is read."""
    layer = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
    layer_place = (
        NamedSharding(place.mesh, PartitionSpec(*place.spec[1:])) if isinstance(place, NamedSharding) else place
    )
    buffer = jnp.zeros(leaf.shape, leaf.dtype, device=place)
    for number, part in enumerate(parts):
        # Waiting keeps the host from reading ahead of the copies.
        buffer = jax.block_until_ready(_layer_writer(place)(buffer, _load(layer, layer_place, part.read), number))
    return buffer


@functools.cache
def _layer_writer(place: Sharding) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    """Writes a layer into a stack of layers at `place`, in the stack's own memory."""

    def write(stack: jax.Array, layer: jax.Array, number: int) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stack, layer, number, 0)

    return jax.jit(write, donate_argnums=0, out_shardings=place)


def _read_tokens(
    tensor: StoredTensor, known_tokens: int, used_tokens: int, index: tuple[slice, ...], dtype: Any
) -> np.ndarray:
    """Part of a table of tokens: known rows, the mean for added ones, rows beyond those as they are, then zeros."""
    rows, columns = index
    result = np.zeros((rows.stop - rows.start, columns.stop - columns.start), dtype)
    for span in (range(min(known_tokens, tensor.shape[0])), range(used_tokens, tensor.shape[0])):
        for chunk in _chunks(max(span.start, rows.start), min(span.stop, rows.stop)):
            result[chunk.start - rows.start : chunk.stop - rows.start] = tensor.read((chunk, columns), dtype)
    added = slice(max(known_tokens - rows.start, 0), max(used_tokens - rows.start, 0))
    if result[added].size:
        total = np.zeros(result.shape[1], np.float64)
        for chunk in _chunks(0, known_tokens):
            total += tensor.read((chunk, columns), np.float64).sum(axis=0)
        result[added] = (total / known_tokens)[None]
    return result


def _chunks(start: int, stop: int) -> Iterator[slice]:
    for first in range(start, stop, _CHUNK_ROWS):
        yield slice(first, min(first + _CHUNK_ROWS, stop))


def stored_values(params: model.Params, shape: model.GPT2) -> dict[str, Callable[[], np.ndarray]]:
    """What brings each tensor to the host, by name without prefix, layer by layer; padding is cut."""
    values: dict[str, Callable[[], np.ndarray]] = {}
    for path, leaf in jax.tree.leaves_with_path(params):
        names = stored_names(path, shape.n_layer)
        if names[0] in (TABLE, HEAD):
            values[names[0]] = functools.partial(_on_host, leaf, slice(shape.vocab_size))
        elif _is_stacked(path):
            values |= {name: functools.partial(_on_host, leaf, layer) for layer, name in enumerate(names)}
        else:
            values[names[0]] = functools.partial(_on_host, leaf, ...)
    return {name: values[name] for name in sorted(values, key=_order)}


def stored_shapes(shape: model.GPT2) -> dict[str, tuple[int, ...]]:
    """The axes of each tensor, by name without prefix, layer by layer; padding is cut."""
    abstract: Any = jax.eval_shape(functools.partial(model.init, shape), jax.random.key(0))
    shapes: dict[str, tuple[int, ...]] = {}
    for path, leaf in jax.tree.leaves_with_path(abstract):
        names = stored_names(path, shape.n_layer)
        axes: tuple[int, ...] = leaf.shape[1:] if _is_stacked(path) else leaf.shape
        shapes |= dict.fromkeys(names, axes)
        if names[0] in (TABLE, HEAD):
            shapes[names[0]] = (shape.vocab_size, shape.n_embd)
    return {name: shapes[name] for name in sorted(shapes, key=_order)}


def stored_names(path: tuple[Any, ...], n_layer: int) -> list[str]:
    """The tensors, without prefix, that a leaf of our parameters consists of: one of each layer where it is stacked."""
    *scope, kind = (key.key for key in path)
    ending = "bias" if kind == "bias" else "weight"
    if scope[0] != "h":
        return [f"{scope[0]}.{ending}"]
    layers = range(n_layer) if _is_stacked(path) else scope[1:2]
    return [f"h.{layer}.{_MODULES[scope[-1]]}.{ending}" for layer in layers]


def _is_stacked(path: tuple[Any, ...]) -> bool:
    """Whether a leaf holds all layers: `h/<module>/<kind>` instead of `h/<layer>/<module>/<kind>`."""
    return path[0].key == "h" and len(path) == 3


def _order(name: str) -> tuple[int, int]:
    """Embeddings, layers, final norm, head."""
    scope, second = name.split(".")[:2]
    return ("wte", "wpe", "h", "ln_f", "lm_head").index(scope), int(second) if scope == "h" else 0


def _on_host(leaf: jax.Array, index: Any) -> np.ndarray:
    return np.asarray(leaf[index])
