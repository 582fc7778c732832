"""Held-out rewards: scored on validation images, evaluated, shown in the report, never trained."""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import final

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from runs import command, last_state, metrics, start
from tiny_clip import write_tiny_clip
from torch import Tensor
from toy import ToyModel, use_toy

from sfumato.compose import compose_command, compose_train, load_settings
from sfumato.config import (
    BrightnessRewardConfig,
    ColorRewardConfig,
    EvaluateConfig,
    RewardConfig,
    WeightedRewardConfig,
)
from sfumato.evaluation.commands import evaluate_run
from sfumato.evaluation.evaluate import evaluate
from sfumato.evaluation.study import Study
from sfumato.report.figures import training_panels
from sfumato.report.records import read_runs
from sfumato.rewards.build import build_reward
from sfumato.rewards.reward import Reward, Score
from sfumato.run import build
from sfumato.run.identity import trained_rewards
from sfumato.training.folder import RunFolder

LIGHT = "validation.rewards.light={kind: brightness, scale: 2.0}"
BLUE = "validation.rewards.blue={kind: color, color: blue}"
SHORT = ("training.max_steps=2", "validation.every_steps=2")
GIVEN = ("objective=draft", "model.pretrained=M", "data.prompts=P", "reward=color")


def pairs(run: Path, step: int) -> list[dict[str, float]]:
    file = run / "samples" / f"step-{step:06d}" / "pairs.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def toy_run(folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> Path:
    use_toy(monkeypatch)
    start(command(folder, "run", *SHORT, *more))
    return folder / "run"


def test_held_out_rewards_are_measured_on_validation_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = toy_run(tmp_path, monkeypatch, LIGHT, BLUE, "training.tensorboard=true")
    for step in (0, 2):
        for row in pairs(run, step):
            for side in ("tuned", "base"):
                file = run / "samples" / f"step-{step:06d}" / f"{row['index']:03d}-{side}.png"
                pixels = np.asarray(Image.open(file), dtype=np.float64).mean((0, 1)) / 255
                light, blue = 2 * pixels.mean(), 20 * (pixels[2] - pixels[:2].mean())
                assert row[f"held_out_{side}/light"] == pytest.approx(light, abs=0.01)
                assert row[f"held_out_{side}/blue"] == pytest.approx(blue, abs=0.1)
        logged = next(row for row in metrics(run) if row["step"] == step)
        for name in ("light", "blue"):
            for key, side in (("held_out", "tuned"), ("held_out_base", "base")):
                mean = np.mean([row[f"held_out_{side}/{name}"] for row in pairs(run, step)])
                assert logged[f"validation/{key}/{name}"] == pytest.approx(mean, rel=1e-5)
    (events,) = (run / "tensorboard").iterdir()
    assert b"validation/held_out/light" in events.read_bytes()
    (record,) = read_runs([RunFolder(run)])
    panels = {panel.title: panel for panel in training_panels([record], None)}
    (line,) = panels["light of validation images (held out)"].lines
    assert list(line.x) == [0, 2]
    assert "blue of validation images (held out)" in panels


def test_held_out_rewards_change_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_them = toy_run(tmp_path / "a", monkeypatch, LIGHT, BLUE)
    without = toy_run(tmp_path / "b", monkeypatch)
    ours, theirs = last_state(with_them), last_state(without)
    assert ours.state == theirs.state
    assert all(torch.equal(ours.weights[name], theirs.weights[name]) for name in theirs.weights)
    left = [{k: v for k, v in row.items() if "held_out" not in k} for row in metrics(with_them)]
    assert left == metrics(without)
    assert not any("held_out" in key for row in pairs(without, 2) for key in row)


def test_the_base_models_scores_are_read_where_there_is_no_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on has no base model any more, but its first pictures' scores."""
    alone = ["objective.kl_coeff=0", "model.reference=false", LIGHT]
    run = toy_run(tmp_path, monkeypatch, *alone)
    start(command(tmp_path, "run", *alone, "training.max_steps=4", "validation.every_steps=2"))
    first, last = pairs(run, 0), pairs(run, 4)
    assert [row["held_out_base/light"] for row in last] == [
        row["held_out_base/light"] for row in first
    ]


@final
class Fails(Reward):
    """Fails for one prompt, and gives no number for another."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
        if "a square" in prompts:
            raise RuntimeError("a square is no ring")
        lost = torch.tensor([math.nan if prompt == "a star" else 0.0 for prompt in prompts])
        return Score(images.mean((1, 2, 3)) + lost)


def test_a_held_out_reward_that_fails_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(config: RewardConfig) -> Reward:
        return Fails() if isinstance(config, BrightnessRewardConfig) else build_reward(config)

    monkeypatch.setattr(build, "build_reward", built)
    shown = tmp_path / "shown.txt"
    shown.write_text("a ring\na square\na star\n")
    with pytest.warns(UserWarning, match="leaves out 2 of 3 rewards of held_out/light: a square"):
        run = toy_run(tmp_path, monkeypatch, LIGHT, f"validation.prompts={shown}")
    rows = pairs(run, 2)
    assert ["held_out_tuned/light" in row for row in rows] == [True, False, False]
    assert all("reward_tuned" in row for row in rows)
    logged = next(row for row in metrics(run) if row["step"] == 2)
    assert logged["validation/held_out/light"] == pytest.approx(rows[0]["held_out_tuned/light"])


# --- Those that are trained


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([LIGHT, BLUE], []),
        (["validation.rewards.red={kind: color, color: red, scale: 1.0}", LIGHT], ["red"]),
        (["objective=nft", "training.global_batch_size=16", BLUE, "reward.color=blue"], ["blue"]),
        (["objective=supervised", BLUE, "reward.color=blue"], []),
        (["validation.rewards.c={kind: clip, pretrained: other}", "reward=clip",
          "reward.pretrained=here"], ["c"]),
        (["validation.rewards.c={kind: clip, pretrained: other, score: cosine}", "reward=clip",
          "reward.pretrained=here"], ["c"]),
        (["validation.rewards.c={kind: http, url: 'http://a/', timeout: 9}", "objective=nft",
          "training.global_batch_size=16", "reward=http", "reward.url=http://a/"], ["c"]),
        (["validation.rewards.c={kind: http, url: 'http://a/', metadata: true}", "objective=nft",
          "training.global_batch_size=16", "reward=http", "reward.url=http://a/"], []),
        (["validation.rewards.c={kind: clip, pretrained: third}", "reward=clip",
          "reward.pretrained=here"], []),
        (["reward=weighted", "reward.parts.x={kind: color, color: blue}",
          "reward.parts.y={kind: brightness, weight: 0.0}", LIGHT, BLUE], ["blue"]),
    ],
)  # fmt: skip
def test_a_held_out_reward_that_training_learns_from_is_named(
    more: list[str], said: list[str]
) -> None:
    given = {text.split("=")[0]: text for text in [*GIVEN, *more]}
    if "objective=supervised" in more:
        given |= {"data.prompts": "data.images.path=P"}
    config, _ = compose_train(list(given.values()))
    contents = {"reward.pretrained": "same", "validation.rewards.c.pretrained": "same"}
    if "pretrained: third" in more[0]:
        contents["validation.rewards.c.pretrained"] = "another"
    assert trained_rewards(config, contents) == said


def test_a_start_says_that_a_held_out_reward_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    toy_run(tmp_path, monkeypatch, "validation.rewards.x.kind=color", LIGHT)
    out = capfd.readouterr().out
    assert "warning: validation.rewards.x is a reward that training learns from" in out
    assert "validation.rewards.light" not in out


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{kind: none}", "rewards.a.kind = 'none'; choose one of clip"),
        ("{kind: weighted}", "rewards.a.kind = 'weighted'; choose one of clip"),
        ("{kind: color, weight: 2.0}", "unknown key validation.rewards.a.weight"),
        ("{kind: clip}", "missing settings: validation.rewards.a.pretrained"),
        ("{kind: color, color: cyan}", r"validation\.rewards\.a\.color='cyan' is unknown"),
        ("brightness", "validation.rewards.a = 'brightness'; write {kind: ..."),
    ],
)
def test_wrong_held_out_rewards_are_refused(entry: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose_train([*GIVEN, f"validation.rewards.a={entry}"])


def test_null_takes_a_held_out_reward_out() -> None:
    config, _ = compose_train([*GIVEN, LIGHT, BLUE, "validation.rewards.light=null"])
    assert config.validation.rewards == {"blue": ColorRewardConfig(color="blue")}


# --- Evaluation


def test_an_evaluation_has_the_held_out_rewards_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(toy_run(tmp_path, monkeypatch, LIGHT, BLUE))
    config = load_settings(run.config)
    rewards = {name: build_reward(each) for name, each in config.validation.rewards.items()}
    study = Study(
        ToyModel(config.model), config, build_reward(config.reward), ["a ring"], num_images=2,
        seed=3, batch_size=2, features="pixels", held_out=rewards,
    )  # fmt: skip
    base, _ = evaluate(run, study, [0, 2])
    assert list(base.held_out) == ["light", "blue"]
    changed = replace(study, config=replace(config, validation=replace(config.validation, rewards={
        **config.validation.rewards, "light": BrightnessRewardConfig(scale=3.0)})))  # fmt: skip
    assert changed.settings() != study.settings()
    assert "rewards" not in replace(study, held_out={}).settings()
    (record,) = read_runs([run])
    titles = [panel.title for panel in training_panels([record], base)]
    assert titles.count("light") == titles.count("blue") == 1
    assert not any("held out" in title for title in titles)


def test_an_evaluation_depends_on_no_balance() -> None:
    def settings(*more: str) -> dict[str, object]:
        given = [*GIVEN[:3], "reward=weighted", "reward.parts.a.kind=color", *more]
        config, _ = compose_train(given)
        assert isinstance(config.reward, WeightedRewardConfig)
        model = ToyModel(config.model)
        reward = build_reward(config.reward)
        return Study(model, config, reward, ["a"], 2, 0, 1, "pixels").settings()

    balanced = settings("reward.standardise=true", "reward.gradients=equalised")
    assert balanced == settings()
    assert not {"standardise", "gradients"} & balanced["reward"].keys()  # type: ignore[attr-defined]


def test_evaluate_reads_a_held_out_model_where_it_lies_now(
    tmp_path: Path, sd_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny_clip(tmp_path / "clip")
    held = "validation.rewards.match={kind: clip, pretrained: clip}"
    small = ["training.max_steps=1", "validation.num_images=1", "model.lora.rank=2", held]
    start([text for text in command(tmp_path, "run", *small, model=sd_folder)
           if not text.startswith("model.trainable")])  # fmt: skip
    began = json.loads((tmp_path / "run" / "contents.json").read_text())["began"]
    assert "validation.rewards.match.pretrained" in began
    request = EvaluateConfig(run=str(tmp_path / "run"), num_images=2, steps=[1])
    (one,) = evaluate_run(request)
    shutil.move(tmp_path / "clip", tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="clip"):
        evaluate_run(replace(request, seed=5))
    typed = [f"run={tmp_path / 'run'}", "num_images=2", "steps=[1]"]
    typed.append(f"validation.rewards.match.pretrained={tmp_path / 'elsewhere'}")
    (again,) = evaluate_run(compose_command("evaluate", typed)[0])
    assert again.held_out == one.held_out
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["validation"]["rewards"]
