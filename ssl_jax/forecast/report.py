"""A forecast, for people and for programs."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import numpy as np

from ssl_jax import description, plan
from ssl_jax.evaluation.tables import aligned
from ssl_jax.forecast import collectives, cost
from ssl_jax.forecast.plan_ahead import Forecast
from ssl_jax.hardware import Topology
from ssl_jax.logbook import format_count, format_duration

# What the same run would take elsewhere: from one GPU to a pod.
ELSEWHERE = ("h100:1", "h100:8", "v4-8", "v5e-16", "v5e-256", "v5p-128")

# Training's share of what large float32 products reach on the same CPU (docs/performance.md: 64 to 74 %).
_CPU_SHARE = 0.65


def lines(forecast: Forecast) -> list[str]:
    """The whole forecast as text."""
    blocks = [
        ("run", aligned(_run(forecast))),
        (f"parameters on {forecast.devices} device{'s' * (forecast.devices > 1)}", aligned(_sharding(forecast))),
        ("memory of the train step on each device, estimated", aligned(_memory(forecast))),
        ("time of the training steps; evaluations, checkpoints and rounds come on top", aligned(_time(forecast))),
    ]
    if forecast.compiled:
        blocks.append((f"compiled for {forecast.topology.name if forecast.topology else ''}", _compiled(forecast)))
    return [line for title, body in blocks for line in ("", title, *(f"  {each}" for each in body))][1:]


def as_dict(forecast: Forecast) -> dict[str, Any]:
    """The whole forecast as `plan.json` has it: bytes, seconds, FLOP."""
    run_cost, length = forecast.cost, forecast.config.train.sequence_length
    seconds, basis = _seconds(forecast)
    return {
        "topology": forecast.topology.name if forecast.topology else None,
        "device": forecast.device,
        "devices": forecast.devices,
        "mesh": dict(forecast.mesh_shape),
        "parameters": plan.parameter_count(forecast.shape),
        "dtype": str(forecast.shape.dtype),
        "attention": forecast.shape.attn_implementation,
        "steps": forecast.plan.total_steps,
        "rows_per_step": forecast.plan.rows,
        "tokens_per_step": run_cost.tokens_per_step,
        "tokens": {name: rows * length for name, rows in forecast.drawn.items() if rows},
        "epochs": {
            name: forecast.drawn[name] / rows
            for name, stream in forecast.streams.items()
            if (rows := stream.rows_in_epoch(0))
        },
        "flops_per_token": run_cost.flops_per_token,
        "step_flops": run_cost.step_flops,
        "total_flops": run_cost.total_flops,
        "drawn_tokens": run_cost.drawn_tokens,
        "memory": {
            **dataclasses.asdict(forecast.memory),
            "total": forecast.memory.total,
            "device": forecast.chip.memory if forecast.chip else None,
        },
        "seconds": seconds,
        "seconds_basis": basis,
        "rounds_seconds": _rounds_seconds(forecast),
        "device_hours": seconds * forecast.devices / 3600,
        "elsewhere": [
            dict(zip(("hardware", "seconds", "device_hours"), row, strict=True)) for row in _elsewhere(forecast)
        ],
        "sharding": [dataclasses.asdict(row) for row in forecast.sharding],
        "compiled": [
            {
                "program": one.name,
                "compile_seconds": one.seconds,
                "memory": {"arguments": one.arguments, "temporary": one.temporary, "outputs": one.outputs},
                "compiler_seconds": _compiler_seconds(forecast, one.cycles),
                "collectives": [
                    dict(zip(("kind", "group", "times", "bytes"), row, strict=True))
                    for row in collectives.table(one.collectives)
                ],
            }
            for one in forecast.compiled
        ],
        "compiler_mfu": _compiler_mfu(forecast),
    }


def _run(forecast: Forecast) -> list[tuple[str, str]]:
    made, length, shape = forecast.plan, forecast.config.train.sequence_length, forecast.shape
    mesh = " × ".join(f"{axis} {size}" for axis, size in forecast.mesh_shape.items())
    tokens = []
    for name, rows in forecast.drawn.items():
        if not rows:
            continue
        stream = forecast.streams.get(name)
        epoch = stream.rows_in_epoch(0) if stream is not None else 0
        tokens.append(f"{format_count(rows * length)} {name}" + (f" ({rows / epoch:.1f} epochs)" if epoch else ""))
    return [
        ("model", f"{plan.parameter_count(shape) / 1e6:.1f}M parameters, {shape.n_layer} × {shape.n_embd}"),
        ("arithmetic", f"{shape.dtype}, attention {shape.attn_implementation}, remat {shape.remat}"),
        ("devices", f"{forecast.devices} {forecast.device}, mesh {mesh}"),
        *description.step_rows(forecast.config, made),
        ("tokens", f"at most {', '.join(tokens)}; {format_count(forecast.cost.tokens_per_step)} a step"),
        (
            "rounds draw",
            f"at most {format_count(forecast.cost.drawn_tokens)} tokens" if made.round_steps else "nothing",
        ),
        ("FLOPs", f"{forecast.cost.flops_per_token / 1e6:,.1f}M a token, {forecast.cost.total_flops:.3g} in all"),
    ]


def _sharding(forecast: Forecast) -> list[tuple[str, ...]]:
    head = ("parameter", "shape", "type", "over", "on each device")
    return [head] + [
        (
            f"{row.name}{f' (× {row.count})' if row.count > 1 else ''}",
            " × ".join(map(str, row.shape)),
            row.dtype,
            row.spec,
            _bytes(row.bytes_per_device),
        )
        for row in forecast.sharding
    ]


def _memory(forecast: Forecast) -> list[tuple[str, ...]]:
    parts = {name: size for name, size in dataclasses.asdict(forecast.memory).items() if size}
    rows = [(name, _bytes(size)) for name, size in parts.items()]
    chip, total = forecast.chip, forecast.memory.total
    has = "" if chip is None else f" of {_bytes(chip.memory)}{'' if total < chip.memory else ': does not fit'}"
    return [*rows, ("total", f"{_bytes(total)}{has}")]


def _time(forecast: Forecast) -> list[tuple[str, ...]]:
    seconds, basis = _seconds(forecast)
    hours = seconds * forecast.devices / 3600
    here = [
        (
            "here" if forecast.topology is None else forecast.topology.name,
            format_duration(seconds),
            f"{hours:.3g}",
            basis,
        )
    ]
    if (rounds := _rounds_seconds(forecast)) is not None:
        basis = "at least: a token of every row reads all weights once"
        here.append(("  its rounds", format_duration(rounds), f"{rounds * forecast.devices / 3600:.3g}", basis))
    usual = f"at {cost.USUAL_MFU:.0%} of the peak"
    others = [(name, format_duration(time), f"{hours:.3g}", usual) for name, time, hours in _elsewhere(forecast)]
    return [("on", "time", "device-hours", ""), *here, *others]


def _compiled(forecast: Forecast) -> list[str]:
    assert forecast.chip is not None
    rows: list[tuple[str, ...]] = [
        ("program", "memory", "arguments", "temporary", "compiler's time", "sent", "compiled in")
    ]
    sent: list[tuple[str, ...]] = [("program", "collective", "devices together", "times", "bytes on each device")]
    for one in forecast.compiled:
        table = collectives.table(one.collectives)
        sent += [(one.name, kind, str(group), f"{times:,}", _bytes(size)) for kind, group, times, size in table]
        rows.append(
            (
                one.name,
                f"{_bytes(one.memory)} of {_bytes(forecast.chip.memory)}",
                _bytes(one.arguments),
                _bytes(one.temporary),
                f"{1000 * _compiler_seconds(forecast, one.cycles):,.1f} ms",
                _bytes(sum(row[3] for row in table)),
                f"{one.seconds:.0f} s",
            )
        )
    mfu = _compiler_mfu(forecast)
    said = (
        [] if mfu is None else [f"by the compiler's time of the train step: {mfu:.0%} of the peak, sending not counted"]
    )
    return [*aligned(rows), "", *aligned(sent), "", *said]


def _seconds(forecast: Forecast) -> tuple[float, str]:
    """Time of the run on the forecast's devices, and what that rests on."""
    if forecast.chip is not None:
        rate = forecast.devices * forecast.chip.peak * cost.USUAL_MFU
        return forecast.cost.seconds(rate), f"at {cost.USUAL_MFU:.0%} of the peak"
    rate = _products_per_second()
    return forecast.cost.seconds(rate * _CPU_SHARE), f"at {_CPU_SHARE:.0%} of {rate / 1e9:,.0f} GFLOP/s, measured now"


def _rounds_seconds(forecast: Forecast) -> float | None:
    """Of drawing all rounds' replies, at least; None without rounds, or where the memory's speed is not known."""
    if forecast.chip is None or not forecast.cost.drawn_tokens:
        return None
    return cost.decoding_seconds(forecast.config, forecast.cost, forecast.shape, forecast.chip, forecast.mesh_shape)


def _elsewhere(forecast: Forecast) -> list[tuple[str, float, float]]:
    rows = []
    for name in ELSEWHERE:
        topology = Topology.parse(name)
        seconds = forecast.cost.seconds(topology.devices * topology.chip.peak * cost.USUAL_MFU)
        rows.append((name, seconds, seconds * topology.devices / 3600))
    return rows


def _compiler_seconds(forecast: Forecast, cycles: int) -> float:
    assert forecast.chip is not None
    return cycles / forecast.chip.clock


def _compiler_mfu(forecast: Forecast) -> float | None:
    """Share of the peak if the train step took the compiler's time."""
    step = next((one for one in forecast.compiled if one.name == "train step"), None)
    if step is None or not step.cycles or forecast.chip is None:
        return None
    useful = forecast.cost.tokens_per_step * forecast.cost.flops_per_token
    return useful / (_compiler_seconds(forecast, step.cycles) * forecast.devices * forecast.chip.peak)


def _products_per_second() -> float:
    """FLOP/s of a large float32 product on this machine's CPU."""
    size = 1024
    square = jax.device_put(np.ones((size, size), np.float32))
    product = jax.jit(jax.numpy.matmul)
    product(square, square).block_until_ready()
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        product(square, square).block_until_ready()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _bytes(number: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 1000 * size else f"{number / size:,.0f} {unit}"
    return f"{number} B"
