"""What the training job's driver says when it cannot begin, for a person and for a machine."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_driver_without_a_broker_says_so_in_the_form_that_is_configured(
    tmp_path: pathlib.Path, form: str
) -> None:
    path = tmp_path / "config.yaml"
    settings = {
        "storage": str(tmp_path / "storage"),
        "kafka": {"bootstrap_servers": ["127.0.0.1:9"], "request_timeout_ms": 300},
        "events": {"actions": ["click"]},
        "logs": {"format": form},
    }
    path.write_text(json.dumps(settings))
    command = [sys.executable, "jobs/train_stream.py", "--config", str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    *_, last = ended.stderr.splitlines()
    if form == "json":
        said = json.loads(last)
        assert said["message"].startswith("no Kafka broker answered at 127.0.0.1:9 within 300 ms")
        assert (said["level"], said["logger"]) == ("ERROR", "jobs.train_stream")
        assert said["error"] == "BrokerUnavailable"
    else:
        assert last.startswith("train_stream: no Kafka broker answered at 127.0.0.1:9 within 300 ms")
