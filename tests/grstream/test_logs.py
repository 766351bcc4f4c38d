"""Lines of log, for a person and for a machine."""

import json
import logging
import subprocess
import sys
import threading

from grstream import logs
from grstream.logs import JsonFormatter


def line(message: str, *arguments: object, **extra: object) -> dict[str, object]:
    record = logging.LogRecord("grstream.tail", logging.WARNING, "tail.py", 1, message, arguments, None)
    vars(record).update(extra)
    text = JsonFormatter().format(record)
    assert "\n" not in text
    return dict(json.loads(text))


def test_a_line_says_when_how_grave_and_who_and_what_else_it_is_about() -> None:
    said = line("partition %d\nis behind", 3, partition=3, offset=2**53 + 1, _ray_timestamp_ns=1)
    assert str(said.pop("time")).endswith("Z")
    assert said == {
        "level": "WARNING",
        "logger": "grstream.tail",
        "message": "partition 3\nis behind",
        "partition": 3,
        "offset": 2**53 + 1,
    }


def test_a_line_within_a_request_has_its_id_and_no_other_task_has() -> None:
    seen: list[object] = []
    with logs.request("page-1"):
        assert line("x")["request_id"] == "page-1"
        with logs.request("page-2"):
            assert line("x")["request_id"] == "page-2"
        assert line("x")["request_id"] == "page-1"
        other = threading.Thread(target=lambda: seen.append(line("x").get("request_id")))
        other.start()
        other.join()
    assert seen == [None]
    assert "request_id" not in line("x")


SAY = """
import logging
from grstream import logs
from grstream.config import LogsConfig
logging.basicConfig()
logs.configure(LogsConfig(format={format!r}, level="WARNING"))
logging.getLogger("grstream.trainer").info("nobody reads this")
logging.getLogger("kafka.conn").info("nor this")
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("grstream.trainer").exception("a step failed", extra={{"step": 7}})
"""


def said(format: str) -> list[str]:
    command = [sys.executable, "-c", SAY.format(format=format)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()


def test_a_process_says_it_as_configured_and_once() -> None:
    (only,) = said("json")
    found = json.loads(only)
    assert (found["logger"], found["step"], found["level"]) == ("grstream.trainer", 7, "ERROR")
    assert "ZeroDivisionError" in found["exception"]
    text = said("text")
    assert text[0].endswith("ERROR grstream.trainer: a step failed")
    assert sum("a step failed" in one for one in text) == 1
