"""Keeps an engine at the weights version to be served, from a thread of its own."""

import logging
import threading
from typing import Protocol

from grstream.scores import UnusableWeights
from grstream.weights import Beside, Manifest, WeightsError, WeightSource, WeightsVersion

logger = logging.getLogger(__name__)


class Swappable(Protocol):
    """What a follower needs of an engine."""

    @property
    def manifest(self) -> Manifest | None: ...

    def swap(self, version: WeightsVersion) -> None: ...

    @property
    def beside(self) -> tuple[int, float] | None: ...

    def serve_beside(self, version: WeightsVersion | None, share: float = 0.0) -> None: ...


class WeightsFollower:
    """Polls a source and swaps what it says into an engine; a version that is no good is left out."""

    def __init__(self, source: WeightSource, engine: Swappable, poll_s: float) -> None:
        self._source, self._engine, self._poll_s = source, engine, poll_s
        self._stopping = threading.Event()
        self._unusable: Beside | None = None  # of an A/B test, reported once
        self.refused = 0  # versions that the engine would not serve
        self.errors = 0  # looks that failed
        self._thread = threading.Thread(target=self._run, name="weights", daemon=True)

    def start(self) -> None:
        """Look before returning, so that who starts has a version if there is one."""
        while self._look():
            pass
        self._thread.start()

    def stop(self) -> None:
        """Returns within the time of a poll."""
        self._stopping.set()
        self._thread.join()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def poll(self) -> bool:
        """Swap in another version if one is to be served: whether it is worth looking again at once."""
        manifest = self._engine.manifest
        version = self._source.instead_of(manifest.number if manifest else 0)
        if version is None:
            return False
        try:
            self._engine.swap(version)
        except UnusableWeights as error:
            logger.error("%s; it is not served", error, extra={"version": version.number})
            self.refused += 1
            self._source.reject(version.number)
            return True
        logger.info(
            "serving weights version %d of step %d",
            *(version.number, version.manifest.step),
            extra={"version": version.number, "step": version.manifest.step},
        )
        return False

    def follow_ab(self) -> None:
        """Have the engine serve some of the users what is ordered for them."""
        wanted = self._source.beside()
        if self._engine.manifest is None or wanted == self._unusable:
            return
        held = self._engine.beside
        if wanted is None:
            if held is not None:
                self._engine.serve_beside(None)
                logger.info("the A/B test has ended")
        elif held != (wanted.number, wanted.share):
            try:
                self._engine.serve_beside(self._source.load(wanted.number), wanted.share)
            except UnusableWeights as error:
                logger.error("%s; all users are served alike", error)
                self._unusable = wanted
                return
            logger.info("version %d serves %.0f %% of users", wanted.number, 100 * wanted.share)
        self._unusable = None

    def _run(self) -> None:
        while not self._stopping.is_set():
            if not self._look():
                self._source.wait(self._poll_s)

    def _look(self) -> bool:
        try:
            again = self.poll()
            self.follow_ab()
            return again
        except (OSError, WeightsError) as error:  # shared storage may be away for a while
            self.errors += 1
            logger.error("cannot read weights versions: %s", error)
            return False
