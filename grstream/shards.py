"""The vocabulary of a training group: every key lives at one rank, and a step brings the rows it needs.

Each rank asks the owners of its micro-batch's keys, which admit them, and gets their vectors; its gradients
go back the same way, are summed there over the ranks and applied once. What all ranks need, the negatives and
each other's targets, every owner sends unasked. Owners follow from the keys alone, so a checkpoint's rows are
dealt out anew to any number of ranks. One rank owns everything and sends nothing.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from grstream.candidates import Candidates, CandidatesState
from grstream.config import TrainConfig
from grstream.keys import Keys
from grstream.ranks import Ints, Ranks
from grstream.vocabulary import Vocabulary, VocabularyState, on


def owners(keys: Keys, world: int) -> Ints:
    """The rank of each key: (n,). Keys are hashes already, so ranks get equal shares."""
    if world == 1:
        return np.zeros(len(keys), np.int64)
    return (keys.view(np.uint64) % np.uint64(world)).astype(np.int64)


def shard(
    dim: int,
    config: TrainConfig,
    ranks: Ranks,
    device: torch.device | str = "cpu",
    half_lives_days: Sequence[float] = (),
) -> Vocabulary:
    """A rank's empty part of a vocabulary, with its share of the budgets."""
    rows, candidates = config.vocabulary_rows, None
    if config.admit_after > 1:
        candidates = Candidates(config.admit_after, _share(config.admit_candidates, ranks))
    budget = None if rows is None else _share(rows, ranks)
    seed, optimizer = config.seed, config.row_optimizer
    return Vocabulary(dim, seed, device, budget, optimizer, candidates, half_lives_days)


def dealt(parts: Sequence[VocabularyState], ranks: Ranks) -> VocabularyState:
    """This rank's part of what was saved in any number of parts. One that it saved itself stays as it was."""
    if len(parts) == ranks.world:
        return parts[ranks.rank]

    def own(keys: Keys) -> npt.NDArray[np.bool_]:
        return owners(keys, ranks.world) == ranks.rank

    kept = [own(part.keys) for part in parts]
    candidates = [part.candidates for part in parts if part.candidates is not None]
    names = {key: name for part in parts for key, name in part.item_names.items()}
    return VocabularyState(
        **{
            field: np.concatenate([getattr(p, field)[at] for p, at in zip(parts, kept, strict=True)])
            for field in ("keys", "rows", "items", "levels", "used")
        },
        optimizer={
            name: np.concatenate([p.optimizer[name][at] for p, at in zip(parts, kept, strict=True)])
            for name in parts[0].optimizer
        },
        item_names=names,  # a vocabulary takes those of its keys
        clock_ms=max(part.clock_ms for part in parts),
        admissions=max(part.admissions for part in parts),
        budget=None,
        candidates=CandidatesState(
            **{
                field: np.concatenate([getattr(c, field)[own(c.keys)] for c in candidates])
                for field in ("keys", "counts", "young")
            }
        )
        if candidates
        else None,
    )


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a rank's micro-batch needs of a vocabulary."""

    keys: Keys  # (n,) of every use, a key as often as it is used
    items: npt.NDArray[np.bool_]  # (n,) names the item of a new event
    new: npt.NDArray[np.bool_]  # (n,) belongs to a new event
    targets: Keys  # (N,) the new events' items
    times: npt.NDArray[np.int64]  # (N,) ms, the new events'
    acted: npt.NDArray[np.bool_]  # (N,) those that the retrieval loss learns from
    names: Mapping[int, str]  # of items


@dataclasses.dataclass(frozen=True)
class Negatives:
    """How to draw what the retrieval loss sets against a step's own items."""

    count: int  # uniformly drawn items
    all_up_to: int  # or, where there are no more than these, every item
    seed: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Items:
    """Items that all ranks know in a step: B of them."""

    keys: Keys  # (B,) ascending
    places: Ints  # (B,) in the step's table
    popularity: npt.NDArray[np.float32]  # (B, horizons) before this step, see `Vocabulary.popularity`
    fresh: npt.NDArray[np.bool_]  # (B,) which have their row since this step
    total: int  # items, of all ranks
    sampled: Ints  # (K,) which of these were drawn
    in_batch: Ints  # (T,) which of these are targets of the ranks' events; a target without a row is none
    wanted: Ints  # (W,) the same of this rank's events
    wanting: Ints  # (W,) those of the rank's N events


@dataclasses.dataclass(frozen=True)
class Fetched:
    """The rows of a step, at one rank: U in all."""

    table: torch.Tensor  # (U, d)
    places: Ints  # (n,) of each key that was asked for
    items: Items | None  # None where no negatives are wanted
    targets: list[Keys]  # of each rank
    times: list[npt.NDArray[np.int64]]  # of each rank's events about them
    # How they came: at an owner the rows it sent, and how many to and from each rank.
    rows: Ints
    sent: list[int]
    received: list[int]


class Shards:
    """A vocabulary's part at this rank, and the way to the others. All ranks call each method together."""

    def __init__(self, vocabulary: Vocabulary, ranks: Ranks) -> None:
        self.vocabulary, self.ranks = vocabulary, ranks

    def fetch(self, asked: Asked, negatives: Negatives | None) -> Fetched:
        """Admit all ranks' keys at their owners, and bring the vectors of what this rank needs."""
        held, ranks = self.vocabulary, self.ranks
        distinct, place = np.unique(asked.keys, return_inverse=True)
        about = np.bincount(place[asked.new], minlength=len(distinct))
        about = 2 * about + (np.bincount(place[asked.items], minlength=len(distinct)) > 0)
        owner = owners(distinct, ranks.world)
        order = np.argsort(owner, kind="stable")
        ends = np.cumsum(np.bincount(owner, minlength=ranks.world))[:-1]
        asked_of = np.split(distinct[order], ends)  # each ascending
        asking = zip(asked_of, np.split(about[order], ends), strict=True)
        halves = [part.reshape(2, -1) for part in ranks.exchange([np.concatenate(pair) for pair in asking])]
        asked_by = [keys for keys, _ in halves]
        rows = self._admit(asked_by, [told for _, told in halves])
        told = ranks.gather((asked.targets, asked.acted, asked.names, asked.times))
        targets = [keys for keys, _, _, _ in told]
        for _, _, names, _ in told:
            held.name(names)
        unasked = [np.empty(0, np.int64)] * ranks.world
        shared: _Shared | None = None
        if negatives is not None:
            acted = np.concatenate([keys[mask] for keys, mask, _, _ in told])
            shared = self._shared(acted, negatives)
            unasked = shared.of_owner
        mine = unasked[ranks.rank]
        extra = [_without(mine, keys) for keys in asked_by]
        sent_keys = np.concatenate([part for pair in zip(asked_by, extra, strict=True) for part in pair])
        sent_rows = np.concatenate(
            [part for at, keys in enumerate(extra) for part in (rows[at], held.lookup(keys))]
        )
        came = [part for r in range(ranks.world) for part in (asked_of[r], _without(unasked[r], asked_of[r]))]
        sent = [len(a) + len(e) for a, e in zip(asked_by, extra, strict=True)]
        received = [len(came[2 * r]) + len(came[2 * r + 1]) for r in range(ranks.world)]
        vectors, _ = held.fetch(sent_keys, sent_rows)
        table_keys = np.concatenate(came)
        by_key = np.argsort(table_keys)
        found = by_key[np.searchsorted(table_keys, distinct, sorter=by_key)]
        items = None
        if shared is not None:
            at = by_key[np.searchsorted(table_keys, shared.keys, sorter=by_key)]
            items = shared.items(at, acted, asked)
        return Fetched(
            table=ranks.exchange_rows(vectors, sent, received),
            places=found[place],
            items=items,
            targets=targets,
            times=[times for _, _, _, times in told],
            rows=sent_rows,
            sent=sent,
            received=received,
        )

    def summed(self, fetched: Fetched, gradient: torch.Tensor) -> tuple[Ints, torch.Tensor]:
        """The rows of this rank that ranks learned from, and the sum of their gradients: (R,) and (R, d).

        The order of each sum is that of the ranks.
        """
        gradient = self.ranks.exchange_rows(gradient, fetched.received, fetched.sent)
        known = np.flatnonzero(fetched.rows >= 0)
        if self.ranks.world == 1:
            every = len(known) == len(fetched.rows)
            return fetched.rows[known], gradient if every else gradient[on(gradient.device, known)]
        rows, place = np.unique(fetched.rows[known], return_inverse=True)
        total = gradient.new_zeros(len(rows), gradient.shape[1])
        ends = np.searchsorted(known, np.cumsum(fetched.sent))[:-1]
        for at, to in zip(np.split(known, ends), np.split(place, ends), strict=True):
            total.index_add_(0, on(total.device, to), gradient[on(total.device, at)])
        return rows, total

    def count(self, fetched: Fetched) -> None:
        """Remember that every rank's events were about their items."""
        self.vocabulary.count(np.concatenate(fetched.targets), np.concatenate(fetched.times))

    def ranks_of(
        self,
        users: torch.Tensor,  # (P, d)
        targets: Keys,  # (P,) the items that were taken
        vectors: Callable[[torch.Tensor], torch.Tensor],  # of items, from rows: (n, d) to (n, d)
        prior: Callable[[torch.Tensor], torch.Tensor],  # of items, from popularity: (n, horizons) to (n,)
        without: Ints,  # rows of this rank that are left out
    ) -> tuple[torch.Tensor, int]:
        """How many items score higher than each user's own, and how many items there are.

        A user's own item that is not among those ranks last.
        """
        held, ranks = self.vocabulary, self.ranks
        items = held.item_rows()
        items = items[~np.isin(items, without)]
        told = ranks.gather((targets, len(items)))
        total = sum(count for _, count in told)
        counts = [len(keys) for keys, _ in told]
        everyone = users.repeat(ranks.world, 1)
        everyone = ranks.exchange_rows(everyone, [len(users)] * ranks.world, counts)
        own = everyone.new_full((len(everyone),), 0.0)
        found = np.zeros(len(everyone), np.bool_)
        if len(items):
            rows = held.lookup(np.concatenate([keys for keys, _ in told]))
            at = np.minimum(np.searchsorted(items, rows), len(items) - 1)
            found = items[at] == rows
            of_items = prior(on(everyone.device, held.popularity(items)))
            scores = torch.addmm(of_items, everyone, vectors(held.gather(items)).T)  # (ΣP, items)
            own = scores.gather(1, on(scores.device, at)[:, None]).squeeze(1) * on(scores.device, found)
        else:
            scores = everyone.new_empty(len(everyone), 0)
        ranks.sum_([own])
        higher = (scores > own[:, None]).sum(1)
        ranks.sum_([higher])
        somewhere = np.any(ranks.gather(found), axis=0)
        higher = torch.where(on(higher.device, somewhere), higher, total)
        begin = sum(counts[: ranks.rank])
        return higher[begin : begin + len(users)], total

    # -- parts ------------------------------------------------------------------------------------------

    def _admit(self, keys: list[Keys], about: list[Ints]) -> list[Ints]:
        """The rows of what each rank asks for, -1 of a key that is to be met more often."""
        together, place = keys[0], np.arange(len(keys[0]))
        if self.ranks.world > 1:
            together, place = np.unique(np.concatenate(keys), return_inverse=True)
        told = np.concatenate(about)
        items = np.bincount(place, told & 1, len(together)) > 0
        events = np.bincount(place, told >> 1, len(together)).astype(np.int64)
        rows = self.vocabulary.admit(together, items, events)[place]
        return np.split(rows, np.cumsum([len(part) for part in keys])[:-1])

    def _shared(self, acted: Keys, negatives: Negatives) -> "_Shared":
        """What every owner sends unasked: what was drawn of its items, and those of all targets."""
        held, ranks = self.vocabulary, self.ranks
        items = held.item_rows()
        sizes = ranks.gather(len(items))
        drawn = self._drawn(items, sizes, negatives)
        rows = held.lookup(acted[owners(acted, ranks.world) == ranks.rank])
        rows = np.unique(np.concatenate([drawn, rows[rows >= 0]]))
        keys = held.keys_of(rows)
        rows, keys = rows[order := np.argsort(keys)], keys[order]
        fresh = np.isin(rows, held.fresh)
        parts = ranks.gather((keys, held.keys_of(drawn), held.popularity(rows), fresh))
        keys = np.concatenate([k for k, *_ in parts])
        order = np.argsort(keys)
        return _Shared(
            of_owner=[k for k, *_ in parts],
            keys=keys[order],
            drawn=np.concatenate([d for _, d, _, _ in parts]),
            popularity=np.concatenate([p for _, _, p, _ in parts])[order],
            fresh=np.concatenate([f for *_, f in parts])[order],
            total=sum(sizes),
        )

    def _drawn(self, items: Ints, sizes: list[int], negatives: Negatives) -> Ints:
        """Which of this rank's items are negatives, all ranks drawing the same of all items."""
        total = sum(sizes)
        if total <= negatives.all_up_to:
            return items
        picks = np.random.default_rng(negatives.seed).integers(total, size=negatives.count)
        picks -= sum(sizes[: self.ranks.rank])
        return items[picks[(picks >= 0) & (picks < len(items))]]


@dataclasses.dataclass(frozen=True)
class _Shared:
    of_owner: list[Keys]  # each ascending
    keys: Keys  # (B,) all of these, ascending
    drawn: Keys  # (K,)
    popularity: npt.NDArray[np.float32]  # (B, horizons)
    fresh: npt.NDArray[np.bool_]  # (B,)
    total: int

    def items(self, places: Ints, acted: Keys, asked: Asked) -> Items:
        in_batch, _ = self._find(acted)
        wanting = np.flatnonzero(asked.acted)
        wanted, found = self._find(asked.targets[wanting])
        return Items(
            keys=self.keys,
            places=places,
            popularity=self.popularity,
            fresh=self.fresh,
            total=self.total,
            sampled=self._find(self.drawn)[0],
            in_batch=in_batch,
            wanted=wanted,
            wanting=wanting[found],
        )

    def _find(self, keys: Keys) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """Where those are that are here, and which of the keys these are."""
        if not len(self.keys):
            return np.empty(0, np.int64), np.zeros(len(keys), np.bool_)
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        found = self.keys[at] == keys
        return at[found], found


def _without(keys: Keys, others: Keys) -> Keys:
    """The keys that are not among the others, both ascending."""
    if not len(others):
        return keys
    at = np.minimum(np.searchsorted(others, keys), len(others) - 1)
    return keys[others[at] != keys]


def _share(whole: int, ranks: Ranks) -> int:
    """A rank's part of a budget: at least one."""
    return max(1, whole // ranks.world + (ranks.rank < whole % ranks.world))
