"""The reference: `GPT2LMHeadModel` in PyTorch with random weights, and the same weights as this program reads them."""

from pathlib import Path
from typing import Any

import pytest

from ssl_jax import config, huggingface, model

torch: Any = pytest.importorskip("torch")


def network(scale: float = 1.0, **settings: Any) -> Any:
    """A network in which no bias is zero and no scale is one.

    Args:
      scale: factor on the weights; large ones make the likeliest text varied.
      **settings: of `GPT2Config`.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    settings = {"bos_token_id": 0, "eos_token_id": 0, **settings}
    # Only the eager implementation knows `reorder_and_upcast_attn`.
    made = GPT2LMHeadModel._from_config(GPT2Config(**settings), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(scale).add_(0.1 * torch.randn_like(parameter))
    return made


def imported(made: Any, folder: Path) -> tuple[model.GPT2, model.Params]:
    """The network by way of the directory that it is saved to."""
    made.save_pretrained(folder)
    return read(folder, made.config.vocab_size)


def read(folder: Path, vocab_size: int, *, scan_layers: bool = True) -> tuple[model.GPT2, model.Params]:
    """The weights in a directory, all of whose tokens are known."""
    settings = huggingface.resolve(config.Model(init_from=str(folder), dtype="float32", scan_layers=scan_layers))
    shape = model.GPT2.from_config(settings, vocab_size)
    return shape, huggingface.read_params(folder, shape, known_tokens=vocab_size)
