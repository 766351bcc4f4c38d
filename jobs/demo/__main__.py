"""The whole loop on this machine, watched and proven: `make demo`, or `python -m jobs.demo`.

    python -m jobs.demo [--data PATH] [--config YAML] [--exit-after-proof]

Brings up the development broker, Ray, a live stream of actions, the trainer and the server, all in var/demo,
which is made anew at each start; shows the model improve; then ranks for one user, posts a few actions and
measures when a score includes them and when a version that learned from them answers. Then everything stays
up until Ctrl-C. Exit code 0 if the loop was proven, 1 if not, 2 if it could not be tried, 130 if it was
stopped before.
"""

import argparse
import concurrent.futures
import pathlib
import signal
import sys
import threading
import time
from types import FrameType

from rich.console import Console

from grstream.config import ConfigError
from grstream.datasets import DatasetError
from grstream.lag import Lag
from jobs.child import ChildDied, Stopped
from jobs.client import Client, Refused
from jobs.demo import screen
from jobs.demo.proof import Proof, ProofFailed
from jobs.demo.source import Source, of_file, of_synthetic
from jobs.observer import Observer
from jobs.stack import ROOT, DirectoryInUse, LocalStack

FRAME_S = 0.25
PORT = 8000  # if it is free
PLAIN_WIDTH = 110


class Demo:
    """One run: brings up, watches, proves, stays."""

    def __init__(
        self, stack: LocalStack, source: Source, console: Console, stop: threading.Event, limit_s: float
    ) -> None:
        self._stack, self._source, self._console, self._stop = stack, source, console, stop
        self._limit_s = limit_s
        self._view = screen.View(stack, source.title, source.pace)
        self._model: Client | None = None
        self._lag: Lag | None = None

    def prove(self) -> bool:
        """Bring everything up and prove the loop; False if stopped before. Raises what went wrong."""
        with screen.of(self._console) as shown, concurrent.futures.ThreadPoolExecutor(1, "proof") as pool:
            work = pool.submit(self._work)
            try:
                while not work.done():
                    self._look()
                    shown.show(self._view)
                    concurrent.futures.wait([work], FRAME_S)
            finally:
                if not work.done():
                    self._stop.set()
            work.result()
            self._look()
            shown.show(self._view)
        proof = self._view.proof
        if self._stop.is_set() or proof is None or proof.moved is None:
            return False
        self._console.print(screen.ranking(proof.moved), screen.way(proof.moved))
        self._console.print(
            f"[bold green]the loop is closed[/], {self._view.seconds:.0f} s after the start\n",
            highlight=False,
        )
        self._console.print("each of these was just answered; copy and try:")
        for call in proof.calls:
            line = screen.curl(call, self._stack.client().url)
            self._console.print(line, style="cyan", soft_wrap=True, highlight=False, markup=False)
        return True

    def stay(self) -> None:
        """Until told to stop. Raises ChildDied."""
        self._console.print("\n[bold]up until Ctrl-C[/]")
        with screen.status(self._console) as shown:
            while not self._stop.wait(FRAME_S):
                self._look()
                shown.show(self._view)

    def close(self) -> None:
        if self._lag:
            self._lag.close()

    def _work(self) -> None:
        self._stack.start()
        config = self._stack.config
        observer = Observer(config)
        self._lag = Lag(config.kafka)
        self._model = self._stack.client()
        client = self._stack.client()
        self._view.observer = observer
        self._view.proof = Proof(
            client,
            observer,
            self._source.action,
            lambda: self._source.scene(config, client),
            lambda: self._view.lag,
            self._limit_s - self._view.seconds,
            self._stop,
        )
        self._view.proof.run()

    def _look(self) -> None:
        """Take in how everything stands. Raises ChildDied."""
        self._stack.check()
        observer = self._view.observer
        if observer is None or self._model is None or self._lag is None:
            return
        observer.refresh()
        if observer.samples:
            self._view.lag = self._lag.of(observer.samples[-1].positions)
        try:
            observer.answered(self._model.get("/v1/model")["version"], time.time_ns() // 1_000_000)
        except (Refused, OSError):
            return  # there is no version yet, or a replica is being started again


def main() -> int:
    options = _options()
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    stop = threading.Event()
    try:
        source = of_file(options.data, options.config) if options.data else of_synthetic(options.config)
        with LocalStack(source.settings, options.home, source.stream, port=PORT) as stack:
            _stop_on_signals(stop, stack)
            console.print(f"this run is in {stack.home}, which was emptied first", soft_wrap=True)
            demo = Demo(stack, source, console, stop, options.limit_s)
            try:
                if not demo.prove():
                    return 130
                if not options.exit_after_proof:
                    demo.stay()
                return 0
            except Stopped:
                return 130
            except (ChildDied, TimeoutError, ProofFailed, Refused, OSError) as error:
                console.print(f"[bold red]failed[/]: {type(error).__name__}:", error, highlight=False)
                return 1
            finally:
                console.print("stopping what was started; another Ctrl-C kills it")
                demo.close()
    except (ConfigError, DatasetError, DirectoryInUse) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2


def _stop_on_signals(stop: threading.Event, stack: LocalStack) -> None:
    """The first signal stops in order, the second kills what was started."""

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            stack.kill()
            raise SystemExit(128 + number)
        stop.set()
        stack.interrupt()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, handle)


def _options() -> argparse.Namespace:
    description, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m jobs.demo",
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=pathlib.Path, help="a data set; default: the synthetic stream")
    parser.add_argument("--config", type=pathlib.Path, help="default: the one in configs/ for the data")
    parser.add_argument("--home", type=pathlib.Path, default=ROOT / "var" / "demo", help="(%(default)s)")
    parser.add_argument("--limit-s", type=float, default=300, help="to prove the loop in (%(default)s)")
    parser.add_argument("--exit-after-proof", action="store_true", help="do not stay up")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
