"""What can be said about the speed of the Arm kernels without Arm hardware. Anyone can repeat the counts.

    python -m benchmarks.arm_analysis            all three parts, as the tables of docs/arm.md
    python -m benchmarks.arm_analysis loops      (a) the instructions of each kernel's multiply loop
    python -m benchmarks.arm_analysis layers     (b) instructions executed per multiply-add, whole layers
    python -m benchmarks.arm_analysis mca        (c) llvm-mca on tile variants

(a) needs g++-aarch64-linux-gnu, (b) also qemu-user and gcc, (c) an llvm-mca of LLVM 16 or later, say llvm-22 (apt-get).
None of the three measures time. Instruction counts show what the compiler made of the source. llvm-mca's models differ
by a factor of 2 between LLVM versions, so they can only compare variants with each other.
"""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "csrc" / "gemm"
BUILD = ROOT / "build" / "arm" / "analysis"
CXX = "aarch64-linux-gnu-g++"

# For each kernel, the instructions that multiply, and how many multiply-adds each one does.
PRODUCTS = {"neon": {"smull": 8, "sadalp": 0}, "neon_dotprod": {"sdot": 16}, "neon_i8mm": {"usmmla": 32}}
LAYERS = [(16, 768, 768), (64, 768, 768), (128, 3072, 768), (128, 768, 3072), (16, 4096, 4096), (1, 768, 768)]


def run(command: Sequence[str | Path], text: str | None = None) -> str:
    """Runs a command with `text` as its input; returns stdout and stderr."""
    done = subprocess.run(
        [str(word) for word in command], input=text, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\nexited with {done.returncode}:\n{done.stdout}")
    return done.stdout


def shipped_flags() -> list[str]:
    """Reads CXX_FLAGS from setup.py, the flags of the shipped build."""
    flags: list[str] = []
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "CXX_FLAGS":
            flags += ast.literal_eval(node.value)
    return flags


def compile_core() -> dict[str, Path]:
    """Cross-compiles the core as shipped; returns its object files by name."""
    BUILD.mkdir(parents=True, exist_ok=True)
    objects = {source.stem: BUILD / f"{source.stem}.o" for source in sorted(CORE.glob("*.cpp"))}
    newest = max(path.stat().st_mtime for path in [*CORE.iterdir(), ROOT / "setup.py"])
    for name, out in objects.items():
        if not out.exists() or out.stat().st_mtime < newest:
            run([CXX, *shipped_flags(), "-c", CORE / f"{name}.cpp", "-o", out])
    return objects


# ---- (a) The multiply loops -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loop:
    """A multiply loop: the instructions from the target of a backward branch to the branch, with no other branch."""

    kernel: str
    rows: int
    columns: int
    code: tuple[str, ...]

    @property
    def products(self) -> int:
        """How many instructions multiply and accumulate."""
        return sum(line.split()[0] in PRODUCTS[self.kernel] for line in self.code)

    @property
    def macs(self) -> int:
        """Multiply-adds of one iteration."""
        return sum(PRODUCTS[self.kernel].get(line.split()[0], 0) for line in self.code)

    @property
    def share(self) -> float:
        """The share of the instructions that multiply."""
        return self.products / len(self.code)

    @property
    def loaded_bytes(self) -> int:
        """Bytes loaded into vector registers in one iteration."""
        return sum(_loaded(line) for line in self.code)

    @property
    def spills(self) -> list[str]:
        """How many vector loads from the stack, vector stores and vector copies there are. There should be none."""
        return [line for line in self.code if _is_spill(line)]


def _loaded(line: str) -> int:
    sizes = {"q": 16, "d": 8, "s": 4}
    if match := re.match(r"(ldp|ldr|ldur)\s+([qds])\d+", line):
        return sizes[match[2]] * (2 if match[1] == "ldp" else 1)
    return 4 if line.startswith("ld1r") else 0


def _is_spill(line: str) -> bool:
    stack = re.match(r"ld\w*\s+[qds{].*\[(sp|x29)", line)
    store = re.match(r"st\w*\s+[qdsv{]", line) and not re.match(r"st\w*\s+sp", line)
    return bool(stack or store or re.match(r"mov\s+v\d+\.16b, v\d+\.16b", line))


def functions(disassembly: str) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """Splits the output of objdump -d into names and (address, instruction)."""
    for part in re.split(r"\n(?=[0-9a-f]+ <)", disassembly):
        if header := re.match(r"[0-9a-f]+ <(.*)>:\n", part):
            lines = re.findall(r"^\s*([0-9a-f]+):\t(.*)$", part, re.MULTILINE)
            yield header[1], [(int(address, 16), text.split("//")[0].strip()) for address, text in lines]


def tight_loops(lines: list[tuple[int, str]]) -> Iterator[tuple[str, ...]]:
    """Yields the loops of one basic block: a backward branch over code without branches."""
    branch = re.compile(r"(b|bl|br|blr|ret|cbn?z|tbn?z)\b")
    for end, text in lines:
        target = re.search(r"\b([0-9a-f]+) <", text) if branch.match(text) else None
        if target and int(target[1], 16) <= end:
            body = [t for address, t in lines if int(target[1], 16) <= address <= end]
            if not any(branch.match(t) for t in body[:-1]):
                yield tuple(body)


def loops_in(kernel: str, disassembly: str) -> list[Loop]:
    """The multiply loops of every tile<rows, columns, outputs>, the longest of each tile first."""
    multiply_loops = []
    for name, lines in functions(disassembly):
        if match := re.search(rf"torchq::{kernel}::tile<(\d+), (\d+), torchq::{kernel}::\w+.*?>\(", name):
            loops = [Loop(kernel, int(match[1]), int(match[2]), body) for body in tight_loops(lines)]
            multiply_loops += sorted((loop for loop in loops if loop.products), key=lambda loop: -loop.macs)
    return multiply_loops


def all_loops(objects: dict[str, Path]) -> dict[str, list[Loop]]:
    """The multiply loops of every Arm kernel in these object files."""
    dump = ["aarch64-linux-gnu-objdump", "-d", "-C", "--no-show-raw-insn"]
    return {kernel: loops_in(kernel, run([*dump, objects[f"kernel_{kernel}"]])) for kernel in PRODUCTS}


def main_loop(loops: list[Loop], rows: int) -> Loop:
    """The loop that does the work of tiles with this many rows."""
    return next(loop for loop in loops if loop.rows == rows)


def print_loops() -> None:
    """Prints table (a)."""
    print(f"\n{run([CXX, '--version']).splitlines()[0]}, {' '.join(shipped_flags())}\n")
    print("| kernel | rows | instructions | that multiply | share | multiply-adds | per loaded byte | spills |")
    print("|---|---|---|---|---|---|---|---|")
    for kernel, loops in all_loops(compile_core()).items():
        for rows in (6, 5, 4, 3, 2, 1):
            loop = main_loop(loops, rows)
            print(
                f"| `{kernel}` | {rows} | {len(loop.code)} | {loop.products} | {loop.share:.1%} | {loop.macs} "
                f"| {loop.macs / loop.loaded_bytes:.2f} | {len(loop.spills)} |"
            )


# ---- (b) Whole layers -----------------------------------------------------------------------------------------------


def layer_program(objects: dict[str, Path]) -> tuple[Path, Path]:
    """Builds arm_layer.cpp with these object files of the core, and the plugin that counts."""
    BUILD.mkdir(parents=True, exist_ok=True)
    program, plugin = BUILD / "arm_layer", BUILD / "libcount.so"
    sources = ROOT / "benchmarks" / "arm_layer.cpp", ROOT / "benchmarks" / "arm_count.c"
    run([CXX, *shipped_flags(), "-static", sources[0], *objects.values(), "-o", program])
    run(["gcc", "-O2", "-shared", "-fPIC", sources[1], "-o", plugin])
    return program, plugin


def instructions_per_mac(kernel: str, layer: tuple[int, int, int], built: tuple[Path, Path]) -> float:
    """Counts three runs of a layer and one run. The difference is exactly two runs, without start-up."""
    program, plugin = built
    counts = []
    for times in ("1", "3"):
        command = ["qemu-aarch64", "-plugin", plugin, "-cpu", "max", program, kernel, *map(str, layer), times]
        counts.append(int(run(command).split()[-1]))
    m, n, k = layer
    return (counts[1] - counts[0]) / 2 / (m * n * k)


def tile_rows(m: int, together: int, tile: int = 6) -> list[int]:
    """The number of rows of each tile that m rows are divided into: as RowTiles in gemm.cpp."""
    units, tiles = -(-m // together), -(-m // tile)
    starts = [(units // tiles * t + min(t, units % tiles)) * together for t in range(tiles + 1)]
    return [min(end, m) - start for start, end in pairwise(starts)]


def expected_per_mac(loops: list[Loop], m: int) -> float:
    """The instructions per multiply-add of a layer that consisted only of its multiply loops."""
    tiles = tile_rows(m, 2 if loops[0].kernel == "neon_i8mm" else 1)
    total = 0.0
    for rows in tiles:
        loop = main_loop(loops, rows)
        executed = rows + rows % 2 if loop.kernel == "neon_i8mm" else rows
        total += len(loop.code) / loop.macs * executed
    return total / m


def print_layers() -> None:
    """Prints table (b)."""
    objects = compile_core()
    loops, built = all_loops(objects), layer_program(objects)
    print(f"\n{run(['qemu-aarch64', '--version']).splitlines()[0]}, -cpu max; float32 in and out, dynamic, bias\n")
    print("| M x N x K | " + " | ".join(f"`{kernel}` | over its loops" for kernel in PRODUCTS) + " |")
    print("|---" * (1 + 2 * len(PRODUCTS)) + "|")
    for layer in LAYERS:
        cells = []
        for kernel in PRODUCTS:
            counted, expected = instructions_per_mac(kernel, layer, built), expected_per_mac(loops[kernel], layer[0])
            cells += [f"{counted:.4f}", f"{counted / expected - 1:+.1%}"]
        print(f"| {'x'.join(map(str, layer))} | " + " | ".join(cells) + " |")


# ---- (c) llvm-mca ---------------------------------------------------------------------------------------------------

MODELS = ["neoverse-v2", "neoverse-n2", "neoverse-n1"]
VARIANTS = {"sdot": [(4, 16), (6, 16), (8, 8)], "usmmla": [(4, 16), (6, 16), (8, 8), (12, 8)]}


def variant(product: str, rows: int, columns: int) -> tuple[str, int]:
    """Writes the loop of a tile over 16 k, as in the kernels; returns it and its number of multiply-adds.

    It loads weights in pairs just before their products: codes, accumulators and two weights fill the registers.
    """
    across = columns // (4 if product == "sdot" else 2)  # accumulator registers across the tile
    down = rows if product == "sdot" else rows // 2
    first = min(24, 30 - down)  # the first register that holds codes
    codes = [f"v{first + i}" for i in range(down)]
    load = [f" ldr q{first + i}, [x{4 + i}], #16" for i in range(down)]
    code = list(load)
    groups = 4 if product == "sdot" else 2
    for group in range(groups):
        if product == "usmmla" and group:
            code += load
        for c in range(0, across, 2):
            code.append(f" ldp q30, q31, [x2, #{(group * across + c) * 16}]")
            for r, a in enumerate(codes):
                for w in (0, 1):
                    by = f"{a}.16b, v{30 + w}.16b" if product == "usmmla" else f"v{30 + w}.16b, {a}.4b[{group}]"
                    code.append(f" {product} v{r * across + c + w}.4s, {by}")
    code += [f" add x2, x2, #{groups * across * 16}", " cmp x2, x3", " b.ne .Lloop"]
    return "\n".join([".Lloop:", *code, ""]), rows * columns * 16


def newest_mca() -> str | None:
    """The llvm-mca of the highest version on the PATH."""
    found = [f"llvm-mca-{version}" for version in range(30, 15, -1) if shutil.which(f"llvm-mca-{version}")]
    return found[0] if found else None


def cycles(mca: str, model: str, code: str) -> float:
    """Predicted cycles of one iteration."""
    flags = ["-mtriple=aarch64", f"-mcpu={model}", "-mattr=+dotprod,+i8mm", "-iterations=200"]
    total = re.search(r"Total Cycles:\s+(\d+)", run([mca, *flags], code))
    if not total:
        raise RuntimeError(f"{mca} printed no Total Cycles")
    return int(total[1]) / 200


def print_mca() -> None:
    """Prints table (c): multiply-adds per predicted cycle."""
    mca = newest_mca()
    if mca is None:
        print("\nno llvm-mca of LLVM 16 or later: apt-get install llvm-22")
        return
    version = re.search(r"LLVM version (\S+)", run([mca, "--version"]))
    print(f"\nllvm-mca of LLVM {version[1] if version else '?'}: multiply-adds per predicted cycle\n")
    print("| loop | " + " | ".join(MODELS) + " |\n|---" + "|---" * len(MODELS) + "|")
    for product, shapes in VARIANTS.items():
        for rows, columns in shapes:
            print(f"| {product} {rows} x {columns} | {_rates(mca, *variant(product, rows, columns))} |")
    for kernel, loops in all_loops(compile_core()).items():
        loop = main_loop(loops, 6)
        code = ".Lloop:\n" + "\n".join(_plain(line) for line in loop.code) + "\n"
        print(f"| `{kernel}` as compiled, 6 rows | {_rates(mca, code, loop.macs)} |")


def _rates(mca: str, code: str, macs: int) -> str:
    absent = {"neoverse-n1"} if "usmmla" in code else set()  # it has no USMMLA, although LLVM's model accepts it
    return " | ".join("-" if model in absent else f"{macs / cycles(mca, model, code):.1f}" for model in MODELS)


def _plain(line: str) -> str:
    """Turns an instruction from objdump into assembler input: the branch goes to the loop's label."""
    return " " + re.sub(r"^(b\.\w+)\s.*", r"\1 .Lloop", line)


PARTS = {"loops": print_loops, "layers": print_layers, "mca": print_mca}


def main() -> None:
    """Runs the parts named on the command line, or all."""
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()


if __name__ == "__main__":
    main()
