"""Splash attention, JAX's flash attention for TPUs with sparse masks, over packed rows."""

from __future__ import annotations

from typing import Any

import jax

# The kernel works on tiles of so many tokens; queries and keys of larger blocks wait less for memory.
LANES = 128
_LARGEST_BLOCK = 512
# Of the outputs and the sums of every row of scores, which the backward pass reads, for rematerialization.
NAME = "attention"


def fits(length: int) -> bool:
    """Whether the kernel can take rows of `length` tokens."""
    return length % LANES == 0


def attend(
    query_BHTK: jax.Array,
    key_BHTK: jax.Array,
    value_BHTK: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """`attention.attend_causally` by the kernel, `[B, H, T, K]`, on one device.

    Args:
      query_BHTK: queries, scaled: the kernel scales nothing.
      key_BHTK: keys.
      value_BHTK: values.
      segment_ids_BT: int32; 0 is padding, which sees padding.
      interpret: runs the kernel without a TPU, slowly, for tests.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention

    kernel = _kernel(query_BHTK.shape[1], query_BHTK.shape[2], interpret)
    segment_ids = splash_attention.SegmentIds(segment_ids_BT, segment_ids_BT)
    return jax.vmap(kernel)(query_BHTK, key_BHTK, value_BHTK, segment_ids)


def _kernel(heads: int, length: int, interpret: bool) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention

    size = max(size for size in range(LANES, _LARGEST_BLOCK + 1, LANES) if length % size == 0)
    causal = splash_attention.MultiHeadMask([splash_attention.CausalMask((length, length))] * heads)
    return splash_attention.make_splash_mha(
        causal,
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash_attention.BlockSizes(
            block_q=size,
            block_kv=size,
            block_q_dkv=size,
            block_kv_dkv=size,
            block_q_dq=size,
            block_kv_dq=size,
        ),
        residual_checkpoint_name=NAME,
        interpret=interpret,
    )
