"""Which runs are set against each other, and along which curves."""

from collections.abc import Sequence
from dataclasses import dataclass

from sfumato.evaluation.records import RunRecord
from sfumato.evaluation.results import EqualReward, Evaluation, at_equal_reward


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


def steps_at_equal_reward(records: Sequence[RunRecord], base: Evaluation | None) -> list[int]:
    """Return each run's evaluated step nearest the highest mean reward that all of them reach.

    Returns:
        [] where fewer than two runs are evaluated, or one of them never rises above the base.
    """
    curves = [[one for one in record.evaluations if one.step] for record in records]
    if len(records) < 2 or not all(curves):
        return []
    reward = min(max(one.reward for one in curve) for curve in curves)
    if base is not None and reward <= base.reward:
        return []
    return [min(curve, key=lambda one: abs(one.reward - reward)).step for curve in curves]


def from_base(record: RunRecord, base: Evaluation | None) -> list[Evaluation]:
    """Return a run's evaluations, starting from the base model's."""
    tuned = [one for one in record.evaluations if one.step]
    return [base, *tuned] if base is not None else tuned
