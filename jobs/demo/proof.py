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
from jobs.demo.scene import NEW_ITEM, NoScene, Scene, history_path, scores_of
from jobs.observer import Learned, Observer

POLL_S = 0.02
VERSIONS = 3  # that must have gone live, one after another
NEAR = 500  # events behind the log's end that count as caught up
BASE_RATE = 1.0
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
        action: str,  # whose prediction is looked at
        make_scene: Callable[[], Scene],
        lag: Callable[[], int | None],  # how many events the trainer is behind the log's end
        limit_s: float,
        stop: threading.Event,
    ) -> None:
        self.done: dict[str, str] = {}  # step -> what was seen
        self.moved: Moved | None = None
        self.calls: list[Call] = []
        self._client, self._observer, self._make_scene, self._stop = client, observer, make_scene, stop
        self._action, self._lag = action, lag
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
        self._until(lambda: self._entropy() < BELOW)

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
        posted = None
        while posted is None and not self._stop.is_set():
            posted = self._post()
        if posted is None:
            return
        if posted.after.scores == posted.before.scores:
            user = posted.scene.user
            raise ProofFailed(f"{VISIBLE}: the history has the actions, but no score of user {user} moved")
        self._seen = f"after {posted.visible_ms:.0f} ms"
        self._posted = posted

    def _post(self) -> "_Posted | None":
        """Rank, post, rank; None where a new version came in between, which would move scores too."""
        scene = self._until(self._scene)
        if scene is None or not self._fresh_version():
            return None
        before = self._until(lambda: self._try(lambda: self._rank(scene)))
        posted_ms, began = time.time_ns() // 1_000_000, time.monotonic()
        last = self._client.post("/v1/actions", {"events": scene.events})["results"][-1]
        after = self._until(lambda: self._try(lambda: self._rank(scene, past=last["offset"])))
        visible_ms = (time.monotonic() - began) * 1000
        if before is None or after is None or before.version != after.version:
            self._seen = "a new version went live in between"
            return None
        return _Posted(scene, before, after, posted_ms, visible_ms, last["partition"], last["offset"])

    def _fresh_version(self) -> bool:
        """Wait until a version goes live, so that there is time until the next; whether one did."""
        held = max(self._observer.live, default=0)
        return bool(self._until(lambda: max(self._observer.live, default=0) > held))

    def _learned(self) -> None:
        posted = self._posted
        scene = posted.scene
        way = self._until(lambda: self._try(lambda: self._through(posted)))
        if way is None:
            return
        learned = self._rank(scene)
        if not learned.new_item_known:
            raise ProofFailed(f"{LEARNED}: version {learned.version} covers the actions, not their new item")
        self.moved = Moved(
            scene=scene,
            action=self._action,
            before=posted.before,
            after=posted.after,
            learned=learned,
            visible_ms=posted.visible_ms,
            posted_ms=posted.posted_ms,
            way=way,
        )
        self._seen = f"version {way.version} after {(way.live_ms - posted.posted_ms) / 1000:.1f} s"

    def _endpoints(self) -> None:
        assert self.moved is not None
        scene = self.moved.scene
        asked: list[tuple[str, str, dict[str, Any] | None]] = [
            ("POST", "/v1/rank", {"user_id": scene.user, "candidates": scene.candidates[:2]}),
            ("POST", "/v1/retrieve", {"user_id": scene.user, "k": 5, "exclude_history": True}),
            ("POST", "/v1/actions", {"events": [{**scene.events[0], "timestamp_ms": scene.at_ms}]}),
            ("GET", history_path(scene.user), None),
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

    def _entropy(self) -> float:
        """The newest normalized entropy; that of the base rate while there is none."""
        samples = self._observer.samples
        entropy = samples[-1].figures.get(f"ne/{self._action}") if samples else None
        if entropy is None:
            return BASE_RATE
        self._seen = f"{self._action} {entropy:.3f} of 1.000"
        return entropy

    def _scene(self) -> Scene | None:
        try:
            return self._make_scene()
        except NoScene as error:
            self._seen = str(error)
            return None

    def _rank(self, scene: Scene, past: int | None = None) -> Any:
        """The scene's ranking; None if it was to include the log past an offset and does not yet."""
        candidates = [*scene.candidates, {**scene.candidates[0], "item_id": NEW_ITEM}]
        body = {"user_id": scene.user, "candidates": candidates, "at_ms": scene.at_ms}
        answer = self._client.post("/v1/rank", body)
        self._observer.answered(answer["version"], time.time_ns() // 1_000_000)
        if past is not None and answer["position"]["offset"] <= past:
            return None
        scores = scores_of(answer, self._action)
        del scores[NEW_ITEM]
        known = answer["results"][-1]["known"]
        return Ranking(answer["version"], answer["history_length"], scores, known)

    def _through(self, posted: "_Posted") -> Learned | None:
        self._observer.refresh()
        first = self._observer.covering(posted.partition, posted.offset)
        self._seen = f"version {first} covers it, not yet live" if first else "no version covers it yet"
        if first is not None:
            self._rank(posted.scene)  # which tells the observer its version
        return self._observer.learned(posted.partition, posted.offset)


@dataclasses.dataclass(frozen=True)
class _Posted:
    scene: Scene
    before: Ranking
    after: Ranking  # by the same version
    posted_ms: int
    visible_ms: float
    partition: int  # of the last event
    offset: int
