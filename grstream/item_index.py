"""Which items score highest for a user: an index of item vectors, searched exactly or approximately.

A score is user · vector + prior. Both indexes add it up in float64 for the items they answer with and order
by it, equal ones by place: what is answered does not depend on blocks, threads or the device's products.
Imports neither Ray nor Kafka.
"""

import importlib
import logging
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from kernels.matmul import matmul

logger = logging.getLogger(__name__)

Places = npt.NDArray[np.int64]
# Which places must not be found: a mask over all (n,), sorted places for all users, or these for each user.
Barred = npt.NDArray[np.bool_] | Places | Sequence[Places | None] | None

NOWHERE = -1  # the place beyond the last one found
BLOCK = 65_536  # rows: of 16,384 to 131,072 the fastest on a CPU
FEW = 4_096  # so many allowed places are searched one by one by an approximate index


class ItemIndex(Protocol):
    """An immutable index over n places."""

    def search(
        self, users: torch.Tensor, k: int, barred: Barred = None, allowed: Places | None = None
    ) -> tuple[npt.NDArray[np.float32], Places]:
        """Scores and places (B, k) of the best for users (B, d) float32, best first, equal ones by place.

        `allowed` are the places (ascending) that may be found, for all users; what is barred is not found
        even then. Where fewer than k may be found the rest is NOWHERE, with a score of -inf. Raises
        ValueError for users that are not finite.
        """
        ...


class ExactIndex:
    """Products with a block of vectors at a time: nothing of size B · n is ever held.

    The vectors are kept as blocks, so that a later version shares those that did not change. They must not be
    changed by the caller. Raises ValueError for vectors or priors that are not finite.
    """

    def __init__(self, vectors: torch.Tensor, prior: torch.Tensor, block: int = BLOCK) -> None:
        """Of vectors (n, d) and priors (n,), float32, on one device."""
        _require(vectors, prior)
        self.block = block
        self._vectors, self._prior = list(vectors.split(block)), list(prior.split(block))
        if not len(vectors):
            self._vectors, self._prior = [], []
        self._count, self._dim = vectors.shape
        self._bounds = [_bounds(v, p) for v, p in zip(self._vectors, self._prior, strict=True)]

    def __len__(self) -> int:
        return self._count

    def after(self, places: Places, vectors: torch.Tensor, prior: torch.Tensor) -> "ExactIndex":
        """A later version that differs at these places (m,), ascending; those beyond the last are appended.

        Blocks without any of them are shared. Raises ValueError where appended places leave a hole.
        """
        _require(vectors, prior)
        count = max(self._count, int(places[-1]) + 1 if len(places) else 0)
        if count - self._count != int((places >= self._count).sum()):
            raise ValueError(f"{self._count} places, and those appended do not follow one another: {places}")
        other = ExactIndex.__new__(ExactIndex)
        other.block, other._count, other._dim = self.block, count, self._dim
        other._vectors, other._prior, other._bounds = [*self._vectors], [*self._prior], [*self._bounds]
        for number in np.unique(places // self.block).tolist():
            start, stop = number * self.block, min((number + 1) * self.block, count)
            first, last = np.searchsorted(places, (start, stop))
            rows = vectors.new_empty(stop - start, self._dim)
            priors = prior.new_empty(stop - start)
            if number < len(self._vectors):
                rows[: len(self._vectors[number])] = self._vectors[number]
                priors[: len(self._prior[number])] = self._prior[number]
            else:
                other._vectors.append(rows)
                other._prior.append(priors)
                other._bounds.append((0.0, 0.0))
            at = torch.from_numpy(places[first:last] - start).to(rows.device)
            rows[at], priors[at] = vectors[first:last], prior[first:last]
            other._vectors[number], other._prior[number] = rows, priors
            # An upper bound will do; of the whole block it would take as long as copying it.
            changed = _bounds(vectors[first:last], prior[first:last])
            norm, size = other._bounds[number]
            other._bounds[number] = max(norm, changed[0]), max(size, changed[1])
        return other

    def with_priors(self, prior: torch.Tensor) -> "ExactIndex":
        """The same vectors with other priors (n,): a version's change with time for all items."""
        if prior.shape != (self._count,) or not bool(torch.isfinite(prior).all()):
            raise ValueError(f"{self._count} finite priors are wanted, not {tuple(prior.shape)}")
        other = ExactIndex.__new__(ExactIndex)
        other.block, other._count, other._dim = self.block, self._count, self._dim
        other._vectors, other._prior = self._vectors, list(prior.split(self.block)) if len(prior) else []
        sizes = [float(part.abs().max()) for part in other._prior]
        other._bounds = [(norm, size) for (norm, _), size in zip(self._bounds, sizes, strict=True)]
        return other

    def take(self, places: Places) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors (m, d) and priors (m,) of places in any order."""
        order = np.argsort(places, kind="stable")
        cuts = np.searchsorted(places[order], np.arange(len(self._vectors) + 1) * self.block)
        back = torch.from_numpy(np.argsort(order, kind="stable"))
        vectors, priors = [], []
        for number in np.flatnonzero(np.diff(cuts)).tolist():
            at = torch.from_numpy(places[order[cuts[number] : cuts[number + 1]]] - number * self.block)
            at = at.to(self._vectors[number].device)
            vectors.append(self._vectors[number].index_select(0, at))
            priors.append(self._prior[number].index_select(0, at))
        if not vectors:
            return torch.empty(0, self._dim), torch.empty(0)
        back = back.to(vectors[0].device)
        return torch.cat(vectors)[back], torch.cat(priors)[back]

    def search(
        self, users: torch.Tensor, k: int, barred: Barred = None, allowed: Places | None = None
    ) -> tuple[npt.NDArray[np.float32], Places]:
        users = _asking(users)
        best = _Best(users, k)
        if k < 1 or not len(users):
            return best.answer()
        if allowed is not None:
            vectors, priors = self.take(allowed)
            places, parts = (
                allowed,
                list(zip(vectors.split(self.block), priors.split(self.block), strict=True)),
            )
            bounds = [_bounds(*part) for part in parts]
        else:
            places, parts = None, list(zip(self._vectors, self._prior, strict=True))
            bounds = self._bounds
        start = 0
        for (vectors, prior), bound in zip(parts, bounds, strict=True):
            stop = start + len(vectors)
            at = np.arange(start, stop) if places is None else places[start:stop]
            if len(vectors):
                scores = _products(users, vectors, prior)
                _bar(scores, at, barred)
                best.see(scores, at, vectors, prior, bound)
            start = stop
        return best.answer()


class FaissIndex:
    """Cells of similar vectors (IVF), of which the nearest to a user are searched; by faiss, on a CPU.

    What is found is scored exactly. Building is deterministic; so are answers. Filters are looked at within
    the cells; where too few may be found there, all cells are searched. It holds the vectors twice.
    """

    def __init__(
        self,
        exact: ExactIndex,
        cells: int | None = None,
        probes: int | None = None,
        seed: int = 0,
        trained_on: int = 64,
    ) -> None:
        """Over the same places as `exact`.

        `cells`: by default 4 √n. `probes`: cells searched for a user, by default a sixteenth of them and 8 at
        least. `trained_on`: vectors a cell that the cells are found from, drawn by `seed`. Raises ImportError
        without faiss (the extra `ann`).
        """
        faiss: Any = importlib.import_module("faiss")  # its own stubs lag behind it
        self._faiss = faiss
        self.exact = exact
        n = len(exact)
        self.cells = max(1, min(cells or round(4 * n**0.5), n))
        self.probes = min(probes or max(8, self.cells // 16), self.cells)
        dim = exact._dim + 1
        quantizer = faiss.IndexFlatIP(dim)
        self._index = faiss.IndexIVFFlat(quantizer, dim, self.cells, faiss.METRIC_INNER_PRODUCT)
        self._index.own_fields = True
        quantizer.this.disown()
        self._index.cp.seed = seed
        self._index.cp.max_points_per_centroid = trained_on
        self._index.cp.min_points_per_centroid = 1
        if n:
            rows = _augmented(*exact.take(np.arange(n)))
            self._index.train(rows)
            self._index.add(rows)

    def after(self, places: Places, vectors: torch.Tensor, prior: torch.Tensor) -> "FaissIndex":
        """As `ExactIndex.after`; the cells stay what they were, and may fit other items less and less."""
        other = FaissIndex.__new__(FaissIndex)
        other.exact = self.exact.after(places, vectors, prior)
        other.cells, other.probes, other._faiss = self.cells, self.probes, self._faiss
        faiss = self._faiss
        other._index = faiss.clone_index(self._index)
        if len(places):
            other._index.remove_ids(faiss.IDSelectorBatch(places[places < len(self.exact)]))
            other._index.add_with_ids(_augmented(vectors, prior), places)
        return other

    def with_priors(self, prior: torch.Tensor) -> "FaissIndex":
        """As `ExactIndex.with_priors`: scores have the new ones, cells are searched by the old."""
        other = FaissIndex.__new__(FaissIndex)
        other.exact = self.exact.with_priors(prior)
        other.cells, other.probes, other._faiss = self.cells, self.probes, self._faiss
        other._index = self._index
        return other

    def __len__(self) -> int:
        return len(self.exact)

    def search(
        self, users: torch.Tensor, k: int, barred: Barred = None, allowed: Places | None = None
    ) -> tuple[npt.NDArray[np.float32], Places]:
        users = _asking(users)
        if (allowed is not None and len(allowed) <= FEW) or k >= len(self) or k < 1 or not len(users):
            return self.exact.search(users, k, barred, allowed)
        if isinstance(barred, np.ndarray) or barred is None:
            return self._search(users, k, barred, allowed)
        rows = [self._search(users[i : i + 1], k, own, allowed) for i, own in enumerate(barred)]
        return np.concatenate([r[0] for r in rows]), np.concatenate([r[1] for r in rows])

    def recall(self, users: torch.Tensor, k: int) -> float:
        """Share of the exact k best that is found, over users (B, d); logged."""
        _, found = self.search(users, k)
        _, truth = self.exact.search(users, k)
        hits = sum(len(np.intersect1d(f, t[t >= 0])) for f, t in zip(found, truth, strict=True))
        share = hits / max(int((truth >= 0).sum()), 1)
        logger.info("recall at %d: %.4f, %d of %d cells searched", k, share, self.probes, self.cells)
        return share

    def _search(
        self, users: torch.Tensor, k: int, barred: npt.NDArray | None, allowed: Places | None
    ) -> tuple[npt.NDArray[np.float32], Places]:
        """With one filter for all users."""
        faiss = self._faiss
        may = None
        if barred is not None or allowed is not None:
            may = np.zeros(len(self), np.bool_) if allowed is not None else np.ones(len(self), np.bool_)
            if allowed is not None:
                may[allowed] = True
            if barred is not None:
                may[barred] = False
        wanted = k if may is None else min(k, int(may.sum()))
        if not wanted:
            return _Best(users, k).answer()
        asked = np.ascontiguousarray(_augmented(users, torch.ones(len(users))))
        # Faiss adds up in fp32: a few more, so that what is equal to it is there to be ordered.
        over = min(k + 16, len(self))
        found = np.empty((0, 0), np.int64)
        for probes in (self.probes, self.cells):
            bits = None if may is None else np.packbits(may, bitorder="little")
            selector = None if bits is None else faiss.IDSelectorBitmap(bits)
            parameters: Any = faiss.SearchParametersIVF(nprobe=probes, sel=selector)
            _, found = self._index.search(asked, over, params=parameters)
            if ((found >= 0).sum(1) >= wanted).all():
                break
        best = _Best(users, k)
        row, column = np.nonzero(found >= 0)
        places = found[row, column]
        vectors, priors = self.exact.take(places)
        best.add(row, places, vectors, priors)
        return best.answer()


class _Best:
    """The k best seen so far of each user, by score in float64 and then by place."""

    def __init__(self, users: torch.Tensor, k: int) -> None:
        self._users, self._k = users, k
        self._wide = users.double().cpu().numpy()
        self._norms = users.norm(dim=1).double()
        self._scores = np.full((len(users), k), -np.inf)
        self._places = np.full((len(users), k), NOWHERE, np.int64)

    def see(
        self,
        scores: torch.Tensor,  # (B, m), barred ones -inf
        places: Places,  # (m,)
        vectors: torch.Tensor,  # (m, d)
        prior: torch.Tensor,  # (m,)
        bound: tuple[float, float],
    ) -> None:
        """A block's scores in fp32: those that may be among the best are added up exactly."""
        # What fp32 sums may be off by, whatever the order in which they are added up.
        off = (vectors.shape[1] + 2) * 2.0**-23 * (self._norms * bound[0] + bound[1])
        least = torch.from_numpy(self._scores[:, -1]).to(scores.device)
        if scores.shape[1] >= self._k and bool(torch.isinf(least).any()):
            own = torch.topk(scores, self._k, dim=1, sorted=False).values.min(1).values.double()
            least = torch.maximum(least, own - off)
        least = (least - off).to(scores.dtype)
        least = torch.nextafter(least, torch.full_like(least, -torch.inf))
        chosen = scores >= least.unsqueeze(1)
        if bool(torch.isinf(least).any()):
            chosen &= torch.isfinite(scores)
        row, at = chosen.nonzero(as_tuple=True)
        if len(row):
            self.add(row.cpu().numpy(), places[at.cpu().numpy()], vectors[at], prior[at])

    def add(self, rows: Places, places: Places, vectors: torch.Tensor, prior: torch.Tensor) -> None:
        """Candidates: the user that each is for (m,), its place, vector and prior."""
        products = self._wide[rows] * vectors.double().cpu().numpy()
        scores = products.sum(1) + prior.double().cpu().numpy()
        held = np.nonzero(self._places >= 0)
        rows = np.concatenate([held[0], rows])
        places = np.concatenate([self._places[held], places])
        scores = np.concatenate([self._scores[held], scores])
        order = np.lexsort((places, -scores, rows))
        rows, places, scores = rows[order], places[order], scores[order]
        rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
        kept = rank < self._k
        self._places[rows[kept], rank[kept]] = places[kept]
        self._scores[rows[kept], rank[kept]] = scores[kept]

    def answer(self) -> tuple[npt.NDArray[np.float32], Places]:
        return self._scores.astype(np.float32), self._places


def _products(users: torch.Tensor, vectors: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
    if len(users) == 1:
        return torch.addmv(prior, vectors, users[0]).unsqueeze(0)
    return matmul(users, vectors.t(), prior)


def _bar(scores: torch.Tensor, places: Places, barred: Barred) -> None:
    """-inf where a place (m,), ascending, is barred."""
    if barred is None:
        return
    if isinstance(barred, np.ndarray):
        own: npt.NDArray[Any] = barred
        at = np.flatnonzero(own[places]) if own.dtype == np.bool_ else _positions(places, own)
        if len(at):
            scores[:, torch.from_numpy(at).to(scores.device)] = -torch.inf
        return
    for row, of_row in enumerate(barred):
        if of_row is not None and len(at := _positions(places, of_row)):
            scores[row, torch.from_numpy(at).to(scores.device)] = -torch.inf


def _positions(places: Places, some: Places) -> Places:
    """Where those of `some`, ascending, that are among the places stand there."""
    some = some[slice(*np.searchsorted(some, (places[0], places[-1] + 1)))]
    at = np.searchsorted(places, some)
    return at[places[np.minimum(at, len(places) - 1)] == some]


def _asking(users: torch.Tensor) -> torch.Tensor:
    if not torch.isfinite(users).all():
        raise ValueError("a user's vector is not finite")
    return users


def _require(vectors: torch.Tensor, prior: torch.Tensor) -> None:
    if prior.shape != vectors.shape[:1]:
        raise ValueError(f"{len(vectors)} vectors, and a prior of shape {tuple(prior.shape)}")
    if not (torch.isfinite(vectors).all() and torch.isfinite(prior).all()):
        raise ValueError("a vector or a prior is not finite")


def _bounds(vectors: torch.Tensor, prior: torch.Tensor) -> tuple[float, float]:
    """The greatest norm of a vector and the greatest size of a prior."""
    if not len(vectors):
        return 0.0, 0.0
    return float(torch.linalg.vector_norm(vectors, dim=1).max()), float(prior.abs().max())


def _augmented(vectors: torch.Tensor, last: torch.Tensor) -> npt.NDArray[np.float32]:
    return torch.cat([vectors, last.to(vectors.device).unsqueeze(1)], 1).cpu().numpy()
