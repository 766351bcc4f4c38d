"""The layers of the encoder: what a row is projected to, and what it makes of what it sees.

x̂          = LayerNorm(x)
u, v, q, k = split(SiLU(x̂ W + β))
o_i        = Σ_{j ∈ S(i)} SiLU(α q_i·k_j + b(i, j)) v_j          (kernels.attention)
y          = x + dropout((LayerNorm(o) ⊙ u) W_o)
"""

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels import POSITION_BUCKETS, TIME_BUCKETS, Sight, attention

if TYPE_CHECKING:  # it brings pydantic, which a bare GPU machine need not have
    from grstream.config import ModelConfig

LAYER_NORM_EPSILON = 1e-6
# Of the usual scale of a layer's last weights at first: a stream is seen once, and a model that begins near
# the embeddings alone learns those sooner (ML-100K in one pass: log loss .578 against .582).
BRANCH_GAIN = 0.1


@dataclasses.dataclass(frozen=True, eq=False)
class Projected:
    """A layer's projections of R rows."""

    u: Tensor  # (R, H · d_v)
    v: Tensor  # (R, H, d_v)
    q: Tensor  # (R, H, d_qk)
    k: Tensor  # (R, H, d_qk)


class Layer(nn.Module):
    """One HSTU layer. Its projection's columns are k, v, q, u, so that keys and values are one slice."""

    def __init__(self, config: "ModelConfig") -> None:
        super().__init__()
        self.heads = config.heads
        self.qk = config.qk_dim or config.dim // config.heads
        self.v = config.v_dim or config.dim // config.heads
        self.reduced = torch.bfloat16 if config.dtype == "bfloat16" else None
        columns = config.heads * (2 * self.qk + 2 * self.v)
        self.norm = nn.LayerNorm(config.dim, LAYER_NORM_EPSILON)
        self.project_in = nn.Linear(config.dim, columns)
        self.position_bias = nn.Parameter(torch.zeros(POSITION_BUCKETS, config.heads))
        self.time_bias = nn.Parameter(torch.zeros(TIME_BUCKETS, config.heads))
        self.norm_out = nn.LayerNorm(config.heads * self.v, LAYER_NORM_EPSILON)
        self.project_out = nn.Linear(config.heads * self.v, config.dim, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        nn.init.xavier_uniform_(self.project_in.weight)
        nn.init.zeros_(self.project_in.bias)
        nn.init.xavier_uniform_(self.project_out.weight, BRANCH_GAIN)

    def project(self, x: Tensor) -> Projected:
        """u, v, q, k of the rows x (R, d)."""
        h, qk, v = self.heads, self.heads * self.qk, self.heads * self.v
        out = F.silu(self._linear(self.norm(x), self.project_in.weight, self.project_in.bias))
        k_, v_, q_, u_ = out.split((qk, v, qk, v), 1)
        return Projected(u_, v_.unflatten(1, (h, -1)), q_.unflatten(1, (h, -1)), k_.unflatten(1, (h, -1)))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """k and v alone, of rows that nobody reads out."""
        h, qk, v = self.heads, self.heads * self.qk, self.heads * self.v
        weight, bias = self.project_in.weight[: qk + v], self.project_in.bias[: qk + v]
        k_, v_ = F.silu(self._linear(self.norm(x), weight, bias)).split((qk, v), 1)
        return k_.unflatten(1, (h, -1)), v_.unflatten(1, (h, -1))

    def attend(self, x: Tensor, row: Projected, k: Tensor, v: Tensor, sight: Sight) -> Tensor:
        """The layer's output for the rows x (R, d), seeing memory k, v as `sight` says."""
        alpha = self.qk**-0.5
        o = attention(row.q, k, v, row.k, row.v, sight, self.position_bias, self.time_bias, alpha)
        gated = self.norm_out(o.flatten(1)) * row.u
        return x + self.dropout(self._linear(gated, self.project_out.weight, None)).to(x.dtype)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.reduced is None:
            return F.linear(x, weight, bias)
        return F.linear(
            x.to(self.reduced), weight.to(self.reduced), None if bias is None else bias.to(self.reduced)
        )
