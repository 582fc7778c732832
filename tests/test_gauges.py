"""Gauges of reward hacking: closed forms on made images, and that they change no training."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import final

import pytest
import torch
from runs import command, last_state, metrics, start
from torch import Tensor
from toy import ToyModel, use_toy

from sfumato.config import ColorRewardConfig, JpegRewardConfig
from sfumato.rewards.build import build_reward
from sfumato.rewards.reward import Reward, Score
from sfumato.training.gauges import (
    build_gauges,
    color_entropy,
    dark_share,
    diversity,
    edge_density,
    grid_share,
    high_frequencies,
    saturated_share,
    sharpness,
)
from sfumato.training.guards import GAUGES, SHARPNESS

N = 32  # pixels a side


def gray(rows: Tensor) -> Tensor:
    """Return a gray image of these lumas."""
    return rows.expand(N, N).expand(1, 3, N, N).contiguous()


def checkers(cell: int) -> Tensor:
    place = torch.arange(N) // cell
    return gray(((place[:, None] + place[None, :]) % 2).float())


def ramp() -> Tensor:
    return gray(torch.linspace(0.2, 0.8, N))


def noise() -> Tensor:
    return torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))


BLACK, WHITE, MIDDLE = (gray(torch.full((N,), level)) for level in (0.0, 1.0, 0.5))
HALVES = gray((torch.arange(N) < N // 2).float())
PAIRS = 2 * N * (N - 1)


def grid(images: Tensor) -> Tensor:
    return grid_share(images, 8)


@pytest.mark.parametrize(
    ("gauge", "image", "expected"),
    [
        (dark_share, BLACK, 1.0),
        (dark_share, WHITE, 0.0),
        (dark_share, HALVES, 0.5),
        (dark_share, gray(torch.full((N,), 0.151)), 0.0),
        (dark_share, ramp(), 0.0),
        (saturated_share, BLACK, 1.0),
        (saturated_share, WHITE, 1.0),
        (saturated_share, MIDDLE, 0.0),
        (saturated_share, gray(torch.full((N,), 0.0019)), 1.0),  # rounds to level 0
        (saturated_share, gray(torch.full((N,), 0.0021)), 0.0),  # and to level 1
        (saturated_share, ramp(), 0.0),
        (edge_density, BLACK, 0.0),
        (edge_density, checkers(1), 1.0),
        (edge_density, checkers(4), 2 * N * (N // 4 - 1) / PAIRS),
        (edge_density, HALVES, N / PAIRS),
        (edge_density, ramp(), 0.0),
        (color_entropy, BLACK, 0.0),
        (color_entropy, WHITE, 0.0),
        (color_entropy, HALVES, 1.0),
        (color_entropy, gray((torch.arange(N) / N) + 0.01), 3.0),  # eight levels, equally often
        (high_frequencies, BLACK, 0.0),
        (high_frequencies, gray(torch.full((N,), 0.3)), 0.0),
        (high_frequencies, checkers(1), 1.0),
        (high_frequencies, checkers(2), 1.0),  # 1/4 period a pixel, and nothing below
        (high_frequencies, gray((torch.arange(N) * math.tau / 8).sin() / 2 + 0.5), 0.0),
        (high_frequencies, gray((torch.arange(N) * math.tau * 3 / 8).sin() / 2 + 0.5), 1.0),
        (grid, BLACK, 0.0),
        (grid, gray(torch.full((N,), 0.3)), 0.0),
        (grid, checkers(4), 1.0),
        (grid, checkers(8), 0.0),  # repeats every 16 pixels, so that all tiles cancel
        (grid, ramp(), (8**2 - 1) / (N**2 - 1)),
    ],
)
def test_a_gauge_has_its_closed_form(gauge, image: Tensor, expected: float) -> None:
    (found,) = gauge(image).tolist()
    assert found == pytest.approx(expected, abs=1e-6)


def test_gauges_of_noise_are_those_of_its_distribution() -> None:
    pixels, image = 256**2, noise()
    assert high_frequencies(image).item() == pytest.approx(0.75, abs=0.01)
    assert grid(image).item() == pytest.approx(63 / (pixels - 1), rel=0.6)
    alike = image[:, :1].expand(-1, 3, -1, -1)
    assert edge_density(alike).item() == pytest.approx(0.81, abs=0.005)  # P(|u - v| > .1)
    assert dark_share(alike).item() == pytest.approx(0.15, abs=0.005)
    bias = 511 / (2 * pixels * math.log(2))  # of the entropy of a sample, Miller and Madow
    assert color_entropy(image).item() == pytest.approx(9 - bias, abs=0.001)


def test_each_image_has_its_own_number() -> None:
    images = torch.cat([BLACK, HALVES, checkers(1)])
    for gauge in (dark_share, saturated_share, edge_density, color_entropy, high_frequencies, grid):
        each = torch.cat([gauge(image[None]) for image in images])
        assert torch.equal(gauge(images), each)


@final
class Bowl(Reward):
    """Minus half the squared distance to a centre, times a curvature."""

    def __init__(self, curvature: float) -> None:
        super().__init__()
        self.curvature = curvature

    def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
        return Score(-0.5 * self.curvature * (images - 0.25).square().sum((1, 2, 3)))


@pytest.mark.parametrize("curvature", [0.5, 3.0])
def test_sharpness_of_a_quadratic_reward(curvature: float) -> None:
    """Downhill by rho from distance d: k ((d + rho)^2 - d^2) / 2."""
    images = torch.cat([WHITE, MIDDLE])[:, :, :4, :4].double()
    distance = (images - 0.25).flatten(1).norm(dim=1)
    expected = curvature * (distance * 0.01 + 0.01**2 / 2)
    found = sharpness(Bowl(curvature), images, ["a", "b"])
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-6)
    top = torch.full_like(images, 0.25)  # no direction is downhill there
    assert sharpness(Bowl(curvature), top, ["a", "b"]).tolist() == [0, 0]


def test_sharpness_of_a_linear_reward_is_the_step_times_its_gradient() -> None:
    reward = build_reward(ColorRewardConfig(scale=20.0))
    weight = 20 / N**2 * math.sqrt(N**2 * (1 + 2 * 0.25))
    assert sharpness(reward, MIDDLE, ["a"]).item() == pytest.approx(0.01 * weight, rel=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sharpness_is_not_rounded_by_autocast(dtype: str) -> None:
    gauge = build_gauges(Bowl(3.0), 8)[SHARPNESS]
    alone = gauge(MIDDLE, ["a"])
    with torch.autocast("cpu", dtype=vars(torch)[dtype]):
        assert torch.equal(gauge(MIDDLE, ["a"]), alone)


def test_gauges_have_the_names_that_guards_know() -> None:
    assert tuple(build_gauges(build_reward(JpegRewardConfig()), 8)) == GAUGES
    assert tuple(build_gauges(build_reward(ColorRewardConfig()), 8)) == (*GAUGES, SHARPNESS)


def test_diversity_is_within_prompts_where_it_can_be() -> None:
    images = torch.cat([BLACK, WHITE, BLACK, MIDDLE])
    half = 128 / 255  # of a picture of 8 bits
    mean = (1 + half) / 2
    assert diversity(images, ["a", "a", "b", "b"]) == pytest.approx(mean, abs=1e-6)
    assert diversity(images, ["a", "b", "c", "c"]) == pytest.approx(half, abs=1e-6)
    apart = (1 + 0 + half + 1 + (1 - half) + half) / 6
    assert diversity(images, ["a", "b", "c", "d"]) == pytest.approx(apart, abs=1e-6)
    assert diversity(BLACK, ["a"]) is None


# --- In a run


def pairs(run: Path, step: int) -> list[dict[str, float]]:
    file = run / "samples" / f"step-{step:06d}" / "pairs.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def toy_run(folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> Path:
    use_toy(monkeypatch)
    start(command(folder, "run", *more))
    return folder / "run"


def test_validation_logs_gauges_beside_the_base_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = toy_run(tmp_path, monkeypatch)
    names = (*GAUGES, SHARPNESS)
    for row in metrics(run):
        if row["step"] % 3:
            assert not any("gauge" in key for key in row)
            continue
        shown = pairs(run, int(row["step"]))
        for name in names:
            for end, side in (("", "tuned"), ("_base", "base")):
                mean = sum(pair[f"gauge_{side}/{name}"] for pair in shown) / len(shown)
                assert row[f"validation/gauge{end}/{name}"] == pytest.approx(mean, rel=1e-6)
        first = metrics(run)[0]["validation/gauge/diversity"]
        assert row["validation/gauge_base/diversity"] == first


@pytest.mark.parametrize("more", [(), ("sampler.eta=0.5", "model.variant=0.2")])
def test_gauges_change_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    with_them = toy_run(tmp_path / "a", monkeypatch, *more)
    without = toy_run(tmp_path / "b", monkeypatch, *more, "validation.gauges=false")
    ours, theirs = last_state(with_them), last_state(without)
    assert {k: v for k, v in ours.state.items() if k != "guards"} == theirs.state
    assert all(torch.equal(ours.weights[name], theirs.weights[name]) for name in theirs.weights)
    told = ("validation/gauge", "guard/")
    rows = metrics(with_them)
    left = [{k: row[k] for k in row if not k.startswith(told)} for row in rows]
    assert left == metrics(without)


def test_a_resumed_run_reads_the_base_models_gauges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no frozen copy, they come from the pictures and rows of step 0."""
    monkeypatch.setattr(ToyModel, "has_reference", False)
    alone = ["objective.kl_coeff=0", "model.reference=false"]
    whole = toy_run(tmp_path / "a", monkeypatch, *alone)
    start(command(tmp_path / "b", "run", *alone, "training.max_steps=3"))
    start(command(tmp_path / "b", "run", *alone))
    assert metrics(tmp_path / "b" / "run") == metrics(whole)


def test_an_older_run_goes_on_without_the_base_models_gauges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ToyModel, "has_reference", False)
    alone = ["objective.kl_coeff=0", "model.reference=false"]
    older = [*alone, "validation.gauges=false", "training.max_steps=3"]
    run = toy_run(tmp_path, monkeypatch, *older)
    start(command(tmp_path, "run", *alone))
    last = metrics(run)[-1]
    assert "validation/gauge/dark" in last and "validation/gauge_base/dark" not in last
    assert "validation/gauge_base/diversity" in last  # of its pictures
