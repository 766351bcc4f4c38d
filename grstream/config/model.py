"""The encoder and its heads."""

from typing import Annotated, Literal, Self

import pydantic

from grstream.config.section import Section


class ModelConfig(Section):
    """The encoder and its heads (paper section 3). The defaults are HSTU; the rest are the ablations."""

    layout: Literal["fused", "interleaved"] = pydantic.Field(
        "fused",
        description="one token an event and one a candidate; or, as in the paper, item and action in turn",
    )
    encoder: Literal["hstu", "transformer"] = pydantic.Field(
        "hstu", description="the paper's, or a Transformer (SASRec) to compare with"
    )
    attention: Literal["silu", "softmax"] | None = pydantic.Field(
        None, description="default: silu for hstu, softmax for transformer"
    )
    layers: int = pydantic.Field(2, ge=1, description="of the encoder")
    dim: int = pydantic.Field(64, ge=2, description="width of the residual stream")
    heads: int = pydantic.Field(2, ge=1, description="of attention, in each layer")
    qk_dim: int | None = pydantic.Field(None, ge=1, description="per head; default dim / heads")
    v_dim: int | None = pydantic.Field(None, ge=1, description="per head; default dim / heads")
    feedforward: int | None = pydantic.Field(None, ge=1, description="transformer only; default 4 · dim")
    position_bias: Literal["bucketed", "exact", "none"] = pydantic.Field(
        "bucketed", description="exact: a weight for each distance below 1,024 tokens"
    )
    time_bias: bool = pydantic.Field(
        True, description="attention has a learned weight for how long ago an event was"
    )
    absolute_positions: int = pydantic.Field(
        0, ge=0, description="learned vectors of absolute position, the last one for all beyond; 0: none"
    )
    popularity_days: list[Annotated[float, pydantic.Field(gt=0)]] = pydantic.Field(
        [],
        description="half-lives, in days of event time, of the counts of an item's events by which retrieval "
        "knows what is popular now; none: it does not",
    )
    dropout: float = pydantic.Field(0.0, ge=0, lt=1, description="of the input and of each layer's output")
    dtype: Literal["float32", "bfloat16"] = pydantic.Field(
        "float32", description="of the encoder's arithmetic; parameters are float32"
    )

    @pydantic.model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if (self.qk_dim is None or self.v_dim is None) and self.dim % self.heads:
            raise ValueError("dim must be a multiple of heads unless qk_dim and v_dim are given")
        return self

    @pydantic.model_validator(mode="after")
    def _fields_of_the_encoder(self) -> Self:
        if self.encoder == "hstu" and self.feedforward is not None:
            raise ValueError("feedforward belongs to encoder: transformer")
        if self.encoder == "transformer" and self.attention == "silu":
            raise ValueError("encoder: transformer attends by softmax; silu belongs to encoder: hstu")
        return self

    @property
    def softmax(self) -> bool:
        return (self.attention or ("silu" if self.encoder == "hstu" else "softmax")) == "softmax"
