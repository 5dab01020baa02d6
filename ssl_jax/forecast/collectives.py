"""What a compiled program does how often, and what it sends between devices, read off its text (HLO)."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f16": 16, "c64": 64, "c128": 128}
_COMPUTATION = re.compile(r"^(?:ENTRY\s+)?%?([\w.-]+)\s*\(.*\)\s*->\s*.*\{\s*$")
_ARRAY = re.compile(r"\b(pred|bf16|c64|c128|[suf]\d+\w*)\[([\d,]*)\]")
_OPERATION = re.compile(rf"=\s+(.*?)\s({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(r"(?:body|condition|calls|to_apply|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BOUND = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    Attributes:
      kind: of `KINDS`.
      dtype: HLO's name of the elements' type.
      shapes: of the arrays that come out, on each device.
      bytes: of what comes out, or of what goes in where that is more (reduce-scatter), on each device, each time.
      times: how often it runs; a loop of unknown length counts once.
      group: how many devices take part together.
      origin: the operation in the source that it comes from.
    """

    kind: str
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    times: int
    group: int
    origin: str


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program's text and how often each part of it runs.

    Attributes:
      bodies: lines of every computation, by name.
      times: how often each runs when the program does; a loop of unknown length counts once.
      devices: that it was compiled for.
    """

    bodies: dict[str, list[str]]
    times: dict[str, int]
    devices: int

    @classmethod
    def read(cls, text: str, devices: int) -> Program:
        """Reads what `jax.stages.Compiled.as_text` gives."""
        bodies = dict(_computations(text))
        return cls(bodies, _times(text, bodies), devices)

    def collectives(self) -> list[Collective]:
        """Every collective that runs."""
        return [
            _collective(match, line, times, self.devices)
            for line, times in self._lines()
            if (match := _OPERATION.search(line)) is not None
        ]

    def cycles(self) -> int:
        """The TPU compiler's estimate of all operations' clock cycles; what it estimates nothing for counts nothing."""
        return sum(int(found[1]) * times for line, times in self._lines() if (found := _CYCLES.search(line)))

    def _lines(self) -> Iterator[tuple[str, int]]:
        for name, lines in self.bodies.items():
            if times := self.times.get(name, 0):
                yield from ((line, times) for line in lines)


def table(collectives: Iterable[Collective]) -> list[tuple[str, int, int, int]]:
    """Kind, size of the group, operations per run of the program and their bytes on each device; the most first."""
    sums: dict[tuple[str, int], list[int]] = defaultdict(lambda: [0, 0])
    for one in collectives:
        entry = sums[one.kind, one.group]
        entry[0] += one.times
        entry[1] += one.times * one.bytes
    rows = [(kind, group, times, size) for (kind, group), (times, size) in sums.items()]
    return sorted(rows, key=lambda row: -row[3])


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    name, lines = "", []
    for line in text.splitlines():
        if (match := _COMPUTATION.match(line)) is not None:
            name, lines = match[1], []
        elif line.rstrip() == "}" and name:  # a kernel's metadata has lines of its own, and braces in them
            yield name, lines
            name = ""
        elif name:
            lines.append(line)


def _times(text: str, bodies: dict[str, list[str]]) -> dict[str, int]:
    """How often each computation runs, from the entry down."""
    entry = re.search(r"^ENTRY\s+%?([\w.-]+)", text, re.MULTILINE)
    assert entry is not None
    times: dict[str, int] = defaultdict(int)

    def visit(name: str, factor: int) -> None:
        times[name] += factor
        for line in bodies.get(name, ()):
            trips = _trips(line, bodies) if " while(" in line else 1
            for match in _CALLED.finditer(line):
                for called in re.findall(r"[\w.-]+", match[1]):
                    if called in bodies:
                        visit(called, factor * trips)

    visit(entry[1], 1)
    return times


def _trips(line: str, bodies: dict[str, list[str]]) -> int:
    """Turns of a loop: as the compiler wrote down, or the one number that its condition compares with."""
    if (known := _TRIPS.search(line)) is not None:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.-]+)", line)
    lines = bodies.get(condition[1], []) if condition else []
    bounds = [int(bound[1]) for each in lines if (bound := _BOUND.search(each)) is not None]
    return bounds[0] if len(bounds) == 1 and any("direction=LT" in each for each in lines) else 1


def _collective(match: re.Match[str], line: str, times: int, devices: int) -> Collective:
    result, kind, started = match[1], match[2], match[3]
    came, group = _arrays(result), _group(line, devices)
    if started and kind in ("all-gather", "collective-permute"):
        came = came[len(came) // 2 :]  # what an operation in two halves shows first is what went in
    origin = re.search(r'op_name="([^"]*)"', line)
    return Collective(
        kind=kind,
        dtype=came[0][0] if came else "",
        shapes=tuple(shape for _, shape in came),
        bytes=_size(came) * (group if kind == "reduce-scatter" else 1),
        times=times,
        group=group,
        origin=origin[1] if origin else "",
    )


def _arrays(text: str) -> list[tuple[str, tuple[int, ...]]]:
    return [(dtype, tuple(map(int, filter(None, sizes.split(","))))) for dtype, sizes in _ARRAY.findall(text)]


def _size(arrays: list[tuple[str, tuple[int, ...]]]) -> int:
    return sum(math.prod(shape) * _bits(dtype) // 8 for dtype, shape in arrays)


def _bits(dtype: str) -> int:
    digits = re.search(r"\d+", dtype)
    return _BITS.get(dtype) or (int(digits[0]) if digits else 8)


def _group(line: str, devices: int) -> int:
    if (match := re.search(r"replica_groups=\[\d+,(\d+)\]", line)) is not None:
        return int(match[1])
    if (match := re.search(r"replica_groups=\{\{([\d,]+)\}", line)) is not None:
        return match[1].count(",") + 1
    if (match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line)) is not None:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", match[2]))
    return 2 if "source_target_pairs" in line else devices
