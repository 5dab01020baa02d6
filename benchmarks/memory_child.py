"""One training step in a fresh process, and what memory it took.

    python benchmarks/memory_child.py ours|naive|huggingface WORKLOAD_JSON STEPS

Prints a JSON object: `baseline_bytes` (resident memory before there is a model), `peak_bytes` (largest resident memory;
on a GPU of its allocator instead, baseline 0), and for JAX `compiler_bytes`: arguments, results and temporaries of the
compiled step, as the compiler counts them. Without steps only the latter. `naive` is our step with a loss that holds
the logits of all tokens at once.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from workload import Workload

from ssl_jax.errors import UserError


def ours(workload: Workload, steps: int) -> dict[str, Any]:
    """What our step takes."""
    import jax
    from train_ours import Training

    device = jax.devices()[0]
    baseline = _resident("VmRSS")
    training = Training(workload)
    batch = training.next_batch()
    step = training.run.programs.train_step.lower(training.state, batch, training.key).compile()
    sizes = step.memory_analysis()
    result: dict[str, Any] = {}
    if sizes is not None:
        result["compiler_bytes"] = (
            sizes.argument_size_in_bytes
            + sizes.output_size_in_bytes
            - sizes.alias_size_in_bytes
            + sizes.temp_size_in_bytes
        )
    if not steps:
        return result
    for _ in range(steps):
        training.state, _ = jax.block_until_ready(step(training.state, training.next_batch(), training.key))
    if workload.device == "cuda":
        return {**result, "baseline_bytes": 0, "peak_bytes": (device.memory_stats() or {})["peak_bytes_in_use"]}
    return {**result, "baseline_bytes": baseline, "peak_bytes": _resident("VmHWM")}


def naive(workload: Workload, steps: int) -> dict[str, Any]:
    """What our step takes with the textbook's loss."""
    import jax
    import jax.numpy as jnp
    import optax

    from ssl_jax import losses

    def cross_entropy(hidden_BTD, embedding_VD, targets_BT, weights_BT, vocab_size, mesh):
        logits_BTV = jnp.einsum("btd,vd->btv", hidden_BTD, embedding_VD, preferred_element_type=jnp.float32)
        is_real_V = jnp.arange(embedding_VD.shape[0]) < vocab_size
        logits_BTV = jnp.where(is_real_V[None, None], logits_BTV, -jnp.inf)
        nll_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)
        return jnp.sum(nll_BT * weights_BT), jax.lax.stop_gradient(nll_BT)

    with mock.patch.object(losses, "weighted_cross_entropy", cross_entropy):
        return ours(workload, steps)


def huggingface(workload: Workload, steps: int) -> dict[str, Any]:
    """What the Trainer's step takes."""
    import torch  # pyright: ignore[reportMissingImports]
    from train_huggingface import make_trainer
    from transformers import TrainerCallback

    class Stops(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == steps

    baseline = _resident("VmRSS")
    with tempfile.TemporaryDirectory(prefix="memory_") as folder:
        make_trainer(workload, folder, Stops()).train()
    if workload.device == "cuda":
        return {"baseline_bytes": 0, "peak_bytes": torch.cuda.max_memory_allocated()}
    return {"baseline_bytes": baseline, "peak_bytes": _resident("VmHWM")}


def _resident(field: str) -> int:
    """Bytes of memory of this process as Linux counts them: VmRSS now, VmHWM at its highest."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise UserError(f"/proc/self/status has no {field}; measure on Linux")


if __name__ == "__main__":
    contestant = {"ours": ours, "naive": naive, "huggingface": huggingface}[sys.argv[1]]
    measured = contestant(Workload.model_validate_json(sys.argv[2]), int(sys.argv[3]))
    # The Trainer prints, too; the last line is the result.
    print(json.dumps(measured))
