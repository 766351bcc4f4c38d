"""What a step costs on this machine, and from it how much goes into one."""

import dataclasses

STEP_ROWS = 4096
STEP_TOKENS = 2048


@dataclasses.dataclass(frozen=True)
class Cost:
    micro_batch: int  # the paper's b_m: candidates of a request in one step
    rows_a_step: int  # of all requests
    tokens_a_step: int  # of histories, encoded

    @classmethod
    def assumed(cls, micro_batch: int | None) -> "Cost":
        """Before anything was measured."""
        return cls(micro_batch or 512, STEP_ROWS, STEP_TOKENS)
