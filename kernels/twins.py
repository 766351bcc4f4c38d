"""Which of an op's two implementations runs: PyTorch's, the definition, or Triton's, for a GPU."""

import importlib
import importlib.util
from types import ModuleType
from typing import Literal

from torch import Tensor

Twin = Literal["auto", "pytorch", "triton"]


def chosen(x: Tensor, implementation: str) -> str:
    """`pytorch` or `triton`: by itself Triton's where it is installed and x is on a GPU and no float64.

    Raises ValueError for an unknown one.
    """
    if implementation in ("pytorch", "triton"):
        return implementation
    if implementation != "auto":
        raise ValueError(f"no implementation {implementation!r}: use auto, pytorch or triton")
    narrow = x.element_size() <= 4
    return "triton" if x.is_cuda and narrow and importlib.util.find_spec("triton") else "pytorch"


def triton_module(name: str) -> ModuleType:
    """`kernels.triton_<name>`, imported when first asked for: not every machine has Triton."""
    return importlib.import_module(f"kernels.triton_{name}")
