"""A dry run tells the truth: memory as XLA has it, no byte written, programs that the TPU compiler takes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any

import jax
import pytest
import tiny

from ssl_jax import config as settings
from ssl_jax import plan, programs, sharding
from ssl_jax.command_line import read_yaml
from ssl_jax.config import Config
from ssl_jax.errors import UserError
from ssl_jax.forecast import ahead, cost, memory, plan_ahead
from ssl_jax.hardware import Topology
from ssl_jax.model import GPT2

WIDE = {"n_layer": 4, "n_head": 4, "n_embd": 256, "n_positions": 256, "vocab_size": 8192}
LONG = {"n_layer": 6, "n_head": 6, "n_embd": 384, "n_positions": 512, "vocab_size": 16384, "remat": "full"}
UNLABELED = {"unlabeled": [{"dataset": "chitchat"}]}
SMALL_VOCABULARY = {"n_layer": 8, "n_head": 4, "n_embd": 256, "n_positions": 256, "vocab_size": 1024}


def made_of(
    values: dict[str, Any] | Config, devices: list[Any] | None = None
) -> tuple[Config, plan.Plan, programs.Programs, Any]:
    """A run's plan and programs, on one CPU or on devices that are not here."""
    config = values if isinstance(values, Config) else Config.model_validate({"train": {"steps": 10}, **values})
    mesh = sharding.make_mesh(config.mesh, devices or jax.devices()[:1])
    shape = GPT2.from_config(config.model, 1, mesh, sequence_length=config.train.sequence_length)
    records = {"labeled_train": 1, "raw_train": 1}
    made_plan = plan.make_plan(config, records, 1, sharding.row_shards(mesh))
    return config, made_plan, programs.make(config, made_plan, shape, mesh, {}), mesh


@pytest.mark.parametrize(
    "values",
    [
        {"model": WIDE, "train": {"steps": 10, "per_device_train_batch_size": 4, "unlabeled_ratio": 3}},
        {
            "model": LONG,
            "train": {"steps": 10, "per_device_train_batch_size": 4, "unlabeled_ratio": 1, "sequence_length": 512},
        },
        {
            "model": SMALL_VOCABULARY,
            "train": {"steps": 10, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2},
            "optimizer": {"ema_decay": 0},
        },
    ],
    ids=["wide", "long rows, recomputed", "deep, in micro-batches"],
)
def test_estimated_memory_is_within_15_percent_of_the_compiler_s(values: dict[str, Any]) -> None:
    config, made_plan, made, mesh = made_of(values)
    estimated = memory.estimate(config, made_plan, made, dict(mesh.shape), (), platform="cpu")
    batch = programs.abstract_batch(made_plan.rows, config.train.sequence_length, mesh)
    compiled = made.train_step.lower(made.abstract_state, batch, programs.abstract_key(mesh), ()).compile()
    true = compiled.memory_analysis()
    needed = true.argument_size_in_bytes + true.temp_size_in_bytes
    assert estimated.total == pytest.approx(needed, rel=0.15)


def test_memory_falls_as_parameters_are_shared_and_activations_recomputed() -> None:
    def total(mesh: dict[str, int], **model: Any) -> memory.Memory:
        config = Config.model_validate(
            {"model": {**WIDE, **model}, "mesh": mesh, "train": {"steps": 10}, "data": UNLABELED}
        )
        return plan_ahead.forecast(config, Topology.parse("h100:8"), None, {}, print).memory

    data, fsdp, tensor = total({"data": 8}), total({"data": 1, "fsdp": 8}), total({"data": 4, "tensor": 2})
    assert fsdp.params < data.params / 6 and fsdp.optimizer < data.optimizer / 6
    assert fsdp.activations == data.activations
    assert tensor.activations < data.activations and tensor.loss == data.loss // 2
    by_remat = [total({"data": 8}, remat=remat).activations for remat in ("none", "dots", "names", "full")]
    assert by_remat == sorted(by_remat, reverse=True) and len(set(by_remat)) == 4


def test_arithmetic_counts_teachers_passes_and_recomputation() -> None:
    def step_flops(**values: Any) -> int:
        config, made_plan, made, _ = made_of({"model": WIDE, **values})
        return cost.cost(config, made_plan, made.shape, {}).step_flops

    plain = step_flops()
    assert plain == 64 * 256 * plan.flops_per_token(made_of({"model": WIDE})[2].shape, 256)
    assert step_flops(objectives={"r_drop": 1.0}) == 2 * plain
    taught = step_flops(distillation={"weight": 0.5, "streams": ["raw"]})
    assert taught == pytest.approx(plain * (1 + 48 / 64 / 3))  # three quarters of the rows, forward only


def dry_run(*words: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = tiny.command("train", *words)
    return subprocess.run(
        command, env={**tiny.environment(), **(environment or {})}, capture_output=True, text=True, check=False
    )


def test_a_dry_run_prints_the_plan_and_writes_it_only_where_asked(tmp_path: Path) -> None:
    tiny.write_data(tmp_path)
    values = tiny.settings(tmp_path)
    values["workdir"] = str(tmp_path / "run")
    tiny.write_config(tmp_path / "config.yaml", values)
    before = sorted(tmp_path.rglob("*"))
    done = dry_run("--config", str(tmp_path / "config.yaml"), "--dry-run")
    assert done.returncode == 0, done.stderr
    for word in ("parameters", "wte/embedding", "activations", "device-hours", "not prepared yet"):
        assert word in done.stdout
    assert sorted(tmp_path.rglob("*")) == before
    done = dry_run("--config", str(tmp_path / "config.yaml"), "--topology", "h100:2", "--workdir", str(tmp_path / "w"))
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "w/plan.json").read_text())
    assert written["devices"] == 2 and written["memory"]["total"] > 0 and written["tokens"]["labeled"] > 0
    assert sorted(path.name for path in (tmp_path / "w").iterdir()) == ["plan.json"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--topology", "v7:4x4"), "no chip 'v7'"),
        (("--topology", "h100:8", "--mesh.fsdp", "3"), "mesh: data -1 × fsdp 3"),
        (("--topology", "h100:8", "--mesh.data", "1", "--mesh.tensor", "8"), "does not divide"),
        (("--dry-run", "--train.num-train-epochs", "3", "--train.steps", "none"), "prepare"),
    ],
)
def test_what_cannot_be_planned_is_told_in_one_message(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    tiny.write_data(tmp_path)
    tiny.write_config(tmp_path / "config.yaml", tiny.settings(tmp_path))
    done = dry_run("--config", str(tmp_path / "config.yaml"), *words)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) <= 2


def test_every_configuration_for_hardware_is_estimated_to_fit() -> None:
    for path in sorted(Path("configs/hardware").glob("*.yaml")):
        hardware = path.stem.split("_", 1)[1]
        topology = Topology.parse(hardware.replace("-", ":") if hardware.startswith("h100") else hardware)
        config = Config.model_validate(read_yaml(path))
        sizes = sharding.mesh_shape(config.mesh, topology.devices)
        made_plan = plan.make_plan(config, {"labeled_train": 1, "raw_train": 1}, 1, sizes["data"] * sizes["fsdp"])
        assert made_plan.rows % (sizes["data"] * sizes["fsdp"]) == 0
        if topology.chip.platform == "gpu":
            found = plan_ahead.forecast(config, topology, None, {}, print)
            assert found.memory.total < 0.92 * topology.chip.memory, path.name


libtpu = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"),
    reason="needs libtpu (pip install 'ssl_jax[tpu-compile]')",
)


@libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "topology", "mesh"),
    [("gpt2", "v5e:2x2", {"fsdp": 2, "tensor": 2}), ("gpt2-xl", "v5e:16x16", {"fsdp": 32})],
)
def test_no_device_gathers_logits_or_activations(size: str, topology: str, mesh: dict[str, int]) -> None:
    config = Config.model_validate(
        {
            "model": {"size": size, "vocab_size": 50257, "n_positions": 1024, "attn_pdrop": 0.0, "remat": "full"},
            "train": {"steps": 10, "sequence_length": 512, "per_device_train_batch_size": 1},
            "mesh": mesh,
            "data": UNLABELED,
        }
    )
    config, made_plan, made, on = made_of(config, ahead.describe(Topology.parse(topology)))
    assert made.shape.attn_implementation == "splash"
    step = next(ahead.compile_programs(config, made_plan, made, on, ()))
    assert step.memory < 16e9 and step.cycles > 0
    gathered = {shape for one in step.collectives if one.kind == "all-gather" for shape in one.shapes}
    assert gathered, "parameters are shared, so some are put together"
    vocabulary, width = made.shape.padded_vocab_size, made.shape.n_embd
    for shape in gathered:
        assert len(shape) < 4 or 512 not in shape, f"attention's queries or keys: {shape}"
        if vocabulary in shape or vocabulary // on.shape["tensor"] in shape:
            assert width in shape or width // on.shape["fsdp"] in shape, f"logits: {shape}"
        assert not (512 in shape and width in shape and made_plan.rows in shape), f"hidden states: {shape}"


@libtpu
@pytest.mark.slow
def test_a_program_too_large_for_the_chip_is_refused() -> None:
    config = Config.model_validate(
        {
            "model": {"size": "gpt2-xl", "vocab_size": 50257, "attn_pdrop": 0.0},
            "train": {"steps": 10},
            "data": UNLABELED,
        }
    )
    with pytest.raises(UserError, match=r"does not fit: it needs [\d.]+G of"):
        plan_ahead.forecast(config, Topology.parse("v5e:1x1"), None, {}, print)


@libtpu
@pytest.mark.slow
def test_slices_are_the_first_axis_and_neighbors_share_parameters() -> None:
    mesh = sharding.make_mesh(settings.Mesh(fsdp=16), ahead.describe(Topology.parse("2*v5e:4x4")))
    slices = [{device.slice_index for device in row.flat} for row in mesh.devices]
    assert slices == [{0}, {1}]
