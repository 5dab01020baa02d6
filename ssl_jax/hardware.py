"""Chips by name: what they hold and how fast they are at most, from the vendors' data sheets."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re

from ssl_jax.errors import UserError

GB = 10**9


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX sees it.

    Attributes:
      name: as users write it.
      platform: JAX's name of the backend.
      kinds: beginnings of `jax.Device.device_kind`.
      memory: bytes of its own memory.
      peak: dense bfloat16 FLOP/s.
      bandwidth: bytes/s from its memory.
      clock: cycles/s of a TPU's cores, from its peak and the size of its matrix units.
    """

    name: str
    platform: str
    kinds: tuple[str, ...]
    memory: int
    peak: float
    bandwidth: float
    clock: float = 0.0


CHIPS = (
    Chip("a100", "gpu", ("NVIDIA A100",), 80 * GB, 312e12, 2039e9),
    Chip("a100-40gb", "gpu", ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), 40 * GB, 312e12, 1555e9),
    Chip("h100", "gpu", ("NVIDIA H100",), 80 * GB, 989e12, 3350e9),
    Chip("h200", "gpu", ("NVIDIA H200",), 141 * GB, 989e12, 4800e9),
    Chip("v4", "tpu", ("TPU v4",), 32 * GB, 275e12, 1228e9, 1.05e9),
    Chip("v5e", "tpu", ("TPU v5 lite", "TPU v5e"), 16 * GB, 197e12, 819e9, 1.5e9),
    Chip("v5p", "tpu", ("TPU v5p", "TPU v5"), 95 * GB, 459e12, 2765e9, 1.75e9),
    Chip("v6e", "tpu", ("TPU v6 lite", "TPU v6e"), 32 * GB, 918e12, 1640e9, 1.75e9),
)

# Chips of a slice → its shape. A slice of v4 or v5p is a box of chips; cloud names count their cores, two a chip.
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_BOXES = {
    4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8",
    1024: "8x8x16", 2048: "8x16x16",
}  # fmt: skip
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "h100-80gb": "h100", "a100-80gb": "a100"}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices that a run could have.

    Attributes:
      chip: what each of them is.
      slice_shape: of a TPU slice, such as `16x16`; None for GPUs.
      devices: of all slices together.
      slices: how many there are.
    """

    chip: Chip
    slice_shape: str | None
    devices: int
    slices: int = 1

    @property
    def name(self) -> str:
        """As users write it."""
        several = f"{self.slices}*" if self.slices > 1 else ""
        return f"{several}{self.chip.name}:{self.slice_shape or self.devices // self.slices}"

    @classmethod
    def parse(cls, text: str) -> Topology:
        """Reads `v5e:16x16`, `2*v5e:16x16` (two slices), a TPU's name in the cloud (`v5e-256`, `v4-8`) or `h100:8`.

        Raises:
          UserError: no such chip, or no such number or arrangement of them.
        """
        match = re.fullmatch(r"(?:(\d+)\*)?([a-z][a-z0-9-]*?)(?:[:-](\d+(?:x\d+)*))?", text.strip().lower())
        if match is None:
            raise UserError(f"--topology {text!r}: not a chip and a shape, such as v5e:16x16, v5p-128 or h100:8")
        slices, given, shape = int(match[1] or 1), match[2], match[3]
        chips = {chip.name: chip for chip in CHIPS}
        chip = chips.get(_ALIASES.get(given, given))
        if chip is None:
            near = difflib.get_close_matches(given, chips, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(chips)}"
            raise UserError(f"--topology {text}: no chip {given!r}; {hint}")
        if slices < 1 or any(int(size) < 1 for size in (shape or "1").split("x")):
            raise UserError(f"--topology {text}: sizes are at least 1")
        if chip.platform == "gpu":
            if shape is not None and "x" in shape:
                raise UserError(f"--topology {text}: GPUs are counted, such as {chip.name}:8")
            return cls(chip, None, slices * int(shape or 1), slices)
        boxed = chip.name in ("v4", "v5p")
        if shape is None or "x" not in shape:
            cores = 2 if boxed and f"{given}-" in text.lower() else 1
            known = _BOXES if boxed else _FLAT
            count = int(shape or (4 * cores if boxed else 1))
            if count % cores or count // cores not in known:
                sizes = ", ".join(f"{given}{'-' if cores > 1 else ':'}{size * cores}" for size in known)
                raise UserError(f"--topology {text}: there is no such slice; known: {sizes}, or a shape like 4x4")
            shape = known[count // cores]
        if shape.count("x") != (2 if boxed else 1):
            example = "4x4x4" if boxed else "4x4"
            raise UserError(f"--topology {text}: a slice of {chip.name} has a shape such as {chip.name}:{example}")
        return cls(chip, shape, slices * math.prod(map(int, shape.split("x"))), slices)


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls `device_kind`; None for one that is not known, such as a CPU."""
    found = [(len(kind), chip) for chip in CHIPS for kind in chip.kinds if device_kind.startswith(kind)]
    return max(found, key=lambda pair: pair[0])[1] if found else None
