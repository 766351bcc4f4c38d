"""What processes write of themselves."""

from typing import Literal

import pydantic

from grstream.config.section import Section


class LogsConfig(Section):
    """What every process of the system writes to its standard error."""

    format: Literal["text", "json"] = pydantic.Field(
        "text", description="json: one object a line; the gateways' access log is that in either case"
    )
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = pydantic.Field(
        "INFO", description="the least that is written"
    )
