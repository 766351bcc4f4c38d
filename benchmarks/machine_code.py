"""Compiles Triton kernels for GPUs that are not there, and reads what the compiler made of them.

    code = compile_for("sm_90", kernel, {"q": "*bf16", "q_stride": "i32", …, "BLOCK": 128}, num_warps=8)
    code.registers, code.spills, code.shared, code.tensor_instructions
    code.loops()  # those with tensor-core instructions, as counts of instructions by unit

Arguments in capitals are constants, the others name their types. Pointers, and integers called `…stride`, are
taken to be divisible by 16, as the launcher finds them to be. Not under TRITON_INTERPRET=1.

**The model of an H100's multiprocessor** behind `clocks`, operations of single threads a clock: 4 schedulers
issue 128; 128 FMA lanes (FFMA, FMUL, FADD; IMAD at half rate); 64 ALU lanes (integers, comparisons,
selections, minima, packing to 16 bits); 16 special-function lanes (MUFU, and conversions from and to 64
bits); 32 lanes of load, store and shuffle; tensor cores do 4,096 FLOP of bf16 with fp32 sums. What runs on
the uniform datapath takes an issue slot. Nothing ever waits: latencies, cache misses and bank conflicts are
not in the model, so a share of it is a bound, not a forecast.
"""

import dataclasses
import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Instructions of the tensor cores, and shared memory that one block may have, in bytes.
TENSOR = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_LANES = {"issue": 128, "fma": 128, "alu": 64, "special": 16, "memory": 32}  # of an H100's multiprocessor
_TENSOR_FLOP = 4096
_FMA = {"FFMA", "FMUL", "FADD"}
_INTEGER_MULTIPLY = {"IMAD"}
_SPECIAL = {"MUFU", "F2I", "I2F", "F2F", "POPC", "FLO"}
_MEMORY = {"LDG", "STG", "LDS", "STS", "LDL", "STL", "LDGSTS", "LDSM", "STSM", "ATOM", "ATOMG", "RED", "SHFL"}
_NO_UNIT = {
    "HGMMA",
    "HMMA",
    "BRA",
    "BAR",
    "BSYNC",
    "BSSY",
    "NOP",
    "WARPGROUP",
    "DEPBAR",
    "LDGDEPBAR",
    "SYNCS",
}
# `        /*0a10*/              @!P0 IMAD.WIDE R2, R2, 0x4, R4 ;`
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_BRANCH = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")
_HGMMA = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)")


@dataclasses.dataclass(frozen=True)
class Loop:
    """The instructions of a loop, without those of loops within, which follow."""

    instructions: Counter[str]  # by full name
    inner: tuple["Loop", ...]

    def units(self) -> dict[str, float]:
        """Instructions of a warp by unit: fma, alu, special, memory, and all that are issued."""
        units = dict.fromkeys(_LANES, 0.0)
        for name, count in self.instructions.items():
            opcode = name.split(".")[0]
            units["issue"] += count
            if opcode in _FMA:
                units["fma"] += count
            elif opcode in _INTEGER_MULTIPLY:
                units["fma"] += 2 * count
            elif opcode in _SPECIAL:
                units["special"] += count
            elif opcode in _MEMORY:
                units["memory"] += count
            elif opcode not in _NO_UNIT and not opcode.startswith("U"):
                units["alu"] += count
        return units

    def tensor_flop(self) -> int:
        """Of a warp group: what its four warps' HGMMA do together."""
        flop = 0
        for name, count in self.instructions.items():
            if shape := _HGMMA.match(name):
                rows, columns, depth = (int(size) for size in shape.groups())
                flop += 2 * rows * columns * depth * count
        return flop


@dataclasses.dataclass(frozen=True)
class Code:
    """A kernel compiled for one target."""

    target: str
    warps: int
    shared: int  # bytes a block
    registers: int  # a thread
    stack: int  # bytes a thread
    spills: int  # instructions that store to or load from local memory; of AMD, registers spilled
    listing: str  # SASS, or AMD assembly

    @property
    def tensor_instructions(self) -> int:
        return len(re.findall(rf"\b{TENSOR[self.target]}", self.listing))

    @property
    def blocks(self) -> int:
        """Blocks that an H100's multiprocessor holds at a time: 65,536 registers, 227 KiB, 64 warps."""
        of_registers = 65536 // (-(-self.registers // 8) * 8 * 32 * self.warps)
        return min(of_registers, SHARED["sm_90"] // (self.shared + 1024), 64 // self.warps)

    def loops(self) -> list[Loop]:
        """The outermost loops with tensor-core instructions, in the order of the listing."""
        return [loop for loop in _loops(self.listing.split("\n")) if _multiplies(loop, TENSOR[self.target])]


def compile_for(
    target: str, kernel: Any, arguments: Mapping[str, Any], num_warps: int = 4, num_stages: int = 2
) -> Code:
    """Compiles `kernel` with what of `arguments` it takes. Raises what Triton raises where it cannot."""
    names = kernel.arg_names
    constants = {(at,): arguments[name] for at, name in enumerate(names) if name.isupper()}
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name.isupper() else arguments[name] for name in names},
        constexprs=constants,
        attrs={
            (at,): [["tt.divisibility", 16]]
            for at, name in enumerate(names)
            if not name.isupper() and (arguments[name][0] == "*" or name.endswith("stride"))
        },
    )
    # Fusing a product and a sum is what a launch does, too, unless its environment forbids it.
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    read = _read_amd if target == "gfx942" else _read_nvidia
    return Code(target, num_warps, compiled.metadata.shared, **read(compiled.asm))


def clocks(loop: Loop, warps: int, trips: tuple[float, ...] = ()) -> dict[str, float]:
    """Clocks that one round of a block's loop keeps each unit of an H100's multiprocessor busy.

    `trips` says how often the loops within go round. Raises ValueError where it does not fit them.
    """
    if len(trips) != len(loop.inner):
        raise ValueError(f"{len(loop.inner)} loops within, but {len(trips)} trip counts")
    units = loop.units()
    for inner, count in zip(loop.inner, trips, strict=True):
        for unit, extra in inner.units().items():
            units[unit] += count * extra
    busy = {unit: count * 32 * warps / _LANES[unit] for unit, count in units.items()}
    return {"tensor": loop.tensor_flop() * (warps // 4) / _TENSOR_FLOP, **busy}


def _read_nvidia(asm: Mapping[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", str(cubin))
        listing = _tool("nvdisasm", "-c", str(cubin))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise ValueError(f"no register count in what cuobjdump says: {usage!r}")
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", listing)),
        "listing": listing,
    }


def _read_amd(asm: Mapping[str, Any]) -> dict[str, Any]:
    listing = asm["amdgcn"]

    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", listing)[1])  # type: ignore[index]

    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "listing": listing,
    }


@functools.cache
def _path(tool: str) -> str:
    path = _TOOLS / tool
    if not path.exists():
        raise FileNotFoundError(f"{path} came with the Triton wheels this was written for: it is not there")
    return str(path)


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([_path(name), *arguments], capture_output=True, text=True, check=True).stdout


def _multiplies(loop: Loop, opcode: str) -> bool:
    return any(name.startswith(opcode) for name in loop.instructions)


def _loops(lines: list[str]) -> list[Loop]:
    """The outermost loops of a listing: what lies between a label and the last branch back to it."""
    labels = {found[1]: at for at, line in enumerate(lines) if (found := _LABEL.match(line))}
    ends: dict[int, int] = {}
    for at, line in enumerate(lines):
        found = _BRANCH.search(line)
        if found and labels.get(found[1], at) < at:
            ends[labels[found[1]]] = at
    loops, after = [], 0
    for begin, end in sorted(ends.items()):
        if begin >= after:
            body = lines[begin + 1 : end]
            inner = _loops(body)
            everything = Counter(m[1] for line in lines[begin : end + 1] if (m := _INSTRUCTION.search(line)))
            for within in inner:
                everything -= _all(within)
            loops.append(Loop(everything, tuple(inner)))
            after = end
    return loops


def _all(loop: Loop) -> Counter[str]:
    return sum((_all(inner) for inner in loop.inner), Counter(loop.instructions))
