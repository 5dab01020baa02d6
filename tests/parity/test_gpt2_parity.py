"""Our model is Hugging Face's GPT-2: logits, loss and gradients of the PyTorch reference with the same weights."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax import losses, model

torch: Any = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.parity,
    # What the reference's own dependencies deprecate is not ours to fix.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

LENGTH, ROWS = 256, 2
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


def reference(activation="gelu_new", n_inner=None, epsilon=1e-5):
    """A small `GPT2LMHeadModel` in which no bias is zero and no scale is one."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=211, n_positions=LENGTH, n_embd=48, n_layer=3, n_head=4, n_inner=n_inner,
        activation_function=activation, layer_norm_epsilon=epsilon, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    network = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def shape_of(config, scan_layers):
    return model.GPT2(
        config.vocab_size, 256, config.n_positions, config.n_embd, config.n_layer, config.n_head,
        config.n_inner or 4 * config.n_embd, config.activation_function, config.layer_norm_epsilon,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, scan_layers=scan_layers,
    )  # fmt: skip


def convert(tensors, shape):
    """PyTorch's arrays by name (weights or their gradients) as our tree; the vocabulary is padded with zeros."""
    arrays = {name.removeprefix("transformer."): tensor.detach().numpy() for name, tensor in tensors}
    padding = ((0, shape.padded_vocab_size - shape.vocab_size), (0, 0))
    blocks = [{} for _ in range(shape.n_layer)]
    for number, block in enumerate(blocks):
        for theirs, (module, kind) in NAMES.items():
            block.setdefault(module, {})[kind] = arrays[f"h.{number}.{theirs}"]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)
    return {
        "wte": {"embedding": np.pad(arrays["wte.weight"], padding)},
        "wpe": {"embedding": arrays["wpe.weight"]},
        "h": stacked if shape.scan_layers else {str(number): block for number, block in enumerate(blocks)},
        "ln_f": {"scale": arrays["ln_f.weight"], "bias": arrays["ln_f.bias"]},
    }


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize(
    ("activation", "n_inner", "epsilon"),
    [
        ("gelu_new", None, 1e-5),
        ("gelu", None, 1e-5),
        ("relu", None, 1e-5),
        ("silu", None, 1e-5),
        ("tanh", None, 1e-5),
        ("gelu_new", 80, 1e-5),
        ("gelu_new", None, 1e-2),
    ],
)
def test_logits_loss_and_gradients_are_the_references(activation, n_inner, epsilon, scan_layers):
    network = reference(activation, n_inner, epsilon)
    shape = shape_of(network.config, scan_layers)
    params = jax.tree.map(jnp.asarray, convert(network.named_parameters(), shape))
    fresh = jax.eval_shape(functools.partial(model.init, shape), jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, fresh)

    text: Any = np.random.default_rng(0).integers(0, shape.vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
    tokens, targets = text[:, :-1], text[:, 1:]
    their_logits = network(torch.tensor(tokens, dtype=torch.long)).logits
    their_loss = torch.nn.functional.cross_entropy(
        their_logits.flatten(0, 1), torch.tensor(targets, dtype=torch.long).flatten()
    )
    their_loss.backward()
    expected_loss = their_loss.item()

    @jax.jit
    def ours(params):
        def mean_loss(params):
            positions = jnp.tile(jnp.arange(LENGTH)[None], (ROWS, 1))
            hidden = model.forward(shape, params, tokens, positions, jnp.ones((ROWS, LENGTH), jnp.int32))
            embedding = model.output_embedding(params, hidden.dtype)
            weights = jnp.full((ROWS, LENGTH), 1 / (ROWS * LENGTH))
            loss, _ = losses.weighted_cross_entropy(hidden, embedding, targets, weights, shape.vocab_size)
            return loss, jnp.einsum("btd,vd->btv", hidden, embedding)[..., : shape.vocab_size]

        return jax.value_and_grad(mean_loss, has_aux=True)(params)

    (loss, logits), gradients = ours(params)
    assert np.abs(np.asarray(logits) - their_logits.detach().numpy()).max() <= 2e-4
    assert abs(float(loss) - expected_loss) <= 1e-4 * expected_loss
    expected = convert(((name, parameter.grad) for name, parameter in network.named_parameters()), shape)
    for (path, found), wanted in zip(jax.tree.leaves_with_path(gradients), jax.tree.leaves(expected), strict=True):
        difference = np.linalg.norm(np.asarray(found) - wanted) / np.linalg.norm(wanted)
        assert difference <= 1e-4, (jax.tree_util.keystr(path), difference)
