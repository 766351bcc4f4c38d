"""Every Triton kernel here compiles for GPUs that are not there, and leaves nothing to local memory."""

from typing import Any

import pytest
import torch

from kernels import triton_embedding, triton_norm_gate, triton_paged
from tests.kernels.ahead_of_time import SHARED, TARGETS, Compiled, compiled

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@pytest.fixture(params=list(TARGETS))
def target(request: pytest.FixtureRequest) -> str:
    return request.param


def require_fit(code: Compiled, target: str) -> None:
    assert code.spills == 0
    assert code.shared <= SHARED[target]
    assert code.registers <= (512 if target == "gfx942" else 255)


def paged(
    target: str, dtype: torch.dtype, width: int, uniform: bool, softmax: bool = False, page: int = 64
) -> Compiled:
    hip = target == "gfx942"
    shape = triton_paged.shape(dtype, width, uniform, hip)
    arguments: dict[str, Any] = {name: f"*{NAMES[dtype]}" for name in triton_paged.paged_kernel.arg_names}
    arguments |= {name: "i32" for name in arguments if name.endswith("stride")}
    arguments |= dict.fromkeys(("page_times", "pages", "row_prefix", "row_clock"), "*i64")
    arguments |= dict.fromkeys(("out", "position_table", "time_table"), "*fp32")
    arguments |= {"tiles": "*i32", "alpha": "fp32"}
    arguments |= {
        "HEADS": 4,
        "QK": width,
        "V": width,
        "PADDED_QK": width,
        "PADDED_V": width,
        "PAGE": page,
        "BLOCK_ROWS": shape.rows,
        "BLOCK_MEMORY": min(shape.memory, page),
        "BITS": 3,
        "HAS_TIME": True,
        "UNIFORM": uniform,
        "SOFTMAX": softmax,
        "APPROXIMATE": dtype != torch.float32 and not hip,
        "PRECISION": shape.precision,
    }
    return compiled(target, triton_paged.paged_kernel, arguments, shape.warps, shape.stages)


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("dtype", NAMES)
def test_paged_attention_fits_and_multiplies_on_tensor_cores(
    target: str, dtype: torch.dtype, uniform: bool
) -> None:
    code = paged(target, dtype, 128, uniform)
    require_fit(code, target)
    # Three products of TF32 are made with sm_80's on all of NVIDIA's.
    newest = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}[target]
    expected = "HMMA" if dtype == torch.float32 and target != "gfx942" else newest
    assert code.tensor_instructions == {expected}


@pytest.mark.slow
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("width", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("dtype", NAMES)
def test_paged_attention_fits_at_every_width(
    target: str, dtype: torch.dtype, width: int, uniform: bool, softmax: bool
) -> None:
    known_to_spill = dtype == torch.float32 and width > 128 and target != "gfx942"
    for page in (64, 256) if known_to_spill else (16, 64, 256):
        require_fit(paged(target, dtype, width, uniform, softmax, page), target)


@pytest.mark.parametrize("width", [64, 1024])
@pytest.mark.parametrize("dtype", NAMES)
def test_norm_gate_fits(target: str, dtype: torch.dtype, width: int) -> None:
    constants, warps = triton_norm_gate._tile(width)
    for kernel in (triton_norm_gate.forward_kernel, triton_norm_gate.backward_kernel):
        arguments: dict[str, Any] = {name: f"*{NAMES[dtype]}" for name in kernel.arg_names}
        arguments |= {name: "i32" for name in arguments if name.endswith("stride")}
        arguments |= {"weight": "*fp32", "bias": "*fp32", "sums": "*fp32"}
        arguments |= {"rows": "i32", "width": "i32", "epsilon": "fp32"}
        require_fit(compiled(target, kernel, arguments | constants, warps), target)


@pytest.mark.parametrize(
    "kernel",
    [
        triton_embedding.gather_kernel,
        triton_embedding.segment_sums_kernel,
        triton_embedding.adagrad_kernel,
        triton_embedding.adamw_kernel,
    ],
)
def test_embedding_kernels_fit(target: str, kernel: Any) -> None:
    arguments: dict[str, Any] = {name: "fp32" for name in kernel.arg_names}
    arguments |= dict.fromkeys(("table", "squares", "mean", "square", "gradient", "out"), "*fp32")
    arguments |= dict.fromkeys(("rows", "order", "ends", "steps"), "*i64")
    arguments |= {"count": "i32", "width": "i32"}
    arguments |= {**triton_embedding._tile(64), "SEGMENT": triton_embedding.SEGMENT}
    require_fit(compiled(target, kernel, arguments), target)
