"""Closed-form rewards and the weighted sum: equal to arithmetic, and to PIL's JPEG."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import write_tiny_clip
from torch import Tensor

from sfumato.rewards.clip import ClipReward
from sfumato.rewards.simple import BrightnessReward, ColorReward, JpegCompressibility
from sfumato.rewards.weighted import WeightedSum


def random_images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


# --- Closed forms


@pytest.mark.parametrize(
    ("color", "expected"), [("red", [20.0, -10.0]), ("green", [-10.0, 5.0]), ("blue", [-10.0, 5.0])]
)
def test_color_reward_of_red_and_of_cyan(color: str, expected: list[float]):
    images = torch.zeros(2, 3, 4, 5)
    images[0, 0] = 1
    images[1, 1:] = 0.5
    assert ColorReward(color)(images, ["", ""]).tolist() == pytest.approx(expected)


def test_color_reward_is_unclamped_scaled_and_differentiable():
    images = torch.full((1, 3, 2, 2), 3.0, requires_grad=True)
    reward = ColorReward("green", scale=8.0)
    reward(images, [""]).sum().backward()
    assert images.grad is not None
    assert images.grad[0, :, 0, 0].tolist() == pytest.approx([-1.0, 2.0, -1.0])
    assert reward.scale == 8.0


def test_color_reward_names_the_colors():
    with pytest.raises(ValueError, match="color is 'cyan'; choose one of red, green, blue"):
        ColorReward("cyan")


def test_brightness_reward():
    images = torch.stack([torch.zeros(3, 2, 2), torch.full((3, 2, 2), 0.25)])
    assert BrightnessReward()(images, ["", ""]).tolist() == [0.0, 5.0]
    assert BrightnessReward(scale=-4.0)(images, ["", ""]).tolist() == [0.0, -1.0]


def test_jpeg_reward_is_minus_the_size_that_pil_writes():
    noise = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    flat = np.full_like(noise, 130)
    sizes = []
    for array in (noise, flat):
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "JPEG", quality=95)
        sizes.append(len(buffer.getvalue()))
    images = torch.from_numpy(np.stack([noise, flat])).permute(0, 3, 1, 2) / 255
    reward = JpegCompressibility()
    value = reward(images.requires_grad_(), ["", ""])
    assert value.tolist() == pytest.approx([-sizes[0] / 1000, -sizes[1] / 1000])
    assert not reward.differentiable
    assert not value.requires_grad


def test_jpeg_reward_clamps_images_outside_the_unit_interval():
    images = random_images(1, 3, 16, 16) * 3 - 1
    reward = JpegCompressibility()
    assert torch.equal(reward(images, [""]), reward(images.clamp(0, 1), [""]))


# --- The weighted sum


def test_weighted_sum_adds_and_reports_parts():
    reward = WeightedSum(
        {"red": (0.5, ColorReward("red")), "dark": (-2.0, BrightnessReward(scale=4.0))}
    )
    images = torch.zeros(2, 3, 4, 4)
    images[0, 0] = 1
    images[1] = 0.5
    score = reward.score(images.requires_grad_(), ["", ""])
    assert score.value.tolist() == pytest.approx([0.5 * 20 - 2 * 4 / 3, -2 * 2])
    assert list(score.parts) == ["red", "dark"]
    assert score.parts["red"].tolist() == pytest.approx([20, 0])
    assert score.parts["dark"].tolist() == pytest.approx([4 / 3, 2])
    assert not any(part.requires_grad for part in score.parts.values())
    assert reward.scale == pytest.approx(0.5 * 20 + 2 * 4)

    score.value.sum().backward()
    assert images.grad is not None
    expected = [(0.5 * 20 - 2 * 4 / 3) / 16] + [(-0.5 * 20 / 2 - 2 * 4 / 3) / 16] * 2
    assert images.grad[0, :, 0, 0].tolist() == pytest.approx(expected)


def test_weighted_sum_is_differentiable_only_if_every_part_is():
    color, size = ColorReward("red"), JpegCompressibility()
    assert WeightedSum({"a": (1.0, color)}).differentiable
    assert not WeightedSum({"a": (1.0, color), "b": (1.0, size)}).differentiable


def test_weighted_sum_moves_and_freezes_its_parts_with_itself(tmp_path: Path):
    write_tiny_clip(tmp_path)
    clip = ClipReward.from_pretrained(str(tmp_path))
    reward = WeightedSum({"clip": (2.0, clip)}).double().train()
    assert {parameter.dtype for parameter in reward.parameters()} == {torch.float64}
    assert not clip.model.training
    images, prompts = random_images(2, 3, 32, 32).double(), ["a star", "a ring"]
    assert torch.equal(reward(images, prompts), 2 * clip(images, prompts))
    assert reward.scale == 2 * clip.scale


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "a weighted sum of no rewards"),
        ({"a": 1.0, "b": math.nan}, "weight of reward 'b' is nan"),
        ({"a": math.inf}, "weight of reward 'a' is inf"),
    ],
)
def test_weighted_sum_refuses(weights: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        WeightedSum({name: (weight, BrightnessReward()) for name, weight in weights.items()})
