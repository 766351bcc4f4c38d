"""What may be retrieved: a version's items less those withdrawn, and those announced that it does not know.

An announced item that nobody has touched has no row: its vector is made as an unknown candidate's is, from
its key's initial vector and its features', and it has no prior. Training teaches features to be found by
themselves (`Learner._described_loss`).
"""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from grstream.catalogue import Catalogue
from grstream.item_index import NOWHERE, ExactIndex, ItemIndex
from grstream.keys import ABSENT, Keys
from grstream.keytable import KeyTable
from grstream.schema import placed

if TYPE_CHECKING:
    from grstream.served import Served

Floats = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True, eq=False)
class Shelf:
    """Of one version and one catalogue."""

    keys: Keys  # (n,) by place of the version
    places: KeyTable
    index: ItemIndex  # over these places
    barred: npt.NDArray[np.bool_]  # (n,) what is no item, or withdrawn
    new: Keys  # (a,) announced ones
    new_index: ItemIndex
    catalogue: Catalogue | None

    @classmethod
    def of(cls, served: "Served", catalogue: Catalogue | None) -> "Shelf":
        barred = ~served.items
        new = np.zeros(0, np.int64)
        features = np.zeros((0, len(served.given.features) - served.given.contexts), np.int64)
        if catalogue is not None:
            at = served.table.places.find(catalogue.keys)
            withdrawn = at[(at >= 0) & ~catalogue.available]
            barred[withdrawn] = True
            known = at >= 0
            known[known] = served.items[at[known]]
            announced = np.flatnonzero(catalogue.available & ~known)
            new, features = catalogue.keys[announced], catalogue.features[announced]
        vectors = served.announced_vectors(new, features)
        priors = vectors.new_zeros(len(vectors))
        return cls(
            served.table.keys,
            served.table.places,
            served.index,
            barred,
            new,
            ExactIndex(vectors, priors),
            catalogue,
        )

    def search(
        self,
        user: torch.Tensor,  # (1, d)
        k: int,
        exclude: Keys | None,
        allow: Keys | None,
    ) -> tuple[Keys, Floats]:
        """The k items of the highest score, best first: (k,) and (k,), fewer where there are no more."""
        barred = self.barred
        if exclude is not None and len(exclude):
            barred = barred.copy()
            barred[self._places(exclude)] = True
        allowed = None if allow is None else np.unique(self._places(allow))
        scores, places = self.index.search(user, k, barred, allowed)
        found = places[0] != NOWHERE
        scores, keys = scores[0][found], self.keys[places[0][found]]
        if not len(self.new):
            return keys, scores
        unwanted = np.zeros(len(self.new), np.bool_) if allow is None else ~np.isin(self.new, allow)
        if exclude is not None:
            unwanted |= np.isin(self.new, exclude)
        more, places = self.new_index.search(user, k, unwanted)
        found = places[0] != NOWHERE
        scores = np.concatenate([scores, more[0][found]])
        keys = np.concatenate([keys, self.new[places[0][found]]])
        best = np.argsort(-scores, kind="stable")[:k]
        return keys[best], scores[best]

    def features(self, items: Keys, columns: int, contexts: int) -> Keys:
        """The catalogue's features of items in the columns that requests come in: (m, columns)."""
        out = np.full((len(items), columns), ABSENT, np.int64)
        if self.catalogue is not None and len(self.catalogue):
            order = np.argsort(self.catalogue.keys, kind="stable")
            at = np.searchsorted(self.catalogue.keys, items, sorter=order).clip(max=len(order) - 1)
            at = order[at]
            known = self.catalogue.keys[at] == items
            out[known, contexts:] = self.catalogue.features[at[known]]
        return out

    def names_of(self, items: Keys) -> dict[int, str]:
        """Ids of those whose id is a string, as the catalogue has them."""
        names = {} if self.catalogue is None else self.catalogue.names
        return {key: names[key] for key in items.tolist() if key in names}

    def _places(self, keys: Keys) -> npt.NDArray[np.int64]:
        at = self.places.find(keys)
        return at[at >= 0]


def in_columns(served: "Served", features: Keys) -> Keys:
    """Item features as the catalogue has them, in the columns of the weights."""
    whole = np.full((len(features), len(served.given.features)), ABSENT, np.int64)
    whole[:, served.given.contexts :] = features
    return whole if served.given.features == served.schema.features else placed(whole, served.columns)
