"""A seeded, endless stream of a small world, for the demo and for benchmarks.

Items stand in clusters; every user is interested in a few clusters, and now and then one of these interests
is exchanged for another. A user is shown an item, mostly of a cluster of interest, popular or new; a click
follows mostly from interest, and a like from a click and from the item's own quality. So what a user did
tells what the user will do, more so the newer it is, and what an item is like shows in who acts upon it.

New items come all the while. Item i belongs to cluster i modulo the number of clusters; with `category` an
event says so, as a feature of its item.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from grstream.config import SyntheticConfig
from grstream.events import ActionEvent
from grstream.keys import Id

CLICK, LIKE = "click", "like"
INTERESTS = 2  # clusters that interest a user at a time

# The chances below make a click about as likely as not, and say most of what there is to learn.
_SHOWN_OF_INTEREST = 0.6
_SHOWN_NEW = 0.15
_CLICK_OF_INTEREST, _CLICK_OTHERWISE = 0.85, 0.1
_LIKE_LEAST, _LIKE_MOST = 0.05, 0.75
_BLOCK = 256  # events drawn at once; fixed, so that a stream's beginning does not depend on how much is read


class SyntheticStream:
    """An iterator of events: endless, and the same for the same configuration and start.

    Event times begin at `start_ms` and advance by the world's own rate. Events have no id: a second run of
    the stream is another run of the world, not the first one sent again.
    """

    def __init__(self, config: SyntheticConfig, start_ms: int = 0) -> None:
        self._config = config
        self._random = np.random.default_rng(config.seed)
        self._interests = self._random.integers(0, config.clusters, (config.users, INTERESTS))
        self._ids = 1 + self._random.permutation(config.users)  # activity must not follow from the id
        self._items = float(config.items)
        self._time_ms = float(start_ms)
        self._block: Iterator[ActionEvent] = iter(())

    def __iter__(self) -> "SyntheticStream":
        return self

    def __next__(self) -> ActionEvent:
        event = next(self._block, None)
        while event is None:
            self._block = self._draw()
            event = next(self._block, None)
        return event

    @property
    def items(self) -> int:
        """How many items there are by now; their ids are 0 to items - 1."""
        return int(self._items)

    def cluster_of(self, item: int) -> int:
        return item % self._config.clusters

    def _draw(self) -> Iterator[ActionEvent]:
        config, random = self._config, self._random
        self._items += config.births * _BLOCK
        users = _zipf(random, np.full(_BLOCK, config.users))
        drifting = users[random.random(_BLOCK) < config.drift]
        self._interests[drifting, random.integers(0, INTERESTS, len(drifting))] = random.integers(
            0, config.clusters, len(drifting)
        )
        items = self._shown(users)
        of_interest = (self._interests[users] == (items % config.clusters)[:, None]).any(1)
        clicks = random.random(_BLOCK) < np.where(of_interest, _CLICK_OF_INTEREST, _CLICK_OTHERWISE)
        quality = (items * 0x9E3779B1 % 2**32) / 2**32
        likes = clicks & (random.random(_BLOCK) < _LIKE_LEAST + (_LIKE_MOST - _LIKE_LEAST) * quality)
        times = self._time_ms + np.cumsum(random.exponential(1000 / config.events_per_s, _BLOCK))
        self._time_ms = times[-1]
        for user, item, click, like, time in zip(
            self._ids[users].tolist(),
            items.tolist(),
            clicks.tolist(),
            likes.tolist(),
            times.astype(np.int64).tolist(),
            strict=True,
        ):
            actions = [name for name, taken in ((CLICK, click), (LIKE, like)) if taken]
            features: dict[str, Id] = {config.category: self.cluster_of(item)} if config.category else {}
            yield ActionEvent(
                user_id=user, item_id=item, actions=actions, timestamp_ms=time, item_features=features
            )

    def _shown(self, users: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """An item for each of the users (B,)."""
        config, random = self._config, self._random
        favourite = self._interests[users, random.integers(0, INTERESTS, _BLOCK)]
        anything = random.integers(0, config.clusters, _BLOCK)
        clusters = np.where(random.random(_BLOCK) < _SHOWN_OF_INTEREST, favourite, anything)
        clusters %= min(config.clusters, self.items)
        members = (self.items - 1 - clusters) // config.clusters + 1  # items of the cluster
        ranks = _zipf(random, members)
        newest_first = random.random(_BLOCK) < _SHOWN_NEW
        return np.where(newest_first, members - 1 - ranks, ranks) * config.clusters + clusters


def _zipf(random: np.random.Generator, sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """A rank below each size, with chances that fall as 1 / (rank + 1), nearly: a floored log-uniform."""
    draws = np.exp(random.random(len(sizes)) * np.log(sizes + 1.0))
    return np.minimum(draws.astype(np.int64), sizes) - 1
