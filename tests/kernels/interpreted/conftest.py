"""Triton reads TRITON_INTERPRET once, when it is imported: `tests/kernels/test_interpreted.py` sets it."""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
