"""Which runs are set against each other, and along which curves."""

from collections.abc import Sequence
from dataclasses import dataclass

from sfumato.evaluation.results import EqualReward, Evaluation, at_equal_reward
from sfumato.report.records import RunRecord


@dataclass(frozen=True)
class Comparison:
    """A DRaFT+ run beside the run without KL, read at equal reward; None where they never meet."""

    baseline: str
    other: str
    result: EqualReward | None


def compare(records: Sequence[RunRecord], base: Evaluation | None) -> list[Comparison]:
    """Set each run with KL against one without: that of the same seed, if there is one."""
    plain = [r for r in records if r.kl_coeff == 0 and r.final is not None]
    found = []
    for record in records:
        if not record.kl_coeff or record.final is None or not plain:
            continue
        same_seed = [r for r in plain if r.seed == record.seed]
        baseline = (same_seed or plain)[0]
        result = at_equal_reward(from_base(baseline, base), from_base(record, base))
        found.append(Comparison(baseline.name, record.name, result))
    return found


def steps_at_equal_reward(
    records: Sequence[RunRecord], base: Evaluation | None
) -> list[tuple[RunRecord, int]]:
    """Return, of runs with a reward, the evaluated step nearest the highest mean that all reach.

    Returns:
        [] where fewer than two runs are evaluated, or one of them never rises above the base.
    """
    scored = [record for record in records if record.scored]
    curves = [
        [(one.reward, one.step) for one in r.evaluations if one.step and one.reward is not None]
        for r in scored
    ]
    if len(scored) < 2 or not all(curves):
        return []
    level = min(max(reward for reward, _ in curve) for curve in curves)
    if base is not None and base.reward is not None and level <= base.reward:
        return []
    nearest = [min(curve, key=lambda point: abs(point[0] - level)) for curve in curves]
    return [(record, step) for record, (_, step) in zip(scored, nearest, strict=True)]


def from_base(record: RunRecord, base: Evaluation | None) -> list[Evaluation]:
    """Return a run's evaluations, starting from the base model's."""
    tuned = [one for one in record.evaluations if one.step]
    return [base, *tuned] if base is not None else tuned
