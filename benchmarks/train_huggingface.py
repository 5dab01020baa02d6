"""The peer: Hugging Face's `Trainer` with its `GPT2LMHeadModel` in PyTorch, no evaluation, log or checkpoint.

    python benchmarks/train_huggingface.py WORKLOAD_JSON [compiled]

Optimizer, clipping, dropout, shapes and precision are ours (on a GPU float32 parameters and bfloat16 arithmetic, by
autocast); everything else is as the Trainer has it by default, but for the mask of the compiled one.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from typing import Any

import accelerate  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]
from alternate import Turns
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    GPT2Config,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from workload import Workload

from ssl_jax import config

_DIALOGUES, _STEPS = 4096, 10**6

# PyTorch's flash kernel takes no mask. Uncompiled, the model sees that full rows need none; while it is compiled it
# cannot look, and makes one. For an attention that it does not know it never makes one, and causal that stays.
UNMASKED = "sdpa_unmasked"
AttentionInterface.register(UNMASKED, sdpa_attention_forward)


class RandomRows(torch.utils.data.Dataset):
    """Rows of random tokens, all of which are labels."""

    def __init__(self, workload: Workload) -> None:
        shape = (_DIALOGUES, workload.sequence_length)
        self._tokens = torch.randint(workload.vocab_size, shape, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self._tokens[index], "labels": self._tokens[index]}


class KeepsLoss(Trainer):
    """A Trainer that can be asked for the loss of the last step."""

    last_loss: Any = None

    def training_step(self, *arguments: Any, **options: Any) -> Any:
        """As the Trainer has it."""
        self.last_loss = super().training_step(*arguments, **options)
        return self.last_loss


class TakesTurns(TrainerCallback):
    """Lets the Trainer work only when it is its turn, from the end of one step to the end of another."""

    def __init__(self, turns: Turns) -> None:
        """Takes where turns come from."""
        self.trainer: KeepsLoss | None = None
        self._turns = turns
        self._left, self._started = 0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any = None, **_: Any) -> None:
        """Waits for the first turn."""
        self._turns.ready(
            {
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "attention": model.config._attn_implementation,
                "optimizer": args.optim.value,
                "compiled": args.torch_compile,
                "threads": torch.get_num_threads(),
                "versions": {"accelerate": accelerate.__version__, "torch": torch.__version__},
            }
        )
        self._wait(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ends a turn with its last step."""
        self._left -= 1
        if not self._left:
            assert self.trainer is not None
            if not args.use_cpu:
                torch.cuda.synchronize()
            loss = float(self.trainer.last_loss)
            self._turns.answer({"seconds": time.perf_counter() - self._started, "loss": loss})
            self._wait(control)

    def _wait(self, control: Any) -> None:
        steps = self._turns.wait()
        self._left, self._started = steps or 1, time.perf_counter()
        control.should_training_stop = steps is None


def make_network(workload: Workload, attention: str = "sdpa") -> Any:
    """A network with fresh weights and an attention of that name."""
    torch.manual_seed(0)
    shape = workload.model_dump(include={"n_layer", "n_embd", "n_head", "vocab_size", "n_positions"})
    drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), workload.dropout)
    settings = GPT2Config(**shape, **drop, bos_token_id=0, eos_token_id=0)
    return AutoModelForCausalLM.from_config(settings, attn_implementation=attention)


def make_trainer(workload: Workload, folder: str, callback: TrainerCallback, *, compiled: bool = False) -> KeepsLoss:
    """A Trainer that trains until the callback stops it."""
    on_cpu = workload.device == "cpu"
    optimizer = config.Optimizer()
    if on_cpu:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=_STEPS,
        per_device_train_batch_size=workload.rows,
        learning_rate=workload.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.b1,
        adam_beta2=optimizer.b2,
        adam_epsilon=optimizer.eps,
        max_grad_norm=optimizer.max_grad_norm,
        bf16=not on_cpu,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        torch_compile=compiled,
        logging_strategy="no",
        logging_nan_inf_filter=False,  # it would wait for the device at every step
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    network = make_network(workload, UNMASKED if compiled else "sdpa")
    return KeepsLoss(network, arguments, train_dataset=RandomRows(workload), callbacks=[callback])


def main() -> None:
    """Trains, turn after turn."""
    workload = Workload.model_validate_json(sys.argv[1])
    callback = TakesTurns(Turns())
    with tempfile.TemporaryDirectory(prefix="train_huggingface_") as folder:
        callback.trainer = make_trainer(workload, folder, callback, compiled="compiled" in sys.argv[2:])
        callback.trainer.train()


if __name__ == "__main__":
    main()
