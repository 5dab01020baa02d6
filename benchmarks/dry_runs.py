"""What every configuration of `configs/hardware/` needs and takes: `python benchmarks/dry_runs.py`.

Each is planned with `--topology` of the hardware in its name; those for TPUs are compiled, which needs the extra
tpu-compile and no TPU. Plans that are there already are not made again. Writes `benchmarks/results/dry_runs.json` and
the table of `docs/hardware.md`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from provenance import provenance
from pydantic import Field
from readme import markdown_table, replace_section

from ssl_jax import command_line, files
from ssl_jax.config import Section
from ssl_jax.errors import UserError

GB = 1e9
HEADER = (
    "configuration", "parameters", "mesh", "rows × tokens a step", "memory of a device: step", "evaluation", "sampler",
    "sent a step", "compiler's time", "MFU then", "1B tokens at 40 % MFU", "compiled in",
)  # fmt: skip


class Options(Section):
    """Which configurations, and where the results go."""

    configs: str = Field(default="configs/hardware/*.yaml", description="Glob of configurations SIZE_HARDWARE.yaml.")
    plans: str = Field(default="runs/dry_runs", description="Folder for their plans.")
    results: str = Field(default="benchmarks/results", description="Folder for dry_runs.json.")
    make: bool = Field(default=True, description="Make plans that are missing; else they are left out.")
    page: str = Field(default="docs/hardware.md", description="Whose table is replaced.")


def main(arguments: Sequence[str]) -> None:
    """Makes the plans that are missing, and the table of all."""
    options = command_line.parse(
        Options, arguments, program="python benchmarks/dry_runs.py", summary=(__doc__ or "").strip()
    )
    plans = {}
    for path in sorted(Path().glob(options.configs)):
        found = plan(path, Path(options.plans) / path.stem, options.make)
        if found is not None:
            plans[path.stem] = found
    files.write_json(Path(options.results) / "dry_runs.json", {"provenance": provenance(), "plans": plans})
    text = markdown_table(HEADER, [row(name, found) for name, found in plans.items()])
    replace_section(Path(options.page), "hardware table", text)
    print(text)


def plan(path: Path, directory: Path, make: bool) -> dict[str, Any] | None:
    """The plan of a configuration, as `plan.json` has it but for the sharding table; None if it may not be made.

    Raises:
      UserError: it does not fit the hardware.
    """
    made, source = directory / "plan.json", directory / "config.txt"
    text = path.read_text(encoding="utf-8")
    if not made.is_file() or not source.is_file() or source.read_text(encoding="utf-8") != text:
        if not make:
            return None
        topology = topology_of(path.stem)
        print(f"{path}: --topology {topology}", flush=True)
        command = [sys.executable, "-m", "ssl_jax.train", "--config", str(path), "--topology", topology]
        done = subprocess.run([*command, "--workdir", str(directory)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"{path}: {done.stderr.strip().splitlines()[-1] if done.stderr else done.returncode}")
        source.write_text(text, encoding="utf-8")
    found = json.loads(made.read_text(encoding="utf-8"))
    return {name: value for name, value in found.items() if name != "sharding"}


def topology_of(stem: str) -> str:
    """`h100:8` of `gpt2_h100-8`; clouds' names of TPUs are topologies as they are."""
    hardware = stem.split("_", 1)[1]
    return hardware.replace("-", ":") if hardware.startswith("h100") else hardware


def row(name: str, found: dict[str, Any]) -> tuple[str, ...]:
    """A configuration's line of the table."""
    mesh = " × ".join(f"{axis} {size}" for axis, size in found["mesh"].items() if size > 1) or "one device"
    limit = f"{found['memory']['device'] / GB:.0f} GB"
    compiled: dict[str, Any] = {one["program"]: one for one in found["compiled"]}
    memory = {program: sum(one["memory"].values()) for program, one in compiled.items()}
    step: Any = compiled.get("train step")
    sent = sum(one["bytes"] for one in step["collectives"]) if step else 0
    hours = found["device_hours"] * 1e9 / (found["steps"] * found["tokens_per_step"])
    estimated = "" if step else ", estimated"
    used = memory["train step"] if step else found["memory"]["total"]
    return (
        f"`{name}.yaml`",
        f"{found['parameters'] / 1e6:,.0f}M",
        mesh,
        f"{found['rows_per_step']:,} × {found['tokens_per_step'] // found['rows_per_step']:,}",
        f"{used / GB:.1f} of {limit}{estimated}",
        f"{memory['evaluation step'] / GB:.1f} GB" if step else "",
        f"{memory['sampler'] / GB:.1f} GB" if step else "",
        f"{sent / GB:.2f} GB" if step else "",
        f"{1000 * step['compiler_seconds']:,.0f} ms" if step else "",
        f"{found['compiler_mfu']:.0%}" if step else "",
        f"{hours:,.1f} device-hours",
        f"{sum(one['compile_seconds'] for one in compiled.values()):.0f} s" if step else "",
    )


if __name__ == "__main__":
    command_line.run(main)
