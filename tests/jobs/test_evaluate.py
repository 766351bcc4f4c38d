"""jobs/evaluate.py: a table beside the published rows, from runs that go on where they were cut."""

import json
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from grstream import epochs
from jobs.evaluate import main

CONFIG = """
model: {layers: 1, dim: 8, heads: 1, time_bias: false}
epochs: {epochs: 2, window: 8, batch_tokens: 200, softmax_dtype: float32}
"""


@pytest.fixture
def arguments(tmp_path: pathlib.Path) -> list[str]:
    """Two configurations of one seed each, on a world of 30 users."""
    random = np.random.default_rng(0)
    lists = [random.integers(20, size=random.integers(5, 12)).tolist() for _ in range(30)]
    pa.parquet.write_table(pa.table({"item_ids": lists}), tmp_path / "sequences.parquet")
    (tmp_path / "small.yaml").write_text(CONFIG)
    (tmp_path / "two.yaml").write_text(CONFIG.replace("layers: 1", "layers: 2"))
    return [
        "ml-1m",
        *("--data", str(tmp_path / "sequences.parquet")),
        *("--config", str(tmp_path / "small.yaml"), str(tmp_path / "two.yaml")),
        *("--output", str(tmp_path / "out"), "--seeds", "2", "--threads", str(torch.get_num_threads())),
    ]


def test_each_configuration_is_a_row_beside_the_published_ones(
    arguments: list[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 0
    out, progress = capsys.readouterr()
    figures = json.loads(out.splitlines()[-1])
    assert list(figures) == ["small", "two"]
    for name, row in figures.items():
        of_seeds = [
            json.loads((tmp_path / "out" / name / f"seed-{seed}" / "result.json").read_text())["test"]
            for seed in (0, 1)
        ]
        for metric, (mean, error) in row["test"].items():
            a, b = (test[metric] for test in of_seeds)
            assert mean == pytest.approx((a + b) / 2, abs=1e-5)
            assert error == pytest.approx(abs(a - b) / 2, abs=1e-5)
        assert f"{row['test']['HR@10'][0]:.4f} ± {row['test']['HR@10'][1]:.4f}" in out
    assert "eSASRec" in out
    assert "0.3133" in out
    assert "two seed 1: epoch 2" in progress


def test_a_run_that_is_over_is_read_and_not_trained_again(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(arguments) == 0
    first = capsys.readouterr().out

    def epoch(self: epochs.Training, show: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(epochs.Training, "epoch", epoch)
    assert main(arguments) == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--data", "nowhere.parquet", "cannot read nowhere.parquet"),
        ("--config", "nowhere.yaml", "cannot read the configuration: "),
    ],
)
def test_what_is_not_there_is_said_without_a_traceback(
    arguments: list[str], option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, option, value]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"evaluate: {message}")
    assert value in said


def test_a_wrong_field_of_a_configuration_is_named_by_its_path(
    arguments: list[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong.yaml").write_text(CONFIG.replace("window: 8", "windows: 8"))
    assert main([*arguments, "--config", str(tmp_path / "wrong.yaml")]) == 1
    assert "epochs.windows (line 3): there is no such field; did you mean window?" in capsys.readouterr().err


@pytest.mark.parametrize("seeds", ["0", "a", "1,1", "-1,2", ""])
def test_seeds_that_are_none_are_refused(
    arguments: list[str], seeds: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*arguments, f"--seeds={seeds}"])
    assert "say how many seeds" in capsys.readouterr().err
