"""What a run shows: pairs of fixed prompts and noise, made and exported with the average."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import final

import numpy as np
import pytest
import torch
from PIL import Image
from runs import (
    PROMPTS,
    command,
    last_state,
    metrics,
    start,
)
from safetensors.torch import load_file
from torch import Tensor
from toy import PromptReward, ToyModel, factor, use_toy

from sfumato.compose import compose_train, load_settings
from sfumato.config import DraftConfig
from sfumato.models.generate import generate
from sfumato.objectives.draft import Draft
from sfumato.rewards.reward import Reward, Score
from sfumato.run import build, open_data
from sfumato.run.build import Own
from sfumato.run.run import train
from sfumato.training.checkpoint import list_checkpoints, read_checkpoint
from sfumato.training.distribution import Distribution
from sfumato.training.state import load_weights


@pytest.fixture(autouse=True)
def toy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    if "sd_folder" not in request.fixturenames:
        use_toy(monkeypatch)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give a complete run of the toy: six steps, validated at 0, 3 and 6, averaged over two."""
    folder = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        use_toy(patch)
        patch.setattr(build, "build_reward", lambda config: PromptReward())
        more = ["training.ema_decay=0.5", "training.tensorboard=true", "model.variant=0.5"]
        start(command(folder, "run", *more))
    yield folder / "run"


def pairs(run_folder: Path, step: int) -> list[dict]:
    file = run_folder / "samples" / f"step-{step:06d}" / "pairs.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def picture(run_folder: Path, step: int, index: int, side: str) -> bytes:
    return (run_folder / "samples" / f"step-{step:06d}" / f"{index:03d}-{side}.png").read_bytes()


def test_validation_shows_the_same_prompts_and_noise(done: Path) -> None:
    shown = [path.name for path in sorted((done / "samples").iterdir())]
    assert shown == ["step-000000", "step-000003", "step-000006"]
    first = pairs(done, 0)
    assert [record["prompt"] for record in first] == PROMPTS[:3]
    assert len({record["seed"] for record in first}) == 3
    for step in (3, 6):
        for index, record in enumerate(pairs(done, step)):
            for key in ("index", "prompt", "seed", "reward_base"):
                assert record[key] == first[index][key]
            assert picture(done, step, index, "base") == picture(done, 0, index, "base")
            assert picture(done, step, index, "tuned") != picture(done, 0, index, "tuned")


def test_validation_is_without_dropout(done: Path) -> None:
    """Before the first step both sides are one model, which dropout would make two."""
    for record in pairs(done, 0):
        assert record["reward_tuned"] == record["reward_base"]


def test_training_is_with_dropout(done: Path, tmp_path: Path) -> None:
    torch.seed()
    rewards = []
    for dropout in (0.0, 0.5):
        one = ["training.max_steps=1", f"model.variant={dropout}"]
        start(command(tmp_path, str(dropout), *one))
        rewards.append(metrics(tmp_path / str(dropout))[1]["reward"])
    assert rewards[0] != rewards[1]


def test_each_image_is_scored_with_its_own_prompt(done: Path) -> None:
    """Recompute the rewards from the files; half an 8-bit level is their precision."""
    assert len({factor(prompt) for prompt in PROMPTS[:3]}) == 3
    for step in (0, 3, 6):
        for record in pairs(done, step):
            for side in ("tuned", "base"):
                file = done / "samples" / f"step-{step:06d}" / f"{record['index']:03d}-{side}.png"
                pixels = np.asarray(Image.open(file), dtype=np.float64) / 255
                number = factor(record["prompt"])
                expected = pixels.mean() * number
                assert record[f"reward_{side}"] == pytest.approx(expected, abs=number / 500)


def test_metrics_hold_the_means_of_the_pairs(done: Path) -> None:
    rows = {row["step"]: row for row in metrics(done)}
    assert list(rows) == list(range(7))
    for step, row in rows.items():
        if step % 3:
            assert "validation/reward" not in row
            continue
        for name, side in (("validation/reward", "tuned"), ("validation/reward_base", "base")):
            mean = np.mean([record[f"reward_{side}"] for record in pairs(done, step)])
            assert row[name] == pytest.approx(mean, rel=1e-6)
    expected = ["reward", "kl", "loss", "grad_norm", "learning_rate"]
    assert all(name in rows[step] for step in range(1, 7) for name in expected)
    assert [rows[step]["learning_rate"] for step in range(1, 7)] == [0.005] + [0.01] * 5
    assert rows[1]["kl"] > 0  # dropout sets the policy apart from its reference at once


def test_the_average_is_what_is_validated(done: Path) -> None:
    config = load_settings(done / "config.yaml")
    rewards = {}
    for name in ("ema", "weights"):
        model = ToyModel(config.model)
        load_weights(model, vars(last_state(done))[name], name)
        model.network.eval()
        for record in pairs(done, 6):
            image = generate(model, [record["prompt"]], [record["seed"]], config.sampler)
            rewards[name, record["index"]] = image.mean().item() * factor(record["prompt"])
    for record in pairs(done, 6):
        assert record["reward_tuned"] == pytest.approx(rewards["ema", record["index"]], rel=1e-5)
        assert abs(rewards["ema", record["index"]] - rewards["weights", record["index"]]) > 1e-3


def test_the_average_is_what_is_exported(done: Path) -> None:
    state = last_state(done)
    network = load_file(done / "export" / "pipeline" / "network.safetensors")
    assert network.keys() == state.ema.keys()
    for name, tensor in network.items():
        assert torch.equal(tensor, state.ema[name])
        assert not torch.equal(tensor, state.weights[name])


def test_the_average_follows_the_weights_of_the_checkpoints(tmp_path: Path) -> None:
    every = ["training.checkpoint_every_steps=1", "training.keep_checkpoints=null"]
    start(command(tmp_path, "run", *every, "training.ema_decay=0.3", "training.max_steps=5"))
    states = [read_checkpoint(path) for path in list_checkpoints(tmp_path / "run/checkpoints")]
    assert [state.step for state in states] == [1, 2, 3, 4, 5]
    for before, state in pairwise(states):
        decay = min(0.3, (1 + before.step) / (10 + before.step))
        for name, shadow in state.ema.items():
            expected = decay * before.ema[name] + (1 - decay) * state.weights[name]
            torch.testing.assert_close(shadow, expected, rtol=1e-6, atol=1e-8)


def test_without_an_average_the_weights_are_exported(tmp_path: Path) -> None:
    start(command(tmp_path, "run", "training.ema_decay=null", "training.max_steps=2"))
    state = last_state(tmp_path / "run")
    network = load_file(tmp_path / "run" / "export" / "pipeline" / "network.safetensors")
    assert state.ema == {}
    assert all(torch.equal(network[name], tensor) for name, tensor in state.weights.items())


def test_run_json_says_what_ran(done: Path) -> None:
    (start_record,) = json.loads((done / "run.json").read_text())["starts"]
    assert start_record["torch"] == torch.__version__
    assert start_record["diffusers"].count(".") == 2
    assert start_record["seed"] == 0
    assert start_record["processes"] == 1
    assert start_record["reward_scale"] == 3.0
    weights = last_state(done).weights
    assert start_record["trained_parameters"] == sum(t.numel() for t in weights.values())
    settings = load_settings(done / "config.yaml")
    composed, _ = compose_train(command(done.parent, "run"))
    assert settings.sampler == composed.sampler
    assert settings.training == replace(composed.training, ema_decay=0.5, tensorboard=True)


def test_validation_prompts_have_a_column_of_their_own(tmp_path: Path) -> None:
    train, check = tmp_path / "train.csv", tmp_path / "check.jsonl"
    train.write_text("legend\na star\n")
    check.write_text('{"words": "a ring"}\n{"words": "a cross"}\n')
    given = ["recipe=demo_draft_plus", f"data.prompts={train}", "data.column=legend"]
    given += ["validation.num_images=3"]
    config, _ = compose_train(given)
    assert open_data.validation_prompts(config) == ["a star"] * 3
    config, _ = compose_train([*given, f"validation.prompts={check}", "validation.column=words"])
    assert open_data.validation_prompts(config) == ["a ring", "a cross", "a ring"]


def test_a_reward_of_a_script_scores_validation_too(
    tmp_path: Path, sd_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    @final
    class Seven(Reward):
        def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
            return Score(images.mean((1, 2, 3)) * 0 + 7, {})

    short = ["training.max_steps=1", "validation.every_steps=1", "verify=false"]
    config, settings = compose_train(command(tmp_path, "run", *short, model=sd_folder))
    assert isinstance(config.objective, DraftConfig)
    distribution = Distribution(config.training)
    own = Own(objective=Draft(config.objective, config.sampler, Seven()))
    train(config, settings, distribution, own)
    distribution.close()
    rows = metrics(tmp_path / "run")
    assert {row["validation/reward"] for row in rows if "validation/reward" in row} == {7.0}
    assert "validation scores by Seven, which the script brought" in capfd.readouterr().out


@final
class Picky(Reward):
    """Gives no number for a broken ring, and fails for a square."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
        if "a square" in prompts:
            raise RuntimeError("a square is no ring")
        lost = torch.tensor([math.nan if "broken" in prompt else 0.0 for prompt in prompts])
        return Score(images.mean((1, 2, 3)) + lost)


def test_validation_leaves_out_what_the_reward_cannot_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing number neither ends the run nor spoils the mean, also where the base is read."""
    monkeypatch.setattr(build, "build_reward", lambda config: Picky())
    shown = tmp_path / "shown.txt"
    shown.write_text("a ring\na broken ring\na square\na star\n")
    given = [f"validation.prompts={shown}", "validation.num_images=4", "objective.kl_coeff=0"]
    given += ["model.reference=false"]
    with pytest.warns(UserWarning, match="leaves out 2 of 4 rewards: a square is no ring"):
        start(command(tmp_path, "run", *given, "training.max_steps=3"))
    with pytest.warns(UserWarning, match="leaves out 2 of 4"):
        start(command(tmp_path, "run", *given))
    for step in (0, 3, 6):
        rows = pairs(tmp_path / "run", step)
        there = ["reward_tuned" in row and "reward_base" in row for row in rows]
        assert there == [True, False, False, True]
        assert not any("reward_tuned" in rows[i] or "reward_base" in rows[i] for i in (1, 2))
        logged = next(row for row in metrics(tmp_path / "run") if row["step"] == step)
        mean = (rows[0]["reward_tuned"] + rows[3]["reward_tuned"]) / 2
        assert logged["validation/reward"] == pytest.approx(mean)


def test_validation_without_any_number_has_no_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "build_reward", lambda config: Picky())
    shown = tmp_path / "shown.txt"
    shown.write_text("a square\n")
    with pytest.warns(UserWarning, match="leaves out 3 of 3"):
        start(command(tmp_path, "run", f"validation.prompts={shown}", "training.max_steps=2"))
    assert not any("validation/reward" in row for row in metrics(tmp_path / "run"))
