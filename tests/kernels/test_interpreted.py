"""Runs `tests/kernels/interpreted` in a process where Triton interprets its kernels, as there is no GPU."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
SUITES = ("tests/kernels/interpreted", "tests/kernels/test_paged.py")


def test_triton_kernels_do_as_their_pytorch_twins_when_interpreted() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *SUITES, "-q", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
