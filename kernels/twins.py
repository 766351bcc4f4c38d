"""Which of an op's two implementations runs: PyTorch's, the definition, or Triton's, for a GPU."""

import importlib
import importlib.util
from types import ModuleType
from typing import Literal

from torch import Tensor

Twin = Literal["auto", "pytorch", "triton"]


def chosen(x: Tensor, implementation: str) -> str:
    """`pytorch` or `triton`: by itself Triton's where it is installed and x is on a GPU and no float64.

    Raises ValueError for an unknown one, and for Triton's with float64, as its kernels compute in fp32.
    """
    if implementation not in ("auto", "pytorch", "triton"):
        raise ValueError(f"no implementation {implementation!r}: use auto, pytorch or triton")
    double = x.element_size() > 4
    if implementation == "auto":
        return "triton" if x.is_cuda and not double and importlib.util.find_spec("triton") else "pytorch"
    if implementation == "triton" and double:
        raise ValueError(f"the triton kernels compute in fp32: for {x.dtype} use pytorch")
    return implementation


def triton_module(name: str) -> ModuleType:
    """`kernels.triton_<name>`, imported when first asked for: not every machine has Triton."""
    return importlib.import_module(f"kernels.triton_{name}")
