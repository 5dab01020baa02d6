"""A run's programs, compiled for TPUs that are not here (`jax.experimental.topologies`, libtpu's compiler)."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from ssl_jax import drawing, model, programs, sampling, sharding, step
from ssl_jax.config import Config
from ssl_jax.errors import UserError
from ssl_jax.forecast import collectives
from ssl_jax.hardware import Topology
from ssl_jax.model import GPT2
from ssl_jax.plan import Plan

EXTRA = "pip install 'ssl_jax[tpu-compile]'"

# libtpu looks for the machine it runs on, which is none of its own here, and lets one process at a time have it.
_VARIABLES = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_HOST_BOUNDS": "1,1,1",
    "TPU_CHIPS_PER_HOST_BOUNDS": "1,1,1",
    "TPU_LOG_DIR": "disabled",
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program.

    Attributes:
      name: of the program.
      seconds: that compiling took.
      arguments: bytes of what it is given, on each device.
      temporary: bytes that it needs besides, on each device.
      outputs: bytes of what it returns in memory of its own, on each device.
      cycles: the compiler's estimate of the clock cycles of its operations, collectives and kernels not among them.
      collectives: what it sends between devices.
    """

    name: str
    seconds: float
    arguments: int
    temporary: int
    outputs: int
    cycles: int
    collectives: tuple[collectives.Collective, ...]

    @property
    def memory(self) -> int:
        """Bytes on each device while it runs."""
        return self.arguments + self.temporary + self.outputs


def describe(topology: Topology) -> list[Any]:
    """The devices of TPU slices that are not here.

    Raises:
      UserError: libtpu is not installed, or its compiler does not know the topology.
    """
    for name, value in _VARIABLES.items():
        os.environ.setdefault(name, value)
    try:
        import libtpu  # noqa: F401 # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(f"--topology {topology.name}: compiling for TPUs needs libtpu: {EXTRA}") from None
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")  # with libtpu installed, JAX would look for a TPU here
    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip as one device, as JAX has them
    if topology.slice_shape == "1x1":
        options["chips_per_host_bounds"] = (1, 1, 1)  # a machine with one chip; others have four
    try:
        described = topologies.get_topology_desc(
            f"{topology.chip.name}:{topology.slice_shape}", platform="tpu", **options
        )
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--topology {topology.name}: the TPU compiler does not know it ({reason})") from None
    return list(described.devices)


def compile_programs(
    config: Config,
    plan: Plan,
    made: programs.Programs,
    mesh: jax.sharding.Mesh,
    teachers: tuple[Any, ...],
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[Compiled]:
    """Compiles the train step, the evaluation step and the sampler, and tells of each.

    Args:
      config: the configuration.
      plan: its plan.
      made: its programs, made for the mesh.
      mesh: of described devices.
      teachers: abstract parameters of teachers other than the average.
      say: called with a line of progress.

    Raises:
      UserError: a program needs more memory than a device has.
    """
    length = config.train.sequence_length
    batch = programs.abstract_batch(plan.rows, length, mesh)
    arguments = (made.abstract_state, batch, programs.abstract_key(mesh), teachers)
    yield _compile("train step", functools.partial(made.train_step.lower, *arguments), mesh, say)

    shape, params = made.shape, made.abstract_state.params
    rows = config.train.per_device_eval_batch_size * sharding.row_shards(mesh)
    scored = programs.abstract_batch(rows, shape.n_positions, mesh)
    score = jax.jit(step.score, static_argnums=0)
    yield _compile("evaluation step", functools.partial(score.lower, shape, params, scored), mesh, say)

    layers = programs.place_params(jax.eval_shape(functools.partial(model.unstack, shape), params), mesh)
    yield _compile("sampler", functools.partial(_lower_sampler, config, shape, layers, mesh), mesh, say)


def _lower_sampler(config: Config, shape: GPT2, layers: model.Params, mesh: jax.sharding.Mesh) -> Any:
    """Drawing as many replies as fit into a batch of a round, or of an evaluation where there are no rounds."""
    settings: Any = config.pseudo_labels if config.pseudo_labels.rounds else config.evaluation
    options = sampling.Options(
        max_new_tokens=settings.sampling.new_tokens,
        do_sample=settings.sampling.do_sample,
        temperature=settings.sampling.temperature,
        top_k=settings.sampling.top_k,
        top_p=settings.sampling.top_p,
        end_ids=(0,),
    )
    rows = config.pseudo_labels.batch_size * sharding.row_shards(mesh)
    places = settings.max_prompt_tokens
    by_row = NamedSharding(mesh, sharding.BATCH)
    batch = {
        "tokens": jax.ShapeDtypeStruct((rows, places), jnp.int32, sharding=by_row),
        "lengths": jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=by_row),
        "ids": jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=by_row),
    }
    seed = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
    drawn = dataclasses.replace(shape, scan_layers=False)
    return drawing.draw_together.lower(drawn, options, layers, batch, seed)


def _compile(name: str, lower: Callable[[], Any], mesh: jax.sharding.Mesh, say: Callable[[str], None]) -> Compiled:
    say(f"compiling the {name} for {mesh.size} devices")
    started = time.monotonic()
    try:
        compiled = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"the {name} {_too_large(name, str(error))}") from None
    memory, text = compiled.memory_analysis(), compiled.as_text()
    program = collectives.Program.read(text, mesh.size)
    return Compiled(
        name=name,
        seconds=time.monotonic() - started,
        arguments=memory.argument_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        cycles=program.cycles(),
        collectives=tuple(program.collectives()),
    )


_TOO_LARGE = (r"Used ([\d.]+\w) of ([\d.]+\w) hbm", r"\(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)")
_WAYS_OUT = {
    "train step": "lower train.per_device_train_batch_size, raise train.gradient_accumulation_steps, mesh.fsdp or "
    "mesh.tensor, or set model.remat full",
    "evaluation step": "lower train.per_device_eval_batch_size, or raise mesh.fsdp or mesh.tensor",
    "sampler": "lower pseudo_labels.batch_size, or raise mesh.fsdp or mesh.tensor",
}


def check(compiled: Compiled, memory: int) -> None:
    """Makes sure that a program fits into so many bytes.

    Raises:
      UserError: it does not.
    """
    if compiled.memory > memory:
        raise UserError(
            f"the {compiled.name} does not fit: it needs {compiled.memory / 1e9:.1f}G of {memory / 1e9:.1f}G on each "
            f"device; {_WAYS_OUT[compiled.name]}"
        )


def _too_large(name: str, message: str) -> str:
    """What the compiler's error means to a user."""
    # Of temporaries alone; what arguments and temporaries need together, `check` sees.
    for pattern in _TOO_LARGE:
        if (found := re.search(pattern, message)) is not None:
            return f"does not fit: it needs {found[1]} of {found[2]} on each device; {_WAYS_OUT[name]}"
    return f"does not compile: {message.splitlines()[0][:300]}"
