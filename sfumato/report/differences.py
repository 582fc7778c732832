"""Differences between two evaluated models, with intervals over prompts and seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sfumato.evaluation.bootstrap import MIN_PROMPTS, paired_interval
from sfumato.evaluation.results import Evaluation
from sfumato.report.records import RunRecord, ShownImage, read_scores

REWARD, HELD_OUT, DIVERSITY = "reward", "held_out.", "diversity"  # names of scores


@dataclass(frozen=True)
class Difference:
    """A difference of means, and the ends of its interval of 95 % if there is one."""

    mean: float
    ends: tuple[float, float] | None


@dataclass(frozen=True)
class Scored:
    """An evaluated model.

    Attributes:
        rows: of each image; of the diversity, of each prompt.
    """

    one: Evaluation
    rows: Sequence[Mapping[str, Any]]
    prompts: Sequence[Mapping[str, Any]]


def scored(record: RunRecord, one: Evaluation) -> Scored:
    """Return an evaluation with the scores of its images.

    Raises:
        ValueError: if scores cannot be read.
    """
    # Runs of one report have the same prompts and seeds: their numbers name them.
    prompts = [{"prompt": str(i), "seed": 0, DIVERSITY: v} for i, v in enumerate(one.per_prompt)]
    return Scored(one, [_row(image) for image in read_scores(record, one.step)], prompts)


def differences(first: Scored, second: Scored) -> dict[str, Difference]:
    """Return second minus first for each score that both have."""
    found = {}
    before, after = means(first.one), means(second.one)
    for name in before.keys() & after.keys():
        rows = [s.prompts if name == DIVERSITY else s.rows for s in (first, second)]
        found[name] = Difference(after[name] - before[name], _ends(rows[0], rows[1], name))
    return found


def means(one: Evaluation) -> dict[str, float]:
    """Return the scores of an evaluation by name."""
    rewards = {} if one.reward is None else {REWARD: one.reward}
    held_out = {f"{HELD_OUT}{name}": value for name, value in one.held_out.items()}
    return {**rewards, **held_out, DIVERSITY: one.diversity}


def _row(image: ShownImage) -> dict[str, Any]:
    return {**asdict(image), "prompt": str(image.prompt_index), "seed": image.index}


def _ends(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], name: str
) -> tuple[float, float] | None:
    """Return the interval's ends; None of too few prompts, or where rows lack the score."""
    if len({row["prompt"] for row in first}) < MIN_PROMPTS:
        return None
    try:
        _, low, high = paired_interval(first, second, name)
    except ValueError:
        return None
    return low, high
