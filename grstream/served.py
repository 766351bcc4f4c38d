"""A weights version made ready to serve: its model, embedding table, items and their vectors."""

import dataclasses
import functools
import hashlib

import numpy as np
import numpy.typing as npt
import torch

from grstream.embedding_table import EmbeddingTable
from grstream.histories import History
from grstream.item_index import ExactIndex, FaissIndex
from grstream.keys import ABSENT, Keys
from grstream.model import HSTU
from grstream.schema import Columns, Schema, placed
from grstream.scores import NonFiniteScores, UnusableWeights, WrongFeatures
from grstream.shelf import in_columns
from grstream.weights import PRIOR, Manifest, Weights, WeightsVersion

RECALL_USERS, RECALL_AT = 64, 100  # of the recall that is logged, item vectors standing for users'


@dataclasses.dataclass(frozen=True)
class Served:
    """All that answers depend on, exchanged as one."""

    manifest: Manifest
    schema: Schema  # that the weights were trained with
    given: Schema  # that histories and requests come in
    columns: Columns  # where the features of `schema` are among those given
    model: HSTU
    table: EmbeddingTable
    item_names: dict[int, str]
    items: npt.NDArray[np.bool_]  # (n,) which places hold an item
    index: ExactIndex | FaissIndex  # over all places

    @property
    def number(self) -> int:
        return self.manifest.number

    @property
    def interleaved(self) -> bool:
        return self.manifest.recipe.model.layout == "interleaved"

    def names_of(self, items: Keys) -> dict[int, str]:
        """The ids of those items whose id is a string."""
        return {key: self.item_names[key] for key in items.tolist() if key in self.item_names}

    def announced_vectors(self, items: Keys, features: Keys) -> torch.Tensor:
        """Retrieval vectors (a, d) of items without a row, from what the catalogue says of them."""
        with torch.inference_mode():
            vectors, _ = candidate_vectors(self, items, in_columns(self, features))
            return self.model.item_vectors(vectors).float()

    @functools.cached_property
    def root(self) -> bytes:
        """What the addresses of all its cache pages begin with."""
        told = f"{self.manifest.lineage} {self.number} {self.schema}"
        return hashlib.blake2b(told.encode(), digest_size=16).digest()


def build(
    version: WeightsVersion,
    device: torch.device,
    given: Schema | None,
    before: Served | None,
    approximate: bool = False,
) -> Served:
    """Raises UnusableWeights. `approximate`: retrieval by faiss."""
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
    priors = prior.to(device)
    with torch.inference_mode():
        if before is None or changed is None:
            index = _indexed(ExactIndex(model.item_vectors(table.rows).float(), priors), approximate)
        else:
            at = torch.from_numpy(changed).to(device)
            vectors = model.item_vectors(table.rows.index_select(0, at)).float()
            index = before.index.after(changed, vectors, priors[at]).with_priors(priors)
    return Served(
        manifest=version.manifest,
        schema=schema,
        given=given,
        columns=schema.columns_in(given),
        model=model,
        table=table,
        item_names=weights.item_names,
        items=weights.items,
        index=index,
    )


def _indexed(exact: ExactIndex, approximate: bool) -> ExactIndex | FaissIndex:
    """The index, or an approximate one over the same places, whose recall is logged."""
    if not approximate:
        return exact
    index = FaissIndex(exact)
    asked = np.random.default_rng(0).permutation(len(exact))[:RECALL_USERS]
    index.recall(exact.take(asked)[0], RECALL_AT)
    return index


def _changed(version: WeightsVersion, before: Manifest) -> npt.NDArray[np.int64] | None:
    """Where a version differs from the one `before`; None where it might anywhere."""
    changed, manifest = version.changed, version.manifest
    if changed is None or (changed.since, manifest.lineage) != (before.number, before.lineage):
        return None
    return changed.places if manifest.recipe == before.recipe else None


def _require_finite(version: WeightsVersion, changed: npt.NDArray[np.int64] | None) -> None:
    weights = version.weights
    if changed is not None:  # the rest was looked at before
        at = (weights.keys[changed], weights.rows[changed], weights.items[changed])
        weights = Weights(weights.dense, *at, item_names={})
    bad = weights.not_finite()
    if bad is not None:
        raise UnusableWeights(f"weights version {version.number}: {bad} holds values that are not finite")


def require_finite_scores(served: Served, scores: torch.Tensor) -> None:
    if not torch.isfinite(scores).all():
        raise NonFiniteScores(
            f"version {served.manifest.number} gave scores that are not finite: its weights are too large"
        )


def as_trained(
    served: Served, history: History, features: Keys | None, candidates: int
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


def candidate_vectors(
    served: Served, items: Keys, features: Keys
) -> tuple[torch.Tensor, npt.NDArray[np.bool_]]:
    """Item vector plus those of its features, column by column as in training; and which items are known."""
    vectors, known = served.table.vectors(items)
    for column in features.T[served.schema.contexts :]:
        present = np.flatnonzero(column != ABSENT)
        at = torch.from_numpy(present).to(vectors.device)
        vectors.index_add_(0, at, served.table.vectors(column[present])[0])
    return vectors, known
