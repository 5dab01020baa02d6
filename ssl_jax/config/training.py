"""Settings of training: length, streams, optimizer, devices."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ssl_jax.config.section import Section


class Train(Section):
    """How long, how much at a time, and how often to look."""

    steps: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000_000,
        description="Optimizer steps; absent: 1000, unless num_train_epochs is given.",
    )
    num_train_epochs: float | None = Field(
        default=None,
        gt=0,
        le=1_000_000,
        description="Length as passes over the labeled dialogues by their own rows; the labeled-only end adds some.",
    )
    per_device_train_batch_size: int = Field(
        default=16, ge=1, le=65_536, description="Rows of the labeled stream per device and step."
    )
    per_device_eval_batch_size: int = Field(default=64, ge=1, le=65_536, description="Rows per device when evaluating.")
    gradient_accumulation_steps: int = Field(
        default=1, ge=1, le=65_536, description="Micro-batches that one step is cut into."
    )
    sequence_length: int = Field(default=256, ge=8, le=1_048_576, description="Tokens per packed row.")
    # Three quarters of the turns of real chat have at most 30 tokens (dataset chitchat, a BPE of 4096), so 32 hold what
    # the first turn of a window answers. In rows of 256 they cost an eighth, and only of dialogues longer than a row.
    window_overlap: int = Field(
        default=32,
        ge=0,
        le=1_048_576,
        description="Tokens that every later window of a dialogue longer than a row repeats as context, behind the "
        "system turn, without learning them again.",
    )
    unlabeled_ratio: float = Field(default=3.0, ge=0, le=1000, description="Unlabeled rows per labeled row in a step.")
    pseudo_label_fraction: float = Field(
        default=0.25, ge=0, le=1, description="Share of the unlabeled rows that are pseudo-labeled once a round exists."
    )
    back_translation_fraction: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of the unlabeled rows that hold real replies behind contexts made up by the model, once a "
        "round exists.",
    )
    backward_fraction: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of the unlabeled rows with dialogues read backwards, so that the model also knows which "
        "context a reply answers.",
    )
    prompts_as_text: bool = Field(
        default=True, description="Prompts without replies are raw text as well: what a person wrote is learned from."
    )
    raw_roles: Literal["text", "alternate"] = Field(
        default="text",
        description="Who speaks in raw text. text: not said. alternate: user and assistant in turn, the last turn "
        "being the assistant's, and prompts that are learned as text change places with replies: pseudo-labels for "
        "roles, right where two people take turns and both write alike.",
    )
    pretrain_fraction: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="First part of the steps that trains on raw text alone; what follows is a fine-tuning with a "
        "warm-up of its own.",
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
    logging_steps: int = Field(default=10, ge=1, le=1_000_000_000, description="Steps between lines of metrics.")
    eval_steps: int = Field(default=100, ge=1, le=1_000_000_000, description="Steps between evaluations on dev.")
    save_steps: int = Field(default=100, ge=1, le=1_000_000_000, description="Steps between checkpoints.")
    save_total_limit: int = Field(
        default=2, ge=1, le=1_000_000, description="Newest checkpoints kept, besides the best one."
    )
    load_best_model_at_end: bool = Field(
        default=True, description="Evaluate and serve the checkpoint with the lowest dev reply_bits_per_byte."
    )
    max_nonfinite_steps: int = Field(
        default=10,
        ge=1,
        le=1_000_000,
        description="Updates in a row that may be skipped for a non-finite loss before giving up.",
    )
    loss_spike_threshold: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        description="A loss so many standard deviations above the mean of the steps before, such as 6, sends the run "
        "back to a checkpoint, and the batches that led there are passed over; absent: never.",
    )
    loss_spike_window: int = Field(
        default=64, ge=8, le=100_000, description="Steps whose losses a loss is compared with, of the same streams."
    )
    loss_spike_skip: int = Field(
        default=8,
        ge=1,
        le=1_000_000,
        description="Batches that are passed over for one spike: its own and those before.",
    )
    max_rollbacks: int = Field(
        default=5,
        ge=1,
        le=1_000_000,
        description="Spikes that send the run back before one of them ends it as diverged.",
    )
    hang_warning_seconds: float = Field(
        default=600.0,
        ge=0,
        le=1e9,
        description="Time without a step or another sign of life after which a warning says where the run is; 0: none.",
    )

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> Train:
        if self.steps is not None and self.num_train_epochs is not None:
            raise ValueError("give steps or num_train_epochs, not both")
        return self

    @model_validator(mode="after")
    def _spikes_have_a_checkpoint_before_them(self) -> Train:
        kept = (self.save_total_limit - 1) * min(self.save_steps, self.eval_steps)
        if self.loss_spike_threshold is not None and kept < self.loss_spike_skip:
            raise ValueError(
                f"loss_spike_skip {self.loss_spike_skip}: save_total_limit {self.save_total_limit} and save_steps "
                f"{self.save_steps} keep no checkpoint from before so many steps; raise save_total_limit"
            )
        return self

    @model_validator(mode="after")
    def _windows_advance(self) -> Train:
        if self.window_overlap >= self.sequence_length:
            raise ValueError(
                f"window_overlap {self.window_overlap} must be below sequence_length {self.sequence_length}; "
                f"set it to {self.sequence_length // 8}"
            )
        return self


class Optimizer(Section):
    """AdamW with warm-up, in optax's names."""

    name: Literal["adamw", "muon"] = Field(
        default="adamw",
        description="Update rule; muon: orthogonalized updates for matrices inside blocks, AdamW for the rest.",
    )
    learning_rate: float = Field(default=1e-3, gt=0, le=10, description="Peak learning rate.")
    warmup_steps: float = Field(
        default=0.05,
        ge=0,
        le=1_000_000_000,
        description="Steps of linear warm-up; a number below 1 is a fraction of all steps.",
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="Shape of the decay after warm-up."
    )
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1, description="Final learning rate as a fraction of the peak.")
    weight_decay: float = Field(
        default=0.1, ge=0, le=100, description="Decoupled decay of matrices (never of biases and norms)."
    )
    b1: float = Field(default=0.9, ge=0, le=0.999999, description="Decay of the first moment.")
    b2: float = Field(default=0.95, ge=0, le=0.999999, description="Decay of the second moment.")
    eps: float = Field(default=1e-8, ge=1e-30, le=1, description="Added to the root of the second moment.")
    max_grad_norm: float = Field(default=1.0, gt=0, le=1e9, description="Gradients are clipped to this global norm.")
    ema_decay: float = Field(default=0.99, ge=0, lt=1, description="Decay of the averaged weights; 0 keeps no average.")


class Mesh(Section):
    """Devices along each axis of the mesh; -1 takes the rest."""

    data: int = Field(default=-1, ge=-1, le=1_000_000, description="Copies of the model that see different rows.")
    fsdp: int = Field(
        default=1, ge=-1, le=1_000_000, description="Devices that share one copy's parameters and see different rows."
    )
    tensor: int = Field(
        default=1,
        ge=-1,
        le=1_000_000,
        description="Devices that share one copy's matrix products and see the same rows.",
    )

    @model_validator(mode="after")
    def _at_most_one_rest(self) -> Mesh:
        sizes = (self.data, self.fsdp, self.tensor)
        if 0 in sizes or sizes.count(-1) > 1:
            shown = ", ".join(f"{name} {size}" for name, size in zip(("data", "fsdp", "tensor"), sizes, strict=True))
            raise ValueError(f"mesh sizes are positive, and at most one of them is -1, got {shown}")
        return self
