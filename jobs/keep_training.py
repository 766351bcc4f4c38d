"""Keep one job on a Ray cluster that may be replaced: submit it, follow it, submit it again.

    python -m jobs.keep_training --address http://HEAD:8265 -- python -m jobs.train_stream --config X.yaml

For a trainer in the cluster of a RayService, whose clusters come and go behind one head service. Whatever
ended the job (an error, `ray job stop`, the cluster) it is submitted again, and training goes on from its
newest checkpoint. After one that lived less than `--steady-s` it waits, ever longer. A job of the same
`--name` that runs already is followed; with another command it is stopped first. Where the cluster behind the
address is another one than before, the job on the old one is stopped before it is submitted to the new one:
two trainers on one storage would write the same checkpoints.

SIGTERM or Ctrl-C: the job is stopped, as `ray job stop` does, and waited for. The client wants RAY_AUTH_MODE
and RAY_AUTH_TOKEN like the cluster. How long a job may take to stop is the cluster's to say
(RAY_JOB_STOP_WAIT_TIME_S where its head runs, 3 s).
"""

import argparse
import dataclasses
import logging
import os
import shlex
import signal
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any

from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

LOOK_S = 2.0  # between looks at the cluster
REQUEST_S = 10.0  # a head that has gone may leave a connection that never answers
FIRST_WAIT_S, LONGEST_WAIT_S = 2.0, 120.0
SILENT_LOOKS = 3  # in a row, and a cluster that was replaced has gone
LOG_LINES = 20  # of a job that ended, shown here
NAME = "grstream.job"  # the key of a job's name in its metadata

logger = logging.getLogger(__name__)


class ClusterAway(ConnectionError):
    """The cluster does not answer, or not sensibly: it starts, goes, or asks for another token."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A submission as the cluster tells of it."""

    id: str
    number: int
    command: str
    status: str  # of ray.job_submission.JobStatus
    running: bool
    host: str | None  # of the head that it was submitted to
    lived_s: float
    message: str


class Jobs:
    """The jobs of one name on the cluster at an address. Every method raises ClusterAway."""

    def __init__(self, address: str, name: str) -> None:
        self._address, self._name = address, name
        self._client: _Client | None = None

    def all(self) -> list[Job]:
        """Those that the cluster knows of, in the order of their submission."""
        listed = self._ask(lambda client: client.list_jobs())
        mine = [job for job in listed if (job.metadata or {}).get(NAME) == self._name and job.submission_id]
        return sorted((_job(job) for job in mine), key=lambda job: job.number)

    def submit(self, command: str, number: int) -> None:
        """As the name's job of that number; where there is one already, it stands."""
        # Ray refuses a second submission of an id, so that whoever submits beside us cannot double the job.
        submission = f"{self._name}-{number:06d}"
        self._ask(
            lambda client: client.submit_job(
                entrypoint=command, submission_id=submission, metadata={NAME: self._name}
            )
        )

    def stop(self, job: Job) -> None:
        self._ask(lambda client: client.stop_job(job.id))

    def tail(self, job: Job) -> str:
        """The last lines that the job wrote."""
        lines: str = self._ask(lambda client: client.get_job_logs(job.id))
        return "\n".join(lines.splitlines()[-LOG_LINES:])

    def _ask(self, question: Callable[["_Client"], Any]) -> Any:
        try:
            if self._client is None:
                self._client = _Client(self._address)
            return question(self._client)
        # What `requests` raises is an OSError; the client raises RuntimeError for an answer that is not 200.
        except (OSError, RuntimeError, AuthenticationError) as error:
            self._client = None
            raise ClusterAway(f"{self._address}: {error}") from error


class _Client(JobSubmissionClient):
    """Ray's, which itself would wait for ever."""

    def _do_request(self, *args: Any, **kwargs: Any) -> Any:
        return super()._do_request(*args, **{"timeout": REQUEST_S, **kwargs})


def _job(details: Any) -> Job:
    """`details`: ray.job_submission.JobDetails."""
    now_ms = time.time_ns() // 1_000_000
    began = details.start_time or now_ms
    agent = details.driver_agent_http_address
    return Job(
        id=details.submission_id,
        number=int(details.submission_id.rpartition("-")[2]),
        command=details.entrypoint,
        status=str(details.status.value),
        running=not details.status.is_terminal(),
        host=urllib.parse.urlsplit(agent).hostname if agent else None,
        lived_s=((details.end_time or now_ms) - began) / 1000,
        message=details.message or "",
    )


class Keeper:
    """Keeps a command running as the job of a name. `look` whenever it is due; `stop` at the end.

    `port` is where heads listen themselves, behind the address: by it the job on a replaced cluster is found.
    """

    def __init__(
        self, address: str, name: str, command: str, steady_s: float, port: int | None = None
    ) -> None:
        self._address, self._name, self._command = address, name, command
        self._steady_s = steady_s
        self._port = port or urllib.parse.urlsplit(address).port or 80
        self._jobs = Jobs(address, name)
        self._followed: Job | None = None
        self._left_behind: Job | None = None  # on a cluster that was replaced
        self._silent = 0  # looks in a row that this cluster did not answer
        self._short_lives = 0
        self._due = 0.0  # no submission before, by time.monotonic

    def look(self) -> None:
        """See how the job is, and do what is to be done. Raises ClusterAway."""
        known = self._jobs.all()
        if self._followed and all(job.id != self._followed.id for job in known):
            logger.info(
                "the cluster at %s is another one: %s is not known to it", self._address, self._followed.id
            )
            self._left_behind, self._followed = self._followed, None
        running = [job for job in known if job.running]
        if running:
            self._follow(running)
            return
        if self._followed:
            self._mourn(known[-1])
            self._followed = None
        if time.monotonic() < self._due or not self._old_one_is_gone():
            return
        number = known[-1].number + 1 if known else 1
        self._jobs.submit(self._command, number)
        logger.info("submitted %s as number %d: %s", self._name, number, self._command)
        self._followed = next((job for job in self._jobs.all() if job.number == number), None)

    def stop(self, within_s: float) -> bool:
        """Stop what runs under the name, and wait; whether it has ended. Raises ClusterAway."""
        deadline = time.monotonic() + within_s
        asked: set[str] = set()
        while running := [job for job in self._jobs.all() if job.running]:
            for job in running:
                if job.id not in asked:
                    logger.info("stopping %s", job.id)
                    self._jobs.stop(job)
                    asked.add(job.id)
            if time.monotonic() > deadline:
                return False
            time.sleep(LOOK_S / 4)
        return True

    def _follow(self, running: list[Job]) -> None:
        for job in running[:-1]:
            self._replace(job, "a newer one runs beside it")
        newest = running[-1]
        if newest.command != self._command:
            self._replace(newest, f"it runs another command: {newest.command}")
        elif self._followed is None or self._followed.id != newest.id:
            logger.info("following %s, which runs already", newest.id)
        self._followed = newest  # as it is now: its host is known a while after its submission
        if newest.lived_s >= self._steady_s:
            self._short_lives = 0

    def _replace(self, job: Job, why: str) -> None:
        logger.info("stopping %s: %s", job.id, why)
        self._jobs.stop(job)

    def _mourn(self, job: Job) -> None:
        """Say how it ended, and when the next one may begin."""
        self._short_lives = self._short_lives + 1 if job.lived_s < self._steady_s else 0
        wait_s = (
            min(FIRST_WAIT_S * 2 ** (self._short_lives - 1), LONGEST_WAIT_S) if self._short_lives else 0.0
        )
        self._due = time.monotonic() + wait_s
        logger.warning(
            "%s %s after %.0f s; the next one in %.0f s. %s\n%s",
            job.id,
            job.status.lower(),
            job.lived_s,
            wait_s,
            job.message.partition("\n")[0],
            self._jobs.tail(job),
        )

    def _old_one_is_gone(self) -> bool:
        """Whether the job on the cluster that was replaced has ended; until then it is asked to."""
        old = self._left_behind
        if old is None:
            return True
        try:
            if old.host is not None:
                there = Jobs(f"http://{old.host}:{self._port}", self._name)
                known = next((job for job in there.all() if job.id == old.id), None)
                if known is not None and known.running:
                    there.stop(known)
                    return False
            self._silent = 0
        except ClusterAway as error:
            self._silent += 1
            if self._silent < SILENT_LOOKS:
                return False
            logger.info("the cluster of %s has gone, and the job with it: %s", old.id, error)
        self._left_behind = None
        return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Keep the job until a signal; the exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        os.environ.pop(name, None)  # Ray prefers them to any address that it is given
    command = shlex.join(options.command[1:] if options.command[:1] == ["--"] else options.command)
    keeper = Keeper(options.address, options.name, command, options.steady_s, options.head_port)
    away = False
    while not stop.is_set():
        try:
            keeper.look()
            away = False
        except ClusterAway as error:
            if not away:
                logger.warning("waiting for the cluster: %s", error)
            away = True
        stop.wait(LOOK_S)
    try:
        if keeper.stop(options.grace_s):
            return 0
        logger.error("the job did not end within %g s", options.grace_s)
    except ClusterAway as error:
        logger.error("the cluster does not answer, so the job may still run: %s", error)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Keep one job on a Ray cluster that may be replaced.")
    parser.add_argument("--address", required=True, help="of the head's dashboard, http://HOST:8265")
    parser.add_argument("--name", default="train", help="of the job; one of a name at a time (%(default)s)")
    parser.add_argument(
        "--steady-s", type=float, default=300, help="a job that lived so long ended by chance (%(default)s)"
    )
    parser.add_argument("--grace-s", type=float, default=60, help="for the job to stop (%(default)s)")
    parser.add_argument(
        "--head-port", type=int, help="heads' own, where the address's service has another; default: its"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    return parser


if __name__ == "__main__":
    sys.exit(main())
