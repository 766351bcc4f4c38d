"""A deep learning recommendation model of the usual kind, to compare HSTU with: DIN and DCN-v2.

Deep Interest Network (Zhou et al. 2018) pools a user's events with weights that depend on the candidate, and
a deep and cross network, version 2 (Wang et al. 2021), crosses what comes out with the candidate:

    a_j     = MLP([h_j, c, h_j ⊙ c, h_j − c])              h_j = item + actions + place + age of event j
    x_0     = [c, Σ_j a_j h_j, mean_j h_j, h_newest]
    x_{l+1} = x_0 ⊙ (W_l x_l + b_l) + x_l
    output  = W [x_L, MLP(x_0)]

It is given what HSTU is given: the same events, vocabulary, optimizer and losses, and each event's distance
in events and in time, in the same buckets. Items are retrieved by a tower that reads the history alone, with
the newest event as the candidate. It encodes every history anew for each candidate and keeps no cache.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grstream.config import Config, ConfigError
from grstream.learner import Learner, Outputs
from grstream.model import Model
from grstream.tokens import Events
from kernels import POSITION_BUCKETS, TIME_BUCKETS, jagged
from kernels.buckets import position_bucket, time_bucket

CROSSES = 3
HIDDEN = 36  # of the network that weighs an event, as in DIN's own code


class DLRM(Model):
    """The network and its heads."""

    def __init__(self, dim: int, actions: int, horizons: int = 0) -> None:
        super().__init__(horizons)
        self.actions = nn.Parameter(torch.randn(actions, dim) * dim**-0.5)
        self.positions = nn.Embedding(POSITION_BUCKETS, dim)
        self.ages = nn.Embedding(TIME_BUCKETS, dim)
        for table in (self.positions, self.ages):
            nn.init.zeros_(table.weight)
        self.start = nn.Parameter(torch.randn(dim) * dim**-0.5)  # stands for the newest event of none
        self.weigh = nn.ModuleDict({name: _mlp(4 * dim, HIDDEN, 1) for name in ("ranking", "retrieval")})
        width = 4 * dim
        self.crosses = nn.ModuleList(nn.Linear(width, width) for _ in range(CROSSES))
        self.deep = _mlp(width, width, width)
        self.ranking = nn.Sequential(nn.LayerNorm(2 * width), nn.Linear(2 * width, actions))
        self.tower = _mlp(3 * dim, width, dim)

    def forward(self, events: Events, new: Tensor) -> tuple[Tensor, Tensor]:
        """What the events `new` (N,) are ranked from (N, 8d) and retrieved from (N, d)."""
        owner = jagged.owners(events.lengths, len(events.times))[new]
        first = jagged.starts(events.lengths)[owner]
        before = new - first  # (N,) events
        asked = jagged.owners(before)  # (P,) pairs of a new event and one before it
        back = before[asked] - jagged.positions(before)  # 1 is the newest
        event = new[asked] - back
        bits = torch.arange(len(self.actions), device=new.device)
        taken = ((events.actions.unsqueeze(1) >> bits) & 1).to(self.actions.dtype)
        known = events.items + taken @ self.actions  # (E, d)
        age = time_bucket(events.times[new][asked] - events.times[event])
        history = F.embedding(event, known) + self.positions(position_bucket(back)) + self.ages(age)  # (P, d)
        newest = torch.where(
            (before > 0).unsqueeze(1), F.embedding((new - 1).clamp(min=0), known), self.start
        )
        candidate = F.embedding(new, events.items)
        mean = self._pool(history, asked, 1 / before[asked].unsqueeze(1).to(history.dtype), len(new))
        pooled = self._pool(history, asked, self._weights("ranking", history, candidate[asked]), len(new))
        crossed = start = torch.cat((candidate, pooled, mean, newest), 1)
        for cross in self.crosses:
            crossed = start * cross(crossed) + crossed
        wanted = self._pool(history, asked, self._weights("retrieval", history, newest[asked]), len(new))
        user = newest + self.tower(torch.cat((wanted, mean, newest), 1))
        return torch.cat((crossed, self.deep(start)), 1), user

    def action_logits(self, outputs: Tensor) -> Tensor:
        """(N, 8d) to a logit per action: (N, A)."""
        return self.ranking(outputs)

    def user_vectors(self, outputs: Tensor) -> Tensor:
        """(N, d) to unit vectors: (N, d)."""
        return F.normalize(outputs, dim=-1)

    def item_vectors(self, items: Tensor) -> Tensor:
        """Vocabulary vectors (N, d) to unit vectors: (N, d)."""
        return F.normalize(items, dim=-1)

    def _weights(self, which: str, history: Tensor, query: Tensor) -> Tensor:
        return self.weigh[which](torch.cat((history, query, history * query, history - query), 1))

    @staticmethod
    def _pool(history: Tensor, asked: Tensor, weights: Tensor, count: int) -> Tensor:
        return history.new_zeros(count, history.shape[1]).index_add(0, asked, weights * history)


class DLRMLearner(Learner):
    """Test, then train, with the DLRM in HSTU's place."""

    def __init__(self, config: Config) -> None:
        if config.events.context:
            raise ConfigError("the DLRM reads no context: events.context must be empty to compare with it")
        super().__init__(config)

    def _build(self) -> Model:
        model = self.config.model
        return DLRM(model.dim, len(self.config.events.actions), len(model.popularity_days))

    def _outputs(self, events: Events, new: Tensor) -> Outputs:
        ranking, retrieval = self.model(events, new)
        return Outputs(ranking, retrieval, tokens=len(events.times) + len(new))


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs))
