"""The dashboard of the stream and training."""

from grstream import telemetry as t
from jobs.monitoring.common import ALL, gauge, q, quantiles
from jobs.monitoring.panels import Dashboard, Panel, Row

TRAINING = Dashboard(
    "grstream-training",
    "grstream: stream and training",
    "How far behind the log training is, how well it predicts what it has not learned yet, what it costs.",
    [
        Row(
            "Stream",
            [
                Panel(
                    "Lag",
                    t.LAG.description + " It grows where readers, or the trainer, are slower than producers.",
                    "short",
                    {"partition {{partition}}": q.largest(t.LAG, by="partition")},
                    warn=10_000,
                    bad=100_000,
                ),
                Panel(
                    "Read to learned",
                    t.LEARNED_SECONDS.description,
                    "s",
                    quantiles(t.LEARNED_SECONDS),
                    warn=5,
                    bad=30,
                ),
                Panel(
                    "Posted to visible",
                    t.HISTORY_VISIBLE.description,
                    "s",
                    quantiles(t.HISTORY_VISIBLE),
                    warn=1,
                    bad=5,
                ),
                Panel(
                    "Offsets settled",
                    "By what became of them. Dead letters are records that are no events; lost ones were "
                    "gone before they were read.",
                    "ops",
                    {"{{disposition}}": q.rate(t.SETTLED, by="disposition")},
                ),
                Panel(
                    "Age of the newest event",
                    "Of what was trained on, by the event's own time. It grows, too, while nothing is sent.",
                    "s",
                    {"partition {{partition}}": q.largest(t.FRESHNESS, by="partition")},
                ),
                Panel(
                    "Share of time waiting for input",
                    t.INPUT_WAIT.description + " Near 1 the trainer keeps up; near 0 it is what is slow.",
                    "percentunit",
                    {"waiting": q.rate(t.INPUT_WAIT)},
                    warn=0.2,
                    bad=0.05,
                    below=True,
                    most=1,
                ),
            ],
        ),
        Row(
            "Quality, of predictions made before learning",
            [
                Panel(
                    "Normalized entropy",
                    t.ENTROPY.description,
                    "none",
                    {"{{action}} {{window}}": q.largest(t.ENTROPY, ALL, by="action, window")},
                    warn=1,
                    bad=1.2,
                ),
                Panel(
                    "Normalized entropy by what is known of the user",
                    "By the number of events before the one predicted, and of events that came late.",
                    "none",
                    {"{{action}} {{window}} {{slice}}": q.largest(t.ENTROPY, by="action, window, slice")},
                ),
                Panel(
                    "Calibration",
                    t.CALIBRATION.description + " 1 is right; a value far from it misleads whoever adds up "
                    "probabilities.",
                    "none",
                    {"{{action}} {{window}}": q.largest(t.CALIBRATION, ALL, by="action, window")},
                    warn=1.1,
                    bad=1.25,
                ),
                Panel(
                    "GAUC",
                    t.GAUC.description + " 0.5 is chance.",
                    "none",
                    {"{{action}} {{window}}": q.largest(t.GAUC, ALL, by="action, window")},
                    warn=0.55,
                    bad=0.5,
                    below=True,
                    least=None,
                    most=1,
                ),
                Panel(
                    "Hit rate",
                    t.HIT_RATE.description,
                    "percentunit",
                    {"@{{k}} {{window}}": q.largest(t.HIT_RATE, ALL, by="k, window")},
                ),
                Panel(
                    "Events in the windows",
                    "Few events make every figure beside this one uncertain. Missed ones came after a window "
                    "had moved on.",
                    "short",
                    {
                        "{{window}}": q.largest(t.WINDOW_EVENTS, ALL, by="window"),
                        "missed {{window}}": q.largest(t.MISSED, by="window"),
                    },
                ),
            ],
        ),
        Row(
            "Training",
            [
                Panel("Events", t.EVENTS.description, "ops", {"events": q.rate(t.EVENTS)}),
                Panel("Tokens", t.TOKENS.description, "ops", {"tokens": q.rate(t.TOKENS)}),
                Panel("Steps", t.STEPS.description, "ops", {"steps": q.rate(t.STEPS)}),
                Panel("Step", t.STEP_SECONDS.description, "s", quantiles(t.STEP_SECONDS), warn=1, bad=5),
                Panel(
                    "Loss",
                    "Of the last step, nats an event: for the direction, not the level.",
                    "none",
                    {"ranking": q.largest(t.RANKING_LOSS), "retrieval": q.largest(t.RETRIEVAL_LOSS)},
                ),
                Panel(
                    "Vocabulary",
                    "Keys with an embedding row, and those that lost theirs, a second: where evictions are "
                    "steady, train.vocabulary_rows is too small or train.admit_after too low.",
                    "short",
                    {"keys": q.largest(t.KEYS), "evicted/s": q.rate(t.EVICTIONS)},
                ),
                Panel(
                    "Versions published",
                    "An hour. With none, scores do not learn; see the gate and publish failures.",
                    "short",
                    {"an hour": f"3600 * {q.rate(t.PUBLISHED)}"},
                ),
                Panel(
                    "Newest version and checkpoint",
                    "Their numbers only go up.",
                    "none",
                    {"version": q.largest(t.VERSION), "checkpoint": q.largest(t.CHECKPOINT)},
                    least=None,
                ),
                Panel(
                    "Checkpoints",
                    t.CHECKPOINT_SECONDS.description + " And the copy, for which steps stand still.",
                    "s",
                    {
                        "written p99": q.quantile(0.99, t.CHECKPOINT_SECONDS),
                        "steps stood still p99": q.quantile(0.99, t.CHECKPOINT_STALL),
                    },
                    warn=10,
                    bad=60,
                ),
            ],
        ),
        Row(
            "Readers",
            [
                gauge(t.USERS, "Users", "short"),
                gauge(t.HISTORY_EVENTS, "Events in histories", "short"),
                gauge(t.HISTORY_BYTES, "Bytes of histories", "bytes"),
                Panel(
                    "Late events",
                    "Ever: placed before others, and those too late for their place (histories.lateness_ms).",
                    "short",
                    {
                        "late, partition {{partition}}": q.largest(t.LATE, by="partition"),
                        "too late, partition {{partition}}": q.largest(t.TOO_LATE, by="partition"),
                    },
                ),
                gauge(t.USERS_EVICTED, "Users evicted", "short"),
                Panel(
                    "Exposures",
                    "Open ones wait for labels; those closed early had no room (events.exposures.max_open).",
                    "short",
                    {
                        "open, partition {{partition}}": q.largest(t.OPEN_EXPOSURES, by="partition"),
                        "closed early, partition {{partition}}": q.largest(t.CLOSED_EARLY, by="partition"),
                    },
                ),
            ],
        ),
    ],
)
