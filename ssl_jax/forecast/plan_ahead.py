"""The forecast of a run: everything that follows from its configuration, and from its data where that is prepared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from ssl_jax import hardware, loading, plan, programs, sharding
from ssl_jax.config import EMA, Config
from ssl_jax.data.store import Prepared
from ssl_jax.data.streams import PackedStream
from ssl_jax.errors import UserError
from ssl_jax.forecast import ahead, cost, memory
from ssl_jax.hardware import Topology
from ssl_jax.model import GPT2


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What a run will be, need and take.

    Attributes:
      config: its configuration.
      plan: its steps, rows and rounds.
      shape: the model.
      mesh_shape: sizes of the mesh's axes.
      device: what JAX or the vendor calls a device.
      chip: what is known of it; None for a CPU.
      topology: what it was made for; None for the devices that are here.
      drawn: rows of every stream over the whole run.
      streams: the streams, where the data is prepared.
      cost: its arithmetic.
      memory: of the train step, estimated.
      sharding: how every parameter lies on the devices.
      compiled: what the compiler says, where it was asked.
    """

    config: Config
    plan: plan.Plan
    shape: GPT2
    mesh_shape: Mapping[str, int]
    device: str
    chip: hardware.Chip | None
    topology: Topology | None
    drawn: Mapping[str, int]
    streams: Mapping[str, PackedStream]
    cost: cost.Cost
    memory: memory.Memory
    sharding: list[sharding.TableRow]
    compiled: list[ahead.Compiled]

    @property
    def devices(self) -> int:
        """How many there are."""
        return self.mesh_shape["data"] * self.mesh_shape["fsdp"] * self.mesh_shape["tensor"]


def forecast(
    config: Config,
    topology: Topology | None,
    prepared: Prepared | None,
    streams: Mapping[str, PackedStream],
    say: Callable[[str], None],
) -> Forecast:
    """Makes the forecast; for a TPU topology the programs are compiled.

    Args:
      config: the configuration.
      topology: the devices to plan for; None: those that are here.
      prepared: the data, or None: every stream that the configuration asks for is taken to have some.
      streams: of the data, none without it.
      say: called with lines of progress.

    Raises:
      UserError: mesh, batch, data and configuration do not fit together, a program does not fit into the memory of a
        device, or there is no compiler for the topology.
    """
    mesh, platform, device = _mesh(config, topology)
    vocabulary = prepared.tokenizer.vocab_size if prepared is not None else config.tokenizer.vocab_size
    shape = GPT2.from_config(
        config.model, vocabulary, mesh, platform=platform, sequence_length=config.train.sequence_length
    )
    made_plan = _plan(config, prepared, streams, sharding.row_shards(mesh))
    names = config.distillation.teachers if config.distillation.weight else ()
    teachers = {name: loading.load(name).shape for name in names if name != EMA}
    made = programs.make(config, made_plan, shape, mesh, teachers)
    abstract_teachers = tuple(programs.abstract_params(one, mesh) for one in teachers.values())
    mesh_shape = dict(mesh.shape)
    compiled = []
    if topology is not None and topology.chip.platform == "tpu":
        for program in ahead.compile_programs(config, made_plan, made, mesh, abstract_teachers, say):
            ahead.check(program, topology.chip.memory)
            compiled.append(program)
    return Forecast(
        config=config,
        plan=made_plan,
        shape=shape,
        mesh_shape=mesh_shape,
        device=device,
        chip=topology.chip if topology is not None else hardware.chip_of(device),
        topology=topology,
        drawn=made_plan.phases()[-1].drawn_before(made_plan.total_steps),
        streams=streams,
        cost=cost.cost(config, made_plan, shape, teachers),
        memory=memory.estimate(config, made_plan, made, mesh_shape, abstract_teachers, platform=platform),
        sharding=sharding.table(made.abstract_state.params),
        compiled=compiled,
    )


def _mesh(config: Config, topology: Topology | None) -> tuple[Any, str, str]:
    """The mesh, JAX's name of its platform, and the name of a device."""
    if topology is None:
        return sharding.make_mesh(config.mesh), jax.default_backend(), jax.devices()[0].device_kind
    if topology.chip.platform == "tpu":
        devices = ahead.describe(topology)
        mesh: Mesh = sharding.make_mesh(config.mesh, devices)
        return mesh, "tpu", devices[0].device_kind
    # No compiler for GPUs works without one; shapes need no devices.
    sizes = sharding.mesh_shape(config.mesh, topology.devices)
    mesh_of_none = AbstractMesh(tuple(sizes.values()), sharding.AXES, axis_types=(AxisType.Auto,) * len(sizes))
    return mesh_of_none, topology.chip.platform, topology.chip.kinds[0]


def _plan(config: Config, prepared: Prepared | None, streams: Mapping[str, PackedStream], row_shards: int) -> plan.Plan:
    if prepared is not None:
        records = {split: len(prepared.lengths(split)) for split in prepared.splits}
        return plan.make_plan(config, records, streams["labeled"].rows_in_epoch(0), row_shards)
    if config.train.num_train_epochs is not None:
        raise UserError(
            "train.num_train_epochs: the length of an epoch is known when the data is prepared; run "
            "python -m ssl_jax.prepare with the same configuration first, or give train.steps"
        )
    has_prompts = bool(config.pseudo_labels.rounds) and config.train.pseudo_label_fraction > 0
    records = {"labeled_train": 1, "raw_train": len(config.data.unlabeled), "prompt_train": int(has_prompts)}
    return plan.make_plan(config, records, 1, row_shards)
