"""Guards: warn, stop, go back; alike on all processes, exact over a kill, refused where in vain."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import (
    assert_same_state,
    command,
    in_child,
    in_processes,
    kill,
    last_state,
    metrics,
    on_call,
    start,
    start_cli,
)
from toy import use_toy

from sfumato.compose import compose_train
from sfumato.config import GuardConfig
from sfumato.launch.results import _missing_of_run
from sfumato.training import validation
from sfumato.training.checkpoint import best_step, list_checkpoints, step_of
from sfumato.training.guards import Guards, find_metric
from sfumato.training.validation import Validation

DRAFT = ("objective=draft", "model.pretrained=M", "data.prompts=P", "reward=color")
JPEG = ("objective=nft", "model.pretrained=M", "data.prompts=P", "reward=jpeg",
        "training.global_batch_size=16")  # fmt: skip
DIVERSITY = "validation/gauge/diversity"


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    use_toy(monkeypatch)


def guards(*more: str) -> Guards:
    return Guards(compose_train([*DRAFT, *more])[0], say=True)


def row(**values: float) -> dict[str, float]:
    return {f"validation/{name.replace('__', '/')}": value for name, value in values.items()}


# --- What they judge


@pytest.mark.parametrize(
    ("guard", "found", "beyond"),
    [
        ("dark.limit=0.3", {"gauge__dark": 0.31}, True),
        ("dark.limit=0.3", {"gauge__dark": 0.3}, False),
        ("dark.limit=0.3", {"gauge__dark": 0.1}, False),
        ("entropy.limit=2", {"gauge__entropy": 1.9}, True),  # falls when a run goes wrong
        ("entropy.limit=2", {"gauge__entropy": 2.5}, False),
        ("reward.limit=1", {"reward": 0.9}, True),
        ("reward={limit: 1, direction: above}", {"reward": 0.9}, False),
        ("reward={limit: 1, direction: above}", {"reward": 1.1}, True),
        ("reader.limit=0.4", {"held_out__reader": 0.3}, True),  # held-out rewards fall too
        ("reader.limit=0.4", {"held_out__reader": 0.5}, False),
        ("x={metric: held_out/reader, limit: 0.4}", {"held_out__reader": 0.3}, True),
        ("x={metric: dark, limit: 0.3}", {"gauge__dark": 0.31}, True),
        ("x={metric: validation/gauge/dark, limit: 0.3}", {"gauge__dark": 0.31}, True),
        (
            "dark={limit: 2, relative: ratio}",
            {"gauge__dark": 0.41, "gauge_base__dark": 0.2},
            True,
        ),
        (
            "dark={limit: 2, relative: ratio}",
            {"gauge__dark": 0.39, "gauge_base__dark": 0.2},
            False,
        ),
        (
            "dark={limit: 0.1, relative: difference}",
            {"gauge__dark": 0.11, "gauge_base__dark": 0.0},
            True,
        ),
        (
            "reward={limit: -0.5, relative: difference}",
            {"reward": -2.6, "reward_base": -2.0},
            True,
        ),
        (
            "reward={limit: -0.5, relative: difference}",
            {"reward": -2.4, "reward_base": -2.0},
            False,
        ),
    ],
)
def test_a_guard_acts_beyond_its_limit(guard: str, found: dict[str, float], beyond: bool) -> None:
    name = guard.partition(".")[0].partition("=")[0]
    reader = "validation.rewards.reader={kind: brightness}"
    judge = guards(reader, f"guard.{guard}", f"guard.{name}.action=stop")
    logged = judge.judge(3, row(**found))
    assert logged[f"guard/{name}"] == beyond
    assert (judge.verdict is not None) == beyond
    if judge.verdict is not None:
        assert (judge.verdict.key, judge.verdict.step) == (f"guard.{name}", 3)


@pytest.mark.parametrize(
    ("guard", "key"),
    [
        ("dark.limit=0.3", "gauge__dark"),
        ("diversity.limit=0.3", "gauge__diversity"),
        ("diversity={limit: 0.3, relative: ratio}", "gauge__diversity"),
        ("reader.limit=0.4", "held_out__reader"),
    ],
)
def test_what_is_not_a_number_is_beyond_any_limit(guard: str, key: str) -> None:
    name = guard.partition(".")[0].partition("=")[0]
    reader = "validation.rewards.reader={kind: brightness}"
    judge = guards(reader, f"guard.{guard}", f"guard.{name}.action=stop")
    judge.judge(3, row(**{key: math.nan, "gauge_base__diversity": 0.2}))
    assert judge.verdict is not None and "nan" in judge.verdict.said


def test_a_number_that_is_not_there_ends_the_row() -> None:
    judge = guards("guard.dark={limit: 0.3, action: stop, patience: 2}")
    dark, nothing = {"gauge__dark": 0.5}, {}
    counts = []
    for step, found in enumerate([dark, nothing, dark, dark], 1):
        assert judge.verdict is None
        counts.append(judge.judge(step, row(**found)).get("guard/dark"))
    assert counts == [1, None, 1, 2]
    assert judge.verdict is not None and judge.verdict.step == 4


def test_patience_counts_validations_in_a_row() -> None:
    judge = guards("guard.dark={limit: 0.3, action: stop, patience: 3}")
    counts = []
    for step, dark in enumerate([0.5, 0.5, 0.1, 0.5, 0.5, 0.5], 1):
        assert judge.verdict is None
        again = guards("guard.dark={limit: 0.3, action: stop, patience: 3}")
        again.restore(json.loads(json.dumps(judge.state())))  # as if killed before each
        judge = again
        counts.append(judge.judge(step, row(gauge__dark=dark))["guard/dark"])
    assert counts == [1, 2, 0, 1, 2, 3]
    assert judge.verdict is not None and judge.verdict.step == 6


def test_a_warning_comes_once_until_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    judge = guards("guard.dark.limit=0.3")
    for step, dark in enumerate([0.5, 0.6, 0.1, 0.7], 1):
        judge.judge(step, row(gauge__dark=dark))
    said = capsys.readouterr().out
    assert said.count("warning: guard.dark: at step") == 2
    assert "at step 1, validation/gauge/dark is 0.5, above the limit 0.3" in said
    assert judge.verdict is None


def test_a_default_guard_warns_of_lost_diversity(capsys: pytest.CaptureFixture[str]) -> None:
    judge = guards()
    for step, spread in ((1, 0.38), (2, 0.2)):
        judge.judge(step, {DIVERSITY: spread, "validation/gauge_base/diversity": 0.4})
    said = capsys.readouterr().out
    assert "at step 2, validation/gauge/diversity is 0.2, 0.5 times the base model's 0.4" in said
    assert judge.verdict is None and "at step 1," not in said
    assert not guards("validation.gauges=false").judge(1, {DIVERSITY: 0.0})
    typed = guards("guard.diversity.action=stop")  # takes limit and relation of the default
    typed.judge(2, {DIVERSITY: 0.2, "validation/gauge_base/diversity": 0.4})
    assert typed.verdict is not None


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_going_back_wins_over_stopping(order: Sequence[int]) -> None:
    both = [
        "guard.dark={limit: 0.3, action: stop}",
        "guard.grid={limit: 0.3, action: rollback}",
        "training.target_reward=1",
    ]
    judge = guards(*[both[i] for i in order], both[2])
    judge.judge(1, row(gauge__dark=0.5, gauge__grid=0.5, reward=2.0))
    assert judge.verdict is not None and judge.verdict.action == "rollback"


def test_the_best_step_is_on_the_front_and_within_limits() -> None:
    judge = guards("guard.dark={limit: 0.3, action: rollback, patience: 9}")

    def loss(reward: float, spread: float, dark: float = 0.0) -> float:
        judge.judge(1, row(reward=reward, reward_base=10.0, gauge__diversity=spread,
                           gauge_base__diversity=0.5, gauge__dark=dark))  # fmt: skip
        return judge.loss

    assert loss(12.0, 0.45) == pytest.approx(-0.9)
    assert loss(14.0, 0.4) < loss(12.0, 0.45) < loss(12.0, 0.4)
    assert loss(9.0, 0.5) == loss(10.0, 0.5) == math.inf  # no better than the base model
    assert loss(14.0, 0.4, dark=0.31) == math.inf
    judge.judge(1, row(reward=12.0, reward_base=10.0))
    assert judge.loss == math.inf  # nothing is known of diversity


def test_without_a_guard_that_goes_back_the_best_has_the_lowest_loss() -> None:
    judge = guards("guard.dark={limit: 0.3, action: stop}")
    for found, loss in (({"loss": 0.5}, 0.5), ({"reward": 1.0}, math.inf)):
        judge.judge(1, row(**found))
        assert judge.loss == loss


@pytest.mark.parametrize(
    ("guard", "found", "said"),
    [
        (
            "dark={limit: 0.3, action: stop}",
            {"gauge__dark": 0.4},
            r"guard\.dark: before the first step, validation/gauge/dark is 0\.4, above the limit",
        ),
        (
            "reward={limit: 0.9, relative: ratio}",
            {"reward": -1.0, "reward_base": -1.0},
            r"guard\.reward\.relative=ratio needs a base value above 0, and validation/reward_base",
        ),
        (
            "dark={limit: 2, relative: ratio}",
            {"gauge__dark": 0.0, "gauge_base__dark": 0.0},
            r"set guard\.dark\.relative=difference",
        ),
    ],
)
def test_a_limit_that_cannot_be_meant_is_told_before_the_first_step(
    guard: str, found: dict[str, float], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        guards(f"guard.{guard}").judge(0, row(**found))


def test_a_target_that_is_reached_before_the_first_step_is_told() -> None:
    with pytest.raises(ValueError, match=r"target_reward=1 is reached before the first step"):
        guards("training.target_reward=1").judge(0, row(reward=1.5))


# --- What is refused


@pytest.mark.parametrize(
    ("given", "typed", "said"),
    [
        (DRAFT, "guard.drak.limit=1", "guard.drak: 'drak' is no metric .*; did you mean dark"),
        (DRAFT, "guard.sharp.limit=1", "did you mean sharpness"),
        (DRAFT, "guard.x={metric: held_out/readr, limit: 1}", "no metric of this run"),
        (
            (*DRAFT, "validation.rewards.reader={kind: brightness}"),
            "guard.x={metric: held_out/readr, limit: 1}",
            "did you mean reader",
        ),
        ((*DRAFT, "validation.gauges=false"), "guard.dark.limit=1", "'dark' is no metric"),
        ((*DRAFT, "validation.num_images=1"), "guard.diversity.limit=1", "'diversity' is no"),
        ((*DRAFT, "objective.kl_coeff=0"), "guard.kl.limit=1", "'kl' is no metric"),
        (DRAFT, "guard.loss.limit=1", "'loss' is no metric"),
        (DRAFT, "guard.saturated.action=stop", "guard.saturated.limit is missing; give a number"),
        (DRAFT, "guard.dark={limit: 1, action: halt}", "guard.dark.action='halt' is unknown"),
        (DRAFT, "guard.dark={limit: 1, direction: up}", "choose one of above, below"),
        (DRAFT, "guard.dark={limit: 1, relative: half}", "choose one of off, ratio, difference"),
        (DRAFT, "guard.dark={limit: 1, patience: 0}", "guard.dark.patience=0 is too small"),
        (DRAFT, "guard.dark={limt: 1}", "unknown key guard.dark.limt"),
        (DRAFT, "guard.dark=0.3", "guard.dark = 0.3; write {KEY: VALUE"),
        (
            (*DRAFT, "objective.kl_coeff=1"),
            "guard.kl={limit: 1, relative: ratio}",
            "kl has no value of it; set guard.kl.relative=off",
        ),
        (
            (*DRAFT, "validation.num_images=1"),
            "guard.dark={limit: 1, action: rollback}",
            "set guard.dark.action=stop",
        ),
        (
            (*DRAFT, "validation.every_steps=0"),
            "guard.dark.limit=1",
            "has no effect with validation.every_steps=0, or set|with validation.every_steps=0",
        ),
        ((*DRAFT, "validation.every_steps=0"), "training.target_reward=1", "every_steps=0"),
        (
            ("objective=supervised", "model.pretrained=M", "data.images.path=P"),
            "training.target_reward=1",
            "with reward=none",
        ),
        (
            ("objective=supervised", "model.pretrained=M", "data.images.path=P"),
            "guard.dark.limit=1",
            "'dark' is no metric of this run's validation; choose one of validation/loss",
        ),
    ],
)
def test_a_guard_in_vain_is_refused(given: Sequence[str], typed: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        compose_train([*given, typed])


def test_a_guard_of_a_sharpness_that_is_not_there_is_refused(tmp_path: Path) -> None:
    more = ["objective=nft", "reward=jpeg", "guard.sharpness.limit=1", "objective.kl_coeff=0"]
    more += ["objective.images_per_prompt=2", "training.global_batch_size=4"]
    with pytest.raises(ValueError, match=r"guard\.sharpness is of the reward's sharpness"):
        start(command(tmp_path, "run", *more))


def test_names_of_metrics() -> None:
    known = ["validation/reward", "validation/held_out/dark", "validation/gauge/dark", "kl"]
    assert find_metric("dark", known) == "validation/gauge/dark"
    assert find_metric("held_out/dark", known) == "validation/held_out/dark"
    assert find_metric("reward", known) == "validation/reward"
    assert find_metric("kl", known) == "kl"
    assert find_metric("grey", known) is None


def test_null_takes_a_guard_out() -> None:
    config, _ = compose_train([*DRAFT, "guard.dark.limit=1", "guard.dark=null"])
    assert config.guard == {}
    config, _ = compose_train([*DRAFT, "guard.dark.limit=1"])
    assert config.guard == {"dark": GuardConfig(limit=1.0)}


# --- In a run: validations after each step find these numbers


def script(monkeypatch: pytest.MonkeyPatch, found: Sequence[dict[str, float]]) -> None:
    """Let the validation of step i find the i-th numbers beside its own."""
    run = Validation.run

    def scripted(self: Validation, model: Any, step: int, *more: Any) -> dict[str, float]:
        return run(self, model, step, *more) | row(**found[min(step, len(found) - 1)])

    monkeypatch.setattr(validation.Validation, "run", scripted)


EACH = ("validation.every_steps=1", "training.max_steps=6", "training.keep_checkpoints=1")
DARK = [{"gauge__dark": 0.0}, {"gauge__dark": 0.1}, {"gauge__dark": 0.2}, {"gauge__dark": 0.9}]
STOP = "guard.dark={limit: 0.3, action: stop}"
BACK = "guard.dark={limit: 0.3, action: rollback}"
FRONT = [
    {"reward": reward, "reward_base": 10.0, "gauge__diversity": spread, **dark}
    for reward, spread, dark in zip(
        (10.0, 12.0, 12.5, 20.0), (0.5, 0.45, 0.2, 0.1), DARK, strict=True
    )
]


def steps(run: Path) -> list[int]:
    return [step_of(place) for place in list_checkpoints(run / "checkpoints")]


def test_a_guard_stops_a_run_and_its_word_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    script(monkeypatch, DARK)
    again = command(tmp_path, "run", *EACH, STOP)
    for _ in range(2):
        assert in_child(lambda: start_cli(again)) == 3
        said = capfd.readouterr()
        assert "ended at step 3 by guard.dark: validation/gauge/dark is 0.9, above" in said.out
        assert "nothing is exported" in said.out and "guard.dark=null" in said.out
        assert "Traceback" not in said.err
        assert steps(tmp_path / "run") == [3]
    assert not (tmp_path / "run" / "export").exists()
    assert in_child(lambda: start_cli([*again, "guard.dark.limit=0.95"])) == 0
    assert steps(tmp_path / "run") == [6]
    assert [r["step"] for r in metrics(tmp_path / "run")] == list(range(7))


def test_a_guard_goes_back_to_the_best_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    script(monkeypatch, FRONT)
    again = command(tmp_path, "run", *EACH, BACK)
    for _ in range(2):
        assert in_child(lambda: start_cli(again)) == 0
        said = capfd.readouterr().out
        assert "ended at step 3 by guard.dark" in said
        assert "the result is step 1" in said and "exported is step 1" in said
        assert steps(tmp_path / "run") == [1, 3]
    assert best_step(tmp_path / "run" / "checkpoints") == 1
    config, _ = compose_train(again)
    assert _missing_of_run(config) is None  # a ladder goes on with its export
    config.guard["dark"].limit = 0.95
    assert "is at step 3 of 6" in str(_missing_of_run(config))
    assert in_child(lambda: start_cli([*again, "guard.dark=null"])) == 0
    assert "exported is step 6" in capfd.readouterr().out


def test_a_run_without_a_better_step_has_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    script(monkeypatch, [{**each, "reward": 9.0, "reward_base": 10.0} for each in FRONT])
    again = command(tmp_path, "run", *EACH, BACK)
    assert in_child(lambda: start_cli(again)) == 3
    assert "no step was better than the base model" in capfd.readouterr().out
    assert not (tmp_path / "run" / "export").exists()


def test_a_reached_reward_ends_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    script(monkeypatch, FRONT)
    again = command(tmp_path, "run", *EACH, "training.target_reward=12.2")
    for _ in range(2):
        assert in_child(lambda: start_cli(again)) == 0
        said = capfd.readouterr().out
        assert "ended at step 2 by training.target_reward: validation/reward is 12.5" in said
        assert "exported is step 2" in said
    assert _missing_of_run(compose_train(again)[0]) is None
    assert in_child(lambda: start_cli([*again, "training.target_reward=99"])) == 0
    assert steps(tmp_path / "run") == [6]


@pytest.fixture
def guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Give a guard with patience over checkpoints that lie apart, and the run nobody killed."""
    script(monkeypatch, [{"gauge__dark": dark} for dark in (0.0, 0.5, 0.1, 0.5, 0.5, 0.5)])
    more = ["validation.every_steps=1", "training.max_steps=8",
            "guard.dark={limit: 0.3, action: stop, patience: 3}"]  # fmt: skip
    start(command(tmp_path / "whole", "run", *more))
    assert last_state(tmp_path / "whole" / "run").step == 5
    yield more


@pytest.mark.parametrize(
    ("function", "number"),
    [("Guards.judge", 5), ("Guards.judge", 6), ("TrainState.snapshot", 3), ("_sync", 12)],
)
def test_a_guards_state_survives_a_kill(
    tmp_path: Path, guarded: list[str], function: str, number: int
) -> None:
    again = command(tmp_path / "parts", "run", *guarded)

    def die() -> None:
        on_call(number, kill, function)
        start(again)

    assert in_child(die) in (-9, 0)
    assert in_child(lambda: start(again)) == 0
    assert_same_state(tmp_path / "parts" / "run", tmp_path / "whole" / "run")
    assert metrics(tmp_path / "parts" / "run") == metrics(tmp_path / "whole" / "run")


def test_all_processes_decide_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process measures otherwise, and still ends with the first."""
    run = Validation.run

    def alike_on(rank: int) -> None:
        def scripted(self: Validation, model: Any, step: int, *more: Any) -> dict[str, float]:
            found = run(self, model, step, *more)
            return found | row(gauge__dark=0.9 if step >= 2 and rank == 0 else 0.0)

        monkeypatch.setattr(validation.Validation, "run", scripted)
        outcome = start(command(tmp_path, "run", *EACH, STOP, "training.micro_batch_size=2"))
        assert outcome.step == 2 and outcome.verdict is not None

    in_processes(2, alike_on)
    assert torch.is_tensor(next(iter(last_state(tmp_path / "run").weights.values())))
    assert last_state(tmp_path / "run").step == 2


def test_an_older_checkpoint_has_no_guards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(command(tmp_path, "run", "training.max_steps=3", "validation.gauges=false"))
    assert "guards" not in last_state(tmp_path / "run").state
    script(monkeypatch, [{"gauge__dark": 0.0}] * 6 + [{"gauge__dark": 0.9}])
    outcome = start(command(tmp_path, "run", STOP))
    assert outcome.step == 6 and outcome.verdict is not None
