"""Semi-supervised training of GPT-2 dialogue models in JAX."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

# Of transformers we use what needs no PyTorch; it would say on every import that there is none.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

if TYPE_CHECKING:
    from ssl_jax.config import TemplateName, Weights
    from ssl_jax.dialogue_model import DialogueModel

__version__ = "0.1.0"


def load(name: str, *, template: TemplateName | Literal["auto"] = "auto", weights: Weights = "auto") -> DialogueModel:
    """A model, ready to answer and to score.

    Args:
      name: a work directory, a Hugging Face GPT-2 directory, or a hub name such as `gpt2`.
      template: how a Hugging Face model reads dialogues: auto (its chat template, else plain text), chat_template,
        end_of_text (turns joined as DialoGPT does), role_tokens, plain.
      weights: auto (as stored), bfloat16, or int8 (a CPU answers about twice as fast).

    Raises:
      UserError: nothing by that name, or what is there cannot be used. It is a ValueError.
    """
    from ssl_jax import loading

    return loading.load(name, template=template, weights=weights)
