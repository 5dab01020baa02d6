"""What a compiled program sends is read off its text, loops counted."""
# ruff: noqa: E501 - the text is the compiler's

from __future__ import annotations

import subprocess
import sys
import textwrap

import tiny

from ssl_jax.forecast import collectives
from ssl_jax.forecast.collectives import Program

LOOP = textwrap.dedent(
    """\
    HloModule jit_f

    %add (a: f32[], b: f32[]) -> f32[] {
      ROOT %sum = f32[] add(%a, %b)
    }

    %condition.1 (p: (s32[], f32[8,4])) -> pred[] {
      %constant.1 = s32[]{:T(128)} constant(12)
      ROOT %less = pred[] compare(%i, %constant.1), direction=LT
    }

    %body.1 (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
      %fusion.1 = f32[8,4]{1,0:T(8,128)} fusion(%x), kind=kLoop, calls=%inner.1, backend_config={"window_config":{"estimated_cycles":"100"}}
      %gather.1 = bf16[64,8]{1,0:T(8,128)(2,1)} all-gather(%y), channel_id=1, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}, metadata={op_name="jit(f)/while/gather"}
    }

    %inner.1 (q: f32[8,4]) -> f32[8,4] {
      ROOT %scatter = f32[2,4]{1,0} reduce-scatter(%q), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
    }

    %unused (z: f32[8]) -> f32[8] {
      %r = f32[8] all-reduce(%z), replica_groups={{0,1}}, to_apply=%add
    }

    ENTRY %main (a: f32[8,4]) -> f32[8,4] {
      %loop = (s32[]{:T(128)}, f32[8,4]{1,0}) while(%start), condition=%condition.1, body=%body.1
      %all = (f32[8]{0}, f32[8]{0}) all-reduce-start(%u, %v), replica_groups={{0,1},{2,3}}, to_apply=%add
      %cycles = f32[8] copy(%u), backend_config={"window_config":{"estimated_cycles":"7"}}
      ROOT %moved = f32[8,4] collective-permute(%w), source_target_pairs={{0,1},{1,0}}
    }
    """
)


def test_operations_in_loops_count_as_often_as_they_run_and_dead_ones_not_at_all() -> None:
    program = Program.read(LOOP, 8)
    found = {one.kind: one for one in program.collectives()}
    assert found.keys() == {"all-gather", "reduce-scatter", "all-reduce", "collective-permute"}
    gather = found["all-gather"]
    assert (gather.times, gather.bytes, gather.group, gather.shapes) == (12, 64 * 8 * 2, 4, ((64, 8),))
    assert gather.origin == "jit(f)/while/gather"
    assert (found["reduce-scatter"].times, found["reduce-scatter"].bytes) == (12, 8 * 4 * 4)
    assert (found["all-reduce"].times, found["all-reduce"].bytes, found["all-reduce"].group) == (1, 64, 2)
    assert program.cycles() == 12 * 100 + 7


def test_the_table_has_the_most_bytes_first() -> None:
    rows = collectives.table(Program.read(LOOP, 8).collectives())
    assert rows[0] == ("all-gather", 4, 12, 12 * 1024)
    assert [row[3] for row in rows] == sorted((row[3] for row in rows), reverse=True)


REAL = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from ssl_jax.forecast.collectives import Program

mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("x",), ()))

def summed(matrix, batch):
    def body(total, _):
        return total + jnp.tanh(batch @ matrix * total).sum(), None
    return jax.lax.scan(body, jnp.float32(1), None, length=5)[0]

arguments = [jax.ShapeDtypeStruct(shape, np.float32, sharding=rows) for shape in ((64, 32), (8, 64))]
compiled = jax.jit(summed, out_shardings=whole).lower(*arguments).compile()
for one in Program.read(compiled.as_text(), 2).collectives():
    print(one.kind, one.shapes, one.times, one.group, one.bytes)
"""


def test_a_gathered_matrix_and_a_summed_scalar_are_found_in_a_real_program() -> None:
    done = subprocess.run(
        [sys.executable, "-c", REAL],
        env={**tiny.environment(), "JAX_NUM_CPU_DEVICES": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "all-gather ((64, 32),) 1 2 8192" in done.stdout
    assert "all-reduce ((),) 5 2 4" in done.stdout
