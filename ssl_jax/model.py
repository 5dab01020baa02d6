"""GPT-2 in Flax Linen, with Hugging Face's parameter names and arithmetic (Radford et al. 2019).

The only module that imports Flax. Callers see plain dictionaries of arrays and four functions: `init`, `forward`,
`prefill` and `decode`. Kernels are `[in, out]` as in Hugging Face's Conv1D. With `scan_layers` the blocks are stacked
under `h` with a leading layer axis; otherwise they are `h/0`, `h/1`, …. An untied output matrix is
`lm_head/embedding`, `[V, D]` like `wte/embedding`.

Axes: B rows, T time, D width, H heads, K head width, S cache slots, L layers, V padded vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from ssl_jax import attention, products, sharding
from ssl_jax.dropout import keep_factors
from ssl_jax.errors import UserError

Params = dict[str, Any]

# What a block keeps for its backward pass, beside its argument. Every product of a block takes as many operations for a
# width of its result, so `names` keeps what spares the most beside them, and little: what attention reads and gives,
# four widths a token; it recomputes 5 of 12 products, and attention never. `dots` keeps all products, nine widths, but
# not attention.
_POLICIES: dict[str, Any] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "names": jax.checkpoint_policies.save_only_these_names("qkv", attention.NAME),
    "full": None,
}
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def _gelu_tanh(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


def _gelu_sigmoid(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(1.702 * x)


# By Hugging Face's names, several of which mean the same function computed in another way.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_new": _gelu_tanh,
    "gelu": _gelu,
    "gelu_python": _gelu,
    "gelu_fast": _gelu_tanh,
    "gelu_accurate": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_python_tanh": _gelu_tanh,
    "quick_gelu": _gelu_sigmoid,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "mish": jax.nn.mish,
    "tanh": jnp.tanh,
}


@dataclasses.dataclass(frozen=True)
class GPT2:
    """Shape and arithmetic of a model: what `config.Model` says, resolved against a tokenizer and a backend.

    Attributes:
      vocab_size: rows of the embedding that count; ids from here to `padded_vocab_size` are never predicted.
      dtype: type of the arithmetic; softmax, layer norms and the loss stay in float32.
      scan_unroll: stacked blocks compiled per turn of the loop over them; all of them: no loop.
      mesh: the devices that the model runs on; None: one device.
    """

    vocab_size: int
    padded_vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan_layers: bool = True
    scan_unroll: int = 1
    remat: str = "none"
    attn_implementation: attention.Implementation = "einsum"
    mesh: jax.sharding.Mesh | None = None

    @classmethod
    def from_config(
        cls,
        config: Any,
        vocab_size: int,
        mesh: jax.sharding.Mesh | None = None,
        *,
        platform: str | None = None,
        sequence_length: int | None = None,
    ) -> GPT2:
        """Resolves a `config.Model` for a tokenizer of `vocab_size` tokens; a larger `config.vocab_size` stands.

        Args:
          config: a `config.Model`.
          vocab_size: of the tokenizer.
          mesh: where the model will run, which may be on devices that are not here; None: on one device.
          platform: JAX's name of the backend; None: that of the mesh's devices, or else of this process.
          sequence_length: of the rows that it is trained with; None: it only answers and scores, wherever it is, and
            without an attention kernel where that is of another platform.

        Raises:
          UserError: the heads, or the attention kernel that is asked for, do not fit the mesh, platform or rows.
        """
        backend = platform or (jax.default_backend() if mesh is None else mesh.devices.flat[0].platform)
        dtype = config.dtype
        if dtype == "auto":
            dtype = "float32" if backend == "cpu" else "bfloat16"
        if mesh is not None and config.n_head % mesh.shape["tensor"]:
            raise UserError(
                f"mesh.tensor {mesh.shape['tensor']} does not divide the model's {config.n_head} heads; set it to a "
                "divisor, and mesh.fsdp for the rest"
            )
        implementation = attention.choose(
            config.attn_implementation,
            platform=backend,
            dtype=dtype,
            head_width=config.n_embd // config.n_head,
            length=sequence_length,
            is_plain=not config.attn_pdrop and not config.reorder_and_upcast_attn,
        )
        fields = {field.name for field in dataclasses.fields(cls)} & set(type(config).model_fields)
        values = {name: getattr(config, name) for name in fields}
        rows = max(vocab_size, config.vocab_size or 0)
        values |= {
            "vocab_size": rows,
            "padded_vocab_size": -(-rows // config.vocab_multiple) * config.vocab_multiple,
            "n_inner": config.n_inner or 4 * config.n_embd,
            "dtype": jnp.dtype(dtype),
            "param_dtype": jnp.dtype(config.param_dtype),
            # Without a loop XLA on CPU is faster, but would keep what recomputation is meant to save.
            "scan_unroll": config.scan_unroll or (config.n_layer if backend == "cpu" and config.remat == "none" else 1),
            "attn_implementation": implementation,
            "mesh": mesh,
        }
        return cls(**values)

    def attention_scale(self, layer: int | jax.Array) -> float | jax.Array:
        """The factor on the attention scores of a layer, counted from 0, that may be traced."""
        scale = 1.0 / math.sqrt(self.n_embd // self.n_head) if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale


def init(model: GPT2, key: jax.Array) -> Params:
    """Fresh parameters as GPT-2 initializes them: normal, the residual projections scaled by 1/sqrt(2 L)."""
    tokens = jnp.zeros((1, 8), jnp.int32)
    # Parameters depend neither on where they will lie nor on a kernel that may not be there.
    model = dataclasses.replace(model, mesh=None, attn_implementation="einsum")
    return dict(_Transformer(model).init(key, tokens, tokens, tokens, tokens[:, 0])["params"])


def forward(
    model: GPT2,
    params: Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
    dropout_key: jax.Array | None = None,
    numbers_B: jax.Array | None = None,
) -> jax.Array:
    """Final hidden states `[B, T, D]` of packed rows; attention is causal and stays within a segment.

    Args:
      model: the shape.
      params: from `init`.
      tokens_BT: int32 ids.
      positions_BT: int32 position of each token in its own segment.
      segment_ids_BT: int32; 0 is padding.
      dropout_key: PRNG key for training; None switches dropout off.
      numbers_B: int32, of the rows, which decide what each draws (`dropout.row_keys`); None: their places.
    """
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    transformer = _Transformer(model, deterministic=dropout_key is None)
    numbers_B = jnp.arange(tokens_BT.shape[0]) if numbers_B is None else numbers_B
    arrays = (tokens_BT, positions_BT, segment_ids_BT, numbers_B)
    hidden_BTD: Any = transformer.apply({"params": params}, *arrays, rngs=rngs)
    return hidden_BTD


def output_embedding(params: Params, dtype: Any) -> Any:
    """The `[V, D]` matrix that turns hidden states into logits: the untied head, or else the token embedding.

    An array of the given type, or a `products.Int8`.
    """
    embedding = params.get("lm_head", params["wte"])["embedding"]
    return embedding if isinstance(embedding, products.Int8) else embedding.astype(dtype)


def logits(model: GPT2, params: Params, hidden_BD: jax.Array) -> jax.Array:
    """Scores of every next token, float32 `[B, V]`; minus infinity for the padding of the vocabulary."""
    return products.logits(hidden_BD, output_embedding(params, hidden_BD.dtype), model.vocab_size)


Cache = tuple[tuple[jax.Array, jax.Array], ...]
"""Keys and values of every layer, each `[B, H, S, K]`."""


def prefill(model: GPT2, layers: Params, tokens_BT: jax.Array, slots: int) -> tuple[jax.Array, Cache]:
    """Reads right-padded prompts: hidden states `[B, T, D]` and a cache with `slots` slots, prompts in the first T.

    Args:
      model: the shape.
      layers: from `unstack`.
      tokens_BT: int32 prompts; what stands behind a prompt's end is harmless, since attention is causal and `decode`
        masks it.
      slots: cache size, at least T.
    """
    length = tokens_BT.shape[1]
    one_segment_BT = jnp.ones_like(tokens_BT)
    padding = ((0, 0), (0, 0), (0, slots - length), (0, 0))

    def attend_for(layer):
        def attend(query, key, value):
            context = _attend_causally(model, layer, query, key, value, one_segment_BT)
            return context, (jnp.pad(key, padding), jnp.pad(value, padding))

        return attend

    return _run_layers(model, layers, tokens_BT, jnp.arange(length)[None], attend_for)


def decode(
    model: GPT2,
    layers: Params,
    tokens_B: jax.Array,
    positions_B: jax.Array,
    slot: jax.Array,
    visible_BS: jax.Array,
    cache: Cache,
) -> tuple[jax.Array, Cache]:
    """One token per row: hidden states `[B, D]` and the cache with the token written at `slot`.

    Args:
      model: the shape.
      layers: from `unstack`.
      tokens_B: int32 ids.
      positions_B: int32 positions in the conversation.
      slot: int32 scalar, the same cache slot for every row, so that the write is one slice update in place.
      visible_BS: bool; which slots a row may see, `slot` included.
      cache: from `prefill` or the last `decode`; its leaves may lack the axis of a single row, `[H, S, K]`.
    """
    slots = visible_BS.shape[1]

    def attend_for(layer):
        def attend(query, key, value):
            shape = (*key.shape[:2], slots, key.shape[-1])
            keys, values = (
                jax.lax.dynamic_update_slice_in_dim(old, new.reshape(*old.shape[:-2], 1, -1), slot, axis=-2)
                for old, new in zip(cache[layer], (key, value), strict=True)
            )
            context = attention.attend(
                query,
                keys.reshape(shape),
                values.reshape(shape),
                visible_BS[:, None, None],
                model.attention_scale(layer),
                upcast=model.reorder_and_upcast_attn,
            )
            return context, (keys, values)

        return attend

    hidden_B1D, cache = _run_layers(model, layers, tokens_B[:, None], positions_B[:, None], attend_for)
    return hidden_B1D[:, 0], cache


def unstack(model: GPT2, params: Params) -> Params:
    """Parameters with one entry per block, as `prefill` and `decode` read them."""
    if not model.scan_layers:
        return params
    blocks = {str(i): jax.tree.map(lambda leaf, i=i: leaf[i], params["h"]) for i in range(model.n_layer)}
    return {**params, "h": blocks}


def with_weights(model: GPT2, params: Params, weights: Literal["auto", "bfloat16", "int8"]) -> tuple[GPT2, Params]:
    """The model with shorter weights, for everything but training.

    Args:
      model: the shape.
      params: its parameters, stacked or not.
      weights: `bfloat16` is the type of all weights and of the arithmetic. `int8` is that of matrices and token
        embeddings (`products.Int8`), and of what they are multiplied with; the rest stays. `auto` changes nothing.
    """
    if weights == "auto":
        return model, params
    if weights == "bfloat16":
        dtype = jnp.dtype(jnp.bfloat16)
        shorter = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        return dataclasses.replace(model, dtype=dtype, param_dtype=dtype), shorter

    def convert(path, leaf):
        name = path[-1].key
        if name == "kernel":
            return products.Int8.of(leaf.T)
        return products.Int8.of(leaf) if name == "embedding" and path[0].key != "wpe" else leaf

    layers = jax.tree_util.tree_map_with_path(convert, unstack(model, params))
    return dataclasses.replace(model, scan_layers=False), layers


def _run_layers(model, layers, tokens_BT, positions_BT, attend_for) -> tuple[jax.Array, Cache]:
    """The forward pass with a cache: blocks one by one, each with its own way to attend."""
    x_BTD: Any = _Embed(model).apply({"params": layers}, tokens_BT, positions_BT)
    cache = []
    for layer in range(model.n_layer):
        x_BTD, entry = _Block(model).apply({"params": layers["h"][str(layer)]}, x_BTD, attend_for(layer))
        cache.append(entry)
    x_BTD = _LayerNorm(model).apply({"params": layers["ln_f"]}, x_BTD)
    return x_BTD, tuple(cache)


def _attend_causally(
    model, layer, query, key, value, segment_ids_BT, dropout_rate=0.0, dropout_key=None, numbers_B=None
) -> jax.Array:
    """Attention as this model's layer does it."""
    return attention.attend_causally(
        query,
        key,
        value,
        segment_ids_BT,
        model.attention_scale(layer),
        implementation=model.attn_implementation,
        upcast=model.reorder_and_upcast_attn,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        numbers_B=numbers_B,
        mesh=model.mesh,
    )


def _is_spread(model: GPT2) -> bool:
    return model.mesh is not None and model.mesh.size > 1


def _constrain(model: GPT2, array: jax.Array, *axes: Any) -> jax.Array:
    """Says how an array lies on several devices; the compiler would guess, and now and then move activations."""
    if model.mesh is None or model.mesh.size == 1:
        return array
    return jax.lax.with_sharding_constraint(array, NamedSharding(model.mesh, PartitionSpec(*axes)))


def _by_row(model: GPT2, x_BTD: jax.Array) -> jax.Array:
    """Every device keeps its own rows; rows that do not divide are left to the compiler."""
    if model.mesh is None or x_BTD.shape[0] % sharding.row_shards(model.mesh):
        return x_BTD
    return _constrain(model, x_BTD, *sharding.BATCH)


def _dropout(module: nn.Module, x: jax.Array, rate: float, numbers_B: jax.Array | None) -> jax.Array:
    """Zeroes a fraction `rate` of `x` and scales up the rest; the rows' numbers are needed where there is a rate."""
    if not rate or numbers_B is None:
        return x
    return x * keep_factors(module.make_rng("dropout"), numbers_B, x.shape, rate).astype(x.dtype)


def _quantized(module: nn.Module, name: str) -> products.Int8 | None:
    """The parameter of that name if it came quantized."""
    value = module.get_variable("params", name)
    return value if isinstance(value, products.Int8) else None


class _Dense(nn.Module):
    """x @ kernel + bias with Hugging Face's Conv1D names.

    Attributes:
      tensor_axes: of the kernel, as `sharding.PARTITION_RULES` has them, fsdp left out.
      groups: (queries, keys and values; heads; width) where the columns are those; the result has these axes then.
    """

    model: GPT2
    features: int
    scale: float = 1.0
    tensor_axes: tuple[str | None, str | None] = (None, "tensor")
    groups: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        initializer = nn.initializers.normal(self.model.initializer_range * self.scale)
        kernel = _quantized(self, "kernel")
        if kernel is None:
            kernel = self.param("kernel", initializer, (x.shape[-1], self.features), self.model.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.model.param_dtype)
        if _is_spread(self.model) and not isinstance(kernel, products.Int8):
            return self._spread(x, kernel, bias)
        # XLA on CPU turns plain matrix products, and only those, into fast calls, also in the backward pass.
        rows = products.matmul(x.reshape(-1, x.shape[-1]), kernel) + bias.astype(self.model.dtype)[None]
        return rows.reshape(*x.shape[:-1], *(self.groups or (self.features,)))

    def _spread(self, x: jax.Array, kernel: Any, bias: jax.Array) -> jax.Array:
        """The product on several devices: each gets the columns or rows that are its part of the heads or the layer.

        Weights move, activations do not: what devices share of a kernel (fsdp) is put together just before its use.
        """
        model, axes = self.model, self.tensor_axes
        kernel, bias = kernel.astype(model.dtype), bias.astype(model.dtype)
        if not self.groups:
            stored = tuple(axis or "fsdp" for axis in axes)
            return jnp.matmul(x, _gathered(model.mesh, stored, axes, kernel)) + bias[None, None]
        # Columns of a head lie in as many places as there are groups: heads are cut where all columns are there.
        kernel = _constrain(model, kernel, "fsdp", None).reshape(x.shape[-1], *self.groups)
        kernel = _gathered(model.mesh, ("fsdp", None, "tensor", None), (None, None, "tensor", None), kernel)
        return jnp.einsum("btd,dghk->btghk", x, kernel) + bias.reshape(1, 1, *self.groups)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gathered(mesh: Any, stored: tuple[str | None, ...], used: tuple[str | None, ...], weight: jax.Array) -> jax.Array:
    """A weight that lies on the axes `stored`, put together for its use on the axes `used`.

    Its gradient goes to where the weight lies: devices get the sum of their part, not all of it.
    """
    for axes in (stored, used):
        weight = jax.lax.with_sharding_constraint(weight, NamedSharding(mesh, PartitionSpec(*axes)))
    return weight


def _gathered_forward(mesh, stored, used, weight):
    return _gathered(mesh, stored, used, weight), None


def _gathered_backward(mesh, stored, used, _, gradient):
    return (jax.lax.with_sharding_constraint(gradient, NamedSharding(mesh, PartitionSpec(*stored))),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


class _LayerNorm(nn.Module):
    model: GPT2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, width, self.model.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, width, self.model.param_dtype)

        def norm(x, scale, bias):
            x32 = x.astype(jnp.float32)
            centered = x32 - x32.mean(axis=-1, keepdims=True)
            variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
            normal = centered * jax.lax.rsqrt(variance + self.model.layer_norm_epsilon)
            ones = (None,) * (x.ndim - 1)
            return (normal * scale.astype(jnp.float32)[ones] + bias.astype(jnp.float32)[ones]).astype(x.dtype)

        # What the backward pass would keep is in float32, twice what it can be computed from in a shorter type.
        return (norm if x.dtype == jnp.float32 else jax.checkpoint(norm))(x, scale, bias)


class _Embed(nn.Module):
    """Token plus position embedding."""

    model: GPT2

    @nn.compact
    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        table = _Table(self.model, self.model.padded_vocab_size, name="wte")
        positions = _Table(self.model, self.model.n_positions, name="wpe")
        return _by_row(self.model, table(tokens_BT) + positions(positions_BT))


class _Table(nn.Module):
    model: GPT2
    rows: int

    @nn.compact
    def __call__(self, ids_BT: jax.Array) -> jax.Array:
        model = self.model
        embedding = _quantized(self, "embedding")
        if embedding is not None:
            return embedding.rows(ids_BT, model.dtype)
        initializer = nn.initializers.normal(model.initializer_range)
        embedding = self.param("embedding", initializer, (self.rows, model.n_embd), model.param_dtype)
        # In this order gradients of short types add up in the parameters' own.
        if model.mesh is None or model.mesh.size == 1 or ids_BT.shape[0] % sharding.row_shards(model.mesh):
            return embedding[ids_BT].astype(model.dtype)
        return self._spread(model.mesh, embedding, ids_BT)

    def _spread(self, mesh: jax.sharding.Mesh, embedding: jax.Array, ids_BT: jax.Array) -> jax.Array:
        """The rows on several devices: each looks into the part of the table that it has, widths cut over fsdp.

        Left to the compiler, a large table's gradient takes the activations of all rows on every device.
        """
        table = sharding.partition_spec((self.name, "embedding"), 2)
        is_cut = table[0] is not None

        def look_up(part_VD, ids_BT):
            if not is_cut:
                return part_VD[ids_BT].astype(self.model.dtype)
            places_BT = ids_BT - jax.lax.axis_index("tensor") * part_VD.shape[0]
            is_here_BT = (places_BT >= 0) & (places_BT < part_VD.shape[0])
            found_BTD = part_VD[jnp.where(is_here_BT, places_BT, 0)].astype(self.model.dtype)
            return jax.lax.psum(jnp.where(is_here_BT[..., None], found_BTD, 0), "tensor")

        # Numbers of tokens go to the devices that share a table; what they find comes back once it is added up.
        rows = PartitionSpec("data")
        found = PartitionSpec("data", None, "fsdp")
        return jax.shard_map(look_up, mesh=mesh, in_specs=(table, rows), out_specs=found)(embedding, ids_BT)


class _Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    model: GPT2
    deterministic: bool = True

    @nn.compact
    def __call__(self, x_BTD: jax.Array, attend: Attend, numbers_B: jax.Array | None = None) -> tuple[jax.Array, Any]:
        model = self.model
        rows, length, width = x_BTD.shape
        residual_scale = (2 * model.n_layer) ** -0.5
        drop = 0.0 if self.deterministic else model.resid_pdrop

        normal = _LayerNorm(model, name="ln_1")(x_BTD)
        groups = (3, model.n_head, width // model.n_head)
        qkv = _Dense(model, 3 * width, groups=groups, name="attn_c_attn")(normal)
        heads = checkpoint_name(qkv, "qkv").transpose(2, 0, 3, 1, 4)
        context_BHTK, extra = attend(heads[0], heads[1], heads[2])
        context = context_BHTK.transpose(0, 2, 1, 3).reshape(rows, length, width)
        projected = _Dense(model, width, residual_scale, ("tensor", None), name="attn_c_proj")(context)
        x_BTD = _by_row(model, x_BTD + _dropout(self, projected, drop, numbers_B))

        normal = _LayerNorm(model, name="ln_2")(x_BTD)
        # Of all that the activation computes, the backward pass gets its argument: the rest is cheaper than memory.
        activation = jax.checkpoint(ACTIVATIONS[model.activation_function])
        inner = activation(_Dense(model, model.n_inner, name="mlp_c_fc")(normal))
        projected = _Dense(model, width, residual_scale, ("tensor", None), name="mlp_c_proj")(inner)
        return _by_row(model, x_BTD + _dropout(self, projected, drop, numbers_B)), extra


class _TrainBlock(nn.Module):
    """A block over packed rows, in the shape that `nn.scan` wants."""

    model: GPT2
    deterministic: bool = True

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, segment_ids_BT: jax.Array, numbers_B: jax.Array, layer: int | jax.Array
    ) -> tuple[jax.Array, None]:
        model = self.model
        rate = 0.0 if self.deterministic else model.attn_pdrop
        dropout_key = self.make_rng("dropout") if rate else None

        def attend(query, key, value):
            context = _attend_causally(model, layer, query, key, value, segment_ids_BT, rate, dropout_key, numbers_B)
            return context, None

        # The block's parameters sit beside, not below, this wrapper: one layout for training and decoding.
        block = _Block(model, self.deterministic)
        return nn.share_scope(self, block) or block(x_BTD, attend, numbers_B)


class _Transformer(nn.Module):
    """Embeddings, blocks, final norm."""

    model: GPT2
    deterministic: bool = True

    @nn.compact
    def __call__(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array, numbers_B: jax.Array
    ) -> jax.Array:
        model = self.model
        embed = _Embed(model)
        nn.share_scope(self, embed)
        x_BTD = embed(tokens_BT, positions_BT)
        if not self.deterministic:
            x_BTD = _dropout(self, x_BTD, model.embd_pdrop, numbers_B)
        if not model.tie_word_embeddings:
            _Table(model, model.padded_vocab_size, name="lm_head")(tokens_BT)  # made here, read by `output_embedding`
        block: Any = _TrainBlock
        if model.remat != "none":
            policy = _POLICIES[model.remat]
            block = nn.remat(block, prevent_cse=not model.scan_layers or model.scan_unroll > 1, policy=policy)
        if model.scan_layers:
            scanned: Any = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, nn.broadcast, 0),  # pyright: ignore[reportArgumentType]
                length=model.n_layer,
                unroll=model.scan_unroll,
            )
            layers = jnp.arange(model.n_layer)
            x_BTD, _ = scanned(model, self.deterministic, name="h")(x_BTD, segment_ids_BT, numbers_B, layers)
        else:
            x_BTD, _ = _Blocks(model, self.deterministic, block, name="h")(x_BTD, segment_ids_BT, numbers_B)
        return _LayerNorm(model, name="ln_f")(x_BTD)


class _Blocks(nn.Module):
    """The unrolled stack, named by layer number."""

    model: GPT2
    deterministic: bool
    block: Any

    @nn.compact
    def __call__(self, x_BTD: jax.Array, segment_ids_BT: jax.Array, numbers_B: jax.Array) -> tuple[jax.Array, None]:
        for layer in range(self.model.n_layer):
            x_BTD, _ = self.block(self.model, self.deterministic, name=str(layer))(
                x_BTD, segment_ids_BT, numbers_B, layer
            )
        return x_BTD, None
