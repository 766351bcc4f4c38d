"""Random attention problems, and as hypothesis draws them: what every implementation is tested on."""

import dataclasses

import torch
from hypothesis import strategies as st
from torch import Tensor

from kernels import TIME_BUCKETS, UNKNOWN_TIME, Sight, attention, position_rows

TABLES = ("position_bias", "time_bias")


@dataclasses.dataclass
class Case:
    sight: Sight
    arrays: dict[str, Tensor]  # the differentiable arguments of attention, by name; a table may lack
    softmax: bool = False

    def run(self, implementation: str = "reference") -> Tensor:
        tables = {name: self.arrays.get(name) for name in TABLES}
        return attention(
            **{**self.arrays, **tables},
            sight=self.sight,
            alpha=self.alpha,
            softmax=self.softmax,
            implementation=implementation,
        )

    @property
    def alpha(self) -> float:
        return self.arrays["q"].shape[-1] ** -0.5


def case(
    lengths: list[int],
    prefixes: list[list[int]],
    *,
    heads: int = 2,
    qk: int = 3,
    v: int = 4,
    times: str = "any",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    bits: int = 3,
    tables: tuple[str, ...] = TABLES,
    softmax: bool = False,
) -> Case:
    """Random tensors for sequences of these lengths, whose rows see these prefixes."""
    random = torch.Generator().manual_seed(seed)
    memory, rows = sum(lengths), sum(map(len, prefixes))

    def draw(count: int) -> Tensor:
        spread = {"any": 10**11, "equal": 1, "close": 50, "some": 10**9}[times]
        drawn = torch.randint(0, spread, (count,), generator=random)  # going back as often as forward
        if times == "some":
            drawn[torch.rand(count, generator=random) < 0.3] = UNKNOWN_TIME
        return drawn

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    wide = torch.promote_types(dtype, torch.float32)
    sight = Sight(
        memory_lengths=torch.tensor(lengths, dtype=torch.int64),
        memory_times=draw(memory),
        row_lengths=torch.tensor([len(p) for p in prefixes], dtype=torch.int64),
        row_prefix=torch.tensor([p for prefix in prefixes for p in prefix], dtype=torch.int64),
        row_times=draw(rows),
    )
    arrays = {
        "q": normal(rows, heads, qk),
        "k": normal(memory, heads, qk),
        "v": normal(memory, heads, v),
        "k_self": normal(rows, heads, qk),
        "v_self": normal(rows, heads, v),
        "position_bias": normal(position_rows(bits), heads).to(wide),
        "time_bias": normal(TIME_BUCKETS, heads).to(wide),
    }
    for name in set(TABLES) - set(tables):
        del arrays[name]
    return Case(sight, arrays, softmax)


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype = torch.float64, longest: int = 24) -> Case:
    lengths = draw(st.lists(st.integers(0, longest), max_size=5))
    prefixes = [draw(st.lists(st.integers(0, n), max_size=6)) for n in lengths]
    return case(
        lengths,
        prefixes,
        heads=draw(st.integers(1, 3)),
        qk=draw(st.integers(1, 5)),
        v=draw(st.integers(1, 5)),
        times=draw(st.sampled_from(["any", "equal", "close", "some"])),
        dtype=dtype,
        seed=draw(st.integers(0, 9)),
        bits=draw(st.sampled_from([1, 3, 8])),
        tables=draw(st.sampled_from([(), TABLES[:1], TABLES[1:], TABLES])),
        softmax=draw(st.booleans()),
    )
