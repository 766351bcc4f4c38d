"""Histories and candidates to scores, by whichever weights version was swapped in last.

Ranking is M-FALCON (paper section 3.4): a user's history is encoded once, its keys and values are kept, and
candidates are scored against them in micro-batches of b_m. No score depends on the micro-batch, on the order
of the candidates or on what the cache held (law 2). An answer comes from one version and names it. Imports
neither Ray nor Kafka. Thread-safe: swapping builds beside and then exchanges one reference; requests take
turns.
"""

import dataclasses
import logging
import threading
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from grstream.config import ServeConfig
from grstream.embedding_table import EmbeddingTable
from grstream.histories import History
from grstream.keys import ABSENT, Keys
from grstream.kv_cache import Entry, KVCache
from grstream.model import HSTU, Cache
from grstream.schema import Columns, Schema, placed
from grstream.scores import (
    EngineNotReady,
    NonFiniteScores,
    Ranked,
    Retrieved,
    Reuse,
    UnusableWeights,
    WrongFeatures,
)
from grstream.tokens import Events, Kind, Tokens, candidate_kind, changed_context, memory_tokens
from grstream.weights import PRIOR, Manifest, Weights, WeightsVersion

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Served:
    """All that answers depend on, exchanged as one."""

    manifest: Manifest
    schema: Schema  # that the weights were trained with
    given: Schema  # that histories and requests come in
    columns: Columns  # where the features of `schema` are among those given
    model: HSTU
    table: EmbeddingTable
    item_names: dict[int, str]
    items: npt.NDArray[np.bool_]  # (n,) which places hold an item
    item_keys: Keys  # (i,) of these, in the order of places
    item_vectors: torch.Tensor  # (i, d)
    prior: torch.Tensor  # (i,) what is added to an item's score in retrieval

    @property
    def interleaved(self) -> bool:
        return self.manifest.recipe.model.layout == "interleaved"


class Engine:
    """Scores by the newest version it was given, over a cache of keys and values per user.

    Histories and requests come with the actions and feature columns of `schema`, by default each version's
    own. One of the two schemas may have grown from the other: a version is told of the features that it was
    trained with and that are given, the others are absent to it, and it scores the actions that it knows.
    """

    def __init__(
        self, config: ServeConfig, device: torch.device | str = "cpu", schema: Schema | None = None
    ) -> None:
        self.device = torch.device(device)
        self._schema = schema
        self._micro_batch = config.micro_batch
        self._lock = threading.Lock()
        self.cache = KVCache(config.cache_bytes)
        self._served: _Served | None = None

    @property
    def manifest(self) -> Manifest | None:
        """Of the version being served."""
        served = self._served
        return None if served is None else served.manifest

    def swap(self, version: WeightsVersion) -> None:
        """Serve another version. Requests under way end with the one they began with.

        One that says where it differs from the version being served is built from it: what did not change is
        copied. Raises UnusableWeights, and goes on with the version it had.
        """
        served = _build(version, self.device, self._schema, self._served)
        if served.given != served.schema and (self._served is None or self._served.schema != served.schema):
            logger.warning(
                "weights version %d was trained with %s, and is asked with %s: what only one of the two "
                "names has no part in its answers",
                *(version.number, served.schema, served.given),
            )
        with self._lock:
            self._served = served
            self.cache.clear()

    @torch.inference_mode()
    def rank(
        self,
        history: History,
        candidates: Keys,  # (C,) item keys
        at_ms: int,
        *,
        features: Keys | None = None,  # (C, F) feature keys, ABSENT where there is none
        user: int | None = None,
    ) -> Ranked:
        """The probability of each action for each candidate, shown at `at_ms` after `history`.

        The columns of context are the request's, so they must be the same for all candidates. `user` is
        where keys and values are kept; without one they are not. Raises EngineNotReady and WrongFeatures.
        """
        with self._lock:
            served = self._ready()
            history, features = _as_trained(served, history, features, len(candidates))
            items, known = _item_vectors(served, candidates, features)
            cache, reuse = self._encode(served, history, user)
            if len(candidates):
                cache = _in_context(served, cache, history, features[0, : served.schema.contexts], at_ms)
            kind = candidate_kind(served.interleaved)
            logits = torch.cat(
                [
                    served.model.action_logits(served.model.score(cache, queries)).float()
                    for queries in self._micro_batches(items, int(cache.lengths), at_ms, kind)
                ]
            )  # (C, A)
        _require_finite_scores(served, logits)
        probabilities = torch.sigmoid(logits).cpu().numpy()
        return Ranked(probabilities, known, served.manifest.number, reuse, served.schema.actions)

    @torch.inference_mode()
    def retrieve(
        self,
        history: History,
        k: int,
        at_ms: int,
        *,
        context: Keys | None = None,  # (C,) feature keys, ABSENT where there is none
        exclude: Keys | None = None,
        user: int | None = None,
    ) -> Retrieved:
        """The k items of the highest score at `at_ms`, by exact search: user · item vector + prior.

        Raises EngineNotReady and WrongFeatures.
        """
        with self._lock:
            served = self._ready()
            asked = np.full((1, len(served.given.features)), ABSENT, np.int64)
            if context is not None and len(context) != served.given.contexts:
                raise WrongFeatures(
                    f"expected {served.given.contexts} features of context, got {len(context)}"
                )
            if context is not None:
                asked[0, : served.given.contexts] = context
            history, features = _as_trained(served, history, asked, 1)
            cache, reuse = self._encode(served, history, user)
            newest = cache.newest  # before the request's context
            cache = _in_context(served, cache, history, features[0, : served.schema.contexts], at_ms)
            nothing = newest.new_zeros(newest.shape)
            (request,) = self._micro_batches(nothing, int(cache.lengths), at_ms, Kind.REQUEST)
            user_vector = served.model.user_vectors(newest + served.model.score(cache, request))  # (1, d)
        scores = (user_vector @ served.item_vectors.T)[0].float() + served.prior  # (n,)
        _require_finite_scores(served, scores)
        allowed = len(scores)
        if exclude is not None and len(exclude):
            barred = np.isin(served.item_keys, exclude)
            allowed -= int(barred.sum())
            scores[torch.from_numpy(barred).to(self.device)] = -torch.inf
        best = torch.topk(scores, min(k, allowed))
        items = served.item_keys[best.indices.cpu().numpy()]
        names = {key: served.item_names[key] for key in items.tolist() if key in served.item_names}
        return Retrieved(items, names, best.values.cpu().numpy(), served.manifest.number, reuse)

    def _ready(self) -> _Served:
        if self._served is None:
            raise EngineNotReady("no weights version is loaded yet: the trainer has to publish one first")
        return self._served

    def _encode(self, served: _Served, history: History, user: int | None) -> tuple[Cache, Reuse]:
        """Keys and values of a history, from the cache as far as it goes."""
        number = served.manifest.number
        entry = self.cache.get(user) if user is not None else None
        reuse = Reuse.MISS if entry is None else entry.reuse(number, history)
        if entry is not None and reuse is Reuse.HIT:
            return entry.cache, reuse
        held = entry if reuse is Reuse.EXTEND else None
        begin = 0 if held is None else len(held.history.items)
        cache = served.model.empty_cache(1) if held is None else held.cache
        if begin < len(history.items):
            cache = served.model.extend(cache, _memory_tokens(served, history, begin))
        if user is not None:
            self.cache.put(user, Entry(number, history, cache))
        return cache, reuse

    def _micro_batches(self, items: torch.Tensor, prefix: int, at_ms: int, kind: Kind) -> Iterator[Tokens]:
        """Candidates of one sequence, each behind the whole of its tokens."""
        for part in items.split(self._micro_batch):
            count = torch.tensor([len(part)], device=self.device)
            prefixes, times = count.new_full((len(part),), prefix), count.new_full((len(part),), at_ms)
            yield Tokens.of_candidates(count, part, prefixes, times, kind)


def _build(
    version: WeightsVersion, device: torch.device, given: Schema | None, before: _Served | None
) -> _Served:
    weights, recipe = version.weights, version.manifest.recipe
    changed = None if before is None else _changed(version, before.manifest)
    _require_finite(version, changed)
    schema = Schema.of(recipe)
    given = given or schema
    problem = given.not_grown_from(schema)
    if problem is not None and schema.not_grown_from(given) is not None:
        raise UnusableWeights(
            f"weights version {version.number} was trained with other actions or features than are "
            f"configured: {problem}"
        )
    model = HSTU(recipe.model, actions=len(recipe.actions))
    dense = {name: torch.from_numpy(np.array(a)) for name, a in weights.dense.items()}
    prior = dense.pop(PRIOR, torch.zeros(len(weights.keys)))
    try:
        if prior.shape != (len(weights.keys),):
            raise ValueError(f"the prior is of shape {tuple(prior.shape)} for {len(weights.keys)} keys")
        model.load_state_dict(dense)
    except (RuntimeError, ValueError) as error:
        raise UnusableWeights(
            f"weights version {version.number} is not what its recipe describes: {error}"
        ) from error
    if weights.rows.shape[1] != recipe.model.dim:
        raise UnusableWeights(
            f"weights version {version.number} is not what its recipe describes: its rows are of "
            f"{weights.rows.shape[1]} numbers"
        )
    model.eval().requires_grad_(False).to(device)
    if before is None or changed is None:
        table = EmbeddingTable.of(weights, recipe.vocabulary_seed, device)
    else:
        table = before.table.after(weights, changed)
    with torch.inference_mode():
        if before is None or changed is None:
            vectors = model.item_vectors(_at(table.rows, np.flatnonzero(weights.items)))
        else:
            vectors = _item_vectors_after(before, model, table.rows, weights.items, changed)
    return _Served(
        manifest=version.manifest,
        schema=schema,
        given=given,
        columns=schema.columns_in(given),
        model=model,
        table=table,
        item_names=weights.item_names,
        items=weights.items,
        item_keys=weights.keys[weights.items],
        item_vectors=vectors,
        prior=prior[torch.from_numpy(weights.items)].to(device),
    )


def _changed(version: WeightsVersion, before: Manifest) -> npt.NDArray[np.int64] | None:
    """Where a version differs from the one `before`; None where it might anywhere."""
    changed, manifest = version.changed, version.manifest
    if changed is None or (changed.since, manifest.lineage) != (before.number, before.lineage):
        return None
    return changed.places if manifest.recipe == before.recipe else None


def _item_vectors_after(
    before: _Served,
    model: HSTU,
    rows: torch.Tensor,  # (n, d)
    items: npt.NDArray[np.bool_],  # (n,)
    changed: npt.NDArray[np.int64],  # places, ascending
) -> torch.Tensor:
    """The item vectors of a version. Each is a function of its row: those of rows that stayed are copied."""
    if not len(before.item_vectors):
        return model.item_vectors(_at(rows, np.flatnonzero(items)))
    places = np.flatnonzero(items)
    were = np.zeros(len(items), np.int64)  # where a place's item vector was; of one that had none, anywhere
    were[: len(before.items)] = np.maximum(np.cumsum(before.items) - 1, 0)
    vectors = _at(before.item_vectors, were[places])
    fresh = changed[items[changed]]
    at = torch.from_numpy(np.searchsorted(places, fresh)).to(rows.device)
    vectors[at] = model.item_vectors(_at(rows, fresh))
    return vectors


def _at(rows: torch.Tensor, places: npt.NDArray[np.int64]) -> torch.Tensor:
    return rows.index_select(0, torch.from_numpy(places).to(rows.device))


def _require_finite(version: WeightsVersion, changed: npt.NDArray[np.int64] | None) -> None:
    weights = version.weights
    if changed is not None:  # the rest was looked at before
        at = (weights.keys[changed], weights.rows[changed], weights.items[changed])
        weights = Weights(weights.dense, *at, item_names={})
    bad = weights.not_finite()
    if bad is not None:
        raise UnusableWeights(f"weights version {version.number}: {bad} holds values that are not finite")


def _require_finite_scores(served: _Served, scores: torch.Tensor) -> None:
    if not torch.isfinite(scores).all():
        raise NonFiniteScores(
            f"version {served.manifest.number} gave scores that are not finite: its weights are too large"
        )


def _as_trained(
    served: _Served, history: History, features: Keys | None, candidates: int
) -> tuple[History, Keys]:
    """The history and the candidates' feature keys, all ABSENT by default, in the columns of the weights."""
    expected = len(served.given.features)
    if features is None:
        features = np.full((candidates, expected), ABSENT, np.int64)
    if history.features.shape[1] != expected or features.shape != (candidates, expected):
        raise WrongFeatures(
            f"version {served.manifest.number} is asked with the features {list(served.given.features)}, "
            f"so expected {expected} columns; the history has {history.features.shape[1]}, the candidates "
            f"are of shape {features.shape}"
        )
    contexts = served.given.contexts
    if (features[:, :contexts] != features[:1, :contexts]).any():
        raise WrongFeatures("context is the request's: its features must be the same for all candidates")
    if served.given.features == served.schema.features:
        return history, features
    history = dataclasses.replace(history, features=placed(history.features, served.columns))
    return history, placed(features, served.columns)


def _item_vectors(served: _Served, items: Keys, features: Keys) -> tuple[torch.Tensor, npt.NDArray[np.bool_]]:
    """Item vector plus those of its features, column by column as in training; and which items are known."""
    vectors, known = served.table.vectors(items)
    for column in features.T[served.schema.contexts :]:
        present = np.flatnonzero(column != ABSENT)
        at = torch.from_numpy(present).to(vectors.device)
        vectors.index_add_(0, at, served.table.vectors(column[present])[0])
    return vectors, known


def _memory_tokens(served: _Served, history: History, begin: int) -> Tokens:
    """The history's events from `begin` on, as the tokens of one sequence."""
    vectors, _ = _item_vectors(served, history.items[begin:], history.features[begin:])
    context = history.features[:, : served.schema.contexts]
    before = np.concatenate([np.full_like(context[:1], ABSENT), context[:-1]])
    event, column = changed_context(context[begin:], before[begin:])
    device = vectors.device
    events = Events(
        lengths=torch.tensor([len(vectors)], device=device),
        items=vectors,
        actions=torch.from_numpy(history.actions[begin:].astype(np.int64)).to(device),
        times=torch.from_numpy(history.times[begin:].astype(np.int64)).to(device),
        contexts=served.table.vectors(context[begin:][event, column])[0],
        context_of=torch.from_numpy(event).to(device),
    )
    return memory_tokens(events, served.interleaved)[0]


def _in_context(served: _Served, cache: Cache, history: History, context: Keys, at_ms: int) -> Cache:
    """The cache of a history, and behind it what the request's context (C,) changes."""
    contexts = len(context)
    last = history.features[-1:, :contexts] if len(history.items) else np.full_like(context, ABSENT)
    _, column = changed_context(context[None], last.reshape(1, -1))
    if not len(column):
        return cache
    times = cache.times.new_full((len(column),), at_ms)
    tokens = Tokens.of_memory(
        lengths=cache.lengths.new_full((1,), len(column)),
        vectors=served.table.vectors(context[column])[0],
        kinds=torch.full_like(times, Kind.CONTEXT),
        actions=torch.zeros_like(times),
        times=times,
    )
    return served.model.extend(cache, tokens)
