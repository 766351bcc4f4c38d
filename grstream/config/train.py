"""Streaming training."""

from typing import Annotated, Literal

import pydantic

from grstream.config.section import Name, Section


class TrainConfig(Section):
    """Streaming training."""

    workers: int = pydantic.Field(1, ge=1, description="trainer processes, each with its part of the keys")
    worker_cpus: float = pydantic.Field(1, gt=0, description="logical CPUs each trainer worker asks Ray for")
    gpu: bool = pydantic.Field(False, description="each worker trains on a GPU of its own")
    learning_rate: float = pydantic.Field(5e-4, gt=0, description="AdamW, dense parameters")
    bias_learning_rate: float = pydantic.Field(
        1e-2, gt=0, description="AdamW, tables of relative position and time"
    )
    row_optimizer: Literal["adagrad", "adamw"] = pydantic.Field(
        "adagrad", description="rowwise, of embedding rows; a checkpoint's must stay what it was"
    )
    row_learning_rate: float = pydantic.Field(
        0.05, gt=0, description="of embedding rows; the default suits adagrad, 1e-3 adamw"
    )
    vocabulary_rows: int | None = pydantic.Field(
        None,
        ge=1,
        description="embedding rows, of items and features, over all workers; beyond, a new key takes the "
        "row of the one used least recently. Each worker has an equal share of them for the keys that are "
        "its own. Default: as many as there are keys",
    )
    admit_after: int = pydantic.Field(
        1, ge=1, description="events that must be about a key before it gets a row and is learned"
    )
    admit_candidates: int = pydantic.Field(
        1 << 20,
        ge=1,
        description="keys without a row, over all workers, whose events are counted; beyond, those without "
        "one for longest are forgotten",
    )
    weight_decay: float = pydantic.Field(0.0, ge=0, description="AdamW, dense parameters")
    retrieval_weight: float = pydantic.Field(0.02, ge=0, description="retrieval loss beside the ranking loss")
    retrieval_temperature: float = pydantic.Field(
        0.05, gt=0, description="divides the retrieval loss's cosines: with less, one item stands out sooner"
    )
    negatives: int = pydantic.Field(256, ge=1, description="uniform negatives a step beside in-batch ones")
    full_softmax_items: int = pydantic.Field(
        0, ge=0, description="up to so many items all are the negatives of every event"
    )
    action_weights: dict[Name, Annotated[float, pydantic.Field(ge=0)]] = pydantic.Field(
        {}, description="of each action's ranking loss; 1 where not given"
    )
    stochastic_length: float | None = pydantic.Field(
        None, gt=1, le=2, description="the paper's α: long histories are trained on in part; default: whole"
    )
    log_predictions: bool = pydantic.Field(False, description="keep every prediction, for evaluation")
    predictions_kept_s: float = pydantic.Field(
        2_592_000, gt=0, description="and so long: they name users, whom a tombstone does not take out"
    )
    publish_every_s: float = pydantic.Field(5, gt=0, description="between versions of the weights")
    checkpoint_every_s: float = pydantic.Field(60, gt=0, description="between checkpoints")
    keep_checkpoints: int = pydantic.Field(3, ge=1, description="newest ones; older are deleted")
    max_restarts: int = pydantic.Field(-1, ge=-1, description="of the worker group; -1: no limit")
    base_every: int = pydantic.Field(
        20,
        ge=1,
        description="versions from one that holds all embedding rows to the next; those between hold "
        "what was touched since the one before",
    )
    keep_versions: int = pydantic.Field(5, ge=2, description="newest ones, beside what they build on")
    exchange: bool = pydantic.Field(
        True,
        description="scorers of the same Ray cluster get versions through its object store, which then "
        "holds a base and the deltas since; without, and in other clusters, from storage",
    )
    recent_events: int = pydantic.Field(20_000, ge=1, description="events that the recent figures are over")
    max_entropy_jump: float | None = pydantic.Field(
        0.5,
        gt=0,
        description="while the normalized entropy of the newest tenth of the recent events is so much above "
        "that of the recent ones, weights are neither published nor saved; null: never judged",
    )
    bad_steps: int = pydantic.Field(
        50, ge=1, description="so many in a row send training back to the newest checkpoint"
    )
    max_reverts: int = pydantic.Field(3, ge=0, description="to one checkpoint; beyond, the job ends")
    seed: int = pydantic.Field(0, description="of parameters, new rows, negatives and stochastic length")
