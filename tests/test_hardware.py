"""Chips and topologies by the names that people give them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_jax.errors import UserError
from ssl_jax.hardware import CHIPS, Topology, chip_of


@pytest.mark.parametrize(
    ("text", "name", "devices"),
    [
        ("v5e:16x16", "v5e:16x16", 256),
        ("v5e-256", "v5e:16x16", 256),
        ("v5litepod-16", "v5e:4x4", 16),
        ("V5E:2x2", "v5e:2x2", 4),
        ("v4-8", "v4:2x2x1", 4),  # named by its cores
        ("v4:4", "v4:2x2x1", 4),
        ("v5p-128", "v5p:4x4x4", 64),
        ("v5p:4x4x4", "v5p:4x4x4", 64),
        ("v5e:8x8", "v5e:8x8", 64),
        ("2*v5e:16x16", "2*v5e:16x16", 512),
        ("h100:8", "h100:8", 8),
        ("h100", "h100:1", 1),
        ("a100-40gb:4", "a100-40gb:4", 4),
    ],
)
def test_a_topology_is_read_as_its_vendor_writes_it(text: str, name: str, devices: int) -> None:
    topology = Topology.parse(text)
    assert (topology.name, topology.devices) == (name, devices)
    assert Topology.parse(topology.name) == topology


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v9:4x4", "no chip 'v9'"),
        ("v5:4x4", "did you mean v5"),
        ("v5e-17", "no such slice; known: v5e:1, v5e:4"),
        ("v4-7", "known: v4-8, v4-16"),
        ("v5e:2x2x2", "has a shape such as v5e:4x4"),
        ("v5p:4x4", "has a shape such as v5p:4x4x4"),
        ("h100:2x4", "GPUs are counted"),
        ("v5e:0x4", "at least 1"),
        ("", "not a chip and a shape"),
        ("16x16", "not a chip and a shape"),
    ],
)
def test_what_nobody_sells_is_refused_with_what_there_is(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Topology.parse(text)


@given(st.text(max_size=12))
def test_any_text_is_a_topology_or_a_message(text: str) -> None:
    try:
        assert Topology.parse(text).devices >= 1
    except UserError as error:
        assert "--topology" in str(error)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5p", "v5p"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("cpu", None),
    ],
)
def test_a_device_is_the_chip_with_the_longest_matching_name(kind: str, name: str | None) -> None:
    chip = chip_of(kind)
    assert (chip.name if chip else None) == name


def test_a_tpu_s_peak_is_a_whole_number_of_matrix_units_at_its_clock() -> None:
    for chip in CHIPS:
        if chip.platform == "tpu":
            units = chip.peak / chip.clock / (2 * 128 * 128)
            assert units == pytest.approx(round(units), rel=0.01)
