"""The layers of the encoder: what a row is projected to, and what it makes of what it sees.

HSTU's (Zhai et al. 2024, section 3):

    x̂          = LayerNorm(x)
    u, v, q, k = split(SiLU(x̂ W + β))
    o_i        = Σ_{j ∈ S(i)} SiLU(α q_i·k_j + b(i, j)) v_j          (kernels.attention)
    y          = x + dropout((LayerNorm(o) ⊙ u) W_o)

The Transformer's, in its pre-norm form, is here because it is what HSTU is compared with (SASRec: Kang and
McAuley 2018), and because everything around the encoder must work for any causal self-attention:

    q, k, v = split(LayerNorm(x) W + β)
    z       = x + dropout(o W_o)               o_i by softmax in SiLU's place
    y       = z + dropout(W_2 GELU(W_1 LayerNorm(z)))
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels import POSITION_BUCKETS, TIME_BUCKETS, Sight, attention, position_rows
from kernels import layer as lean
from kernels.matmul import linear
from kernels.paged import PagedSight, PageTensor, paged_attention

if TYPE_CHECKING:  # it brings pydantic, which a bare GPU machine need not have
    from grstream.config import ModelConfig

LAYER_NORM_EPSILON = 1e-6
EXACT_POSITIONS = position_rows(9)  # exact below 1,024 tokens back
# Of the usual scale of a layer's last weights at first: a stream is seen once, and a model that begins near
# the embeddings alone learns those sooner (ML-100K in one pass: log loss .578 against .582).
BRANCH_GAIN = 0.1


@dataclasses.dataclass(frozen=True, eq=False)
class Projected:
    """A layer's projections of R rows."""

    q: Tensor  # (R, H, d_qk)
    k: Tensor  # (R, H, d_qk)
    v: Tensor  # (R, H, d_v)
    u: Tensor | None  # (R, H · d_v), HSTU's gate


class Layer(nn.Module):
    """What both kinds share: heads, biases, and attention under one rule of sight."""

    def __init__(self, config: "ModelConfig") -> None:
        super().__init__()
        self.heads = config.heads
        self.qk = config.qk_dim or config.dim // config.heads
        self.v = config.v_dim or config.dim // config.heads
        self.softmax = config.softmax
        self.reduced = torch.bfloat16 if config.dtype == "bfloat16" else None
        self.norm = nn.LayerNorm(config.dim, LAYER_NORM_EPSILON)
        self.project_out = nn.Linear(config.heads * self.v, config.dim, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        rows = {"none": 0, "bucketed": POSITION_BUCKETS, "exact": EXACT_POSITIONS}[config.position_bias]
        self.position_bias = nn.Parameter(torch.zeros(rows, config.heads)) if rows else None
        self.time_bias = nn.Parameter(torch.zeros(TIME_BUCKETS, config.heads)) if config.time_bias else None
        nn.init.xavier_uniform_(self.project_out.weight, BRANCH_GAIN)

    def forward(self, memory: Tensor, readers: Sequence[tuple[Tensor | None, Sight]]) -> tuple[Tensor, ...]:
        """For each pair the layer's outputs (R, d) for rows x that see the memory (M, d) as their sight says.

        None stands for rows that are the memory itself.
        """
        own = self.project(memory) if any(x is None for x, _ in readers) else None
        k, v = (own.k, own.v) if own is not None else self.keys_values(memory)
        outs = []
        for x, sight in readers:
            if x is not None:
                outs.append(self.attend(x, self.project(x), k, v, sight))
            elif own is not None:
                outs.append(self.attend(memory, own, k, v, sight))
        return tuple(outs)

    def project(self, x: Tensor) -> Projected:
        """The projections of the rows x (R, d)."""
        raise NotImplementedError

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """k and v alone, of rows that nobody reads out."""
        raise NotImplementedError

    def attend(
        self, x: Tensor, row: Projected, k: PageTensor, v: PageTensor, sight: Sight | PagedSight
    ) -> Tensor:
        """The layer's output for the rows x (R, d), seeing memory k, v as `sight` says."""
        raise NotImplementedError

    def _attention(self, row: Projected, k: PageTensor, v: PageTensor, sight: Sight | PagedSight) -> Tensor:
        """(R, H · d_v)."""
        tables = (self.position_bias, self.time_bias)
        alpha = self.qk**-0.5
        if isinstance(sight, PagedSight):
            o = paged_attention(row.q, k, v, row.k, row.v, sight, *tables, alpha, softmax=self.softmax)
        else:
            assert isinstance(k, Tensor)
            assert isinstance(v, Tensor)
            o = attention(row.q, k, v, row.k, row.v, sight, *tables, alpha, softmax=self.softmax)
        return o.flatten(1)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.reduced is None:
            return linear(x, weight, bias)
        return linear(
            x.to(self.reduced), weight.to(self.reduced), None if bias is None else bias.to(self.reduced)
        )

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.heads, -1))


class HSTULayer(Layer):
    """Its projection's columns are k, v, q, u, so that keys and values are one slice."""

    def __init__(self, config: "ModelConfig") -> None:
        super().__init__(config)
        self.project_in = nn.Linear(config.dim, config.heads * (2 * self.qk + 2 * self.v))
        self.norm_out = nn.LayerNorm(config.heads * self.v, LAYER_NORM_EPSILON)
        nn.init.xavier_uniform_(self.project_in.weight)
        nn.init.zeros_(self.project_in.bias)

    def forward(self, memory: Tensor, readers: Sequence[tuple[Tensor | None, Sight]]) -> tuple[Tensor, ...]:
        if not torch.is_grad_enabled():
            return super().forward(memory, readers)
        # As below, but keeping little for the backward pass.
        shape = lean.Shape(
            heads=self.heads,
            qk=self.qk,
            v=self.v,
            epsilon=LAYER_NORM_EPSILON,
            alpha=self.qk**-0.5,
            softmax=self.softmax,
            dropout=self.dropout.p if self.training else 0.0,
            reduced=self.reduced,
        )
        norm, into = self.norm, self.project_in
        columns = sum(shape.columns) if any(x is None for x, _ in readers) else sum(shape.columns[:2])

        def project(x: Tensor, columns: int) -> Tensor:
            weight, bias = into.weight[:columns], into.bias[:columns]
            return lean.project(x, norm.weight, norm.bias, weight, bias, shape)

        rows = [
            lean.Reader(memory, None, sight)
            if x is None
            else lean.Reader(x, project(x, sum(shape.columns)) if len(x) else None, sight)
            for x, sight in readers
        ]
        tables = (self.position_bias, self.time_bias)
        gate = (self.norm_out.weight, self.norm_out.bias, self.project_out.weight)
        return lean.attend(project(memory, columns), rows, *tables, *gate, shape)

    def project(self, x: Tensor) -> Projected:
        qk, v = self.heads * self.qk, self.heads * self.v
        out = F.silu(self._linear(self.norm(x), self.project_in.weight, self.project_in.bias))
        k_, v_, q_, u_ = out.split((qk, v, qk, v), 1)
        return Projected(self._by_head(q_), self._by_head(k_), self._by_head(v_), u_)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        qk, v = self.heads * self.qk, self.heads * self.v
        weight, bias = self.project_in.weight[: qk + v], self.project_in.bias[: qk + v]
        k_, v_ = F.silu(self._linear(self.norm(x), weight, bias)).split((qk, v), 1)
        return self._by_head(k_), self._by_head(v_)

    def attend(
        self, x: Tensor, row: Projected, k: PageTensor, v: PageTensor, sight: Sight | PagedSight
    ) -> Tensor:
        assert row.u is not None
        gated = self.norm_out(self._attention(row, k, v, sight)) * row.u
        return x + self.dropout(self._linear(gated, self.project_out.weight, None)).to(x.dtype)


class TransformerLayer(Layer):
    """A pre-norm Transformer's. Its projection's columns are k, v, q."""

    def __init__(self, config: "ModelConfig") -> None:
        super().__init__(config)
        hidden = config.feedforward or 4 * config.dim
        self.project_in = nn.Linear(config.dim, config.heads * (2 * self.qk + self.v))
        self.norm_out = nn.LayerNorm(config.dim, LAYER_NORM_EPSILON)
        self.widen = nn.Linear(config.dim, hidden)
        self.narrow = nn.Linear(hidden, config.dim)
        for map_, gain in ((self.project_in, 1.0), (self.widen, 1.0), (self.narrow, BRANCH_GAIN)):
            nn.init.xavier_uniform_(map_.weight, gain)
            nn.init.zeros_(map_.bias)

    def project(self, x: Tensor) -> Projected:
        qk, v = self.heads * self.qk, self.heads * self.v
        out = self._linear(self.norm(x), self.project_in.weight, self.project_in.bias)
        k_, v_, q_ = map(self._by_head, out.split((qk, v, qk), 1))
        return Projected(q_, k_, v_, None)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        qk, v = self.heads * self.qk, self.heads * self.v
        weight, bias = self.project_in.weight[: qk + v], self.project_in.bias[: qk + v]
        k_, v_ = map(self._by_head, self._linear(self.norm(x), weight, bias).split((qk, v), 1))
        return k_, v_

    def attend(
        self, x: Tensor, row: Projected, k: PageTensor, v: PageTensor, sight: Sight | PagedSight
    ) -> Tensor:
        seen = self._linear(self._attention(row, k, v, sight), self.project_out.weight, None)
        z = x + self.dropout(seen).to(x.dtype)
        hidden = F.gelu(self._linear(self.norm_out(z), self.widen.weight, self.widen.bias))
        return z + self.dropout(self._linear(hidden, self.narrow.weight, self.narrow.bias)).to(x.dtype)


LAYERS: dict[str, type[Layer]] = {"hstu": HSTULayer, "transformer": TransformerLayer}
