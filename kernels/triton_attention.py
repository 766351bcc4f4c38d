"""`kernels.attention` in Triton: jagged, both biases fused, no pair of tokens in memory. SiLU alone.

The plan (`triton_tiles`) says which tiles of pairs there are and how much bias arithmetic each takes; the
kernels (`triton_forward`, `triton_backward`) go through them. Runs on CUDA and HIP devices, and on any under
TRITON_INTERPRET=1. Inputs of 16 bits take the tensor cores as they are and SiLU by the hardware's tanh;
those of fp32 have fp32 products (`tf32x3` on NVIDIA) and the exact SiLU.

Every sum has one order, so results never differ from run to run on the same launch options. Those are tuned
on first use for each octave of the longest history; with `deterministic` they are fixed, so that two
processes agree too.
"""

import dataclasses
import functools
from typing import Any

import torch
import triton
from torch import Tensor

from kernels import triton_backward, triton_forward
from kernels.buckets import TIME_BUCKETS, position_bits, position_bucket
from kernels.sight import Sight
from kernels.triton_bias import UNSEEN
from kernels.triton_tiles import Tiles, edges, tiles

# Past the last bucket the table goes on with its value, up to the largest difference of two times, 2^62, and
# further to a power of 2.
TIME_ROWS = 128
_LARGEST_BLOCK = 128


_TUNED = [(4, 2), (8, 2), (8, 3)]  # and those tried


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tokens of a tile, for the kernels whose programs are blocks of rows, or blocks of memory."""

    rows: int
    memory: int
    by_memory: bool = False


@dataclasses.dataclass(frozen=True)
class _Call:
    """What of a call is not a tensor."""

    sight: Sight
    alpha: float
    deterministic: bool
    learns_tables: bool


def attention(
    q: Tensor,  # (R, H, d_qk)
    k: Tensor,  # (M, H, d_qk)
    v: Tensor,  # (M, H, d_v)
    k_self: Tensor,  # (R, H, d_qk)
    v_self: Tensor,  # (R, H, d_v)
    sight: Sight,
    position_bias: Tensor | None,  # (position_rows(bits), H)
    time_bias: Tensor | None,  # (TIME_BUCKETS, H)
    alpha: float,
    softmax: bool = False,
    deterministic: bool = False,
) -> Tensor:  # (R, H, d_v) in fp32
    """See `kernels.attention`. Raises ValueError for softmax and unfit dtypes."""
    if softmax:
        raise ValueError("the triton implementation of attention has no softmax: use the reference")
    dtypes = {x.dtype for x in (q, k, v, k_self, v_self)}
    if len(dtypes) > 1 or not dtypes <= {torch.bfloat16, torch.float16, torch.float32}:
        raise ValueError(f"q, k, v, k_self, v_self must all be bf16, all fp16 or all fp32, not {dtypes}")
    tables = [x for x in (position_bias, time_bias) if x is not None]
    learns_tables = torch.is_grad_enabled() and any(x.requires_grad for x in tables)
    out: Tensor = _Attention.apply(
        *(_rows_apart(x) for x in (q, k, v, k_self, v_self)),
        position_bias,
        time_bias,
        _Call(sight, alpha, deterministic, learns_tables),
    )
    return out


def generation(device: torch.device) -> int:
    """The major compute capability of an NVIDIA device, 0 for AMD's; Hopper's for what is interpreted."""
    if device.type != "cuda":
        return 9
    return 0 if torch.version.hip else torch.cuda.get_device_capability(device)[0]


def launch_options(of: int) -> dict[str, int]:
    """Those that are not tuned, for a generation: with them no kernel spills a register at heads of 128."""
    if of == 0:
        return {"num_warps": 4, "num_stages": 1}
    return {"num_warps": 8, "num_stages": 3 if of == 9 else 2}


def blocks_for(dtype: torch.dtype, widest: int, of: int) -> tuple[Blocks, Blocks]:
    """The tiles of the kernels by rows and of the one by memory, for heads of up to `widest` numbers."""
    if of < 9 or dtype == torch.float32 or widest > 128:
        return Blocks(64, 32), Blocks(32, 64, by_memory=True)
    return Blocks(128, 64), Blocks(32 if of == 9 else 64, 128, by_memory=True)


def _rows_apart(x: Tensor) -> Tensor:
    """`x` where a row's heads lie one after another, as in a slice of a projection, else such a copy."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, position_bias, time_bias, call = arguments
        ctx.save_for_backward(*tensors, position_bias, time_bias)
        ctx.call = call
        q, _, v, _, _ = tensors
        out = q.new_empty(len(q), q.shape[1], v.shape[2], dtype=torch.float32)
        launch = _Launch(tensors, position_bias, time_bias, call)
        launch.run(triton_forward.forward, out=out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, position_bias, time_bias = ctx.saved_tensors
        launch = _Launch(tensors, position_bias, time_bias, ctx.call)
        q, k, v, k_self, v_self = (
            torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors
        )
        gradient = gradient.to(q.dtype).contiguous()
        sums = launch.sums()
        by_rows = {
            "gradient": gradient,
            "q_gradient": q,
            "k_self_gradient": k_self,
            "v_self_gradient": v_self,
            "sums": sums,
        }
        launch.run(triton_backward.backward_rows, **by_rows, MIXED_SUMS=False)
        if any(ctx.needs_input_grad[5:7]):
            launch.run(triton_backward.backward_rows, **by_rows, MIXED_SUMS=True)
        launch.run(triton_backward.backward_memory, gradient=gradient, k_gradient=k, v_gradient=v)
        tables = sums.sum(0).t() / 2  # (positions + times, H); the kernels leave SiLU's half out
        of_position, of_time = tables.split(launch.table_rows)
        return (
            *(q, k, v, k_self, v_self),
            None if position_bias is None else of_position.to(position_bias.dtype),
            None if time_bias is None else of_time[: len(time_bias)].to(time_bias.dtype),
            None,
        )


class _Launch:
    """The arguments of the kernels for one call."""

    def __init__(
        self, tensors: list[Tensor], position_bias: Tensor | None, time_bias: Tensor | None, call: _Call
    ) -> None:
        q, _, v, _, _ = tensors
        heads = q.shape[1]
        bits = None if position_bias is None else position_bits(len(position_bias))
        self.call = call
        self.tensors = dict(zip(("q", "k", "v", "k_self", "v_self"), tensors, strict=True))
        self.generation = generation(q.device)
        self.blocks = blocks_for(q.dtype, max(q.shape[2], v.shape[2]), self.generation)
        timed = time_bias is not None
        by_rows, by_memory = self.blocks
        self.by_rows = call.sight.planned(_tiles, bits, timed, by_rows, call.learns_tables)
        self.by_memory = functools.partial(call.sight.planned, _tiles, bits, timed, by_memory, False)
        differences = call.sight.planned(_differences, bits)
        none = q.new_zeros(heads, 1, dtype=torch.float32)
        position = none if position_bias is None else position_bias.t().to(torch.float32) / 2
        time = none if time_bias is None else time_bias.t().to(torch.float32) / 2
        if time_bias is not None:
            time = torch.cat((time, time[:, -1:].expand(-1, TIME_ROWS - TIME_BUCKETS)), 1)
        by_difference = position.index_select(1, differences.bucket).masked_fill_(differences.unseen, UNSEEN)
        self.table_rows = [position.shape[1], time.shape[1]]
        nvidia = q.is_cuda and self.generation > 0
        narrow = q.dtype != torch.float32
        self.shared = {
            "row_prefix": call.sight.row_prefix,
            "row_clock": call.sight.row_clock,
            "memory_times": call.sight.memory_times,
            "tables": torch.cat((position, time, by_difference), 1),
            "position_edges": differences.edges,
            "table_stride": sum(self.table_rows) + len(differences.bucket),
            "origin": differences.longest,
            "half_alpha": call.alpha / 2,
            "octave": differences.longest.bit_length(),
            "POSITIONS": position.shape[1],
            "TIMES": time.shape[1],
            "HEADS": heads,
            "QK": q.shape[2],
            "V": v.shape[2],
            "PADDED_QK": max(16, triton.next_power_of_2(q.shape[2])),
            "PADDED_V": max(16, triton.next_power_of_2(v.shape[2])),
            "HAS_POSITION": position_bias is not None,
            "HAS_TIME": time_bias is not None,
            "APPROXIMATE": nvidia and narrow,
            "PTX": nvidia,
            "PRECISION": "widened" if not q.is_cuda else "tf32x3" if nvidia and not narrow else "ieee",
        }

    def sums(self) -> Tensor:
        """Where the programs of rows add up the tables' gradients: (programs, H, positions + times)."""
        programs = len(self.by_rows.programs)
        return self.shared["tables"].new_zeros(programs, self.shared["HEADS"], sum(self.table_rows))

    def run(self, kernel: Any, **own: Any) -> None:
        """Launches a kernel with the arguments it names."""
        at_memory = "k_gradient" in own
        blocks = self.blocks[at_memory]
        plan = self.by_memory() if at_memory else self.by_rows
        if not len(plan.programs):
            return
        strides = {f"{name}_stride": x.stride(0) for name, x in self.tensors.items()}
        given = {
            **(self.tensors | strides | self.shared | own),
            "programs": plan.programs,
            "entries": plan.entries,
            "ranks": plan.ranks,
            "steps": plan.steps,
            "BLOCK_ROWS": blocks.rows,
            "BLOCK_MEMORY": blocks.memory,
            "WINDOW": triton.next_power_of_2(plan.window),
        }
        arguments = {name: given[name] for name in kernel.arg_names}
        grid = (len(plan.programs), self.shared["HEADS"])
        if self.tensors["q"].is_cuda and not self.call.deterministic:
            _tuned(kernel)[grid](**arguments)
        else:
            kernel[grid](**arguments, **launch_options(self.generation))


@functools.cache
def _tuned(kernel: Any) -> Any:
    """The kernel with launch options tried out for each octave of lengths and each shape of heads."""
    configs = [triton.Config({}, num_warps=warps, num_stages=stages) for warps, stages in _TUNED]
    keys = ("octave", "HEADS", "QK", "V", "HAS_POSITION", "HAS_TIME", "BLOCK_ROWS", "WINDOW", "MIXED_SUMS")
    added_to = [name for name in ("sums",) if name in kernel.arg_names]
    return triton.autotune(configs, [key for key in keys if key in kernel.arg_names], restore_value=added_to)(
        kernel
    )


@dataclasses.dataclass(frozen=True)
class _Differences:
    """What the position table by difference is made of, and the buckets' edges."""

    longest: int  # the most memory tokens of a sequence
    bucket: Tensor  # (span,) of the difference longest - x at each x
    unseen: Tensor  # (span,) whether that is not above 0
    edges: Tensor  # (positions,) float32


def _differences(sight: Sight, bits: int | None) -> _Differences:
    device = sight.row_prefix.device
    longest = int(sight.memory_lengths.max()) if len(sight.memory_lengths) else 0
    span = longest + triton.next_power_of_2(longest + _LARGEST_BLOCK)  # whatever the window, it ends before
    difference = longest - torch.arange(span, device=device)
    bucket = torch.zeros_like(difference) if bits is None else position_bucket(difference, bits)
    return _Differences(
        longest,
        bucket,
        difference <= 0,
        (edges(bits) if bits is not None else torch.zeros(1)).to(device, torch.float32),
    )


def _tiles(sight: Sight, bits: int | None, timed: bool, blocks: Blocks, sums: bool) -> Tiles:
    return tiles(sight, bits, timed, blocks.rows, blocks.memory, blocks.by_memory, sums)
