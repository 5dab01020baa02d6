"""Host memory that importing a Hugging Face model takes, beside that of its parameters.

    python benchmarks/import_memory.py --output benchmarks/results/import_memory.json

Writes a GPT-2 of the given size in float32 with random weights, reads it in a process of its own on the CPU, where
device arrays are host memory too, and compares the process's peak resident memory (`VmHWM`, mapped files included) with
the bytes of the parameters.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from provenance import provenance
from pydantic import Field

from ssl_jax import command_line, files, tensor_files
from ssl_jax.config import MODEL_SIZES, Section
from ssl_jax.errors import UserError

LIMIT = 1.3
SHARD_BYTES = 2**30
VOCAB_SIZE = 50257


class Options(Section):
    """What is imported, and where the result goes."""

    size: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2"] = Field(
        default="gpt2-xl", description="Size of the model."
    )
    scan_layers: bool = Field(default=True, description="Whether layers are stacked, as for training.")
    folder: str | None = Field(
        default=None, description="Where the model is written, 4 bytes per parameter; absent: the temporary folder."
    )
    output: str = Field(default="benchmarks/results/import_memory.json", description="File that receives the result.")


def main(arguments: Sequence[str]) -> None:
    """Writes the model, measures its import, writes and prints the result, removes the model."""
    options = command_line.parse(
        Options, arguments, program="python benchmarks/import_memory.py", summary=(__doc__ or "").strip()
    )
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="import_memory_") as folder:
        write_model(Path(folder), {**MODEL_SIZES[options.size], "vocab_size": VOCAB_SIZE})
        measured = measure(Path(folder), scan_layers=options.scan_layers)
    files.write_json(
        Path(options.output),
        {**provenance(), "size": options.size, "scan_layers": options.scan_layers, **measured, "limit": LIMIT},
    )
    print(json.dumps(measured))
    if measured["ratio"] > LIMIT:
        raise UserError(f"peak memory is {measured['ratio']:.2f} times the parameters, more than {LIMIT}")


def write_model(directory: Path, settings: dict[str, int]) -> None:
    """Writes a Hugging Face directory of a GPT-2 with random float32 weights, shard by shard."""
    from ssl_jax import config, gpt2_tensors, huggingface, model

    shape = model.GPT2.from_config(config.Model.model_validate(settings), 0)
    shapes = {gpt2_tensors.PREFIX + name: axes for name, axes in gpt2_tensors.stored_shapes(shape).items()}
    random = np.random.default_rng(0)

    def draw(name: str) -> np.ndarray:
        return random.standard_normal(shapes[name], dtype=np.float32)

    tensor_files.write_tensors(directory, shapes, draw, "float32", SHARD_BYTES)
    files.write_json(directory / huggingface.SETTINGS, {"model_type": "gpt2", **settings})


def measure(directory: Path, *, scan_layers: bool) -> dict[str, Any]:
    """Imports a directory in a child process on the CPU.

    Returns:
      `parameter_bytes`, `peak_bytes` (largest resident memory of the process), `baseline_bytes` (the same, before the
      import), `ratio` (peak ÷ parameters) and `seconds` of the import.
    """
    command = [sys.executable, __file__, _CHILD, str(directory), str(int(scan_layers))]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(result.stdout.splitlines()[-1])


def _import(directory: Path, scan_layers: bool) -> None:
    """The child: imports the model and prints what it took."""
    import jax

    from ssl_jax import config, huggingface, model

    jax.devices()
    baseline = _peak_bytes()
    started = time.perf_counter()
    settings = huggingface.resolve(config.Model(init_from=str(directory), scan_layers=scan_layers))
    shape = model.GPT2.from_config(settings, 0)
    params = huggingface.read_params(directory, shape, known_tokens=shape.vocab_size)
    jax.block_until_ready(params)
    seconds, peak = time.perf_counter() - started, _peak_bytes()
    parameter_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    print(
        json.dumps(
            {
                "parameter_bytes": parameter_bytes,
                "peak_bytes": peak,
                "baseline_bytes": baseline,
                "ratio": round(peak / parameter_bytes, 4),
                "seconds": round(seconds, 1),
            }
        )
    )


def _peak_bytes() -> int:
    """The largest resident memory that this process has had, mapped files included."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise UserError("/proc/self/status has no VmHWM; measure on Linux")


_CHILD = "measure-import"

if __name__ == "__main__":
    if sys.argv[1:2] == [_CHILD]:
        _import(Path(sys.argv[2]), bool(int(sys.argv[3])))
    else:
        command_line.run(main)
