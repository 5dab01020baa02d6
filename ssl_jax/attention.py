"""Causal attention within segments, in the form that every backend runs well.

Axes: B rows, H heads, T query time, S key time, K head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from ssl_jax import sharding, splash
from ssl_jax.dropout import keep_factors
from ssl_jax.errors import UserError

Implementation = Literal["einsum", "cudnn", "splash"]

NEGATIVE = -1e30  # a finite "minus infinity": a row of padding keeps a finite softmax
# Small blocks multiply fewer keys in vain; many of them take long to compile.
SMALLEST_BLOCK, MOST_BLOCKS = 64, 8
# What rematerialization by names keeps: outputs, and what a kernel keeps beside them to go back.
NAME = splash.NAME
# Bytes of scores above which a CPU goes through the rows one by one.
LARGE = 2**25


# Platforms of the kernels, by JAX's names.
_PLATFORMS = {"cudnn": ("gpu", "NVIDIA GPUs"), "splash": ("tpu", "TPUs")}


def choose(
    asked: Implementation | Literal["auto"],
    *,
    platform: str,
    dtype: str,
    head_width: int,
    length: int | None,
    is_plain: bool,
) -> Implementation:
    """The form of attention for what the configuration asks, and why not.

    Args:
      asked: `model.attn_implementation`.
      platform: JAX's name of the backend.
      dtype: of the arithmetic.
      head_width: of each head.
      length: of the rows that are trained on; None: there is no training, and a kernel gives way to `einsum` where it
        cannot be used, so that a model answers wherever it is taken.
      is_plain: neither dropout on the probabilities nor products in float32.

    Raises:
      UserError: the kernel that is asked for is not for that platform, type, width or length.
    """
    if asked == "einsum" or (asked == "auto" and (not is_plain or platform not in ("gpu", "tpu"))):
        return "einsum"
    kernel: Implementation = asked if asked != "auto" else ("cudnn" if platform == "gpu" else "splash")
    why = _why_not(kernel, platform, dtype, head_width, length, is_plain)
    if why is None:
        return kernel
    if asked == "auto" or length is None:
        return "einsum"
    raise UserError(f"model.attn_implementation {kernel} {why}, or set it to auto")


def _why_not(kernel: str, platform: str, dtype: str, head_width: int, length: int | None, is_plain: bool) -> str | None:
    """What a kernel cannot do, with what to change, or None."""
    if not is_plain:
        return "has no attn_pdrop and no reorder_and_upcast_attn; set them to 0"
    needed, name = _PLATFORMS[kernel]
    if platform != needed:
        return f"is a kernel of {name}, and this is a {platform}; set it to einsum"
    if kernel == "cudnn" and dtype != "bfloat16":
        return f"computes in 16 bits; set model.dtype {dtype} to bfloat16"
    if kernel == "cudnn" and (head_width % 8 or head_width > 128):
        return f"needs heads of 8, 16, … or 128 wide, not {head_width}; change model.n_head"
    if kernel == "splash" and length is not None and not splash.fits(length):
        return f"needs rows of a multiple of {splash.LANES} tokens; change train.sequence_length {length}"
    return None


def segment_mask(segment_ids_BT: jax.Array, first: int = 0, stop: int | None = None) -> jax.Array:
    """Which keys the queries from `first` to `stop` may see: bool `[B, 1, stop - first, stop]`.

    A token sees itself and earlier tokens of its own segment. Segment 0 is padding; padding sees only padding.
    """
    stop = segment_ids_BT.shape[1] if stop is None else stop
    same_BTS = segment_ids_BT[:, first:stop, None] == segment_ids_BT[:, None, :stop]
    causal_TS = jnp.tri(stop - first, stop, first, dtype=bool)
    return (same_BTS & causal_TS[None])[:, None]


def attend_causally(
    query_BHTK: jax.Array,
    key_BHTK: jax.Array,
    value_BHTK: jax.Array,
    segment_ids_BT: jax.Array,
    scale: float | jax.Array,
    *,
    implementation: Implementation = "einsum",
    upcast: bool = False,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    numbers_B: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Attention of every token to itself and what stands before it in its segment, `[B, H, T, K]`.

    `einsum` goes through the queries in blocks: one block's scores are alive at a time, keys behind a block are not
    multiplied at all, and the backward pass takes the scores again instead of keeping them, as FlashAttention does
    (Dao et al. 2022). `cudnn` is NVIDIA's fused kernel, for 16-bit types without `upcast` and dropout; `splash` that of
    TPUs, without `upcast` and dropout. Where rows are too short for it (prompts, read once) it is `einsum` after all.

    Args:
      query_BHTK: queries.
      key_BHTK: keys.
      value_BHTK: values.
      segment_ids_BT: int32, see `segment_mask`.
      scale: factor on the scores, a scalar.
      implementation: which form.
      upcast: see `attend`.
      dropout_rate: of the probabilities; 0 switches it off.
      dropout_key: PRNG key where there is dropout.
      numbers_B: int32, of the rows, which decide what each draws; None: their places.
      mesh: the devices that this runs on; None: one.
    """
    rows, heads, length, _ = query_BHTK.shape
    kernel = {"cudnn": _attend_by_cudnn, "splash": splash.attend if splash.fits(length) else None}.get(implementation)
    if kernel is not None:
        # Kernels scale nothing, so that the scale may be traced; in float32, so that it is never rounded.
        scaled_BHTK = (query_BHTK.astype(jnp.float32) * scale).astype(query_BHTK.dtype)
        return on_each_device(kernel, mesh, scaled_BHTK, key_BHTK, value_BHTK, segment_ids_BT)
    in_blocks = functools.partial(_attend_in_blocks, scale=scale, upcast=upcast, dropout_rate=dropout_rate)
    numbers_B = jnp.arange(rows) if numbers_B is None else numbers_B
    is_large = 4 * rows * heads * length**2 > LARGE and rows > 1
    if not is_large or not _is_on_one_cpu(mesh):
        context_BHTK = in_blocks(query_BHTK, key_BHTK, value_BHTK, segment_ids_BT, dropout_key, numbers_B)
        return checkpoint_name(context_BHTK, NAME)

    # XLA on CPU merges a recomputation with what it repeats, which keeps all scores after all; but not across loops.
    @jax.checkpoint
    def attend_row(row):
        query, key, value, segment_ids, number = jax.tree.map(lambda array: array[None], row)
        return in_blocks(query, key, value, segment_ids, dropout_key, number)[0]

    context_BHTK = jax.lax.map(attend_row, (query_BHTK, key_BHTK, value_BHTK, segment_ids_BT, numbers_B))
    return checkpoint_name(context_BHTK, NAME)


def on_each_device(
    kernel: Callable[..., jax.Array],
    mesh: Mesh | None,
    query_BHTK: jax.Array,
    key_BHTK: jax.Array,
    value_BHTK: jax.Array,
    segment_ids_BT: jax.Array,
) -> jax.Array:
    """`kernel` on the rows (over data and fsdp) and heads (over tensor) of each device, `[B, H, T, K]`.

    The compiler cannot cut a kernel: without a word about it every device would get all rows and heads. Rows that do
    not divide over the devices are read by all of them.
    """
    if mesh is None or mesh.size == 1:
        return kernel(query_BHTK, key_BHTK, value_BHTK, segment_ids_BT)
    rows = sharding.BATCH[0] if query_BHTK.shape[0] % sharding.row_shards(mesh) == 0 else None
    by_head, by_row = PartitionSpec(rows, "tensor"), PartitionSpec(rows)
    given = (by_head, by_head, by_head, by_row)
    spread = jax.shard_map(kernel, mesh=mesh, in_specs=given, out_specs=by_head, check_vma=False)
    return spread(query_BHTK, key_BHTK, value_BHTK, segment_ids_BT)


def _is_on_one_cpu(mesh: Mesh | None) -> bool:
    if mesh is None:
        return jax.default_backend() == "cpu"
    return mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"


def _attend_in_blocks(
    query_BHTK, key_BHTK, value_BHTK, segment_ids_BT, dropout_key, numbers_B, *, scale, upcast, dropout_rate
) -> jax.Array:
    """`attend_causally` by `attend`, a block of queries at a time."""
    rows, heads, length, _ = query_BHTK.shape

    def attend_block(query_BHTK, key_BHSK, value_BHSK, segment_ids_BS, scale, key):
        block, stop = query_BHTK.shape[2], key_BHSK.shape[2]
        mask = segment_mask(segment_ids_BS, stop - block, stop)
        keep_BHTS = keep_factors(key, numbers_B, (rows, heads, block, stop), dropout_rate) if dropout_rate else None
        return attend(query_BHTK, key_BHSK, value_BHSK, mask, scale, upcast=upcast, keep_BHTS=keep_BHTS)

    contexts, size = [], max(SMALLEST_BLOCK, -(-length // MOST_BLOCKS))
    for number, first in enumerate(range(0, length, size)):
        stop = min(first + size, length)
        key = jax.random.fold_in(dropout_key, number) if dropout_key is not None else None
        contexts.append(
            jax.checkpoint(attend_block)(
                query_BHTK[:, :, first:stop],
                key_BHTK[:, :, :stop],
                value_BHTK[:, :, :stop],
                segment_ids_BT[:, :stop],
                scale,
                key,
            )
        )
    return jnp.concatenate(contexts, axis=2)


def attend(
    query_BHTK: jax.Array,
    key_BHSK: jax.Array,
    value_BHSK: jax.Array,
    mask: jax.Array,
    scale: float | jax.Array,
    *,
    upcast: bool = False,
    keep_BHTS: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention, `[B, H, T, K]` in the type of `value_BHSK`; the softmax is in float32.

    Heads are a leading axis: on CPU the small batched products run a third faster than in time-major form.

    Args:
      query_BHTK: queries.
      key_BHSK: keys.
      value_BHSK: values.
      mask: bool, broadcastable to `[B, H, T, S]`; False keys get no weight.
      scale: factor on the scores, a scalar.
      upcast: takes the product of scaled queries and keys in full float32 (`reorder_and_upcast_attn`, Mistral GPT-2);
        otherwise in the type they come in, with float32 sums.
      keep_BHTS: factors on the probabilities (dropout), or None.
    """
    # The queries are scaled, not the scores, which are more; in float32, so that the scale itself is never rounded.
    scaled_BHTK = query_BHTK.astype(jnp.float32) * scale
    if upcast:
        key_BHSK = key_BHSK.astype(jnp.float32)
    scores_BHTS = jnp.einsum(
        "bhtk,bhsk->bhts",
        scaled_BHTK.astype(key_BHSK.dtype),
        key_BHSK,
        precision=jax.lax.Precision.HIGHEST if upcast else None,  # accelerators shorten float32 products by default
        preferred_element_type=jnp.float32,
    )
    probabilities_BHTS = jax.nn.softmax(jnp.where(mask, scores_BHTS, NEGATIVE), axis=-1)
    if keep_BHTS is not None:
        probabilities_BHTS = probabilities_BHTS * keep_BHTS
    return jnp.einsum("bhts,bhsk->bhtk", probabilities_BHTS.astype(value_BHSK.dtype), value_BHSK)


def _attend_by_cudnn(query_BHTK, key_BHTK, value_BHTK, segment_ids_BT) -> jax.Array:
    """`attend_causally` of scaled queries by cuDNN's flash attention, which takes time before heads."""
    query_BTHK, key_BTHK, value_BTHK = (array.swapaxes(1, 2) for array in (query_BHTK, key_BHTK, value_BHTK))
    context_BTHK = jax.nn.dot_product_attention(
        query_BTHK,
        key_BTHK,
        value_BTHK,
        mask=segment_mask(segment_ids_BT),
        scale=1.0,
        implementation="cudnn",
    )
    return context_BTHK.swapaxes(1, 2)
