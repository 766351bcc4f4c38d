"""Stochastic Length: most long histories are trained on in part (Zhai et al. 2024, section 3.2).

A history of n events longer than N^(α/2), N being the window, is cut to N^(α/2) of its events, except with
probability N^α / n². So attention costs O(N^α d) a user instead of O(N² d), and every event is still seen
now and then. Which events stay is drawn without replacement, an older one the less likely the further it
lies back (the paper's feature-weighted selection, appendix); their order is kept.
"""

import numpy as np
import numpy.typing as npt

from grstream.microbatch import MicroBatch, Role


def kept_events(batch: MicroBatch, window: int, alpha: float, seed: int) -> npt.NDArray[np.bool_]:
    """Which events a training step reads: (E,). New events always stay, being what is learned from.

    α in (1, 2]; at 2 nothing is ever cut. The draw of a sequence depends on the seed and on the partition
    and offset of its first new event alone, so that a replay draws the same.
    """
    kept = np.ones(len(batch.items), np.bool_)
    most = round(window ** (alpha / 2))
    stops = np.cumsum(batch.lengths)
    new = np.add.reduceat(np.append(batch.roles != Role.CONTEXT, False), np.append(0, stops[:-1]))
    new = np.where(batch.lengths > 0, new, 0)
    first_new = np.cumsum(new) - new
    for sequence in np.flatnonzero((batch.lengths > most) & (new > 0)):
        n, start = int(batch.lengths[sequence]), int(stops[sequence] - batch.lengths[sequence])
        at = first_new[sequence]
        place = (int(batch.partitions[at]), int(batch.offsets[at]) % 2**64)  # a seed is not negative
        random = np.random.default_rng((seed, *place))
        if random.random() < window**alpha / n**2:
            continue
        old = start + np.flatnonzero(batch.roles[start : start + n] == Role.CONTEXT)
        stay = min(max(most - int(new[sequence]), 0), len(old))
        # Efraimidis and Spirakis: the largest u^(1/w) are a weighted sample without replacement.
        weights = np.arange(1, len(old) + 1) / len(old)
        keys = np.log(random.random(len(old))) / weights
        kept[old] = False
        kept[old[np.argsort(keys)[len(old) - stay :]]] = True
    return kept
