"""What all sections of the configuration share."""

import re
from typing import Annotated

import pydantic

MAX_ACTIONS = 31  # a set of actions travels as the bits of a non-negative int32
ACTION_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.:-]{0,63}")

Name = Annotated[str, pydantic.StringConstraints(pattern=f"^{ACTION_NAME.pattern}$")]


class ConfigError(ValueError):
    """The configuration is wrong; the message gives the path of each wrong field and what it may be."""


class Section(pydantic.BaseModel):
    # What was written may be a secret in the wrong place: no message quotes it.
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)
