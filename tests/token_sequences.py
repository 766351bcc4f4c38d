"""Users with histories and candidates, as hypothesis draws them, and encoders to show them to."""

import dataclasses
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from grstream.config import ModelConfig
from grstream.model import HSTU
from grstream.tokens import Kind, Tokens, candidate_kind
from kernels import UNKNOWN_TIME

ACTIONS = 3
FP32 = {"atol": 1e-5, "rtol": 1e-5}


@dataclasses.dataclass(frozen=True, eq=False)
class User:
    """A history of n memory tokens and m candidates, each asked after a prefix of the history."""

    items: Tensor  # (n, d)
    kinds: Tensor  # (n,)
    actions: Tensor  # (n,)
    times: Tensor  # (n,)
    candidates: Tensor  # (m, d)
    prefix: Tensor  # (m,)
    asked: Tensor  # (m,) milliseconds
    asks: Kind = Kind.CANDIDATE

    def events(self, first: int, last: int) -> "User":
        """Events [first, last) alone, no candidates."""
        cut = slice(first, last)
        history = (self.items[cut], self.kinds[cut], self.actions[cut], self.times[cut])
        return User(*history, self.items[:0], *(self.prefix[:0],) * 2, self.asks)

    def asking(self, which: Sequence[int] | Tensor) -> "User":
        """The same history, asked about these of its candidates."""
        rows = torch.as_tensor(which, dtype=torch.int64)
        return dataclasses.replace(
            self, candidates=self.candidates[rows], prefix=self.prefix[rows], asked=self.asked[rows]
        )

    def __len__(self) -> int:
        return len(self.times)


def tokens(users: Sequence[User]) -> Tokens:
    return Tokens(
        memory_lengths=torch.tensor([len(u) for u in users], dtype=torch.int64),
        memory_vectors=torch.cat([u.items for u in users]),
        memory_kinds=torch.cat([u.kinds for u in users]),
        memory_actions=torch.cat([u.actions for u in users]),
        memory_times=torch.cat([u.times for u in users]),
        query_lengths=torch.tensor([len(u.asked) for u in users], dtype=torch.int64),
        query_vectors=torch.cat([u.candidates for u in users]),
        query_kinds=torch.cat([torch.full_like(u.asked, u.asks) for u in users]),
        query_prefix=torch.cat([u.prefix for u in users]),
        query_times=torch.cat([u.asked for u in users]),
    )


def events(users: Sequence[User]) -> Tokens:
    """Their histories, as `extend` takes them."""
    t = tokens(users)
    return Tokens.of_memory(
        t.memory_lengths, t.memory_vectors, t.memory_kinds, t.memory_actions, t.memory_times
    )


def candidates(users: Sequence[User]) -> Tokens:
    """Their candidates, as `score` takes them."""
    t = tokens(users)
    kind = users[0].asks if users else Kind.CANDIDATE
    return Tokens.of_candidates(t.query_lengths, t.query_vectors, t.query_prefix, t.query_times, kind)


def encoder(config: ModelConfig, seed: int = 0) -> HSTU:
    """An encoder whose biases and gains are not those of initialisation, which would hide mistakes."""
    torch.manual_seed(seed)
    model = HSTU(config, ACTIONS).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
        for layer in model.layers:
            for table in (layer.position_bias, layer.time_bias):
                if table is not None:
                    table.normal_()
    return model


def user(
    length: int,
    prefixes: Sequence[int],
    dim: int,
    times: str = "rising",
    seed: int = 0,
    interleaved: bool = False,
) -> User:
    """Context tokens stand among the others in either layout; `interleaved` says what the others are."""
    random = torch.Generator().manual_seed(1_000 * length + 10 * len(prefixes) + seed)
    moments = torch.randint(0, 10**11, (length + len(prefixes),), generator=random)
    if times == "equal":
        moments[:] = 1_700_000_000_000
    if times == "some":
        moments[torch.rand(len(moments), generator=random) < 0.3] = UNKNOWN_TIME
    history = moments[:length]
    if times == "rising":
        history = torch.sort(history).values
    items = torch.randn(length, dim, generator=random)
    actions = torch.randint(0, 2**ACTIONS, (length,), generator=random)
    kinds = torch.full((length,), Kind.EVENT)
    if interleaved:
        kinds = torch.arange(length) % 2 + Kind.ITEM
        actions[kinds != Kind.ACTION], items[kinds == Kind.ACTION] = 0, 0
    kinds[torch.rand(length, generator=random) < 0.15] = Kind.CONTEXT
    return User(
        items=items,
        kinds=kinds,
        actions=actions * (kinds != Kind.CONTEXT),
        times=history,
        candidates=torch.randn(len(prefixes), dim, generator=random),
        prefix=torch.tensor(prefixes, dtype=torch.int64),
        asked=moments[length:],
        asks=candidate_kind(interleaved),
    )


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    encoder = draw(st.sampled_from(["hstu", "transformer"]))
    silu = encoder == "hstu" and draw(st.booleans())
    return ModelConfig(
        encoder=encoder,
        attention="silu" if silu else "softmax",
        layers=draw(st.integers(1, 3)),
        dim=draw(st.sampled_from([8, 12])),
        heads=draw(st.integers(1, 3)),
        qk_dim=draw(st.integers(1, 6)),
        v_dim=draw(st.integers(4, 7)),
        position_bias=draw(st.sampled_from(["bucketed", "exact", "none"])),
        time_bias=draw(st.booleans()),
        absolute_positions=draw(st.sampled_from([0, 5])),
    )


@st.composite
def crowds(draw: st.DrawFn, dim: int, least: int = 0, longest: int = 12) -> list[User]:
    """Users with histories from none up, candidates from none up, times rising, equal or going back."""
    interleaved = draw(st.booleans())
    lengths = draw(st.lists(st.integers(0, longest), min_size=least, max_size=4))
    return [
        user(
            n,
            draw(st.lists(st.integers(0, n), max_size=4)),
            dim,
            draw(st.sampled_from(["rising", "equal", "any", "some"])),
            seed,
            interleaved,
        )
        for seed, n in enumerate(lengths)
    ]
