"""Compiles a Triton kernel for a GPU that is not there, and says what it would take of one.

    compiled("sm_90", kernel, {"q": "*bf16", …, "BLOCK": 128}, num_warps=4, num_stages=3)

Arguments are types, but for constexprs, which are values. Pointers and integers named `…stride` or `width`
are taken to be divisible by 16, as the launcher finds. Not under TRITON_INTERPRET=1.
"""

import dataclasses
import pathlib
import re
import subprocess
import tempfile
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
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}  # bytes a block
# Of the tensor cores: those of sm_80, which its successors have too, and what each has of its own.
_TENSOR = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|v_mfma)")
_TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclasses.dataclass(frozen=True)
class Compiled:
    registers: int  # a thread, AMD's accumulation registers included
    spills: int  # instructions to and from local memory
    shared: int  # bytes a block
    tensor_instructions: frozenset[str]  # the names found


def compiled(
    target: str, kernel: Any, arguments: dict[str, Any], num_warps: int = 4, num_stages: int = 3
) -> Compiled:
    signature, constants, attributes = {}, {}, {}
    for at, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        signature[name] = "constexpr" if parameter.is_constexpr else arguments[name]
        if parameter.is_constexpr:
            constants[(at,)] = arguments[name]
        elif arguments[name].startswith("*") or name.endswith(("stride", "width")):
            attributes[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    built = triton.compile(source, target=TARGETS[target], options=options)
    if target == "gfx942":
        listing = built.asm["amdgcn"]
        registers, spills = _amd(listing, "vgpr_count"), _amd(listing, "[sv]gpr_spill_count")
    else:
        registers, listing = _disassembled(built.asm["cubin"])
        spills = len(re.findall(r"\b(?:LDL|STL)\b", listing))
    return Compiled(registers, spills, built.metadata.shared, frozenset(_TENSOR.findall(listing)))


def _amd(listing: str, what: str) -> int:
    return sum(int(count) for count in re.findall(rf"\.{what}:\s+(\d+)", listing))


def _disassembled(cubin: bytes) -> tuple[int, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        pathlib.Path(file.name).write_bytes(cubin)
        usage, listing = (
            subprocess.run(
                [_TOOLS / tool, option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    return int(registers[1]), listing
