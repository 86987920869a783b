"""The machine code of the micro-kernels: accumulators are in registers, and each weight and code is loaded once.

An accumulator on the stack gives the right answer at half the speed, so no other test would notice it.
"""

import itertools
import platform
import re
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property

import pytest

from helpers.core import CORE, core_as_shipped, run

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the checks read x86-64 instructions")

# The instruction that multiplies: there is one for each accumulator and group of 4 k.
DOTS = {"avx2": "vpmaddwd", "avx_vnni": "vpdpbusd", "avx512vl_vnni": "vpdpbusd", "avx512_vnni": "vpdpbusd"}

AMX = "amx_int8"  # its accumulators are tile registers: they have their own test

TALL_ROWS = (7, 8)  # only in avx512_vnni's second tile, 8 x 48

VECTOR = re.compile(r"%[xyz]mm\d+")
FRAME_POINTER = "mov    %rsp,%rbp"


@dataclass(frozen=True)
class Line:
    address: int
    text: str

    def jumps_back_to(self) -> int | None:
        jump = re.match(r"j\w+\s+([0-9a-f]+)\b", self.text)
        return int(jump[1], 16) if jump and int(jump[1], 16) <= self.address else None


@dataclass(frozen=True, eq=False)
class Function:
    name: str
    lines: list[Line]

    @cached_property
    def loops(self) -> list[range]:
        """The places of the lines from the target of each backward jump to the jump."""
        addresses = [line.address for line in self.lines]
        starts = [(line.jumps_back_to(), end) for end, line in enumerate(self.lines, 1)]
        return [range(bisect_left(addresses, start), end) for start, end in starts if start is not None]

    def dot_loops(self, dot: str) -> list[list[Line]]:
        """The innermost loops that multiply."""
        dots = [place for place, line in enumerate(self.lines) if re.search(dot, line.text)]
        loops = [loop for loop in self.loops if bisect_left(dots, loop.start) < bisect_left(dots, loop.stop)]
        # The epilogue may be placed behind the function's end and also jump back, over the loops. A range of lines that
        # contains a loop is therefore not an innermost one.
        inner = [a for a in loops if not any(b != a and a.start <= b.start and b.stop <= a.stop for b in loops)]
        return [self.lines[loop.start : loop.stop] for loop in inner]

    def spills(self, body: list[Line]) -> list[str]:
        """The vector loads and stores on the stack, and all other vector stores. A multiply loop has none."""
        frame = any(line.text == FRAME_POINTER for line in self.lines)  # else %rbp is a general register
        stack = re.compile(r"\(%r[sb]p" if frame else r"\(%rsp")
        vector = [line.text for line in body if VECTOR.search(line.text)]
        return [text for text in vector if stack.search(text) or re.search(r"%[xyz]mm\d+.*\)(\{.*)?$", text)]


def functions(disassembly: str) -> list[Function]:
    """Splits the output of objdump -d."""
    found: list[Function] = []
    for text in disassembly.splitlines():
        if header := re.match(r"[0-9a-f]+ <(.*)>:$", text):
            found.append(Function(header[1], []))
        elif found and (line := re.match(r"\s*([0-9a-f]+):\s+(?:\{vex\} )?(\S.*)$", text)):
            found[-1].lines.append(Line(int(line[1], 16), line[2].strip()))
    return found


def count(pattern: str, body: list[Line]) -> int:
    return sum(bool(re.search(pattern, line.text)) for line in body)


def constants(kernel: str) -> dict[str, int]:
    """kMaxRows, kVectors, kSplit, kUnroll and the like, read from the kernel's file or one that it includes."""
    text = (CORE / f"kernel_{kernel}.cpp").read_text()
    text += "".join((CORE / name).read_text() for name in re.findall(r'#include "(\w+\.inc)"', text))
    lines = re.findall(r"^constexpr int ((?:kMaxRows|kOutAhead) = .*);$", text, re.MULTILINE)
    assert len(lines) == 2, f"kernel_{kernel}.cpp defines no kMaxRows or no kOutAhead"
    return {name: int(value) for name, value in re.findall(r"(\w+) = (\d+)", ", ".join(lines))}


def tiles(listing: list[Function], kernel: str) -> dict[tuple[int, int, str], Function]:
    """The instantiations of tile<rows, columns, outputs>."""
    name = re.compile(rf"torchq::{kernel}::tile<(\d+), (\d+), torchq::{kernel}::(\w+.*?) ?>\(")
    return {(int(m[1]), int(m[2]), m[3]): f for f in listing if (m := name.search(f.name))}


@pytest.fixture(scope="module")
def listings() -> dict[str, list[Function]]:
    """The disassembly of every file of the cores as shipped: `kernel_avx2`, and `attention_kernel_avx2`."""
    return {
        o.stem.removeprefix("gemm_"): functions(run(["objdump", "-d", "-C", "--no-show-raw-insn", o]))
        for o in core_as_shipped()
    }


every_kernel = pytest.mark.parametrize("kernel", DOTS)


def test_every_x86_kernel_is_checked():
    sources = {path.stem.removeprefix("kernel_") for path in CORE.glob("kernel_*.cpp")}
    assert {name for name in sources if not name.startswith(("neon", "reference"))} == {*DOTS, AMX}


@every_kernel
def test_every_tile_has_a_multiply_loop(listings, kernel):
    """There is one for every number of rows and columns that the kernel has, so the tests below check all."""
    found = tiles(listings[f"kernel_{kernel}"], kernel)
    shape = constants(kernel)
    columns = {c for _, c, _ in found}
    assert shape["kVectors"] in columns
    tall = set(itertools.product(TALL_ROWS, range(1, 4))) if kernel == "avx512_vnni" else set()
    shapes = set(itertools.product(range(1, shape["kMaxRows"] + 1), columns))
    for outputs in ("FloatOutputs<(torchq::Activation)0>", "AnyOutputs"):
        assert {(r, c) for r, c, o in found if o == outputs} == shapes | tall
    for outputs in {o for _, _, o in found}:
        assert {(r, c) for r, c, o in found if o == outputs} >= {(r, c) for r, c in shapes if c == shape["kVectors"]}
    without = [tile for tile, function in found.items() if not function.dot_loops(DOTS[kernel])]
    assert without == []


@every_kernel
def test_accumulators_stay_in_registers(listings, kernel):
    faults = [
        f"{kernel} tile<{rows}, {columns}, {outputs}>: {text}"
        for (rows, columns, outputs), function in tiles(listings[f"kernel_{kernel}"], kernel).items()
        for body in function.dot_loops(DOTS[kernel])
        for text in function.spills(body)
    ]
    assert not faults, "vectors on the stack inside a multiply loop:\n" + "\n".join(faults)


@every_kernel
def test_one_product_per_accumulator_and_group(listings, kernel):
    """An iteration may process several groups of 4 k, but only whole groups."""
    shape = constants(kernel)
    for (rows, columns, _), function in tiles(listings[f"kernel_{kernel}"], kernel).items():
        if rows == 1 and shape.get("kOneRowSums"):
            continue
        accumulators = rows * columns * shape["kSplit"]
        for body in function.dot_loops(DOTS[kernel]):
            products = count(DOTS[kernel], body)
            assert products % accumulators == 0, f"tile<{rows}, {columns}>: {products} products for {accumulators}"


def test_a_single_row_takes_one_panel_after_the_other(listings):
    """Each panel has a loop with a sum for each of its groups, whose weights are operands, and one for what is left."""
    sums = constants("avx512_vnni")["kOneRowSums"]
    for (rows, columns, _), function in tiles(listings["kernel_avx512_vnni"], "avx512_vnni").items():
        if rows == 1:
            loops = function.dot_loops(DOTS["avx512_vnni"])
            counts = [
                (count(r"vpdpbusd .*\(", loop), count("vpbroadcastd", loop), count("%zmm", loop)) for loop in loops
            ]
            assert sorted(counts) == [(1, 1, 2)] * columns + [(sums, sums, 2 * sums)] * columns


@every_kernel
def test_main_tile_loads_everything_once(listings, kernel):
    """One broadcast per row, one load per vector of weights, and no copies. In avx512_vnni, 6 + 4 feed 24 products.

    A tile that asks for the lines it will write has a loop until then, and one for the rest. An unrolled loop may have
    one copy per group. A copy costs decoding bandwidth, which does not limit these kernels.
    """
    shape = constants(kernel)
    rows, columns = shape["kMaxRows"], shape["kVectors"]
    vectors = columns * shape["kSplit"]
    main = {o: f for (r, c, o), f in tiles(listings[f"kernel_{kernel}"], kernel).items() if (r, c) == (rows, columns)}
    all_loops = [function.dot_loops(DOTS[kernel]) for function in main.values()]
    for loops in all_loops:
        groups = [count(DOTS[kernel], loop) // (rows * vectors) for loop in loops]
        assert sorted(groups) == sorted([*{1, shape["kUnroll"]}, *([1] if shape["kOutAhead"] else [])])
    for loop in itertools.chain(*all_loops):
        each = count(DOTS[kernel], loop) // (rows * vectors)
        broadcasts = count(r"vpbroadcast[dq]\s+.*\(", loop)
        loads = count(r"\(.*\),.*%[xyz]mm", loop) - broadcasts
        copies = count(r"vmov\w+\s+%[xyz]mm\d+,%[xyz]mm\d+$", loop)
        assert (broadcasts, loads) == (rows * each, vectors * each)
        assert copies <= (each if each > 1 else 0)


@pytest.mark.parametrize(("tall", "wide"), [(3, 1), (2, 2), (2, 1), (1, 4), (1, 3), (1, 2), (1, 1)])
def test_tiles_are_loaded_once_a_step(listings, tall, wide):
    """A step of 64 k loads each tile of codes and of weights once, and uses no zmm (xmm may hold pointers)."""
    check_tile_steps(listings[f"kernel_{AMX}"], "tdpbusd", tall, wide)


@pytest.mark.parametrize(("tall", "wide"), [(2, 2), (2, 1), (1, 4), (1, 3), (1, 2), (1, 1)])
def test_tiles_of_attention_are_loaded_once_a_step(listings, tall, wide):
    check_tile_steps(listings["attention_kernel_amx_bf16"], "tdpbf16ps", tall, wide)


def check_tile_steps(listing: list[Function], dot: str, tall: int, wide: int) -> None:
    (function,) = [f for f in listing if f"::multiply<{tall}, {wide}>(" in f.name]
    steps = [loop for loop in function.dot_loops(dot) if not count("tilestored", loop)]  # without the first step
    counts = {(count(dot, loop), count("tileloadd", loop), count("%[yz]mm", loop)) for loop in steps}
    assert counts == {(tall * wide, tall + wide, 0)}


def test_avx2_never_saturates(listings):
    """VPMADDUBSW adds two products in int16: 2 * 255 * 127 > 32767."""
    text = [line.text for function in listings["kernel_avx2"] for line in function.lines]
    assert any("vpmaddwd" in line for line in text)
    assert not any("vpmaddubsw" in line for line in text)


NO_KERNELS = {"feedback": "feedback_by_vectors"}  # files beside the kernels' table, and the namespace of their vectors


def test_no_avx_outside_kernels(listings):
    """Baseline code runs on every x86-64 CPU; only functions in namespaces of vectors may use ymm and zmm."""
    leaks = []
    for stem, listing in listings.items():
        kernel = stem.replace("attention_", "attention::").replace("kernel_", "") if "kernel_" in stem else None
        space = NO_KERNELS.get(stem, kernel)
        for function in listing:
            own = space not in (None, "reference") and f"torchq::{space}::" in function.name
            if not own and count(r"%[yz]mm|^v", function.lines):
                leaks.append(f"{stem}: {function.name}")
    assert leaks == []
    assert any("torchq::reference::run" in function.name for function in listings["kernel_reference"])
    for stem, space in NO_KERNELS.items():
        assert any(f"torchq::{space}::" in function.name for function in listings[stem])


# The kernels of attention: the instruction that multiplies, the vectors in a full tile's row, and its operations.
ATTENTION = {
    "avx512": ("vfmadd", 4, ["Multiply"]),
    "avx512_bf16": ("vfmadd|vdpbf16ps", 4, ["Multiply", "MultiplyHalves"]),
    "amx_bf16": ("vfmadd", 4, ["Multiply"]),  # those of bfloat16 are in tiles
    "avx2": ("vfmadd", 1, ["Multiply"]),
}


@pytest.mark.parametrize("kernel", ATTENTION)
def test_sums_of_attention_stay_in_registers(listings, kernel):
    """Each tile has one loop, which multiplies once for each vector of sums and stores nothing."""
    dot, panels, operations = ATTENTION[kernel]
    vectors = 1 if kernel != "avx2" else 2  # of a panel
    found = {}
    for function in listings[f"attention_kernel_{kernel}"]:
        if tile := re.search(r"::tile<.*::(\w+), (\d+), (\d+)>\(", function.name):
            found[tile[1], int(tile[2]), int(tile[3])] = function
    assert set(found) == set(itertools.product(operations, range(1, 7), range(1, panels + 1)))
    for (operation, rows, columns), function in found.items():
        (loop,) = function.dot_loops(dot)
        assert count(dot, loop) == rows * columns * vectors, (operation, rows, columns)
        assert function.spills(loop) == [], (operation, rows, columns)


CLEAN = """
0000000000000000 <void torchq::avx512_vnni::tile<1, 2, torchq::avx512_vnni::AnyOutputs>(torchq::Block const&)>:
   0:\tpush   %rbp
   1:\tmov    %rsp,%rbp
   4:\tvmovdqa64 %zmm9,0x40(%rsp)
   8:\tvmovdqu64 (%rax),%zmm3
   c:\tvpbroadcastd (%rcx),%zmm2
  10:\tvpdpbusd %zmm3,%zmm2,%zmm0
  14:\t{vex} vpdpbusd 0x40(%rax),%zmm2,%zmm1
  18:\tcmp    %r8,%rdx
  1c:\tjne    8 <void torchq::avx512_vnni::tile<1, 2, torchq::avx512_vnni::AnyOutputs>(torchq::Block const&)+0x8>
  20:\tvmovups %zmm0,(%rdi)
  24:\tret
  28:\tvmovups %zmm1,(%rdi)
  2c:\tjmp    4 <void torchq::avx512_vnni::tile<1, 2, torchq::avx512_vnni::AnyOutputs>(torchq::Block const&)+0x4>
"""


@pytest.mark.parametrize(("file", "expected"), [("code_products", 4), ("attention", 4), ("float_products", 1)])
def test_what_attention_needs_soon_is_asked_for(listings, file, expected):
    """g++ drops calls of a function that only prefetches, in silence. q, k, v and y are four loops."""
    lines = [line for function in listings[f"attention_{file}"] for line in function.lines]
    assert count(r"^prefetch", lines) >= expected


def spills_of(disassembly: str) -> list[str]:
    (function,) = tiles(functions(disassembly), "avx512_vnni").values()
    return [text for body in function.dot_loops("vpdpbusd") for text in function.spills(body)]


def test_the_reader_finds_the_inner_loop():
    """Stores outside the loop are allowed, and so is the epilogue's jump back across the loop."""
    (function,) = tiles(functions(CLEAN), "avx512_vnni").values()
    (body,) = function.dot_loops("vpdpbusd")
    assert [line.address for line in body] == [0x8, 0xC, 0x10, 0x14, 0x18, 0x1C]
    assert count("vpdpbusd", body) == 2
    assert spills_of(CLEAN) == []


@pytest.mark.parametrize(
    "spill",
    [
        "vmovdqa64 %zmm0,0x40(%rsp)",
        "vmovdqa64 0x40(%rsp),%zmm0",
        "vpdpbusd -0x80(%rbp),%zmm2,%zmm1",
        "vmovdqa %ymm0,-0x50(%rbp)",
        "vmovdqu %ymm0,(%rsi,%rdx,4)",
        "vmovdqu32 %zmm0,(%rsi){%k1}",
    ],
)
def test_a_spill_is_found(spill):
    assert spills_of(CLEAN.replace("cmp    %r8,%rdx", spill)) == [spill]


def test_a_frame_pointer_that_is_none_is_no_spill():
    load = "vmovdqu64 (%rbp),%zmm3"
    body = CLEAN.replace("cmp    %r8,%rdx", load)
    assert spills_of(body) == [load]
    assert spills_of(body.replace(FRAME_POINTER, "mov    %rsi,%rbp")) == []
