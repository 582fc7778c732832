"""Guards: limits of what validation measures, beyond which a run warns, ends, or goes back.

A run that goes back has as its result the step of the lowest validation loss or, under a reward,
of the greatest

    (reward of validation images - the base model's) x their diversity

among those at which no guard of the settings was beyond its limit. No step has more of both.
"""

import difflib
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, final

from sfumato.config import GuardConfig, NoRewardConfig, OwnConfig, TrainConfig

# What training/gauges.py measures: of each picture, in its order; of the reward; of all pictures.
GAUGES = ("dark", "saturated", "edges", "entropy", "high_frequencies", "grid")
SHARPNESS, DIVERSITY = "sharpness", "diversity"
# Under a reward these warn; docs/reward_hacking.md says how they were chosen.
DEFAULTS: Mapping[str, GuardConfig] = {
    DIVERSITY: GuardConfig(limit=0.85, relative="ratio"),
    "edges": GuardConfig(limit=0.75, relative="ratio"),
    "high_frequencies": GuardConfig(limit=0.65, relative="ratio"),
    "dark": GuardConfig(limit=0.1, relative="difference"),  # a ratio of next to nothing is noise
    "grid": GuardConfig(limit=2.0, relative="ratio"),
}
_SPREAD = f"validation/gauge/{DIVERSITY}"
# What falls when a run goes wrong; all else rises.
FALLS = {*("reward", "held_out", "accuracy", "margin", "psnr"), DIVERSITY}
FALLS |= {"edges", "entropy", "high_frequencies"}


@dataclass(frozen=True)
class Verdict:
    """What ended a run before its last step.

    Attributes:
        key: of the setting: guard.NAME or training.target_reward.
        action: stop, rollback, or reach for a reward that was to be reached.
        said: the metric, its value and the limit, in words.
        rule: the values of the setting.
    """

    key: str
    action: str
    step: int
    said: str
    rule: Any


@final
class Guards:
    """The guards of a run, asked after each validation.

    Args:
        say: whether this process prints warnings.

    Attributes:
        verdict: what ended the run, or None.
        loss: of the last validation; the best step has the lowest. Infinite if it cannot be best.
    """

    def __init__(self, config: TrainConfig, *, say: bool = False) -> None:
        self._target = config.training.target_reward
        self._guards = resolved(config)
        self._known = known_metrics(config)
        self._typed = {*config.guard}
        self._say = say
        self._beyond: dict[str, int] = {}  # validations in a row, where not 0
        self.verdict: Verdict | None = None
        self.loss = math.inf

    def judge(self, step: int, row: Mapping[str, float]) -> dict[str, float]:
        """Judge the metrics of a validation; return for each guard how often it is beyond in a row.

        Raises:
            ValueError: if a guard that ends the run is beyond its limit before the first step, or a
                metric cannot be judged so, or is not logged.
        """
        logged: dict[str, float] = {}
        for name, guard in self._guards.items():
            said = self._said_beyond(name, guard, step, row)
            before = self._beyond.pop(name, 0)  # a validation without a number ends the row too
            if said is None:
                continue
            count = before + 1 if said else 0
            logged[f"guard/{name}"] = float(count)
            if said:
                self._beyond[name] = count
                self._act(f"guard.{name}", guard, step, said, count)
        self._aim(step, row)
        self._rank(row)
        return logged

    def _act(self, key: str, guard: GuardConfig, step: int, said: str, count: int) -> None:
        if guard.action != "warn" and not step:
            raise ValueError(
                f"{key}: before the first step, {said}; give another limit, or one that is "
                f"relative to the base model ({key}.relative=ratio)"
            )
        if count < guard.patience:
            return
        if count == guard.patience and self._say:
            print(f"\nwarning: {key}: at step {step}, {said}", flush=True)
        if guard.action == "warn" or (self.verdict and self.verdict.action == "rollback"):
            return
        if self.verdict is None or guard.action == "rollback":
            self.verdict = Verdict(key, guard.action, step, said, asdict(guard))

    def _said_beyond(
        self, name: str, guard: GuardConfig, step: int, row: Mapping[str, float]
    ) -> str | None:
        """Say how far a metric is beyond its limit, "" if it is not; None if nothing is known."""
        metric = find_metric(guard.metric or name, row)
        if metric is None:
            wanted = guard.metric or name
            if step and find_metric(wanted, self._known) is None:  # of a script's own objective
                raise ValueError(unknown_metric(f"guard.{name}", wanted, list(row)))
            return None
        value, words = row[metric], ""
        measured = value
        if guard.relative != "off":
            base = row.get(base_of(metric) or "")
            if base is None:
                return None
            if guard.relative == "ratio" and base <= 0:
                if name not in self._typed:
                    return None
                raise ValueError(
                    f"guard.{name}.relative=ratio needs a base value above 0, and "
                    f"{base_of(metric)} is {base:.4g}; set guard.{name}.relative=difference"
                )
            ratio = guard.relative == "ratio"
            measured = value / base if ratio else value - base
            how = "times" if ratio else "more than"
            words = f", {measured:.4g} {how} the base model's {base:.4g}"
        limit, above = guard.limit, guard.direction == "above"
        assert limit is not None, "resolved"
        if measured <= limit if above else measured >= limit:  # NaN is beyond any limit
            return ""
        return f"{metric} is {value:.4g}{words}, {guard.direction} the limit {limit:g}"

    def _aim(self, step: int, row: Mapping[str, float]) -> None:
        reward = row.get("validation/reward", -math.inf)
        if self._target is None or reward < self._target or self.verdict:
            return
        key, said = "training.target_reward", f"validation/reward is {reward:.4g}"
        if not step:
            raise ValueError(
                f"{key}={self._target:g} is reached before the first step: {said}; give a higher "
                "one, or leave it out"
            )
        self.verdict = Verdict(key, "reach", step, said, self._target)

    def _rank(self, row: Mapping[str, float]) -> None:
        self.loss = row.get("validation/loss", math.inf)
        if not any(guard.action == "rollback" for guard in self._guards.values()):
            return
        if self._typed & self._beyond.keys():
            self.loss = math.inf
        elif "validation/loss" not in row:
            names = ("validation/reward", "validation/reward_base", _SPREAD)
            reward, base, spread = (row.get(name, math.nan) for name in names)
            gain = (reward - base) * spread
            self.loss = -gain if gain > 0 else math.inf  # NaN included

    def state(self) -> dict[str, Any]:
        """Return what a run that goes on needs, as JSON; empty where nothing was beyond."""
        verdict = {} if self.verdict is None else {"verdict": asdict(self.verdict)}
        return verdict | ({"beyond": dict(self._beyond)} if self._beyond else {})

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put the state back; what a setting said that has changed since counts no more."""
        counts = state.get("beyond", {})
        self._beyond = {name: counts[name] for name in counts if name in self._guards}
        if "verdict" not in state:
            return
        verdict = Verdict(**state["verdict"])
        rules: dict[str, Any] = {"training.target_reward": self._target}
        rules |= {f"guard.{name}": asdict(guard) for name, guard in self._guards.items()}
        if rules.get(verdict.key) == verdict.rule:
            self.verdict = verdict


def resolved(config: TrainConfig) -> dict[str, GuardConfig]:
    """Return the guards of a run, by name, with limits and directions; defaults under a reward."""
    names = [*config.guard]
    known = known_metrics(config)
    names += [
        name for name in DEFAULTS if name not in names and f"validation/gauge/{name}" in known
    ]
    return {name: _resolved(name, config.guard.get(name) or GuardConfig(), known) for name in names}


def limit_of(
    name: str, metric: str | None, limit: float | None, relative: str
) -> tuple[float | None, str]:
    """Return `limit` and `relative` of a guard: its own, or those of the default guard NAME."""
    if limit is None and metric is None and name in DEFAULTS:
        return DEFAULTS[name].limit, DEFAULTS[name].relative
    return limit, relative


def _resolved(name: str, guard: GuardConfig, known: Collection[str]) -> GuardConfig:
    limit, relative = limit_of(name, guard.metric, guard.limit, guard.relative)
    guard = replace(guard, limit=limit, relative=relative)
    if guard.direction is None:
        wanted = guard.metric or name
        kinds = set((find_metric(wanted, known) or wanted).split("/"))
        guard = replace(guard, direction="below" if kinds & FALLS else "above")
    return guard


def check_guards(config: TrainConfig) -> None:
    """Refuse guards of metrics that are not logged, or without a limit.

    Raises:
        ValueError: naming the setting, and the nearest metric.
    """
    known, own = known_metrics(config), isinstance(config.objective, OwnConfig)
    for name, guard in resolved(config).items():
        key, metric = f"guard.{name}", find_metric(guard.metric or name, known)
        if metric is None and not own:
            raise ValueError(unknown_metric(key, guard.metric or name, known))
        if guard.limit is None:
            raise ValueError(
                f"{key}.limit is missing; give a number (only {', '.join(DEFAULTS)} have a default)"
            )
        if guard.relative != "off" and metric is not None and base_of(metric) is None:
            raise ValueError(
                f"{key}.relative={guard.relative} compares with the base model, and {metric} has "
                f"no value of it; set {key}.relative=off"
            )
        if guard.action == "rollback" and not {"validation/loss", _SPREAD} & {*known}:
            raise ValueError(
                f"{key}.action=rollback goes back to the step of the best reward and diversity, or "
                "of the lowest validation loss, and the run measures none of them; set "
                f"{key}.action=stop"
            )


def check_sharpness(config: TrainConfig) -> None:
    """Refuse a guard of the sharpness of a reward without a gradient, with a ValueError."""
    for name, guard in config.guard.items():
        metric = find_metric(guard.metric or name, known_metrics(config))
        if metric == f"validation/gauge/{SHARPNESS}":
            raise ValueError(
                f"guard.{name} is of the reward's sharpness, and the reward has no gradient; leave "
                f"the guard out (guard.{name}=null), or guard another gauge: {', '.join(GAUGES)}"
            )


def known_metrics(config: TrainConfig) -> list[str]:
    """Return the metrics that guards may name, as the settings tell them."""
    names = [f"held_out/{name}" for name in config.validation.rewards]
    if _is_scored(config):
        names.insert(0, "reward")
        if config.validation.gauges:
            names += [f"gauge/{name}" for name in (*GAUGES, SHARPNESS)]
            names += [f"gauge/{DIVERSITY}"] if config.validation.num_images > 1 else []
    if config.objective.has_validation_loss and config.validation.loss_images:
        names += ["loss", *(["accuracy", "margin"] if config.objective.reads_pairs else [])]
    kl = ["kl"] if vars(config.objective).get("kl_coeff") else []
    return [*(f"validation/{name}" for name in names), *kl]


def find_metric(name: str, known: Collection[str]) -> str | None:
    """Return the metric that a guard's name means: of a gauge, a held-out reward, or itself."""
    starts = ("validation/gauge/", "validation/held_out/", "validation/", "")
    return next((start + name for start in starts if start + name in known), None)


def unknown_metric(key: str, name: str, known: Collection[str]) -> str:
    """Return the message for a guard of a metric that is not logged."""
    short = {metric.rpartition("/")[2]: metric for metric in known}
    near = difflib.get_close_matches(name.rpartition("/")[2], short, 1, 0.5)
    hint = f"did you mean {near[0]}? There are" if near else "choose one of"
    return f"{key}: {name!r} is no metric of this run's validation; {hint} {', '.join(known)}"


def base_of(metric: str) -> str | None:
    """Return the metric of the base model's own value; None for one that has none."""
    room, _, rest = metric.partition("/")
    kind, slash, name = rest.partition("/")
    scored = room == "validation" and kind in ("reward", "held_out", "gauge")
    return f"{room}/{kind}_base{slash}{name}" if scored else None


def _is_scored(config: TrainConfig) -> bool:
    return config.objective.trains == "model" and not isinstance(config.reward, NoRewardConfig)
