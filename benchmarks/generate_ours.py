"""Our contestant: the sampler, as replies are streamed. `generate_ours.py WORKLOAD_JSON greedy|sample WEIGHTS`."""

from __future__ import annotations

import sys
import time
from typing import Any

import jax
import numpy as np
from alternate import Turns
from train_ours import random_model
from workload import Workload

from ssl_jax import config, model, sampling


class Generation:
    """A model with random weights and a batch of random prompts."""

    def __init__(self, workload: Workload, *, do_sample: bool, weights: config.Weights = "auto") -> None:
        # As training leaves them on a CPU; an accelerator answers with parameters of its own type.
        self._shape, self._params = model.with_weights(*random_model(workload), weights)
        size = (workload.rows, workload.sequence_length)
        self._prompts = np.random.default_rng(0).integers(0, workload.vocab_size, size, np.int32)
        self._lengths = np.full(workload.rows, workload.sequence_length, np.int32)
        self._sampling: dict[str, Any] = {"do_sample": False}
        if do_sample:
            self._sampling = {"do_sample": True, "top_k": 50, "top_p": 0.95}
        self._start = jax.jit(sampling.start, static_argnums=(0, 1))
        self._advance = jax.jit(sampling.advance, static_argnums=(0, 1), donate_argnums=3)

    def generate(self, new_tokens: int) -> dict[str, float]:
        """Replies of so many tokens; `seconds`, `first_seconds` to the first token, `decode_seconds` for the others."""
        options = sampling.Options(max_new_tokens=new_tokens, **self._sampling)
        keys = jax.random.split(jax.random.key(0), len(self._lengths))
        started = time.perf_counter()
        state = self._start(self._shape, options, self._params, self._prompts, self._lengths, keys)
        np.asarray(state.last_B)
        first = time.perf_counter()
        state = self._advance(self._shape, options, self._params, state, np.int32(new_tokens))
        drawn = np.asarray(sampling.replies(state).lengths)
        ended = time.perf_counter()
        assert (drawn == new_tokens).all()
        return {"seconds": ended - started, "first_seconds": first - started, "decode_seconds": ended - first}

    def parameter_bytes(self) -> int:
        """Of all parameters but the table of positions, of which a step reads a row."""
        read = {name: leaf for name, leaf in self._params.items() if name != "wpe"}
        return sum(leaf.nbytes for leaf in jax.tree.leaves(read))


def main() -> None:
    """Generates as many tokens as it is told, turn after turn."""
    turns = Turns()
    workload, mode = Workload.model_validate_json(sys.argv[1]), sys.argv[2]
    weights: Any = sys.argv[3]
    generation = Generation(workload, do_sample=mode == "sample", weights=weights)
    turns.ready({"parameter_bytes": generation.parameter_bytes()})
    while (new_tokens := turns.wait()) is not None:
        turns.answer(generation.generate(new_tokens))


if __name__ == "__main__":
    main()
