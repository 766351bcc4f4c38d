"""`Proof`: that the loop is closed, step by step, each with what was measured.

A step that does not come true in time is a `ProofFailed`, which names it.
"""

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

from grstream.keys import Id
from jobs.client import Client, Refused
from jobs.demo.scene import NEW_ITEM, NoScene, Scene, scores_of
from jobs.observer import Learned, Observer

POLL_S = 0.02
VERSIONS = 3  # that must have gone live, one after another
NEAR = 500  # events behind the log's end that count as caught up
BELOW = 0.98  # normalized entropy that counts as below the base rate's 1: over 2,000 events 1 is ± .01

SERVED = "a version of the weights serves"
LEARNS = "the model beats the base rate"
SWAPS = "versions go live one after another"
VISIBLE = "a posted action is in the scores"
CAUGHT_UP = "the trainer has caught up with the log"
LEARNED = "a version that learned it serves"
ENDPOINTS = "every endpoint answers"
STEPS = (SERVED, LEARNS, SWAPS, CAUGHT_UP, VISIBLE, LEARNED, ENDPOINTS)


class ProofFailed(RuntimeError):
    """The loop is not proven; the message says which step failed and what was seen last."""


@dataclasses.dataclass(frozen=True)
class Ranking:
    """An answer of /v1/rank, by item."""

    version: int
    history_length: int
    scores: dict[Id, float]
    new_item_known: bool


@dataclasses.dataclass(frozen=True)
class Moved:
    """What a few actions did to one user's ranking."""

    scene: Scene
    action: str
    before: Ranking
    after: Ranking
    learned: Ranking
    visible_ms: float  # from posting to the answer that includes the actions
    posted_ms: int  # wall clock
    way: Learned


@dataclasses.dataclass(frozen=True)
class Call:
    """A request that was made and answered."""

    method: str
    path: str
    body: dict[str, Any] | None
    ms: float


class Proof:
    """Run by a thread of its own; what it has found so far can be read by others."""

    def __init__(
        self,
        client: Client,
        observer: Observer,
        make_scene: Callable[[str], Scene],  # of the action to be looked at
        lag: Callable[[], int | None],  # how many events the trainer is behind the log's end
        limit_s: float,
        stop: threading.Event,
    ) -> None:
        self.done: dict[str, str] = {}  # step -> what was seen
        self.moved: Moved | None = None
        self.calls: list[Call] = []
        self._client, self._observer, self._make_scene, self._stop = client, observer, make_scene, stop
        self._lag = lag
        self._began = time.monotonic()
        self._deadline = self._began + limit_s
        self._step = STEPS[0]
        self._seen = "nothing yet"

    def run(self) -> None:
        """All steps. Raises ProofFailed; returns early if told to stop."""
        for step, work in (
            (SERVED, self._served),
            (LEARNS, self._learns),
            (SWAPS, self._swaps),
            (CAUGHT_UP, self._caught_up),
            (VISIBLE, self._visible),
            (LEARNED, self._learned),
            (ENDPOINTS, self._endpoints),
        ):
            self._step, self._seen = step, "nothing yet"
            work()
            if self._stop.is_set():
                return
            self.done[step] = self._seen

    # -- steps ------------------------------------------------------------------------------------------

    def _served(self) -> None:
        ready = self._until(lambda: self._try(lambda: self._client.get("/readyz")))
        self._seen = f"version {ready['version']}" if ready else self._seen

    def _learns(self) -> None:
        self._until(lambda: min(self._entropies().values(), default=1.0) < BELOW)
        self._seen = ", ".join(f"{name} {value:.3f}" for name, value in self._entropies().items())

    def _swaps(self) -> None:
        self._until(lambda: len(self._observer.live) >= VERSIONS)
        self._seen = f"{len(self._observer.live)} so far, the newest {max(self._observer.live, default=0)}"

    def _caught_up(self) -> None:
        def near() -> bool:
            lag = self._lag()
            self._seen = "lag unknown" if lag is None else f"{lag:,} events behind"
            return lag is not None and lag <= NEAR

        self._until(near)

    def _visible(self) -> None:
        entropies = self._entropies()
        action = min(entropies, key=lambda name: entropies[name])
        scene = self._until(lambda: self._scene(action))
        if scene is None:
            return
        before = self._rank(scene, action)
        posted_ms, began = time.time_ns() // 1_000_000, time.monotonic()
        placed = self._client.post("/v1/actions", {"events": scene.events})["results"]
        last = placed[-1]
        after = self._until(lambda: self._rank(scene, action, past=last["offset"]))
        visible_ms = (time.monotonic() - began) * 1000
        if after is None:
            return
        if after.scores == before.scores:
            raise ProofFailed(
                f"{VISIBLE}: the actions are in the history, but no score of {scene.user} moved"
            )
        self._seen = f"after {visible_ms:.0f} ms"
        self._posted = (scene, action, before, after, visible_ms, posted_ms, last)

    def _learned(self) -> None:
        scene, action, before, after, visible_ms, posted_ms, last = self._posted
        partition, offset = last["partition"], last["offset"]
        way = self._until(lambda: self._through(scene, action, partition, offset))
        if way is None:
            return
        learned = self._rank(scene, action)
        if not learned.new_item_known:
            raise ProofFailed(f"{LEARNED}: version {learned.version} covers the actions, not their new item")
        self.moved = Moved(scene, action, before, after, learned, visible_ms, posted_ms, way)
        self._seen = f"version {way.version} after {(way.live_ms - posted_ms) / 1000:.1f} s"

    def _endpoints(self) -> None:
        assert self.moved is not None
        scene = self.moved.scene
        asked: list[tuple[str, str, dict[str, Any] | None]] = [
            ("POST", "/v1/rank", {"user_id": scene.user, "candidates": scene.candidates[:3]}),
            ("POST", "/v1/retrieve", {"user_id": scene.user, "k": 5, "exclude_history": True}),
            ("POST", "/v1/actions", {"events": [{**scene.events[0], "timestamp_ms": scene.at_ms}]}),
            ("GET", f"/v1/users/{scene.user}/history", None),
            *(("GET", path, None) for path in ("/v1/model", "/readyz", "/healthz", "/openapi.json", "/docs")),
        ]
        for method, path, body in asked:
            began = time.monotonic()
            if body is not None:
                self._client.post(path, body)
            else:
                self._client.get(path)
            self.calls.append(Call(method, path, body, (time.monotonic() - began) * 1000))
        self._seen = f"{len(self.calls)} of {len(self.calls)}"

    # -- parts of steps ---------------------------------------------------------------------------------

    def _until(self, found: Callable[[], Any]) -> Any:
        """What `found` finds, as soon as it does; None if told to stop. Raises ProofFailed."""
        while not self._stop.is_set():
            what = found()
            if what:
                return what
            if time.monotonic() > self._deadline:
                waited = time.monotonic() - self._began
                raise ProofFailed(f"{self._step}: not within {waited:.0f} s; last seen: {self._seen}")
            self._stop.wait(POLL_S)
        return None

    def _try(self, ask: Callable[[], Any]) -> Any:
        """An answer, or None while there is none, which may be for a while at the start."""
        try:
            return ask()
        except (Refused, OSError) as error:
            self._seen = str(error)
            return None

    def _entropies(self) -> dict[str, float]:
        """The newest normalized entropies by action."""
        samples = self._observer.samples
        figures = samples[-1].figures if samples else {}
        found = {name[3:]: value for name, value in figures.items() if name.startswith("ne/")}
        self._seen = ", ".join(f"{name} {value:.3f}" for name, value in found.items()) or self._seen
        return found

    def _scene(self, action: str) -> Scene | None:
        try:
            return self._make_scene(action)
        except NoScene as error:
            self._seen = str(error)
            return None

    def _rank(self, scene: Scene, action: str, past: int | None = None) -> Any:
        """The scene's ranking; None if it was to include the log past an offset and does not yet."""
        candidates = [*scene.candidates, {**scene.candidates[0], "item_id": NEW_ITEM}]
        body = {"user_id": scene.user, "candidates": candidates, "at_ms": scene.at_ms}
        answer = self._client.post("/v1/rank", body)
        self._observer.answered(answer["version"], time.time_ns() // 1_000_000)
        if past is not None and answer["position"]["offset"] <= past:
            return None
        scores = scores_of(answer, action)
        del scores[NEW_ITEM]
        known = answer["results"][-1]["known"]
        return Ranking(answer["version"], answer["history_length"], scores, known)

    def _through(self, scene: Scene, action: str, partition: int, offset: int) -> Learned | None:
        self._observer.refresh()
        first = self._observer.covering(partition, offset)
        self._seen = f"version {first} covers it, not yet live" if first else "no version covers it yet"
        if first is not None:
            self._rank(scene, action)  # which tells the observer its version
        return self._observer.learned(partition, offset)
