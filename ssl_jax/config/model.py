"""Settings of the model."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ssl_jax.config.paths import check_path
from ssl_jax.config.section import Section

MODEL_SIZES: dict[str, dict[str, int]] = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
    "distilgpt2": {"n_layer": 6, "n_head": 12, "n_embd": 768},
}


class Model(Section):
    """GPT-2's shape and arithmetic, in `GPT2Config`'s names."""

    init_from: str | None = Field(default=None, description="Start from this Hugging Face GPT-2 directory or hub name.")
    size: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2"] | None = Field(
        default=None, description="A published size by name; sets n_layer, n_head, n_embd."
    )
    n_layer: int = Field(default=12, ge=1, le=512, description="Transformer blocks.")
    n_head: int = Field(default=12, ge=1, le=512, description="Attention heads per block.")
    n_embd: int = Field(default=768, ge=8, le=65536, description="Width of the residual stream.")
    n_inner: int | None = Field(
        default=None, ge=8, le=1_048_576, description="Width of the feed-forward layer; absent: 4 × n_embd."
    )
    n_positions: int = Field(default=1024, ge=8, le=1_048_576, description="Longest context (tokens).")
    vocab_size: int | None = Field(
        default=None, ge=1, le=1_000_000, description="Rows of the token embedding; absent: as the tokenizer needs."
    )
    activation_function: Literal[
        "gelu_new", "gelu", "gelu_python", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh",
        "quick_gelu", "relu", "relu2", "silu", "swish", "mish", "tanh",
    ] = Field(default="gelu_new", description="Non-linearity of the feed-forward layer.")  # fmt: skip
    layer_norm_epsilon: float = Field(default=1e-5, ge=1e-12, le=1, description="Added to the variance in layer norms.")
    scale_attn_weights: bool = Field(default=True, description="Divide attention scores by √(n_embd / n_head).")
    scale_attn_by_inverse_layer_idx: bool = Field(
        default=False, description="Divide the attention scores of layer i by i as well, counted from 1."
    )
    reorder_and_upcast_attn: bool = Field(
        default=False, description="Take the products of queries and keys in float32, whatever dtype says."
    )
    tie_word_embeddings: bool = Field(
        default=True, description="Predict with the token embedding (else with a matrix of its own, lm_head)."
    )
    resid_pdrop: float = Field(
        default=0.1, ge=0, le=0.99, description="Dropout on what a block adds to the residual stream."
    )
    embd_pdrop: float = Field(default=0.1, ge=0, le=0.99, description="Dropout on the embeddings.")
    attn_pdrop: float = Field(default=0.1, ge=0, le=0.99, description="Dropout on attention probabilities.")
    initializer_range: float = Field(default=0.02, gt=0, le=10, description="Standard deviation of initial weights.")
    param_dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="Type of the stored parameters.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="Type of the arithmetic; auto: float32 on CPU, bfloat16 on accelerators."
    )
    attn_implementation: Literal["auto", "einsum", "cudnn", "splash"] = Field(
        default="auto",
        description="Form of attention; auto: without attn_pdrop cuDNN's kernel on NVIDIA for bfloat16 and splash "
        "attention on TPUs for rows of a multiple of 128 tokens, else einsum.",
    )
    scan_layers: bool = Field(
        default=True, description="Stack the blocks' parameters and loop over them (else keep every block apart)."
    )
    scan_unroll: int | None = Field(
        default=None,
        ge=1,
        le=512,
        description="Blocks compiled per turn of that loop; absent: all on a CPU without remat, else one.",
    )
    remat: Literal["none", "dots", "names", "full"] = Field(
        default="none",
        description="What the backward pass recomputes: nothing; all but matrix products (dots); all but attention and "
        "what it reads (names); whole blocks.",
    )
    vocab_multiple: int = Field(
        default=64, ge=1, le=65_536, description="The embedding table is padded to a multiple; the pad is masked."
    )

    _path = field_validator("init_from")(check_path)

    @model_validator(mode="before")
    @classmethod
    def _named_size(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("size"), str) and values["size"] in MODEL_SIZES:
            shape = MODEL_SIZES[values["size"]]
            for name, number in shape.items():
                if values.get(name) not in (None, number, str(number)):
                    raise ValueError(f"size {values['size']} means {name} {number}; drop {name} or drop size")
            values = {**values, **shape}
        return values

    @model_validator(mode="after")
    def _kernel_can(self) -> Model:
        if self.attn_implementation in ("cudnn", "splash") and (self.attn_pdrop or self.reorder_and_upcast_attn):
            raise ValueError(
                f"attn_implementation {self.attn_implementation} has no attn_pdrop and no reorder_and_upcast_attn; "
                "set them to 0"
            )
        if self.attn_implementation == "cudnn" and self.dtype == "float32":
            raise ValueError("attn_implementation cudnn computes in 16 bits; dtype float32 needs einsum")
        return self

    @model_validator(mode="after")
    def _heads_divide(self) -> Model:
        if self.init_from is None and self.n_embd % self.n_head:  # pretrained weights bring both
            raise ValueError(f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head}")
        return self
