"""Semi-supervised training of GPT-2 dialogue models in JAX."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ssl_jax.dialogue_model import DialogueModel

__version__ = "0.1.0"


def load(directory: str) -> DialogueModel:
    """The model of a work directory, ready to answer and to score.

    Raises:
      UserError: no work directory, or no checkpoint in it that verifies.
    """
    from pathlib import Path

    from ssl_jax import dialogue_model

    return dialogue_model.load(Path(directory))
