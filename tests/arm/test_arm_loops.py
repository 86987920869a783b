"""The machine code of the Arm kernels: the instructions of the multiply loops, and of whole layers.

As on x86-64, an accumulator on the stack gives the right answer at half the speed, so no other test would notice it.
"""

from pathlib import Path

import pytest

from benchmarks import arm_analysis
from benchmarks.arm_analysis import PRODUCTS, Loop, loops_in, main_loop, tile_rows
from emulation import core_objects

ROWS = range(1, 7)
every_kernel = pytest.mark.parametrize("kernel", PRODUCTS)


@pytest.fixture(scope="module")
def objects() -> dict[str, Path]:
    """The GEMM's, by name."""
    return {source.stem: out for source, out in core_objects().items() if source.parent == arm_analysis.CORE}


@pytest.fixture(scope="module")
def loops(objects) -> dict[str, list[Loop]]:
    return arm_analysis.all_loops(objects)


@every_kernel
def test_every_tile_has_a_multiply_loop(loops, kernel):
    """For every number of rows, so that the tests below check all."""
    assert {loop.rows for loop in loops[kernel]} == set(ROWS)


@every_kernel
def test_accumulators_stay_in_registers(loops, kernel):
    """No vector is loaded from the stack, stored, or copied inside a multiply loop."""
    assert [(loop.rows, loop.spills) for loop in loops[kernel] if loop.spills] == []


@every_kernel
def test_an_iteration_is_whole_groups(loops, kernel):
    """An iteration does rows x columns x k multiply-adds. USMMLA multiplies pairs of rows, even if one is missing."""
    depth, columns = {"neon": (4, 8), "neon_dotprod": (4, 16), "neon_i8mm": (16, 16)}[kernel]
    for loop in loops[kernel]:
        rows = loop.rows + loop.rows % 2 if kernel == "neon_i8mm" else loop.rows
        assert loop.macs % (rows * columns * depth) == 0, f"{kernel}, {loop.rows} rows"


# For the loop of a full tile: the minimum share of instructions that multiply, the minimum number of multiply-adds per
# loaded byte, and the number of loads per iteration. neon needs two instructions to multiply, SMULL and SADALP, and
# loads the codes of every group.
MAIN = {"neon": (0.69, 3.4, 10), "neon_dotprod": (0.84, 4.3, 14), "neon_i8mm": (0.73, 4.3, 11)}


@every_kernel
def test_the_main_loop_mostly_multiplies(loops, kernel):
    share, per_byte, loads = MAIN[kernel]
    loop = main_loop(loops[kernel], 6)
    assert loop.share >= share
    assert loop.macs / loop.loaded_bytes >= per_byte
    assert sum(line.startswith("ld") for line in loop.code) == loads


@pytest.mark.parametrize(("kernel", "most"), [("neon", 1.9), ("neon_dotprod", 1.8), ("neon_i8mm", 1.9)])
def test_one_row_loads_little_more_than_its_weights(loops, kernel, most):
    """For one row, each weight is used once: a byte per multiply-add, plus the codes. Few other instructions remain."""
    loop = main_loop(loops[kernel], 1)
    useful = loop.macs // 2 if kernel == "neon_i8mm" else loop.macs
    assert loop.loaded_bytes / useful <= 1.13
    assert len(loop.code) / loop.products <= (2.2 if kernel == "neon" else most)


# ---- Whole layers, instructions executed ----------------------------------------------------------------------------

# How many more instructions a layer may take than its multiply loops: 10 %, except where that is impossible. A loop of
# USMMLA takes only 0.042 instructions per multiply-add, so at 768 x 768 the minimum for quantizing an input (1.75) and
# finishing an output (1.63) already exceeds 10 %: see docs/arm.md. The measured values lie a little below these limits.
LIMITS = {
    ("neon", (16, 768, 768)): 0.03,
    ("neon", (128, 3072, 768)): 0.02,
    ("neon_dotprod", (16, 768, 768)): 0.09,
    ("neon_dotprod", (128, 3072, 768)): 0.06,
    ("neon_dotprod", (16, 4096, 4096)): 0.02,
    ("neon_i8mm", (16, 768, 768)): 0.16,
    ("neon_i8mm", (128, 3072, 768)): 0.10,
    ("neon_i8mm", (128, 768, 3072)): 0.09,
    ("neon_i8mm", (16, 4096, 4096)): 0.04,
}


@pytest.fixture(scope="module")
def built(objects):
    return arm_analysis.layer_program(objects)


@pytest.mark.parametrize(("kernel", "layer"), LIMITS)
def test_layers_are_little_more_than_their_loops(loops, built, kernel, layer):
    counted = arm_analysis.instructions_per_mac(kernel, layer, built)
    expected = arm_analysis.expected_per_mac(loops[kernel], layer[0])
    assert expected < counted <= expected * (1 + LIMITS[kernel, layer])


def test_rows_are_cut_as_in_gemm_cpp():
    assert tile_rows(16, 1) == [6, 5, 5]
    assert tile_rows(16, 2) == [6, 6, 4]
    assert tile_rows(7, 2) == [4, 3]
    assert tile_rows(1, 2) == [1]


# ---- The reader itself ----------------------------------------------------------------------------------------------

CLEAN = """
0000000000000000 <void torchq::neon_i8mm::tile<2, 4, torchq::neon_i8mm::AnyOutputs>(torchq::Block const&)>:
   0:\tstp\td8, d9, [sp, #16]
   4:\tldp\tq5, q2, [x3]
   8:\tldr\tq1, [x2]
   c:\tusmmla\tv10.4s, v5.16b, v1.16b
  10:\tusmmla\tv11.4s, v2.16b, v1.16b
  14:\tcmp\tx4, x2
  18:\tb.ne\t4 <void torchq::neon_i8mm::tile<2, 4, torchq::neon_i8mm::AnyOutputs>(torchq::Block const&)+0x4>  // b.any
  1c:\tstr\tq10, [x5]
  20:\tret
  24:\tusmmla\tv12.4s, v5.16b, v1.16b
  28:\tb\t1c <void torchq::neon_i8mm::tile<2, 4, torchq::neon_i8mm::AnyOutputs>(torchq::Block const&)+0x1c>
"""


def test_the_reader_finds_the_loop():
    """It does not take a block after the end of the function, which also jumps back, for a loop."""
    (loop,) = loops_in("neon_i8mm", CLEAN)
    assert (loop.rows, loop.products, loop.macs, loop.loaded_bytes, len(loop.code)) == (2, 2, 64, 48, 6)
    assert loop.share == 2 / 6
    assert loop.spills == []


@pytest.mark.parametrize(
    "spill",
    ["ldr\tq3, [sp, #96]", "ldp\tq3, q4, [x29, #96]", "str\tq3, [x7]", "stp\tq3, q4, [sp]", "mov\tv3.16b, v31.16b"],
)
def test_a_spill_is_found(spill):
    (loop,) = loops_in("neon_i8mm", CLEAN.replace("cmp\tx4, x2", spill))
    assert loop.spills == [spill]
