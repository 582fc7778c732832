"""Cost of a checkpoint, from what the run recorded."""

from dataclasses import dataclass

from sfumato.report.records import RunRecord


@dataclass(frozen=True)
class Cost:
    """What training up to a step took; None is not recorded.

    Attributes:
        seconds: of all training steps, without validation and checkpoints.
        images: in all batches, with repetitions.
        queries: images that a reward scored to train on.
    """

    seconds: float | None
    images: int | None
    queries: int | None


def cost(record: RunRecord, step: int) -> Cost:
    """Return the cost of a step of a run."""
    rows = [row for row in record.metrics if 0 < row["step"] <= step]
    seconds = [row["seconds_per_step"] for row in rows if "seconds_per_step" in row]
    queries = [row["reward_queries"] for row in rows if "reward_queries" in row]
    batch = record.setting("training", "global_batch_size")
    return Cost(
        sum(seconds) if len(seconds) == step else None,  # a part of the steps would be too few
        step * batch if batch else None,
        int(queries[-1]) if queries else None,
    )
