"""Every setting of the program: its type, bound, default, unit and meaning. The schema is the documentation.

Names follow Hugging Face where a thing has a name there (`TrainingArguments`, `GPT2Config`, `GenerationConfig`).
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from ssl_jax.config.data import Data, Source, TemplateName, Tokenizer
from ssl_jax.config.methods import EMA, Distillation, Noise, Objectives
from ssl_jax.config.model import MODEL_SIZES, Model
from ssl_jax.config.paths import check_path
from ssl_jax.config.replies import DEFAULT_NEW_TOKENS, Evaluation, PseudoLabels, Sampling
from ssl_jax.config.section import Section
from ssl_jax.config.served import Reranking, Served, ServedWeights, Weights
from ssl_jax.config.training import Mesh, Optimizer, Train

__all__ = [
    "DEFAULT_NEW_TOKENS", "EMA", "FORMER_NAMES", "MODEL_SIZES", "Config", "Data", "Distillation", "Evaluation", "Mesh",
    "Model", "Noise", "Objectives", "Optimizer", "PseudoLabels", "Reranking", "Sampling", "Section", "Served",
    "ServedWeights", "Source", "TemplateName", "Tokenizer", "Train", "Weights",
]  # fmt: skip

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
    distillation: Distillation = Field(default=Distillation(), description="Soft labels of teachers.")
    pseudo_labels: PseudoLabels = Field(default=PseudoLabels(), description="Teacher rounds.")
    evaluation: Evaluation = Field(default=Evaluation(), description="Metrics.")
    mesh: Mesh = Field(default=Mesh(), description="Devices.")

    _path = field_validator("workdir")(check_path)

    @model_validator(mode="before")
    @classmethod
    def _former_names(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for name in values:
                if name in FORMER_NAMES:
                    raise ValueError(f"'{name}' is called {FORMER_NAMES[name]} here")
        return values

    @model_validator(mode="after")
    def _methods_have_what_they_need(self) -> Config:
        train, backward = self.train, self.train.backward_fraction
        if (backward or train.back_translation_fraction) and not self.tokenizer.direction_tokens:
            name = "backward_fraction" if backward else "back_translation_fraction"
            raise ValueError(f"train.{name} needs control tokens; set tokenizer.direction_tokens to true")
        needing = {
            "train.back_translation_fraction": train.back_translation_fraction,
            "pseudo_labels.backward_weight": self.pseudo_labels.backward_weight and self.pseudo_labels.rounds,
        }
        for name, value in needing.items():
            if value and not backward:
                raise ValueError(f"{name} asks a model that reads backwards; set train.backward_fraction, such as 0.25")
        if train.back_translation_fraction and not self.pseudo_labels.rounds:
            raise ValueError("train.back_translation_fraction needs rounds; set pseudo_labels.rounds, such as [0.4]")
        if self.distillation.weight and EMA in self.distillation.teachers and not self.optimizer.ema_decay:
            raise ValueError("distillation.teachers: ema needs an average; set optimizer.ema_decay, such as 0.99")
        noise = (self.model.resid_pdrop, self.model.embd_pdrop, self.model.attn_pdrop, train.token_replacement)
        if self.objectives.r_drop and not any(noise):
            raise ValueError("objectives.r_drop compares passes with different dropout; set model.resid_pdrop above 0")
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        if self.model.init_from is not None and "n_positions" not in self.model.model_fields_set:
            return self  # the context is that of the pretrained model, which is read later
        if self.train.sequence_length > self.model.n_positions:
            raise ValueError(
                f"train.sequence_length {self.train.sequence_length} exceeds model.n_positions "
                f"{self.model.n_positions}; lower the first or raise the second"
            )
        for name in ("evaluation", "pseudo_labels"):
            section = getattr(self, name)
            sampling = section.sampling
            needed = section.max_prompt_tokens + sampling.new_tokens
            if sampling.bounded_by_max_length:
                needed = max(section.max_prompt_tokens + 1, sampling.new_tokens)
            if needed > self.model.n_positions:
                what = f"{name}.max_prompt_tokens + {name}.sampling.max_new_tokens"
                if sampling.bounded_by_max_length:
                    what = f"the larger of {name}.max_prompt_tokens + 1 and {name}.sampling.max_length"
                raise ValueError(f"{what} is {needed}, more than model.n_positions {self.model.n_positions}")
        return self
