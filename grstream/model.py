"""HSTU, the encoder and its heads (Zhai et al. 2024, section 3): no Ray, no Kafka, no vocabulary.

Three faces of one computation, equal within 1e-5 in fp32: `forward` encodes whole sequences (training),
`extend` grows a cache of keys and values by new memory tokens, and `score` runs query tokens against a cache.
What a cache holds depends on tokens and times before, never on the time of the request.
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grstream.layers import LAYER_NORM_EPSILON, LAYERS, Layer
from grstream.pages import PagedCache
from kernels import Sight, jagged
from kernels.paged import stored

if TYPE_CHECKING:  # one brings pydantic, which a bare GPU machine need not have
    from grstream.config import ModelConfig
    from grstream.tokens import Tokens


KINDS = 6  # grstream.tokens.Kind


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    memory: Tensor  # (M, d), or (N, d) of the memory tokens that were asked for
    query: Tensor  # (Q, d)


@dataclasses.dataclass(frozen=True, eq=False)
class Cache:
    """What the encoder keeps of S sequences' M memory tokens, to extend them and to score against them."""

    lengths: Tensor  # (S,) int64
    times: Tensor  # (M,) int64 milliseconds
    layers: tuple[
        tuple[Tensor, Tensor], ...
    ]  # per layer k (M, H, d_qk) and v (M, H, d_v), in the model's dtype
    newest: Tensor  # (S, d): the newest memory token encoded, HSTU.start where there is none

    @property
    def nbytes(self) -> int:
        arrays = (self.lengths, self.times, self.newest, *(array for layer in self.layers for array in layer))
        return sum(array.numel() * array.element_size() for array in arrays)

    def seen_by(self, tokens: "Tokens") -> Sight:
        """What the query tokens see."""
        rows = (tokens.query_lengths, tokens.query_prefix, tokens.query_times)
        return Sight(self.lengths, self.times, *rows)

    @staticmethod
    def concat(caches: Sequence["Cache"]) -> "Cache":
        """The sequences of several caches, in order, as one. Raises ValueError when there are none."""
        if not caches:
            raise ValueError("no caches to join; HSTU.empty_cache(0) makes one without sequences")
        if len(caches) == 1:
            return caches[0]
        layers = zip(*(cache.layers for cache in caches), strict=True)
        return Cache(
            lengths=torch.cat([cache.lengths for cache in caches]),
            times=torch.cat([cache.times for cache in caches]),
            layers=tuple((torch.cat([k for k, _ in of]), torch.cat([v for _, v in of])) for of in layers),
            newest=torch.cat([cache.newest for cache in caches]),
        )

    def split(self) -> list["Cache"]:
        """One cache a sequence. They are copies: a view would keep every user's keys alive as long as one."""
        sizes = self.lengths.tolist()
        layers = [(k.split(sizes), v.split(sizes)) for k, v in self.layers]
        return [
            Cache(
                lengths=self.lengths[s : s + 1].clone(),
                times=times.clone(),
                layers=tuple((k[s].clone(), v[s].clone()) for k, v in layers),
                newest=self.newest[s : s + 1].clone(),
            )
            for s, times in enumerate(self.times.split(sizes))
        ]


class Model(nn.Module, abc.ABC):
    """What a learner asks of a model besides outputs: what they say of actions, and of which items.

    Retrieval ranks items by user · item vector plus a prior, which knows how popular an item is now.
    """

    def __init__(self, horizons: int) -> None:
        super().__init__()
        self.popularity = nn.Parameter(torch.zeros(horizons)) if horizons else None

    def prior(self, popularity: Tensor) -> Tensor:
        """`Vocabulary.popularity` of items (N, horizons) to what is added to their scores: (N,)."""
        return popularity.sum(1) if self.popularity is None else popularity @ self.popularity

    @abc.abstractmethod
    def action_logits(self, query: Tensor) -> Tensor: ...

    @abc.abstractmethod
    def user_vectors(self, outputs: Tensor) -> Tensor: ...

    @abc.abstractmethod
    def item_vectors(self, items: Tensor) -> Tensor: ...


class HSTU(Model):
    """The encoder with its ranking and retrieval heads, for `actions` configured actions."""

    def __init__(self, config: "ModelConfig", actions: int) -> None:
        super().__init__(horizons=len(config.popularity_days))
        d = config.dim
        layers = nn.ModuleList(LAYERS[config.encoder](config) for _ in range(config.layers))
        self.layers = cast(Sequence[Layer], layers)
        self.actions = nn.Parameter(torch.randn(actions, d) * d**-0.5)
        self.kinds = nn.Parameter(torch.randn(KINDS, d) * d**-0.5)
        rows = config.absolute_positions
        self.positions = nn.Parameter(torch.randn(rows, d) * d**-0.5) if rows else None
        self.dropout = nn.Dropout(config.dropout)
        self.start = nn.Parameter(torch.randn(d) * d**-0.5)  # stands for the newest token of an empty history
        self.ranking = nn.Sequential(
            nn.LayerNorm(d, LAYER_NORM_EPSILON), nn.Linear(d, d), nn.SiLU(), nn.Linear(d, actions)
        )
        self.retrieval = nn.Sequential(nn.LayerNorm(d, LAYER_NORM_EPSILON), nn.Linear(d, d))

    def begin_at_newest_item(self) -> "HSTU":
        """Have user vectors begin as the newest token, which carries its item.

        On a stream users come back to what they have just met. Where no item comes twice, or the items say
        nothing of one another, a random start learns sooner.
        """
        _, linear = self.retrieval
        assert isinstance(linear, nn.Linear)
        nn.init.eye_(linear.weight)
        nn.init.zeros_(linear.bias)
        return self

    # The three faces ------------------------------------------------------------------------------------

    def forward(self, tokens: "Tokens", readout: Tensor | None = None) -> Encoded:
        """Encode whole sequences. `readout` (N,) int64 names the memory tokens wanted, -1 the start vector.

        Without it all are encoded to the end; with it the last layer computes all keys and values, but only
        the rows named.
        """
        sight = self._own_sight(tokens)
        memory, query = self._memory(tokens, sight.row_prefix), self._query(tokens)
        queries = (tokens.query_lengths, tokens.query_prefix, tokens.query_times)
        seen_by_queries = Sight(tokens.memory_lengths, tokens.memory_times, *queries)
        *lower, last = self.layers
        for layer in lower:
            memory, query = layer(memory, ((None, sight), (query, seen_by_queries)))
        if readout is None:
            return Encoded(*last(memory, ((None, sight), (query, seen_by_queries))))
        if not len(memory):
            (query,) = last(memory, ((query, seen_by_queries),))
            return Encoded(self.start.expand(len(readout), -1), query)
        rows, place, chosen = _rows(readout, sight)
        out, query = last(memory, ((memory[rows], chosen), (query, seen_by_queries)))
        return Encoded(self._or_start(out, place, readout), query)

    def extend(self, cache: Cache | None, tokens: "Tokens") -> Cache:
        """The cache grown by each sequence's new memory tokens; from None it is the prefill.

        The new tokens of a sequence stand behind all its tokens in the cache. Raises ValueError when the
        numbers of sequences differ or there are query tokens.
        """
        if len(tokens.query_times):
            raise ValueError("extend takes memory tokens alone; query tokens go to score")
        cache = cache or self.empty_cache(len(tokens.memory_lengths))
        if len(cache.lengths) != len(tokens.memory_lengths):
            raise ValueError(
                f"{len(tokens.memory_lengths)} sequences cannot extend a cache of {len(cache.lengths)}"
            )
        new, old = tokens.memory_lengths, cache.lengths
        lengths = old + new
        owner = jagged.owners(new, len(tokens.memory_times))
        prefix = old[owner] + jagged.positions(new, len(tokens.memory_times))
        order = _merged(old, new) if len(old) > 1 and len(cache.times) else None

        def merge(before: Tensor, after: Tensor) -> Tensor:
            joined = torch.cat((before, after)) if len(before) else after
            return joined if order is None else joined.index_select(0, order)

        sight = Sight(lengths, merge(cache.times, tokens.memory_times), new, prefix, tokens.memory_times)
        memory = self._memory(tokens, prefix)
        kept: list[tuple[Tensor, Tensor]] = []
        *lower, last = self.layers
        for layer, (k, v) in zip(lower, cache.layers, strict=False):
            row = layer.project(memory)
            kept.append((merge(k, row.k), merge(v, row.v)))
            memory = layer.attend(memory, row, *kept[-1], sight)
        k, v = last.keys_values(memory)
        kept.append((merge(cache.layers[-1][0], k), merge(cache.layers[-1][1], v)))
        grown = new.nonzero().squeeze(1)
        newest = self._read_out(memory, torch.cumsum(new, 0)[grown] - 1, *kept[-1], sight)
        return Cache(lengths, sight.memory_times, tuple(kept), cache.newest.index_copy(0, grown, newest))

    def grow(self, cache: PagedCache, tokens: "Tokens", readout: Tensor) -> Tensor:
        """Encode new memory tokens into the pages of their sequences; the outputs at `readout` (N,): (N, d).

        The new tokens of a sequence are the last of `cache.lengths`: their pages are there, and those before
        them hold what `grow` put there. `readout` names new tokens, ascending. The same as `extend`, but in
        place, and whoever reads fewer tokens of a sequence sees no change.
        """
        new, lengths = tokens.memory_lengths, cache.lengths
        rows = len(tokens.memory_times)
        owner = jagged.owners(new, rows)
        prefix = (lengths - new)[owner] + jagged.positions(new, rows)
        paged = cache.sight(new, prefix, tokens.memory_times)
        places = paged.row_places()
        cache.pool.times[places] = tokens.memory_times
        # Sequences that begin here need not be read back from their pages.
        sight = Sight(new, tokens.memory_times, new, prefix, tokens.memory_times)
        begins = bool((new == lengths).all())
        memory = self._memory(tokens, prefix)
        *lower, last = self.layers
        for layer, pages in zip(lower, cache.layers, strict=False):
            row = layer.project(memory)
            for array, kept in zip((row.k, row.v), pages, strict=True):
                stored(kept, places, array)
            memory = (
                layer.attend(memory, row, row.k, row.v, sight)
                if begins
                else layer.attend(memory, row, *pages, paged)
            )
        k, v = last.keys_values(memory)
        for array, kept in zip((k, v), cache.layers[-1], strict=True):
            stored(kept, places, array)
        lengths = torch.bincount(owner[readout], minlength=len(new))
        x, of = memory[readout], (lengths, prefix[readout], tokens.memory_times[readout])
        if begins:
            return last.attend(x, last.project(x), k, v, Sight(new, tokens.memory_times, *of))
        return last.attend(x, last.project(x), *cache.layers[-1], cache.sight(*of))

    def score(self, cache: Cache | PagedCache, tokens: "Tokens") -> Tensor:
        """Query tokens against the cache of their sequences: (Q, d). Raises ValueError as `extend` does."""
        if len(tokens.memory_times):
            raise ValueError("score takes query tokens alone; memory tokens go to extend")
        if len(cache.lengths) != len(tokens.query_lengths):
            raise ValueError(
                f"queries of {len(tokens.query_lengths)} sequences do not fit a cache of {len(cache.lengths)}"
            )
        sight, query = cache.seen_by(tokens), self._query(tokens)
        for layer, (k, v) in zip(self.layers, cache.layers, strict=True):
            query = layer.attend(query, layer.project(query), k, v, sight)
        return query

    def empty_cache(self, sequences: int) -> Cache:
        """The cache of sequences without any token."""
        lengths = torch.zeros(sequences, dtype=torch.int64, device=self.start.device)
        nothing = tuple(layer.keys_values(self.start[None, :][:0]) for layer in self.layers)
        return Cache(lengths, lengths[:0], nothing, self.start.expand(sequences, -1))

    # The heads ------------------------------------------------------------------------------------------

    def action_logits(self, query: Tensor) -> Tensor:
        """Query tokens' outputs (Q, d) to a logit per action: (Q, A)."""
        return self.ranking(query)

    def user_vectors(self, outputs: Tensor) -> Tensor:
        """What items are retrieved from (U, d), see `tokens.Asked.retrieval`, to unit vectors: (U, d)."""
        return F.normalize(self.retrieval(outputs), dim=-1)

    def item_vectors(self, items: Tensor) -> Tensor:
        """Vocabulary vectors (N, d) to unit vectors for retrieval: (N, d)."""
        return F.normalize(items, dim=-1)

    # Tokens to rows -------------------------------------------------------------------------------------

    def _memory(self, tokens: "Tokens", positions: Tensor) -> Tensor:
        bits = torch.arange(len(self.actions), device=tokens.memory_actions.device)
        taken = (tokens.memory_actions.unsqueeze(1) >> bits) & 1  # (M, A)
        said = self.kinds[tokens.memory_kinds] + taken.to(self.actions.dtype) @ self.actions
        return self._placed(tokens.memory_vectors + said, positions)

    def _query(self, tokens: "Tokens") -> Tensor:
        return self._placed(tokens.query_vectors + self.kinds[tokens.query_kinds], tokens.query_prefix)

    def _placed(self, x: Tensor, positions: Tensor) -> Tensor:
        if self.positions is not None:
            x = x + self.positions[positions.clamp(max=len(self.positions) - 1)]
        return self.dropout(x)

    @staticmethod
    def _own_sight(tokens: "Tokens") -> Sight:
        """Each memory token sees those before it."""
        lengths, times = tokens.memory_lengths, tokens.memory_times
        return Sight(lengths, times, lengths, jagged.positions(lengths, len(times)), times)

    def _read_out(self, memory: Tensor, readout: Tensor, k: Tensor, v: Tensor, sight: Sight) -> Tensor:
        """The last layer at some rows of `sight`, -1 being the start vector: (N, d)."""
        if not len(memory):
            return self.start.expand(len(readout), -1)
        rows, place, chosen = _rows(readout, sight)
        x, last = memory[rows], self.layers[-1]
        return self._or_start(last.attend(x, last.project(x), k, v, chosen), place, readout)

    def _or_start(self, rows: Tensor, place: Tensor, readout: Tensor) -> Tensor:
        return torch.where((readout >= 0).unsqueeze(1), rows[place], self.start)


def _rows(readout: Tensor, sight: Sight) -> tuple[Tensor, Tensor, Sight]:
    """The rows of `sight` that are named, where each of `readout` is among them, and what they see."""
    rows, place = torch.unique(
        readout.clamp(min=0), return_inverse=True
    )  # ascending: packed as sequences are
    owner = jagged.owners(sight.row_lengths, len(sight.row_prefix))[rows]
    chosen = Sight(
        memory_lengths=sight.memory_lengths,
        memory_times=sight.memory_times,
        row_lengths=torch.bincount(owner, minlength=len(sight.row_lengths)),
        row_prefix=sight.row_prefix[rows],
        row_times=sight.row_times[rows],
    )
    return rows, place, chosen


def _merged(old: Tensor, new: Tensor) -> Tensor:
    """Where each token of the joined sequences lies in all the old tokens followed by all the new: (M,)."""
    sources = torch.cat((jagged.owners(old), jagged.owners(new)))
    return torch.sort(sources, stable=True).indices
