"""The peer: Hugging Face's `generate`.

    python benchmarks/generate_huggingface.py WORKLOAD_JSON MODE [static]

`static` is its form with a cache of fixed size, with which on a GPU it compiles the step of decoding.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
from alternate import Turns
from train_huggingface import make_network
from workload import Workload


class Generation:
    """A network with random weights and a batch of random prompts."""

    def __init__(self, workload: Workload, *, do_sample: bool, static: bool) -> None:
        if workload.device == "cpu":
            torch.set_num_threads(len(os.sched_getaffinity(0)))
        dtype = torch.float32 if workload.device == "cpu" else torch.bfloat16
        self._network = make_network(workload).to(workload.device, dtype).eval()
        self._network.generation_config.eos_token_id = None  # replies end at their length alone
        self._network.generation_config.pad_token_id = 0
        size = (workload.rows, workload.sequence_length)
        generator = torch.Generator().manual_seed(0)
        self._prompts = torch.randint(workload.vocab_size, size, generator=generator).to(workload.device)
        self._mask = torch.ones_like(self._prompts)
        self._options: dict[str, Any] = {"do_sample": False}
        if do_sample:
            self._options = {"do_sample": True, "top_k": 50, "top_p": 0.95}
        if static:
            self._options["cache_implementation"] = "static"

    def generate(self, new_tokens: int) -> dict[str, float]:
        """Replies of so many tokens; `seconds`, `first_seconds` to the first token, `decode_seconds` for the others.

        `generate` does not say when it has the first token: it is asked for one token before it is asked for all.
        """
        first, whole = self._seconds(1), self._seconds(new_tokens)
        return {"seconds": whole, "first_seconds": first, "decode_seconds": whole - first}

    def _seconds(self, new_tokens: int) -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            found = self._network.generate(
                self._prompts, attention_mask=self._mask, max_new_tokens=new_tokens, **self._options
            )
        if found.is_cuda:
            torch.cuda.synchronize()
        assert found.shape[1] == self._prompts.shape[1] + new_tokens
        return time.perf_counter() - started


def main() -> None:
    """Generates as many tokens as it is told, turn after turn."""
    turns = Turns()
    generation = Generation(
        Workload.model_validate_json(sys.argv[1]), do_sample=sys.argv[2] == "sample", static="static" in sys.argv[3:]
    )
    turns.ready({})
    while (new_tokens := turns.wait()) is not None:
        turns.answer(generation.generate(new_tokens))


if __name__ == "__main__":
    main()
