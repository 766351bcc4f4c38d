"""The attention kernels: throughput on a GPU, or what their machine code bounds it to where there is none.

    python -m benchmarks.kernels [--quick] [--json FILE]           # on a GPU
    python -m benchmarks.kernels --static [--times FILE] [--json FILE]    # anywhere; --quick without a GPU

**On a GPU**, for 4 heads of 64 and 128 in bf16 and histories of 1k … 16k tokens (16k in a batch), both biases
on: TFLOP/s of the forward and of the backward pass, the share of what a large matmul reaches in the same run,
and the ratio to `scaled_dot_product_attention` (flash, causal) and to Meta's Triton kernel, if importable, at
the same shape. Counted are visible pairs alone, at 4 · d_head FLOP forward and 10 · d_head backward.

**Static**: compiles for sm_90 and reads the steady loops (`benchmarks.machine_code` states the model of a
multiprocessor): per kernel and kind of tile, instructions of a thread for an element of the tile by unit,
registers, shared memory, blocks at a time, and share = tensor clocks / the busiest unit's clocks. The totals
weight kinds by how often the plan finds them in a history of 4,096 events, each its own row, and loops over
buckets by how often they go round there. `share_forward` and `share_backward` count the tensor clocks that
the kernels spend; `useful_*` count visible pairs at 4 and 10 · d_head only, so that what lies beyond the
diagonal and what the backward pass computes twice is lost. The table kernel's products, which repeat those of
the other, count as time alone.

The history: `--times FILE` reads a file of tab-separated user, item, rating, unix seconds (MovieLens' u.data)
and strings the gaps of its most active users together. The default draws gaps with the statistics of the 50
most active users of CI&T Deskdrop: 60 % lie within a session, log-normal with median 34 s and sigma 2.2, the
others between sessions, log-normal with median 15 h and sigma 1.66.
"""

import argparse
import dataclasses
import json
import pathlib
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels import POSITION_BUCKETS, TIME_BUCKETS, Sight, attention, position_bits

HEADS = 4
LENGTHS = (1024, 2048, 4096, 8192, 16384)
STATIC_LENGTH = 4096
KINDS = ("uniform", "stepped", "mixed")
_H100_FLOP = 4096  # of tensor cores, per multiprocessor and clock


def drawn_times(count: int) -> Tensor:
    """Milliseconds of a bursty history: see above."""
    random = torch.Generator().manual_seed(0)
    normal = torch.randn(count, generator=random, dtype=torch.float64)
    within = torch.rand(count, generator=random) < 0.6
    gaps = torch.where(within, (2.2 * normal).exp() * 34, (1.66 * normal).exp() * 15 * 3600)
    return 1_700_000_000_000 + (gaps * 1000).long().cumsum(0)


def read_times(path: pathlib.Path, count: int) -> Tensor:
    """Milliseconds of a history strung together from those of a file's most active users.

    Raises ValueError where the file has too few events.
    """
    users = defaultdict(list)
    for line in path.read_text().splitlines():
        user, _, _, seconds = line.split("\t")[:4]
        users[user].append(int(seconds) * 1000)
    histories = sorted((torch.tensor(sorted(times)) for times in users.values()), key=len, reverse=True)
    gaps = torch.cat([times.diff() for times in histories])
    if len(gaps) < count:
        raise ValueError(f"{path} has {len(gaps)} gaps between events: a history of {count} takes more")
    return 1_000_000_000_000 + gaps[:count].cumsum(0)


def own_sight(times: Tensor, sequences: int = 1) -> Sight:
    """Sequences of these times, each event a row that sees what is before it."""
    lengths = torch.full((sequences,), len(times), device=times.device)
    prefix = torch.arange(len(times), device=times.device).repeat(sequences)
    return Sight(lengths, times.repeat(sequences), lengths, prefix, times.repeat(sequences))


# Static -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Weights:
    """How often a plan has each kind of tile, and what the loops over buckets in them go round on average."""

    tiles: list[int]
    time_trips: list[float]  # over the edges between a tile's buckets of time
    position_trips: list[float]
    table_trips: tuple[float, float]  # over a mixed tile's buckets of position and of time


def weights(sight: Sight, by_memory: bool, width: int) -> Weights:
    from kernels.triton_attention import blocks_for
    from kernels.triton_backward import BUCKETS
    from kernels.triton_tiles import tiles

    blocks = blocks_for(torch.bfloat16, width, of=9)[by_memory]
    plan = tiles(sight, position_bits(POSITION_BUCKETS), True, blocks.rows, blocks.memory, by_memory)
    packed = plan.entries[:, 1]
    time = ((packed >> 8 & 0xFF) - (packed & 0xFF)).double()
    position = ((packed >> 32) - (packed >> 16 & 0xFFFF)).double()
    counts, times, positions = [], [], []
    for kind in range(len(KINDS)):
        bounds = plan.programs[:, 4 + kind : 6 + kind].tolist()
        of_kind = torch.cat([torch.arange(first, end) for first, end in bounds])
        counts.append(len(of_kind))
        times.append(float(time[of_kind].mean()) if len(of_kind) else 0.0)
        positions.append(float(position[of_kind].mean()) if len(of_kind) else 0.0)
    passes = [float(((x[of_kind] + 1) / BUCKETS.value).ceil().mean()) for x in (position, time)]
    return Weights(counts, times, positions, (passes[0], passes[1]))


def static(times: Tensor) -> dict[str, Any]:
    report: dict[str, Any] = {"target": "sm_90", "events": len(times), "spills": 0}
    for width in (128, 64):
        found = static_shares(own_sight(times), width)
        report["spills"] += found.pop("spills")
        suffix = "" if width == 128 else f"_{width}"
        report |= {f"{name}{suffix}": round(value, 4) for name, value in found.items()}
    return report


def static_shares(sight: Sight, width: int) -> dict[str, float]:
    """Prints the table of one head width and gives its shares and spills."""
    from benchmarks.attention_code import KERNELS, arguments, compiled
    from benchmarks.machine_code import clocks

    by_rows, by_memory = weights(sight, False, width), weights(sight, True, width)
    total = {"forward": 0.0, "backward": 0.0}
    tensor = dict(total)
    spills = 0
    print(f"\nd_head {width}, bias on, bf16, sm_90; instructions of a thread per element")
    heading = ("issue", "alu", "fma", "special", "memory")
    print(
        f"{'kernel':16} {'tile':8} {'tiles':>6} "
        + " ".join(f"{unit:>7}" for unit in heading)
        + "  share  busiest"
    )
    for kernel in KERNELS:
        code = compiled("sm_90", kernel, torch.bfloat16, width)
        spills += code.spills
        constants = arguments("sm_90", kernel, torch.bfloat16, width)
        elements = constants["BLOCK_ROWS"] * constants["BLOCK_MEMORY"]
        seen = by_memory if kernel == "backward_memory" else by_rows
        kinds = [2] if kernel == "backward_tables" else [0, 1, 2]
        loops = code.loops()
        if len(loops) != len(kinds):
            raise ValueError(
                f"{kernel} has {len(loops)} loops with tensor-core instructions, not {len(kinds)}"
            )
        which = kernel.split("_")[0]
        for kind, loop in zip(kinds, loops, strict=True):
            trips = (seen.time_trips[kind], seen.position_trips[kind])
            if kernel == "backward_tables":
                trips = seen.table_trips
            busy = clocks(loop, code.warps, trips[: len(loop.inner)])
            longest = max(busy.values())
            total[which] += seen.tiles[kind] * longest
            if kernel != "backward_tables":
                tensor[which] += seen.tiles[kind] * busy["tensor"]
            lanes = {"issue": 128, "alu": 64, "fma": 128, "special": 16, "memory": 32}
            counts = " ".join(f"{busy[unit] * lanes[unit] / elements:7.1f}" for unit in heading)
            busiest = max(busy, key=lambda unit: busy[unit])
            share = busy["tensor"] / longest
            print(f"{kernel:16} {KINDS[kind]:8} {seen.tiles[kind]:6} {counts}  {share:5.2f}  {busiest}")
        print(
            f"{'':16} {code.registers} registers, {code.spills} spills, {code.shared // 1024} KiB shared, "
            f"{code.warps} warps, {code.blocks} block(s) a multiprocessor"
        )
    pairs = int(sight.row_prefix.sum())
    found = {
        "share_forward": tensor["forward"] / total["forward"],
        "share_backward": tensor["backward"] / total["backward"],
        "useful_forward": 4 * width * pairs / _H100_FLOP / total["forward"],
        "useful_backward": 10 * width * pairs / _H100_FLOP / total["backward"],
    }
    print("  ".join(f"{name} {value:.3f}" for name, value in found.items()))
    return {**found, "spills": spills}


# On a GPU ------------------------------------------------------------------------------------------------


def milliseconds(run: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, warmup=100, rep=300, return_mode="median"))


def matmul_ceiling(size: int = 8192) -> float:
    """TFLOP/s of a large product in bf16."""
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    return 2 * size**3 / milliseconds(lambda: a @ a) / 1e9


def passes(out: Tensor, inputs: list[Tensor]) -> Callable[[], Any]:
    gradient = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, inputs, gradient, retain_graph=True)


def ours(length: int, sequences: int, width: int) -> tuple[float, float]:
    """Milliseconds forward and backward."""
    sight = own_sight(drawn_times(length).cuda(), sequences)
    rows = length * sequences
    tensors = [
        torch.randn(rows, HEADS, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(5)
    ]
    tables = [
        torch.randn(buckets, HEADS, device="cuda", requires_grad=True)
        for buckets in (POSITION_BUCKETS, TIME_BUCKETS)
    ]

    def run() -> Tensor:
        return attention(*tensors, sight, *tables, width**-0.5, implementation="triton")

    return milliseconds(run), milliseconds(passes(run(), tensors + tables))


def flash(length: int, sequences: int, width: int) -> tuple[float, float]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (
        torch.randn(sequences, HEADS, length, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )

    def run() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    return milliseconds(run), milliseconds(passes(run(), [q, k, v]))


def metas(length: int, sequences: int, width: int) -> tuple[float, float] | None:
    """Meta's kernel, without any bias, as it has none; None where it is not installed."""
    try:
        from generative_recommenders.ops.triton.triton_hstu_attention import triton_hstu_mha
    except ImportError:
        return None
    q, k, v = (
        torch.randn(sequences * length, HEADS, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    offsets = torch.arange(0, sequences * length + 1, length, device="cuda")

    def run() -> Tensor:
        return triton_hstu_mha(N=length, alpha=width**-0.5, q=q, k=k, v=v, seq_offsets=offsets)

    return milliseconds(run), milliseconds(passes(run(), [q, k, v]))


def on_gpu(quick: bool) -> dict[str, Any]:
    ceiling = matmul_ceiling()
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "matmul_tflops": round(ceiling, 1)}
    print(f"{report['device']}: a matmul of bf16 reaches {ceiling:.0f} TFLOP/s")
    print("d_head  length   forward: TFLOP/s share  /flash /Meta   backward: TFLOP/s share  /flash /Meta")
    for width in (128, 64):
        for length in (2048, 8192) if quick else LENGTHS:
            sequences = LENGTHS[-1] // length
            pairs = sequences * HEADS * length * (length + 1) / 2
            mine = ours(length, sequences, width)
            others = {"flash": flash(length, sequences, width), "meta": metas(length, sequences, width)}
            line = f"{width:6} {length:7}"
            for at, (name, flop) in enumerate((("forward", 4), ("backward", 10))):
                rate = flop * width * pairs / mine[at] / 1e9
                ratios = {other: t[at] / mine[at] if t else None for other, t in others.items()}
                report[f"{name}_{width}_{length}"] = {
                    "tflops": round(rate, 1),
                    "share": round(rate / ceiling, 3),
                    **{f"to_{other}": ratio and round(ratio, 3) for other, ratio in ratios.items()},
                }
                shown = " ".join("    –" if ratio is None else f"{ratio:5.2f}" for ratio in ratios.values())
                line += f"            {rate:7.1f} {rate / ceiling:5.2f}  {shown}"
            print(line)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="two lengths; without a GPU, --static")
    parser.add_argument("--static", action="store_true", help="read the machine code for sm_90")
    parser.add_argument("--times", type=pathlib.Path, help="a file like MovieLens' u.data to take times from")
    parser.add_argument("--json", type=pathlib.Path, help="also write the last line there")
    options = parser.parse_args()
    if options.static or (options.quick and not torch.cuda.is_available()):
        times = read_times(options.times, STATIC_LENGTH) if options.times else drawn_times(STATIC_LENGTH)
        report = static(times)
    elif torch.cuda.is_available():
        report = on_gpu(options.quick)
    else:
        raise SystemExit("no CUDA device: run with --static")
    line = json.dumps(report)
    if options.json:
        options.json.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
