"""Under TRITON_INTERPRET=1 Triton's interpreter learns matrix products of bf16.

It keeps bf16 as uint16 and multiplies those as they are (triton 3.9, `InterpreterBuilder.create_dot`).
"""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from typing import Any

    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    _dot = InterpreterBuilder.create_dot

    def _widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def _dot_of_widened(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return _dot(self, _widened(a), _widened(b), *rest)

    InterpreterBuilder.create_dot = _dot_of_widened
