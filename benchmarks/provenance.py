"""Where and with what a number was measured."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "transformers",
    "torch",
    "accelerate",
    "numpy",
)


def provenance() -> dict[str, Any]:
    """Hardware, versions, commit and date, as JSON values.

    Keys: `cpu` (model name), `cores` (usable by this process), `memory_gib`, `gpus` (name, memory and driver of each,
    as NVIDIA's driver lists them), `accelerator` (kinds and count of JAX's devices, None if this process never imported
    JAX), `python`, `versions` (None where a package is absent), `commit` and `dirty` (None outside a git checkout),
    `date` (UTC, ISO 8601).
    """
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "gpus": _gpus(),
        "accelerator": _accelerator(),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
        **_commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def _gpus() -> list[str]:
    """Asked of the driver, since what measures leaves the device to its children."""
    command = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    try:
        listed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    except (FileNotFoundError, subprocess.SubprocessError):
        return []
    return listed.stdout.splitlines()


def _accelerator() -> dict[str, Any] | None:
    jax = sys.modules.get("jax")
    if jax is None:
        return None
    devices = jax.devices()
    return {"kinds": sorted({device.device_kind for device in devices}), "count": len(devices)}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> dict[str, Any]:
    try:
        commit, status = _git("rev-parse", "--verify", "HEAD"), _git("status", "--porcelain")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": bool(status)}


def _git(*arguments: str) -> str:
    result = subprocess.run(
        ("git", *arguments), cwd=Path(__file__).parent, check=True, capture_output=True, text=True, timeout=30
    )
    return result.stdout.strip()
