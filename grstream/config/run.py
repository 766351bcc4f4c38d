"""A run of `jobs/evaluate.py` over epochs: sequences with their last items held out."""

from typing import Literal

import pydantic

from grstream.config.model import ModelConfig
from grstream.config.section import Section


class EpochsConfig(Section):
    """How a model is trained on data that are all there."""

    epochs: int = pydantic.Field(100, ge=1, description="over which the learning rate falls to its floor")
    patience: int = pydantic.Field(20, ge=1, description="epochs without a better validation before the end")
    evaluate_every: int = pydantic.Field(1, ge=1, description="epochs")
    window: int = pydantic.Field(200, ge=1, description="newest events that a model sees")
    tiled: bool = pydantic.Field(
        True, description="learn from all events, in windows that begin anywhere; or from the newest window"
    )
    batch_tokens: int = pydantic.Field(4096, ge=1, description="events a step, all of them targets")
    learning_rate: float = pydantic.Field(1e-3, gt=0, description="AdamW, at its highest")
    learning_rate_floor: float = pydantic.Field(0.1, ge=0, le=1, description="share of it at the last epoch")
    warmup: float = pydantic.Field(1.0, ge=0, description="epochs over which the learning rate rises")
    bias_learning_rate: float = pydantic.Field(1e-2, gt=0, description="AdamW, tables of relative biases")
    betas: tuple[float, float] = pydantic.Field((0.9, 0.98), description="AdamW")
    weight_decay: float = pydantic.Field(0.0, ge=0, description="of matrices, the items' vectors among them")
    clip: float = pydantic.Field(1.0, gt=0, description="greatest norm of all gradients together")
    averaging: float = pydantic.Field(
        0.999,
        ge=0,
        lt=1,
        description="decay a step of the average of the weights, which is what is evaluated",
    )
    request: bool = pydantic.Field(
        False,
        description="ask at the time of the next event, by a token that nobody sees, and read what comes "
        "next off it and the newest event together; for data with times",
    )
    temperature: float = pydantic.Field(0.05, gt=0, description="divides the loss's cosines")
    loss: Literal["full", "sampled"] = pydantic.Field(
        "full", description="softmax over all items, or over a sample"
    )
    negatives: int = pydantic.Field(512, ge=1, description="uniform ones, beside those in the batch; sampled")
    softmax_dtype: Literal["float32", "bfloat16"] = pydantic.Field(
        "bfloat16", description="of the products with all items"
    )


class RunConfig(Section):
    """A model and how it is trained."""

    model: ModelConfig = pydantic.Field(description="the encoder")
    epochs: EpochsConfig = pydantic.Field(EpochsConfig(), description="the training")
