"""Every setting of the program: its type, bound, default, unit and meaning. The schema is the documentation.

Names follow Hugging Face where a thing has a name there (`TrainingArguments`, `GPT2Config`, `GenerationConfig`).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MODEL_SIZES: dict[str, dict[str, int]] = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
    "distilgpt2": {"n_layer": 6, "n_head": 12, "n_embd": 768},
}

# What `TrainingArguments` and the article's scripts called a setting, and where it lives here.
FORMER_NAMES = {
    "output_dir": "workdir",
    "logging_dir": "workdir (event files go to <workdir>/tensorboard)",
    "evaluate_during_training": "train.eval_steps",
    "evaluation_strategy": "train.eval_steps",
    "eval_strategy": "train.eval_steps",
    "max_steps": "train.steps",
    "num_train_epochs": "train.num_train_epochs",
    "per_device_train_batch_size": "train.per_device_train_batch_size",
    "per_gpu_train_batch_size": "train.per_device_train_batch_size",
    "per_device_eval_batch_size": "train.per_device_eval_batch_size",
    "per_gpu_eval_batch_size": "train.per_device_eval_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "logging_steps": "train.logging_steps",
    "eval_steps": "train.eval_steps",
    "save_steps": "train.save_steps",
    "save_total_limit": "train.save_total_limit",
    "load_best_model_at_end": "train.load_best_model_at_end",
    "warmup_steps": "optimizer.warmup_steps",
    "weight_decay": "optimizer.weight_decay",
    "learning_rate": "optimizer.learning_rate",
    "lr_scheduler_type": "optimizer.lr_scheduler_type",
    "max_grad_norm": "optimizer.max_grad_norm",
    "adam_beta1": "optimizer.b1",
    "adam_beta2": "optimizer.b2",
    "adam_epsilon": "optimizer.eps",
    "test_size": "data.test_size",
    "block_size": "train.sequence_length",
    "max_seq_length": "train.sequence_length",
    "model_name_or_path": "model.init_from",
}


class Section(BaseModel):
    """A frozen group of fields that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Source(Section):
    """Where dialogues come from: files, a packaged data set, or a TFDS data set."""

    path: str | None = Field(default=None, description="Files to read: a path or a glob.")
    format: Literal[
        "auto", "messages", "prompt_completion", "sharegpt", "alpaca", "parlai", "log", "text", "parquet",
        "whatsapp", "telegram", "discord", "slack",
    ] = Field(default="auto", description="Format of the files; auto looks at the first rows.")  # fmt: skip
    dataset: Literal["chitchat"] | None = Field(default=None, description="A data set that a Python package carries.")
    tfds: str | None = Field(default=None, description="A TensorFlow Datasets name.")
    regime: Literal["labeled", "logs", "turns", "prompts", "fragments"] | None = Field(
        default=None,
        description="Form of a packaged data set's dialogues. labeled: roles marked. logs: complete, no roles. "
        "turns: replies without contexts. prompts: contexts without replies. fragments: openings nobody answered.",
    )
    max_dialogues: int | None = Field(
        default=None,
        ge=1,
        description="Take at most this many dialogues. A labeled budget leaves the rest to `unlabeled`.",
    )
    split_lines: bool = Field(default=True, description="Raw text: every line is a turn (else the whole text is one).")

    @model_validator(mode="after")
    def _one_place(self) -> Source:
        places = [name for name in ("path", "dataset", "tfds") if getattr(self, name)]
        if len(places) != 1:
            raise ValueError(f"a source names exactly one of path, dataset, tfds; found {places or 'none'}")
        return self


class Data(Section):
    """Which dialogues, how they are checked and split, and where the prepared form is stored."""

    labeled: tuple[Source, ...] = Field(default=(), description="Sources of dialogues with roles, ending in a reply.")
    unlabeled: tuple[Source, ...] = Field(default=(), description="Sources of raw text and of prompts without replies.")
    test_size: float = Field(default=0.2, gt=0, lt=1, description="Fraction of the labeled dialogues held out as test.")
    dev_size: float = Field(default=0.1, ge=0, lt=1, description="Fraction of the labeled dialogues held out as dev.")
    split_by: Literal["fraction", "time", "group", "hash"] = Field(
        default="hash", description="How held-out dialogues are chosen. hash: by id, stable when data is appended."
    )
    prepared_dir: str = Field(
        default="prepared", description="Folder of prepared data; its name carries a content hash."
    )
    max_rejected_fraction: float = Field(
        default=0.05, ge=0, le=1, description="Stop when more than this fraction of the rows is malformed."
    )
    max_turn_bytes: int = Field(default=100_000, ge=1, description="A longer turn is malformed (UTF-8 bytes).")

    @model_validator(mode="after")
    def _room_for_train(self) -> Data:
        if self.test_size + self.dev_size >= 1:
            raise ValueError("test_size + dev_size must leave something to train on (sum below 1)")
        return self


class Tokenizer(Section):
    """Text to token ids."""

    name_or_path: str | None = Field(
        default=None, description="Hugging Face tokenizer: a directory or a hub name. Absent: fit a byte-level BPE."
    )
    vocab_size: int = Field(
        default=8192, ge=300, le=1_000_000, description="Size of a fitted BPE, control tokens included."
    )


class Model(Section):
    """GPT-2's shape and arithmetic, in `GPT2Config`'s names."""

    init_from: str | None = Field(default=None, description="Start from this Hugging Face GPT-2 directory or hub name.")
    size: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2"] | None = Field(
        default=None, description="A published size by name; sets n_layer, n_head, n_embd."
    )
    n_layer: int = Field(default=12, ge=1, le=512, description="Transformer blocks.")
    n_head: int = Field(default=12, ge=1, le=512, description="Attention heads per block.")
    n_embd: int = Field(default=768, ge=8, le=65536, description="Width of the residual stream.")
    n_inner: int | None = Field(default=None, ge=8, description="Width of the feed-forward layer; absent: 4 × n_embd.")
    n_positions: int = Field(default=1024, ge=8, le=1_048_576, description="Longest context (tokens).")
    activation_function: Literal["gelu_new", "gelu", "relu", "silu", "tanh"] = Field(
        default="gelu_new", description="Non-linearity of the feed-forward layer."
    )
    layer_norm_epsilon: float = Field(default=1e-5, gt=0, description="Added to the variance in layer norms.")
    resid_pdrop: float = Field(
        default=0.1, ge=0, le=0.99, description="Dropout on what a block adds to the residual stream."
    )
    embd_pdrop: float = Field(default=0.1, ge=0, le=0.99, description="Dropout on the embeddings.")
    attn_pdrop: float = Field(default=0.1, ge=0, le=0.99, description="Dropout on attention probabilities.")
    initializer_range: float = Field(default=0.02, gt=0, description="Standard deviation of initial weights.")
    param_dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="Type of the stored parameters.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="Type of the arithmetic; auto: float32 on CPU, bfloat16 on accelerators."
    )
    scan_layers: bool = Field(default=True, description="Compile one block and loop over it (else unroll every block).")
    remat: Literal["none", "dots", "full"] = Field(
        default="none", description="What the backward pass recomputes: nothing, all but matrix products, whole blocks."
    )
    vocab_multiple: int = Field(
        default=64, ge=1, description="The embedding table is padded to a multiple; the pad is masked."
    )

    @model_validator(mode="before")
    @classmethod
    def _named_size(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("size") in MODEL_SIZES:
            shape = MODEL_SIZES[values["size"]]
            for name, number in shape.items():
                if values.get(name) not in (None, number, str(number)):
                    raise ValueError(f"size {values['size']} means {name} {number}; drop {name} or drop size")
            values = {**values, **shape}
        return values

    @model_validator(mode="after")
    def _from_scratch(self) -> Model:
        if self.init_from is not None:
            raise ValueError("init_from: pretrained weights cannot be read yet; leave it out to train from scratch")
        return self

    @model_validator(mode="after")
    def _heads_divide(self) -> Model:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head}")
        return self


class Train(Section):
    """How long, how much at a time, and how often to look."""

    steps: int | None = Field(
        default=None, ge=1, description="Optimizer steps; absent: 1000, unless num_train_epochs is given."
    )
    num_train_epochs: float | None = Field(
        default=None,
        gt=0,
        description="Length as passes over the labeled dialogues by their own rows; the labeled-only end adds some.",
    )
    per_device_train_batch_size: int = Field(
        default=16, ge=1, description="Rows of the labeled stream per device and step."
    )
    per_device_eval_batch_size: int = Field(default=64, ge=1, description="Rows per device when evaluating.")
    gradient_accumulation_steps: int = Field(default=1, ge=1, description="Micro-batches that one step is cut into.")
    sequence_length: int = Field(default=256, ge=8, description="Tokens per packed row.")
    unlabeled_ratio: float = Field(default=3.0, ge=0, le=1000, description="Unlabeled rows per labeled row in a step.")
    pseudo_label_fraction: float = Field(
        default=0.25, ge=0, le=1, description="Share of the unlabeled rows that are pseudo-labeled once a round exists."
    )
    labeled_only_fraction: float = Field(
        default=0.1, ge=0, lt=1, description="Last part of the steps that trains on labeled dialogues alone."
    )
    token_replacement: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Probability that an input token is replaced by a random one (regularizer).",
    )
    logging_steps: int = Field(default=10, ge=1, description="Steps between lines of metrics.")
    eval_steps: int = Field(default=100, ge=1, description="Steps between evaluations on dev.")
    save_steps: int = Field(default=100, ge=1, description="Steps between checkpoints.")
    save_total_limit: int = Field(default=2, ge=1, description="Newest checkpoints kept, besides the best one.")
    load_best_model_at_end: bool = Field(
        default=True, description="Evaluate and serve the checkpoint with the lowest dev reply_bits_per_byte."
    )
    max_nonfinite_steps: int = Field(
        default=10, ge=1, description="Updates in a row that may be skipped for a non-finite loss before giving up."
    )

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> Train:
        if self.steps is not None and self.num_train_epochs is not None:
            raise ValueError("give steps or num_train_epochs, not both")
        return self


class Optimizer(Section):
    """AdamW with warm-up, in optax's names."""

    name: Literal["adamw", "muon"] = Field(
        default="adamw",
        description="Update rule; muon: orthogonalized updates for matrices inside blocks, AdamW for the rest.",
    )
    learning_rate: float = Field(default=1e-3, gt=0, le=10, description="Peak learning rate.")
    warmup_steps: float = Field(
        default=0.05, ge=0, description="Steps of linear warm-up; a number below 1 is a fraction of all steps."
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="Shape of the decay after warm-up."
    )
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1, description="Final learning rate as a fraction of the peak.")
    weight_decay: float = Field(
        default=0.1, ge=0, description="Decoupled decay of matrices (never of biases and norms)."
    )
    b1: float = Field(default=0.9, ge=0, lt=1, description="Decay of the first moment.")
    b2: float = Field(default=0.95, ge=0, lt=1, description="Decay of the second moment.")
    eps: float = Field(default=1e-8, gt=0, description="Added to the root of the second moment.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="Gradients are clipped to this global norm.")
    ema_decay: float = Field(default=0.99, ge=0, lt=1, description="Decay of the averaged weights; 0 keeps no average.")


class Objectives(Section):
    """Weights of the loss terms. Each term is a mean over its own tokens."""

    supervised: float = Field(default=1.0, ge=0, description="Weight of labeled replies.")
    lm: float = Field(default=1.0, ge=0, description="Weight of raw text.")
    pseudo: float = Field(default=0.5, ge=0, description="Weight of pseudo-labeled replies after the ramp.")
    pseudo_ramp: float = Field(
        default=0.3, ge=0, le=1, description="Fraction of the steps over which the weight of pseudo-labels rises."
    )
    prompt_loss_weight: float = Field(
        default=0.0, ge=0, le=1, description="Weight of a labeled dialogue's other tokens, relative to its replies."
    )


class Sampling(Section):
    """How replies are drawn, in `GenerationConfig`'s names."""

    max_new_tokens: int = Field(default=48, ge=1, description="Longest reply (tokens).")
    do_sample: bool = Field(default=True, description="Draw from the distribution (else take the likeliest token).")
    temperature: float = Field(default=1.0, gt=0, description="Logits are divided by this.")
    top_k: int = Field(default=0, ge=0, description="Keep the k likeliest tokens; 0 keeps all.")
    top_p: float = Field(default=0.95, gt=0, le=1, description="Keep the likeliest tokens that hold this probability.")


class PseudoLabels(Section):
    """Rounds in which a teacher answers prompts that have no reply."""

    rounds: tuple[float, ...] = Field(
        default=(), description="When rounds happen, as increasing fractions of the steps. Empty: no pseudo-labels."
    )
    teacher: Literal["ema", "snapshot"] = Field(
        default="ema", description="Who answers: the averaged weights or the current ones."
    )
    prompts_per_round: int = Field(default=512, ge=1, description="Prompts answered in a round.")
    num_return_sequences: int = Field(
        default=2, ge=1, le=64, description="Replies drawn per prompt; the best one is kept."
    )
    batch_size: int = Field(default=64, ge=1, description="Sequences sampled at a time per device.")
    max_prompt_tokens: int = Field(
        default=128, ge=8, description="Longest context shown to the teacher (newest turns kept)."
    )
    sampling: Sampling = Field(default=Sampling(), description="How the teacher draws replies.")
    min_reply_tokens: int = Field(default=3, ge=1, description="Shorter replies are rejected.")
    max_repetition: float = Field(default=0.2, ge=0, le=1, description="Largest share of repeated 4-grams in a reply.")
    max_copy: float = Field(
        default=0.8, ge=0, le=1, description="Largest share of a reply's 4-grams found in its context."
    )
    max_duplicates: int = Field(default=3, ge=1, description="How often the same reply may be accepted in a round.")
    keep_fraction: float = Field(
        default=0.5, gt=0, le=1, description="Share kept by score within every length bucket, after the other filters."
    )
    length_buckets: int = Field(
        default=4, ge=1, description="Equal-sized buckets of reply length that the score is ranked in."
    )

    @model_validator(mode="after")
    def _rounds_in_order(self) -> PseudoLabels:
        if any(not 0 < at < 1 for at in self.rounds) or list(self.rounds) != sorted(set(self.rounds)):
            raise ValueError(f"rounds are increasing fractions between 0 and 1, got {list(self.rounds)}")
        return self


class Evaluation(Section):
    """How much is evaluated. During training only reply_bits_per_byte is computed, on dev."""

    dev_dialogues: int = Field(default=64, ge=1, description="Dev dialogues scored at every evaluation.")
    test_dialogues: int | None = Field(default=None, ge=1, description="Test dialogues scored at the end; absent: all.")
    recall_examples: int = Field(default=200, ge=0, description="Contexts ranked for recall_at_1_of_20 and mrr.")
    generated_replies: int = Field(
        default=500, ge=0, description="Replies drawn for distinct, entropy, length, repetition."
    )
    max_prompt_tokens: int = Field(
        default=128, ge=8, description="Longest context for ranking and replies (newest turns)."
    )
    sampling: Sampling = Field(default=Sampling(), description="How the replies are drawn.")
    sample_prompts: tuple[str, ...] = Field(
        default=("hi, how are you?", "what do you do for fun?", "have you seen any good movies lately?"),
        description="Prompts answered at every evaluation, for samples.jsonl.",
    )


class Mesh(Section):
    """Devices along each axis of the mesh; -1 takes the rest."""

    data: int = Field(default=-1, ge=-1, description="Copies of the model that see different rows.")
    fsdp: int = Field(default=1, ge=-1, description="Devices that share one copy's parameters and see different rows.")
    tensor: int = Field(
        default=1, ge=-1, description="Devices that share one copy's matrix products and see the same rows."
    )

    @model_validator(mode="after")
    def _at_most_one_rest(self) -> Mesh:
        sizes = (self.data, self.fsdp, self.tensor)
        if 0 in sizes or sizes.count(-1) > 1:
            raise ValueError("mesh sizes are positive, and at most one of them is -1")
        return self


class Config(Section):
    """A run, completely."""

    seed: int = Field(default=0, ge=0, lt=2**31, description="Decides every random choice together with the step.")
    workdir: str = Field(default="runs/default", description="Where the run's checkpoints, metrics and results go.")
    data: Data = Field(default=Data(), description="Dialogues.")
    tokenizer: Tokenizer = Field(default=Tokenizer(), description="Text to token ids.")
    model: Model = Field(default=Model(), description="GPT-2.")
    train: Train = Field(default=Train(), description="Length, batch, intervals.")
    optimizer: Optimizer = Field(default=Optimizer(), description="AdamW.")
    objectives: Objectives = Field(default=Objectives(), description="Loss terms.")
    pseudo_labels: PseudoLabels = Field(default=PseudoLabels(), description="Teacher rounds.")
    evaluation: Evaluation = Field(default=Evaluation(), description="Metrics.")
    mesh: Mesh = Field(default=Mesh(), description="Devices.")

    @model_validator(mode="before")
    @classmethod
    def _former_names(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for name in values:
                if name in FORMER_NAMES:
                    raise ValueError(f"'{name}' is called {FORMER_NAMES[name]} here")
        return values

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        if self.train.sequence_length > self.model.n_positions:
            raise ValueError(
                f"train.sequence_length {self.train.sequence_length} exceeds model.n_positions "
                f"{self.model.n_positions}; lower the first or raise the second"
            )
        for name in ("evaluation", "pseudo_labels"):
            section = getattr(self, name)
            needed = section.max_prompt_tokens + section.sampling.max_new_tokens
            if needed > self.model.n_positions:
                raise ValueError(
                    f"{name}.max_prompt_tokens + {name}.sampling.max_new_tokens is {needed}, more than "
                    f"model.n_positions {self.model.n_positions}"
                )
        return self
