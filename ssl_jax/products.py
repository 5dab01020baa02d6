"""Matrix products with the model's weights, in the forms that XLA runs well; among them 8-bit weights for serving.

Axes: N rows, I inputs, O outputs, D width, V padded vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values_OI", "scales_O"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Int8:
    """A matrix of 8-bit integers, one scale for each output: LLM.int8()'s vector-wise weights (Dettmers et al. 2022).

    Outputs come first, which is the order in which a CPU multiplies bytes fastest.

    Attributes:
      values_OI: int8, -127 to 127.
      scales_O: float32; the matrix is values × scales.
    """

    values_OI: jax.Array
    scales_O: jax.Array

    @classmethod
    def of(cls, matrix_OI: jax.Array) -> Int8:
        """The nearest such matrix."""
        values_OI, scales_O = _round_rows(matrix_OI)
        return cls(values_OI, scales_O)

    def rows(self, numbers: jax.Array, dtype: Any) -> jax.Array:
        """The rows of some outputs, `[…, I]`."""
        return (self.values_OI[numbers] * self.scales_O[numbers][..., None]).astype(dtype)


def matmul(x_NI: jax.Array, kernel: jax.Array | Int8) -> jax.Array:
    """The product `[N, O]`, in the type of `x_NI`, with sums in float32.

    With an `Int8` kernel the rows of `x_NI` are rounded to 8 bits too, each by its own scale, and the sums are exact.

    Args:
      x_NI: any float type.
      kernel: `[I, O]`, or an `Int8`.
    """
    if not isinstance(kernel, Int8):
        return _of_two_rows(lambda x: x @ kernel.astype(x.dtype), x_NI)
    values_NI, scales_N = _round_rows(x_NI)
    sums_NO = _of_two_rows(
        lambda x: jax.lax.dot_general(x, kernel.values_OI, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32),
        values_NI,
    )
    return (sums_NO * scales_N[:, None] * kernel.scales_O[None]).astype(x_NI.dtype)


def logits(hidden_ND: jax.Array, embedding: jax.Array | Int8, vocab_size: int) -> jax.Array:
    """Scores of all tokens, float32 `[N, V]`; minus infinity for those from `vocab_size` on.

    Args:
      hidden_ND: any float type.
      embedding: `[V, D]`, of the same type, or an `Int8`.
      vocab_size: number of real tokens.
    """
    if isinstance(embedding, Int8):
        logits_NV = matmul(hidden_ND.astype(jnp.float32), embedding)
    else:
        logits_NV = _of_two_rows(
            lambda x: jnp.einsum("nd,vd->nv", x, embedding, preferred_element_type=jnp.float32), hidden_ND
        )
    if vocab_size == logits_NV.shape[1]:
        return logits_NV
    is_real_V = jnp.arange(logits_NV.shape[1]) < vocab_size
    return jnp.where(is_real_V[None], logits_NV, -jnp.inf)


def _round_rows(matrix_NI: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows as int8 and the float32 scale `[N]` of each."""
    matrix_NI = matrix_NI.astype(jnp.float32)
    scales_N = jnp.maximum(jnp.max(jnp.abs(matrix_NI), axis=1), 1e-30) / 127.0
    return jnp.round(matrix_NI / scales_N[:, None]).astype(jnp.int8), scales_N


def _of_two_rows(multiply: Any, x_NI: jax.Array) -> jax.Array:
    """`multiply(x_NI)`; a single row goes twice where XLA has fast products of short types for several rows only."""
    if x_NI.shape[0] != 1 or x_NI.dtype == jnp.float32:
        return multiply(x_NI)
    # Asked when it is compiled, which may be for other devices than those that are here.
    return jax.lax.platform_dependent(
        x_NI, cpu=lambda x: multiply(jnp.broadcast_to(x, (2, x.shape[1])))[:1], default=multiply
    )
