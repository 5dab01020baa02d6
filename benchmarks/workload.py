"""What the benchmarks of training let the contestants do: one model, one shape of a batch, one precision for all."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from ssl_jax import command_line
from ssl_jax.config import MODEL_SIZES, Section

Device = Literal["cpu", "cuda"]

_HERE = Path(__file__).parent


class Workload(Section):
    """A model and the batch that it is trained with. Every row is full of tokens, all of which are predicted."""

    n_layer: int = Field(ge=1, description="Transformer blocks.")
    n_embd: int = Field(ge=8, description="Width.")
    n_head: int = Field(ge=1, description="Attention heads.")
    vocab_size: int = Field(ge=8, description="Tokens that the model knows.")
    n_positions: int = Field(default=1024, ge=8, description="Longest context (tokens).")
    rows: int = Field(ge=1, description="Rows of a step's batch, of all streams together.")
    sequence_length: int = Field(ge=8, description="Tokens per row.")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="On embeddings, attention and residual stream.")
    unlabeled_ratio: float = Field(default=0.0, ge=0, description="Unlabeled rows per labeled row; ours alone.")
    taught_by_average: bool = Field(
        default=False, description="The average of the student gives unlabeled rows soft labels; ours alone."
    )
    averaged: bool = Field(
        default=False, description="An average of the weights is kept, and nobody taught; ours alone."
    )
    learning_rate: float = Field(default=1e-4, gt=0, description="Constant.")
    device: Device = Field(default="cpu", description="Where to compute: float32 on cpu, bfloat16 on cuda.")

    @model_validator(mode="after")
    def _rows_divide(self) -> Workload:
        if abs(self.labeled_rows * (1 + self.unlabeled_ratio) - self.rows) > 1e-6:
            raise ValueError(f"{self.rows} rows cannot hold {self.unlabeled_ratio:g} unlabeled rows per labeled one")
        return self

    @property
    def labeled_rows(self) -> int:
        """Labeled rows of a step."""
        return round(self.rows / (1 + self.unlabeled_ratio))

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.rows * self.sequence_length


Size = Literal["tiny", "quickstart", "gpt2", "gpt2-medium", "gpt2-xl"]

_PUBLISHED = {"vocab_size": 50257, "n_positions": 1024}
_MODELS: dict[Size, dict[str, int]] = {
    "tiny": {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 512, "n_positions": 256},
    "quickstart": {"n_layer": 6, "n_embd": 256, "n_head": 4, "vocab_size": 8192, "n_positions": 256},
    "gpt2": {**MODEL_SIZES["gpt2"], **_PUBLISHED},
    "gpt2-medium": {**MODEL_SIZES["gpt2-medium"], **_PUBLISHED},
    "gpt2-xl": {**MODEL_SIZES["gpt2-xl"], **_PUBLISHED},
}
# Rows and tokens per row: what a CPU does in seconds, and what fills a GPU of 80 GB.
_BATCHES: dict[Size, dict[Device, tuple[int, int]]] = {
    "tiny": {"cpu": (4, 32), "cuda": (4, 32)},
    "quickstart": {"cpu": (16, 128), "cuda": (256, 128)},
    "gpt2": {"cpu": (4, 256), "cuda": (32, 1024)},
    "gpt2-medium": {"cpu": (4, 256), "cuda": (16, 1024)},
    "gpt2-xl": {"cpu": (1, 256), "cuda": (8, 1024)},
}


def workload(size: Size, device: Device = "cpu", **changes: Any) -> Workload:
    """The workload of a size on a device, with some fields changed; None changes nothing."""
    rows, sequence_length = _BATCHES[size][device]
    values = {**_MODELS[size], "rows": rows, "sequence_length": sequence_length, "device": device}
    values |= {name: value for name, value in changes.items() if value is not None}
    return command_line.validate(Workload, values, origin=f"size {size}")


def has_peer() -> bool:
    """Whether what the extra `bench` installs is there."""
    return all(importlib.util.find_spec(name) for name in ("accelerate", "torch"))


def child(script: str, *arguments: str) -> list[str]:
    """The command that runs a script of this folder."""
    return [sys.executable, str(_HERE / script), *arguments]


def variables(device: Device) -> dict[str, str]:
    """Environment of a contestant: this package, this device, no memory taken before it is needed."""
    path = os.pathsep.join([str(_HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {
        "PYTHONPATH": path,
        "JAX_PLATFORMS": device,
        # Several processes share a GPU: each takes what it needs, as much as there is.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
