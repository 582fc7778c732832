"""Evaluation: diversity against scipy, images against their own seeds, runs at equal reward."""

import json
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist
from scipy.stats import sem
from test_vision import write_dinov2
from tiny_aesthetic import write_tiny_siglip
from tiny_clip import write_tiny_clip
from tiny_sd import write_tiny_sd

from sfumato.clip import load_vision
from sfumato.config import (
    ClassifierRewardConfig,
    ColorRewardConfig,
    DraftConfig,
    ModelConfig,
    SamplerConfig,
    TrainConfig,
    WeightedPartConfig,
    WeightedRewardConfig,
)
from sfumato.diffusion.randomness import derive
from sfumato.evaluation import evaluate as evaluation
from sfumato.evaluation.diversity import LpipsDistance, PixelDistance, build_distance
from sfumato.evaluation.results import Evaluation, at_equal_reward, read_evaluations
from sfumato.evaluation.study import Study
from sfumato.images import load_images
from sfumato.models.generate import generate
from sfumato.models.model import TextToImageModel
from sfumato.models.registry import load_model
from sfumato.rewards.clip import ClipReward
from sfumato.rewards.simple import BrightnessReward, ColorReward
from sfumato.rewards.weighted import WeightedSum
from sfumato.training.checkpoint import Snapshot, write_checkpoint
from sfumato.training.folder import RunFolder

CPU = torch.device("cpu")
PROMPTS = ["a star", "a red ring"]
STUDY: dict[str, Any] = {"num_images": 3, "seed": 7, "batch_size": 4, "features": "pixels"}


def images_of(count: int, side: int) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(3))


# ---- diversity


def test_pixel_distances_are_those_of_scipy() -> None:
    images = images_of(5, 16)  # at 16 x 16 the resize changes nothing
    expected = pdist(images.flatten(1).double().numpy()) / np.sqrt(3 * 16 * 16)
    np.testing.assert_allclose(PixelDistance().pairs(images), expected, rtol=1e-5)
    assert PixelDistance().mean(images) == pytest.approx(expected.mean(), rel=1e-5)


def test_pixel_distance_compares_means_of_areas_at_any_size() -> None:
    small = images_of(4, 16)
    flat = torch.nn.functional.interpolate(small, (64, 64), mode="area")
    fine = flat + 0.2 * (2 * (torch.arange(64) % 2) - 1)  # stripes that a grid of 16 cannot see
    np.testing.assert_allclose(
        PixelDistance().pairs(fine), PixelDistance().pairs(flat), rtol=0, atol=2e-3
    )


def test_clip_distances_are_those_of_scipy(tmp_path: Path) -> None:
    write_tiny_clip(tmp_path / "clip")
    images = images_of(4, 40)
    features = ClipReward.from_pretrained(str(tmp_path / "clip")).image_features(images)
    distance = build_distance(str(tmp_path / "clip"), CPU)
    expected = pdist(features.double().numpy(), "cosine")
    np.testing.assert_allclose(distance.pairs(images), expected, atol=2e-6)
    assert distance.label == "mean pairwise CLIP cosine distance"


@pytest.mark.parametrize(
    ("write", "name"), [(write_dinov2, "DINOv2"), (write_tiny_siglip, "SigLIP")]
)
def test_cosine_distances_are_those_of_transformers_own_features(
    tmp_path: Path, write: Callable[[Path], object], name: str
) -> None:
    write(tmp_path)
    images = images_of(4, 40)
    features = load_vision(str(tmp_path), "features").features(images)
    distance = build_distance(str(tmp_path), CPU)
    expected = pdist(features.double().numpy(), "cosine")
    np.testing.assert_allclose(distance.pairs(images), expected, atol=2e-6)
    assert distance.label == f"mean pairwise {name} cosine distance"


def test_lpips_sees_every_pair_once_in_minus_one_to_one() -> None:
    images = images_of(8, 16)  # 28 pairs: more than one batch of the network

    def squared(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        assert min(first.min(), second.min()) < -0.9
        return (first - second).square().sum((1, 2, 3), keepdim=True)

    scaled = (2 * images - 1).flatten(1).double().numpy()
    np.testing.assert_allclose(
        LpipsDistance(squared).pairs(images), pdist(scaled, "sqeuclidean"), rtol=1e-5
    )


def test_missing_lpips_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ValueError, match=r"pip install 'sfumato\[lpips\]'"):
        build_distance("lpips", CPU)


def test_missing_lpips_weights_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_network(net: str, verbose: bool) -> None:
        raise URLError("no route")

    package = types.ModuleType("lpips")
    monkeypatch.setattr(package, "LPIPS", without_network, raising=False)
    monkeypatch.setitem(sys.modules, "lpips", package)
    with pytest.raises(ValueError, match=r"AlexNet weights.*no route.*sfumato\[lpips\]"):
        build_distance("lpips", CPU)


def test_unknown_features_and_single_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"features = .*nowhere.* must be pixels, lpips"):
        build_distance(str(tmp_path / "nowhere"), CPU)
    with pytest.raises(ValueError, match="num_images to 2 or more"):
        PixelDistance().mean(images_of(1, 16))


# ---- evaluate


def evaluate(
    run: RunFolder,
    model: TextToImageModel,
    config: TrainConfig,
    reward: Any,
    steps: list[int],
    prompts: list[str],
    **settings: Any,
) -> list[Any]:
    study = Study(model, config, reward, prompts, **settings)
    return evaluation.evaluate(run, study, steps)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    write_tiny_sd(folder)
    return folder


@pytest.fixture(scope="module")
def config(pretrained: Path) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(pretrained=str(pretrained)),
        sampler=SamplerConfig(num_inference_steps=2, guidance_scale=2.0),
        objective=DraftConfig(),
        reward=ColorRewardConfig(),
    )


@pytest.fixture(scope="module")
def model(config: TrainConfig) -> TextToImageModel:
    torch.manual_seed(0)  # A of the adapter decides how far B moves the images
    return load_model(config.model)


def weights_of(model: TextToImageModel, size: float) -> dict[str, torch.Tensor]:
    """Return A as it is and B = size: at 0 the policy is the reference."""
    return {
        name: torch.full_like(p, size) if "lora_B" in name else p.detach().clone()
        for name, p in model.trainable().items()
    }


@pytest.fixture
def run(tmp_path: Path, model: TextToImageModel) -> RunFolder:
    """A run whose step 1 changed nothing, and whose EMA at step 2 is what is shown."""
    folder = RunFolder(tmp_path / "run")
    same, other = weights_of(model, 0.0), weights_of(model, 0.3)
    write_checkpoint(folder.checkpoints, Snapshot(1, same, {}, {}, {}))
    write_checkpoint(folder.checkpoints, Snapshot(2, same, other, {}, {}))
    return folder


def rows_of(run: RunFolder, step: int) -> list[dict[str, Any]]:
    lines = (run.evaluation(step) / "scores.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_evaluate_scores_checkpoints_from_the_same_noise(
    run: RunFolder, model: TextToImageModel, config: TrainConfig
) -> None:
    brightness = BrightnessReward(scale=1.0)
    found = evaluate(
        run,
        model,
        config,
        ColorReward("red"),
        [2, 0, 1],
        PROMPTS,
        held_out={"brightness": brightness},
        **STUDY,
    )
    assert [one.step for one in found] == [0, 1, 2]
    assert found[1].reward == pytest.approx(found[0].reward, abs=1e-5)
    assert found[1].diversity == pytest.approx(found[0].diversity, abs=1e-6)
    assert abs(found[2].reward - found[0].reward) > 0.01
    assert read_evaluations(run) == found

    rows = rows_of(run, 2)
    assert [(row["prompt_index"], row["index"]) for row in rows] == [
        (p, i) for p in range(2) for i in range(3)
    ]
    assert [row["seed"] for row in rows] == [derive(7, p, i) for p in range(2) for i in range(3)]
    assert [row["seed"] for row in rows] == [row["seed"] for row in rows_of(run, 0)]
    shown = generate(model, ["a red ring"], [derive(7, 1, 1)], config.sampler)  # step 2 is loaded
    saved = load_images([run.evaluation(2) / "images" / "001-001.png"])
    torch.testing.assert_close(saved, shown, rtol=0, atol=0.5 / 255 + 1e-5)


def test_the_numbers_are_those_of_the_images(
    run: RunFolder, model: TextToImageModel, config: TrainConfig
) -> None:
    held = {"brightness": BrightnessReward(scale=1.0)}
    reward = WeightedSum({"red": (2.0, ColorReward("red"))})
    (found,) = evaluate(run, model, config, reward, [0], PROMPTS, held_out=held, **STUDY)
    images = load_images(
        [run.evaluation(0) / f"images/{p:03d}-{i:03d}.png" for p in range(2) for i in range(3)]
    )
    means = images.double().mean((2, 3)).numpy()
    red = 20 * (means[:, 0] - means[:, 1:].mean(1))
    assert found.reward == pytest.approx(2 * red.mean(), abs=0.02)
    assert found.held_out["brightness"] == pytest.approx(means.mean(), abs=1e-3)
    rows = rows_of(run, 0)
    np.testing.assert_allclose([row["parts"]["red"] for row in rows], red, atol=0.05)
    rewards = np.array([row["reward"] for row in rows]).reshape(2, 3)
    assert found.reward_error == pytest.approx(np.hypot(*sem(rewards, axis=1)) / 2)

    summary = json.loads((run.evaluation(0) / "summary.json").read_text())
    diversity = [PixelDistance().mean(images[start : start + 3]) for start in (0, 3)]
    assert summary["diversity"]["per_prompt"] == pytest.approx(diversity, abs=1e-3)
    assert found.diversity == pytest.approx(np.mean(diversity), abs=1e-3)
    assert found.diversity_label == PixelDistance.label


def test_without_a_reward_all_else_is_measured(
    run: RunFolder, model: TextToImageModel, config: TrainConfig
) -> None:
    held = {"brightness": BrightnessReward(scale=1.0)}
    red = ColorReward("red")
    (scored,) = evaluate(run, model, config, red, [2], PROMPTS, held_out=held, **STUDY)
    with_reward = rows_of(run, 2)
    (found,) = evaluate(run, model, config, None, [2], PROMPTS, held_out=held, **STUDY)
    assert found == replace(scored, reward=None, reward_error=None)
    assert rows_of(run, 2) == [
        {name: value for name, value in row.items() if name not in ("reward", "parts")}
        for row in with_reward
    ]
    summary = json.loads((run.evaluation(2) / "summary.json").read_text())
    assert not {"reward", "reward_error"} & summary.keys()
    assert summary["settings"]["reward"] is None
    written = (run.evaluation(2) / "summary.json").stat()
    assert evaluate(run, model, config, None, [2], PROMPTS, held_out=held, **STUDY) == [found]
    assert (run.evaluation(2) / "summary.json").stat() == written


def test_done_steps_are_skipped_until_the_settings_change(
    run: RunFolder, model: TextToImageModel, config: TrainConfig
) -> None:
    reward = ColorReward("red")
    (run.path / "evaluation" / ".step-000000.tmp-1" / "images").mkdir(parents=True)
    first = evaluate(run, model, config, reward, [0], PROMPTS, **STUDY)
    assert sorted(p.name for p in (run.path / "evaluation").iterdir()) == [".lock", "step-000000"]
    written = (run.evaluation(0) / "summary.json").stat()

    again = evaluate(run, model, config, reward, [0], PROMPTS, **{**STUDY, "batch_size": 2})
    assert (run.evaluation(0) / "summary.json").stat() == written
    assert again == first

    other = evaluate(run, model, config, reward, [0], PROMPTS, **{**STUDY, "num_images": 2})
    assert (run.evaluation(0) / "summary.json").stat() != written
    assert len(rows_of(run, 0)) == 4
    assert other != first


def test_crops_of_training_change_no_evaluation(
    model: TextToImageModel, config: TrainConfig
) -> None:
    found = []
    for crop in (0.7, 1.0):
        reward = ClassifierRewardConfig(pretrained="folder", crop=crop)
        part = WeightedPartConfig(reward)
        for own in (reward, WeightedRewardConfig(parts={"part": part})):
            study = Study(model, replace(config, reward=own), ColorReward("red"), PROMPTS, **STUDY)
            found.append(study.settings()["reward"])
    assert found[:2] == found[2:] and found[0] != found[1]
    reward = WeightedRewardConfig(parts={"crop": WeightedPartConfig(ClassifierRewardConfig("f"))})
    study = Study(model, replace(config, reward=reward), ColorReward("red"), PROMPTS, **STUDY)
    assert "crop" in study.settings()["reward"]["parts"]


def test_an_interrupted_step_is_no_evaluation(
    run: RunFolder, model: TextToImageModel, config: TrainConfig
) -> None:
    def broken(images: torch.Tensor, prompts: Any) -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(
            run, model, config, ColorReward("red"), [0], PROMPTS, held_out={"x": broken}, **STUDY
        )
    assert not run.evaluation(0).exists()
    assert read_evaluations(run) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_images": 1}, "num_images = 1"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"prompts": []}, "no prompts"),
        ({"steps": [0, 3]}, r"no checkpoint of step 3.*step-000001, step-000002"),
        ({"features": "nowhere/clip"}, "features = 'nowhere/clip'"),
    ],
)
def test_mistakes_are_named_before_an_image_is_made(
    run: RunFolder,
    model: TextToImageModel,
    config: TrainConfig,
    change: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    settings = {"steps": [0], "prompts": PROMPTS, **STUDY, **change}
    with pytest.raises(ValueError, match=message):
        evaluate(run, model, config, ColorReward("red"), **settings)
    assert not (run.path / "evaluation").exists()


def test_a_reward_that_is_not_finite_is_refused(
    run: RunFolder, model: TextToImageModel, config: TrainConfig
) -> None:
    with pytest.raises(ValueError, match=r"at step 0 the rewards .* nan"):
        evaluate(run, model, config, ColorReward("red", float("nan")), [0], PROMPTS, **STUDY)
    assert read_evaluations(run) == []


def test_a_damaged_summary_is_named_and_made_again(
    run: RunFolder, model: TextToImageModel, config: TrainConfig
) -> None:
    place = run.evaluation(0)
    place.mkdir(parents=True)
    (place / "summary.json").write_text('{"step": 0}')
    with pytest.raises(ValueError, match=r"summary.json is damaged: .*diversity"):
        read_evaluations(run)
    (found,) = evaluate(run, model, config, ColorReward("red"), [0], PROMPTS, **STUDY)
    assert read_evaluations(run) == [found]


# ---- at equal reward


def curve(*points: tuple[float, float], label: str = "d") -> list[Evaluation]:
    return [Evaluation(10 * i, r, 0.1, d, label) for i, (r, d) in enumerate(points)]


def interpolator(points: list[tuple[float, float]]) -> Callable[[Any], Any]:
    rewards, diversity = zip(*points, strict=True)
    return lambda levels: np.interp(levels, rewards, diversity)


def test_monotone_curves_agree_with_numpy() -> None:
    steep = [(1.0, 0.8), (2.0, 0.5), (5.0, 0.1)]
    gentle = [(1.0, 0.8), (1.5, 0.75), (4.0, 0.6)]
    result = at_equal_reward(curve(*steep), curve(*gentle))
    assert result is not None
    np.testing.assert_allclose(result.levels, np.linspace(1.0, 4.0, 11)[1:])
    first, second = interpolator(steep)(result.levels), interpolator(gentle)(result.levels)
    np.testing.assert_allclose(result.baseline_diversity, first)
    np.testing.assert_allclose(result.other_diversity, second)
    assert result.mean_difference == pytest.approx((second - first).mean())


def test_the_first_crossing_counts_and_a_fall_does_not() -> None:
    wavy = curve((0.0, 1.0), (2.0, 0.8), (1.0, 0.1), (4.0, 0.2))
    straight = curve((0.0, 1.0), (4.0, 0.6))
    result = at_equal_reward(wavy, straight, num_levels=4)
    assert result is not None
    assert result.levels == (1.0, 2.0, 3.0, 4.0)
    third = 0.1 + 2 / 3 * (0.2 - 0.1)  # on the way from 1 to 4
    assert result.baseline_diversity == pytest.approx((0.9, 0.8, third, 0.2))
    assert result.other_diversity == pytest.approx((0.9, 0.8, 0.7, 0.6))


def test_the_order_is_that_of_steps() -> None:
    rising = curve((0.0, 1.0), (1.0, 0.7), (2.0, 0.5))
    assert at_equal_reward(rising[::-1], rising) == at_equal_reward(rising, rising)


def test_a_curve_that_starts_higher_is_read_from_its_start() -> None:
    long, late = curve((0.0, 1.0), (4.0, 0.0)), curve((2.0, 0.9), (4.0, 0.7))
    result = at_equal_reward(long, late, num_levels=2)
    assert result is not None
    assert result.levels == (3.0, 4.0)
    assert result.other_diversity == pytest.approx((0.8, 0.7))


@pytest.mark.parametrize(
    "other",
    [
        [],
        [(1.0, 0.8)],
        [(1.0, 0.8), (0.5, 0.9)],  # never above the base
        [(6.0, 0.8), (7.0, 0.7)],  # starts above all that the baseline reaches
    ],
)
def test_no_common_range(other: list[tuple[float, float]]) -> None:
    assert at_equal_reward(curve((1.0, 0.8), (5.0, 0.1)), curve(*other)) is None


def test_steps_that_nothing_scored_are_left_out() -> None:
    points = curve((1.0, 0.8), (2.0, 0.5), (5.0, 0.1))
    blind = [*points, Evaluation(15, None, None, 0.0, "d")]
    assert at_equal_reward(points, blind) == at_equal_reward(points, points)
    assert at_equal_reward(points, blind[-1:]) is None


def test_different_distances_are_not_compared() -> None:
    points = (0.0, 1.0), (1.0, 0.0)
    first, second = curve(*points), curve(*points, label="LPIPS")
    with pytest.raises(ValueError, match="measured as LPIPS and as d"):
        at_equal_reward(first, second)


def test_a_step_of_other_weights_is_evaluated_again(
    run: RunFolder, model: TextToImageModel, config: TrainConfig
) -> None:
    def rewards() -> float:
        (found,) = evaluate(run, model, config, ColorReward("red"), [2], PROMPTS, **STUDY)
        return found.reward

    before = rewards()
    write_checkpoint(run.checkpoints, Snapshot(2, weights_of(model, -0.3), {}, {}, {}))
    assert abs(rewards() - before) > 1e-3
