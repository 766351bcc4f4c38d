"""jobs/evaluate.py pass and staleness: models side by side on one data set."""

import json
import pathlib

import numpy as np
import pytest
import torch

from jobs import one_pass
from jobs.evaluate import main

CONFIG = """
storage: unused
events: {actions: [rated, liked]}
replay:
  actions:
    - {action: rated}
    - {action: liked, column: rating, at_least: 4}
histories: {window: 8, chunk: 2}
source: {flush_events: 20}
model: {layers: 1, dim: 8, heads: 1}
"""


@pytest.fixture
def options(tmp_path: pathlib.Path) -> list[str]:
    """300 ratings of 20 users."""
    random = np.random.default_rng(0)
    rows = zip(
        random.integers(20, size=300), random.integers(30, size=300), random.integers(1, 6, 300), strict=True
    )
    text = "".join(f"{user}\t{item}\t{rating}\t{1000 + at}\n" for at, (user, item, rating) in enumerate(rows))
    (tmp_path / "u.data").write_text(text)
    (tmp_path / "config.yaml").write_text(CONFIG)
    return [
        *("--data", str(tmp_path / "u.data"), "--config", str(tmp_path / "config.yaml"), "--action", "liked"),
        *("--output", str(tmp_path / "out"), "--seeds", "2", "--threads", str(torch.get_num_threads())),
    ]


def test_models_and_rates_stand_side_by_side_with_their_differences(
    options: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["pass", *options, "--models", "hstu", "transformer", "dlrm"]
    assert main(command) == 0
    said = capsys.readouterr().out
    found = json.loads(said.splitlines()[-1])
    assert found["events"] == 150
    rows = found["rows"]
    assert list(rows) == [
        *("hstu", "transformer", "dlrm"),
        *("running rate: global", "running rate: item", "running rate: user_item", "popular in 7 days"),
    ]
    for name in ("transformer", "dlrm"):
        ahead, low, high = rows[name]["ne_difference"]
        assert ahead == pytest.approx(np.mean(rows[name]["ne"]) - np.mean(rows["hstu"]["ne"]), abs=2e-5)
        assert low < ahead < high
    assert len(rows["hstu"]["hr@10"]) == 2
    assert len(rows["popular in 7 days"]["hr@10"]) == 1

    # What was made before is read.
    monkeypatch.setattr(one_pass, "learned", lambda *_: pytest.fail("passed again"))
    assert main(command) == 0
    assert capsys.readouterr().out == said


def test_a_pass_of_another_configuration_is_not_mistaken_for_this_one(
    options: list[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def entropies() -> list[float]:
        assert main(["pass", *options, "--models", "hstu"]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]["hstu"]["ne"]

    before = entropies()
    (tmp_path / "config.yaml").write_text(CONFIG.replace("window: 8", "window: 6"))
    assert entropies() != before


def test_staleness_is_a_row_for_each_age_and_a_plot(
    options: list[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "staleness.png"
    command = ["staleness", *options, "--every", "40", "--ages", "0", "1", "3", "--plot", str(plot)]
    assert main(command) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert list(rows) == ["0 versions old", "1 version old", "3 versions old"]
    assert len({tuple(row["ne"]) for row in rows.values()}) == 3
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--action", "bought"], "the configured actions are rated, liked"),
        (["--data", "nowhere/u.data"], "cannot read nowhere/u.data"),
    ],
)
def test_what_is_wrong_is_said_without_a_traceback(
    options: list[str], change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pass", *options, *change]) == 1
    assert message in capsys.readouterr().err
