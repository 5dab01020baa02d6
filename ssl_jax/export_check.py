"""Compares an exported directory with the model it came from, by means of `transformers` and PyTorch."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax import model
from ssl_jax.errors import UserError

if TYPE_CHECKING:
    from ssl_jax.dialogue_model import DialogueModel

# Rounding of two float32 programs that add up the same terms in another order. It grows with the logits, which are near
# 1 for fresh weights and near 100 for published ones.
LARGEST_DIFFERENCE = 2e-4
LARGEST_SHARE_OF_A_LOGIT = 2e-5

# Spaces, case, digits, accents, other scripts, a character beyond the basic plane.
_TEXT = "Hello there!  How's it going?\n\tNaïve café № 1234567, 你好, привет 🙂"
_MESSAGES = [
    {"role": "user", "content": "hi, how are you?"},
    {"role": "assistant", "content": "Fine. And you?"},
    {"role": "user", "content": "not bad 🙂"},
]


@dataclasses.dataclass(frozen=True)
class Check:
    """What was compared, what came out, and whether it is as it should be."""

    name: str
    outcome: str
    passed: bool

    def __str__(self) -> str:
        return f"{self.name}: {self.outcome}"


def require_reference() -> None:
    """Looks for PyTorch, which `transformers` computes with.

    Raises:
      UserError: it is not installed.
    """
    if importlib.util.find_spec("torch") is None:
        raise UserError("--check needs PyTorch; pip install 'ssl_jax[parity]', or leave out --check")


def compare(directory: Path, ours: DialogueModel, dtype: str) -> list[Check]:
    """Loads a directory with `transformers` and compares names of weights, logits and token ids.

    Args:
      directory: from `huggingface.write`.
      ours: the model that was written.
      dtype: type of the written weights; ours are rounded to it, and all arithmetic is float32.

    Returns:
      One check of the weights' names, of logits over a full context of random tokens, and of the ids of a text and of a
      conversation.
    """
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import GPT2LMHeadModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    loader: Any = GPT2LMHeadModel
    network, report = loader.from_pretrained(
        directory, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    odd = {kind.removesuffix("_keys"): sorted(map(str, names)) for kind, names in report.items() if names}
    names = Check("weights", str(odd) if odd else "no missing and no unexpected key", not odd)

    tokens = np.random.default_rng(0).integers(0, ours.shape.vocab_size, (1, ours.shape.n_positions)).astype(np.int32)
    with torch.inference_mode():
        theirs = network.eval()(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    return [names, _compare_logits(_logits(ours, tokens, dtype), theirs), *_compare_ids(directory, ours)]


def _logits(ours: DialogueModel, tokens_BT: np.ndarray, dtype: str) -> np.ndarray:
    """float32 `[B, T, V]` of our program with the weights as they were written."""
    params = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(jnp.float32), ours.params)
    shape = dataclasses.replace(ours.shape, dtype=jnp.dtype("float32"), param_dtype=jnp.dtype("float32"))

    @jax.jit
    def compute(params, tokens_BT):
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
        hidden_BTD = model.forward(shape, params, tokens_BT, positions_BT, jnp.ones_like(tokens_BT))
        return jnp.einsum("btd,vd->btv", hidden_BTD, model.output_embedding(params, jnp.float32))

    with jax.default_matmul_precision("highest"):
        return np.asarray(compute(params, tokens_BT))[..., : shape.vocab_size]


def _compare_logits(ours: np.ndarray, theirs: np.ndarray) -> Check:
    difference = float(np.abs(ours - theirs).max())
    limit = max(LARGEST_DIFFERENCE, LARGEST_SHARE_OF_A_LOGIT * float(np.abs(theirs).max()))
    outcome = f"largest absolute difference {difference:.2g} over {ours.shape[1]} tokens (limit {limit:.2g})"
    return Check("logits", outcome, difference <= limit)


def _compare_ids(directory: Path, ours: DialogueModel) -> list[Check]:
    from transformers import AutoTokenizer

    from ssl_jax.conversation import as_prompt

    theirs: Any = AutoTokenizer.from_pretrained(directory)
    pairs = {"text": (ours.tokenizer.encode_text(_TEXT), theirs(_TEXT, add_special_tokens=False)["input_ids"])}
    if theirs.chat_template is not None:
        prompt = ours.tokenizer.encode_prompt(as_prompt(_MESSAGES), 10**6).tokens
        rendered = theirs.apply_chat_template(_MESSAGES, add_generation_prompt=True, return_dict=False)
        pairs["conversation"] = (prompt, rendered)
    return [_compare_lists(name, list(map(int, mine)), list(other)) for name, (mine, other) in pairs.items()]


def _compare_lists(name: str, ours: list[int], theirs: list[int]) -> Check:
    if ours == theirs:
        return Check(name, f"the same {len(ours)} token ids", True)
    return Check(name, f"token ids differ: {ours} here, {theirs} in transformers", False)
