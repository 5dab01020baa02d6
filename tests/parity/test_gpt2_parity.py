"""Our model is Hugging Face's GPT-2: logits, loss and gradients of the PyTorch reference with the same weights.

Every case runs with full, right-padded and packed rows; the reference reads each dialogue in a row of its own.
"""

import functools
import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import network, torch

from ssl_jax import attention, config, losses, model, plan

LENGTH, ROWS = 256, 2
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "gelu, narrow": dict(activation_function="gelu", n_inner=80),
    "relu, epsilon": dict(activation_function="relu", layer_norm_epsilon=1e-2),
    "silu, unscaled": dict(activation_function="silu", scale_attn_weights=False),
    "tanh, inverse layer": dict(activation_function="tanh", scale_attn_by_inverse_layer_idx=True),
    "quick_gelu, untied": dict(activation_function="quick_gelu", tie_word_embeddings=False),
    "Mistral": dict(scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True),
    "all": dict(
        activation_function="relu2", n_inner=80, layer_norm_epsilon=1e-3, scale_attn_weights=False,
        scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True, tie_word_embeddings=False,
    ),
}  # fmt: skip
# Lengths of the dialogues that share a row.
LAYOUTS = {
    "full": ((LENGTH,), (LENGTH,)),
    "padded": ((171,), (40,)),
    "packed": ((100, 120), (31, LENGTH - 31)),
}
ACTIVATIONS: tuple[str, ...] = typing.get_args(config.Model.model_fields["activation_function"].annotation)

NAMES = {
    "ln_1.weight": ("ln_1", "scale"),
    "ln_1.bias": ("ln_1", "bias"),
    "attn.c_attn.weight": ("attn_c_attn", "kernel"),
    "attn.c_attn.bias": ("attn_c_attn", "bias"),
    "attn.c_proj.weight": ("attn_c_proj", "kernel"),
    "attn.c_proj.bias": ("attn_c_proj", "bias"),
    "ln_2.weight": ("ln_2", "scale"),
    "ln_2.bias": ("ln_2", "bias"),
    "mlp.c_fc.weight": ("mlp_c_fc", "kernel"),
    "mlp.c_fc.bias": ("mlp_c_fc", "bias"),
    "mlp.c_proj.weight": ("mlp_c_proj", "kernel"),
    "mlp.c_proj.bias": ("mlp_c_proj", "bias"),
}


@functools.cache
def reference(case: str) -> Any:
    return network(
        vocab_size=211, n_positions=LENGTH, n_embd=48, n_layer=3, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, **CASES[case],
    )  # fmt: skip


def shape_of(settings: Any, scan_layers: bool) -> model.GPT2:
    """The reference's configuration, field by field under the same name, with a padded vocabulary."""
    shared = set(config.Model.model_fields) & set(settings.to_dict()) - {"dtype"}
    fields = {name: getattr(settings, name) for name in shared}
    return model.GPT2.from_config(config.Model(**fields, scan_layers=scan_layers, vocab_multiple=64), vocab_size=1)


def convert(tensors: Any, shape: model.GPT2) -> model.Params:
    """PyTorch's arrays by name (weights or their gradients) as our tree; the vocabulary is padded with zeros."""
    arrays = {name.removeprefix("transformer."): tensor.detach().numpy() for name, tensor in tensors}
    padding = ((0, shape.padded_vocab_size - shape.vocab_size), (0, 0))
    blocks = [{} for _ in range(shape.n_layer)]
    for number, block in enumerate(blocks):
        for theirs, (module, kind) in NAMES.items():
            block.setdefault(module, {})[kind] = arrays[f"h.{number}.{theirs}"]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)
    params = {
        "wte": {"embedding": np.pad(arrays["wte.weight"], padding)},
        "wpe": {"embedding": arrays["wpe.weight"]},
        "h": stacked if shape.scan_layers else {str(number): block for number, block in enumerate(blocks)},
        "ln_f": {"scale": arrays["ln_f.weight"], "bias": arrays["ln_f.bias"]},
    }
    if not shape.tie_word_embeddings:
        params["lm_head"] = {"embedding": np.pad(arrays["lm_head.weight"], padding)}
    return params


@functools.cache
def ours(case: str, scan_layers: bool) -> tuple[model.GPT2, model.Params]:
    """The reference's shape and weights, in the tree that `init` makes."""
    network = reference(case)
    shape = shape_of(network.config, scan_layers)
    params = jax.tree.map(jnp.asarray, convert(network.named_parameters(), shape))
    fresh = jax.eval_shape(functools.partial(model.init, shape), jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, fresh)
    return shape, params


@functools.cache
def dialogues(layout: str) -> list[list[np.ndarray]]:
    """For every row the ids of its dialogues, each with one id more, the last target."""
    rng = np.random.default_rng(0)
    return [[rng.integers(0, 211, n + 1).astype(np.int32) for n in row] for row in LAYOUTS[layout]]


# The time here is spent in the compiler: the same arithmetic in slower machine code takes half of it.
compiled: Any = functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})


def logits_of(shape: model.GPT2, params: model.Params, hidden: jax.Array) -> jax.Array:
    return hidden @ model.output_embedding(params, hidden.dtype).T[:, : shape.vocab_size]


@compiled
def loss_logits_gradients(shape, params, tokens, positions, segment_ids, targets, weights) -> Any:
    def mean_loss(params):
        hidden = model.forward(shape, params, tokens, positions, segment_ids)
        embedding = model.output_embedding(params, hidden.dtype)
        loss, _ = losses.weighted_cross_entropy(hidden, embedding, targets, weights, shape.vocab_size)
        return loss, hidden

    (loss, hidden), gradients = jax.value_and_grad(mean_loss, has_aux=True)(params)
    return loss, logits_of(shape, params, hidden.reshape(-1, shape.n_embd)).reshape(*tokens.shape, -1), gradients


@functools.cache
def theirs(case: str, layout: str) -> tuple[float, np.ndarray, dict[str, np.ndarray]]:
    """Mean loss over all targets, logits of each dialogue in a row of its own, and gradients by name."""
    texts = [text for row in dialogues(layout) for text in row]
    tokens = torch.zeros((len(texts), LENGTH), dtype=torch.long)
    targets = torch.full_like(tokens, -100)
    for row, text in enumerate(texts):
        tokens[row, : len(text) - 1] = torch.from_numpy(text[:-1])
        targets[row, : len(text) - 1] = torch.from_numpy(text[1:])
    network = reference(case)
    network.zero_grad()
    logits = network(tokens, attention_mask=(targets >= 0).long()).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    loss.backward()
    return loss.item(), logits.detach().numpy(), {name: p.grad.clone() for name, p in network.named_parameters()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_are_the_references(case, scan_layers, layout):
    shape, params = ours(case, scan_layers)
    tokens, positions, segment_ids, targets = np.zeros((4, ROWS, LENGTH), np.int32)
    places = []
    for row, texts in enumerate(dialogues(layout)):
        begin = 0
        for segment, text in enumerate(texts, start=1):
            place = row, slice(begin, begin := begin + len(text) - 1)
            tokens[place], targets[place] = text[:-1], text[1:]
            positions[place], segment_ids[place] = np.arange(len(text) - 1), segment
            places.append(place)
    weights = (segment_ids > 0) / np.float32((segment_ids > 0).sum())
    loss, logits, gradients = loss_logits_gradients(shape, params, tokens, positions, segment_ids, targets, weights)

    expected_loss, expected_logits, expected_gradients = theirs(case, layout)
    for place, expected in zip(places, expected_logits, strict=True):
        found = np.asarray(logits)[place]
        assert np.abs(found - expected[: len(found)]).max() <= 2e-4
    assert abs(float(loss) - expected_loss) <= 1e-4 * expected_loss
    wanted_gradients = convert(expected_gradients.items(), shape)
    for (path, found), wanted in zip(
        jax.tree.leaves_with_path(gradients), jax.tree.leaves(wanted_gradients), strict=True
    ):
        difference = np.linalg.norm(np.asarray(found) - wanted) / np.linalg.norm(wanted)
        assert difference <= 1e-4, (jax.tree_util.keystr(path), difference)


@compiled
def logits_token_by_token(shape, params, tokens, lengths) -> Any:
    """Logits `[T, B, V]`, from the prompts' last tokens on; row b's prompt is its first `lengths[b]` tokens."""
    layers = model.unstack(shape, params)
    rows, slots = jnp.arange(tokens.shape[0]), jnp.arange(LENGTH)
    prompt_slots = max(PROMPTS)
    hidden, cache = model.prefill(shape, layers, tokens[:, :prompt_slots], LENGTH)

    def step(cache, number):
        slot, places = prompt_slots + number, lengths + number
        visible = (slots[None] < lengths[:, None]) | ((slots >= prompt_slots) & (slots <= slot))[None]
        hidden, cache = model.decode(shape, layers, tokens[rows, places], places, slot, visible, cache)
        return cache, logits_of(shape, params, hidden)

    _, following = jax.lax.scan(step, cache, jnp.arange(LENGTH - prompt_slots))
    return jnp.concatenate([logits_of(shape, params, hidden[rows, lengths - 1])[None], following])


PROMPTS = (40, 17)


@pytest.mark.parametrize("case", CASES)
def test_logits_token_by_token_with_the_cache_are_the_references(case):
    """Prompts of different lengths read at once, then 216 single tokens, up to the longest context."""
    shape, params = ours(case, scan_layers=True)
    tokens = np.stack([row[0][:-1] for row in dialogues("full")])
    found = np.asarray(logits_token_by_token(shape, params, tokens, np.array(PROMPTS)))
    expected = theirs(case, "full")[1]
    for row, length in enumerate(PROMPTS):
        assert np.abs(found[:, row] - expected[row, length - 1 :][: len(found)]).max() <= 2e-4


def test_products_of_bfloat16_queries_and_keys_are_upcast_as_in_the_reference():
    rng = np.random.default_rng(0)
    drawn = [torch.from_numpy(rng.normal(0, 3, (2, 4, 32, 12)).astype(np.float32)) for _ in range(3)]
    query, key, value = drawn[0].bfloat16(), drawn[1].bfloat16(), drawn[2]
    last = reference("Mistral").transformer.h[2].attn
    with torch.no_grad():
        expected, _ = last._upcast_and_reordered_attn(query, key, value, torch.full((32, 32), -1e9).triu(1))

    arrays = (jnp.asarray(query.float(), jnp.bfloat16), jnp.asarray(key.float(), jnp.bfloat16), jnp.asarray(value))
    scale = ours("Mistral", True)[0].attention_scale(2)
    mask = jnp.tri(32, dtype=bool)[None, None]
    upcast, plain = (attention.attend(*arrays, mask, scale, upcast=choice) for choice in (True, False))
    assert np.abs(np.asarray(upcast).swapaxes(1, 2) - expected.numpy()).max() <= 1e-5
    assert np.abs(np.asarray(upcast - plain)).max() > 1e-3, "the case cannot tell upcast products from others"


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_and_its_slope_are_those_of_that_name(name):
    from transformers.activations import ACT2FN

    x = np.linspace(-8, 8, 1001, dtype=np.float32)
    at = torch.tensor(x, requires_grad=True)
    expected = ACT2FN[name](at)
    expected.sum().backward()
    found, slope = jax.vmap(jax.value_and_grad(model.ACTIVATIONS[name]))(jnp.asarray(x))
    # Where tanh is near -1, float32 knows 1 + tanh to 6e-8 only, times x², the slope of its argument.
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-5, atol=5e-6)
    np.testing.assert_allclose(slope, at.grad.numpy(), rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("size", sorted(config.MODEL_SIZES))
def test_a_size_by_name_has_the_references_number_of_parameters(size, tied):
    from transformers import GPT2Config, GPT2LMHeadModel

    fields: dict[str, Any] = dict(config.MODEL_SIZES[size])
    with torch.device("meta"):
        network = GPT2LMHeadModel(GPT2Config(tie_word_embeddings=tied, **fields))
    settings = config.Model(size=size, tie_word_embeddings=tied)  # pyright: ignore[reportArgumentType]
    shape = model.GPT2.from_config(settings, vocab_size=50257)
    assert plan.parameter_count(shape) == network.num_parameters()


def test_defaults_of_the_fields_that_we_share_are_the_references():
    from transformers import GPT2Config

    shared = {name: field.default for name, field in config.Model.model_fields.items() if hasattr(GPT2Config, name)}
    assert len(shared) >= 17
    # Absent fields follow the tokenizer and the device.
    theirs = {name: getattr(GPT2Config(), name) for name in shared if name not in ("vocab_size", "dtype")}
    assert {name: shared[name] for name in theirs} == theirs
