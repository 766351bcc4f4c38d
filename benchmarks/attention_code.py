"""The attention kernels compiled ahead of time: what a launch would compile, for a GPU that is not there."""

import functools
from typing import Any

import torch
import triton

from benchmarks.machine_code import Code, compile_for
from kernels import POSITION_BUCKETS, triton_backward, triton_forward
from kernels.triton_attention import TIME_ROWS, blocks_for, launch_options

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
GENERATIONS = {"sm_80": 8, "sm_90": 9, "sm_100": 10, "gfx942": 0}
KERNELS = ("forward", "backward_rows", "backward_tables", "backward_memory")


def arguments(target: str, kernel: str, dtype: torch.dtype, width: int, bias: bool = True) -> dict[str, Any]:
    """Types and constants of a kernel's arguments at 4 heads of `width` numbers, rows of ascending prefix."""
    amd = target == "gfx942"
    blocks = blocks_for(dtype, width, GENERATIONS[target])[kernel == "backward_memory"]
    tensors = ("q", "k", "v", "k_self", "v_self", "gradient", "q_gradient", "k_gradient", "v_gradient")
    padded = max(16, triton.next_power_of_2(width))
    return {
        **{name: f"*{_TYPES[dtype]}" for name in (*tensors, "k_self_gradient", "v_self_gradient")},
        **{f"{name}_stride": "i32" for name in ("q", "k", "v", "k_self", "v_self", "table")},
        **{name: "*i64" for name in ("row_prefix", "row_clock", "memory_times", "entries")},
        **{name: "*i32" for name in ("programs", "ranks")},
        **{name: "*fp32" for name in ("out", "sums", "tables", "position_edges")},
        **{"steps": "*i16", "origin": "i32", "octave": "i32", "half_alpha": "fp32"},
        "POSITIONS": POSITION_BUCKETS if bias else 1,
        "TIMES": TIME_ROWS if bias else 1,
        "HEADS": 4,
        "QK": width,
        "V": width,
        "PADDED_QK": padded,
        "PADDED_V": padded,
        "BLOCK_ROWS": blocks.rows,
        "BLOCK_MEMORY": blocks.memory,
        "HAS_POSITION": bias,
        "HAS_TIME": bias,
        "APPROXIMATE": not amd and dtype != torch.float32,
        "PTX": not amd,
        "PRECISION": "tf32x3" if dtype == torch.float32 and not amd else "ieee",
        "WINDOW": triton.next_power_of_2(blocks.rows - 1 + blocks.memory),
        "MIXED_SUMS": kernel == "backward_tables",
    }


@functools.cache
def compiled(target: str, kernel: str, dtype: torch.dtype, width: int, bias: bool = True) -> Code:
    """One of KERNELS with the launch options that are not tuned."""
    function = {
        "forward": triton_forward.forward,
        "backward_rows": triton_backward.backward_rows,
        "backward_tables": triton_backward.backward_rows,
        "backward_memory": triton_backward.backward_memory,
    }[kernel]
    options = launch_options(GENERATIONS[target])
    return compile_for(target, function, arguments(target, kernel, dtype, width, bias), **options)
