"""CLIP rewards: equal to transformers' CLIP and its image processor, and to finite differences."""

import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import IMAGE_SIZE, MAX_TOKENS, write_tiny_clip
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer, CLIPVisionModel

from sfumato.clip import ImageSettings, preprocess
from sfumato.clip.preprocessing import CLIP_STD, processor_settings
from sfumato.rewards.clip import ClipReward

CLIP_32 = ImageSettings(32, 32)
PROMPTS = ["a red star", "a small blue ring on a yellow background", "It's 7 o'clock!"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "clip"
    write_tiny_clip(folder)
    return folder


def random_images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def image_gradient(reward: ClipReward, images: Tensor) -> Tensor:
    images = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS).sum(), images)
    return gradient


def test_clip_score_equals_transformers(clip_folder: Path):
    reward = ClipReward.from_pretrained(str(clip_folder))
    images = random_images(3, 3, 45, 60)
    pixels = preprocess(images, ImageSettings(IMAGE_SIZE, IMAGE_SIZE))
    tokens = CLIPTokenizer.from_pretrained(clip_folder)(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = CLIPModel.from_pretrained(clip_folder)(**tokens, pixel_values=pixels)
    score = reward.score(images, PROMPTS)
    torch.testing.assert_close(
        score.value, expected.logits_per_image.diagonal(), atol=1e-5, rtol=1e-5
    )
    assert score.value.std() > 0.1
    assert score.parts == {}
    assert reward.scale == pytest.approx(math.exp(2.6592), rel=1e-5)
    torch.testing.assert_close(
        reward.image_features(images), expected.image_embeds, atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        reward.text_features(PROMPTS), expected.text_embeds, atol=1e-5, rtol=1e-5
    )


def test_clip_score_depends_on_image_and_prompt(clip_folder: Path):
    reward = ClipReward.from_pretrained(str(clip_folder))
    black_white = torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32)])
    by_image = reward(black_white, ["a star", "a star"])
    by_prompt = reward(black_white[[0, 0]], ["a star", "a ring"])
    assert (by_image[0] - by_image[1]).abs() > 0.1
    assert (by_prompt[0] - by_prompt[1]).abs() > 0.1


def test_scale_survives_bfloat16_weights(clip_folder: Path):
    exact = ClipReward.from_pretrained(str(clip_folder))
    half = ClipReward.from_pretrained(str(clip_folder), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.scale == exact.scale
    images = random_images(3, 3, 32, 32)
    assert half(images, PROMPTS).dtype == torch.float32
    torch.testing.assert_close(half(images, PROMPTS), exact(images, PROMPTS), atol=0.2, rtol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = exact(images, PROMPTS)
    assert torch.equal(mixed, exact(images, PROMPTS))  # float32 towers stay float32


def test_long_prompt_is_cut_as_transformers_cuts_it_and_warned_of_once(clip_folder: Path):
    reward = ClipReward.from_pretrained(str(clip_folder))
    prompt = "z" * 200
    with pytest.warns(UserWarning, match=f"{MAX_TOKENS} of the 202 tokens"):
        features = reward.text_features(["short", prompt])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward.text_features([prompt])
        ClipReward.from_pretrained(str(clip_folder)).text_features(["z" * (MAX_TOKENS - 2)])
    tokens = CLIPTokenizer.from_pretrained(clip_folder)(
        [prompt], truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    )
    with torch.no_grad():
        pooled = CLIPModel.from_pretrained(clip_folder).get_text_features(**tokens).pooler_output
    expected = pooled / pooled.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(features[1:], expected, atol=1e-5, rtol=1e-5)


# --- Preprocessing


@pytest.mark.parametrize(
    ("height", "width", "size", "crop"),
    [
        (64, 64, 32, 32),
        (96, 70, 32, 32),
        (64, 99, 32, 32),
        (20, 27, 32, 32),
        (11, 8, 32, 32),
        (32, 32, 32, 32),
        (75, 90, 45, 32),
    ],
)
def test_preprocess_equals_transformers_on_pil(height: int, width: int, size: int, crop: int):
    # PIL rounds to 8 bits after each of its two passes and clips overshoot, which values of
    # 64..191 avoid: half a step, times the filter's absolute sum (below 2), plus half a step.
    generator = np.random.default_rng(0)
    array = generator.integers(64, 192, (height, width, 3), dtype=np.uint8)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": crop, "width": crop}
    )
    expected = processor(Image.fromarray(array), return_tensors="pt")["pixel_values"]
    images = torch.from_numpy(array).permute(2, 0, 1)[None] / 255
    result = preprocess(images, ImageSettings(size, crop))
    assert result.shape == expected.shape
    difference = (result - expected) * torch.tensor(CLIP_STD).view(3, 1, 1)
    assert difference.abs().max() < 1.5 / 255
    assert difference.abs().mean() < 0.5 / 255


NONE = {"do_resize": False}  # nothing is rounded then
TO_32 = {"do_center_crop": False, "size": {"height": 32, "width": 32}}


@pytest.mark.parametrize(
    "stated",
    [
        {},
        {"rescale_factor": 1 / 127.5},
        {"do_rescale": False},
        {"do_rescale": False, "rescale_factor": 0.5},
        {"do_normalize": False},
        {"do_normalize": False, "image_mean": "unread", "do_rescale": False},
        {"image_mean": 0.5, "image_std": 0.25},
        {"image_mean": [0, 0.5, 1], "image_std": [1, 2, 3.0]},
        {"resample": 2},
        {"size": 40},
        {"size": {"shortest_edge": 40}, "crop_size": 32},
        {"size": {"height": 40, "width": 36}, "crop_size": [32, 32]},
        {"size": [40, 36]},
        {"size": 40, "default_to_square": True},
        TO_32,
        {**TO_32, "crop_size": 7, "resample": 2},
        NONE,
        {**NONE, "resample": 1, "size": 3},
        {**NONE, "size": None, "rescale_factor": 0.5},
        {"do_normalize": None, "image_mean": None},
        {**NONE, "do_rescale": False, "image_mean": [104, 117, 123], "image_std": 1},
        {**NONE, "rescale_factor": 1 / 127.5, "image_mean": 1, "image_std": 1},
        {"do_convert_rgb": False, "image_processor_type": "CLIPImageProcessorFast"},
        {"do_convert_rgb": None, "feature_extractor_type": "CLIPFeatureExtractor", "else": [1]},
    ],
    ids=str,
)
@pytest.mark.parametrize(("height", "width"), [(96, 71), (33, 64), (32, 32), (13, 50), (20, 21)])
def test_settings_mean_what_transformers_makes_of_them(
    stated: dict[str, Any], height: int, width: int
):
    generator = np.random.default_rng(0)
    array = generator.integers(64, 192, (height, width, 3), dtype=np.uint8)
    with_crop = {"crop_size": 32, **stated}
    if "size" not in stated:
        with_crop["size"] = 32
    processor: Any = CLIPImageProcessorPil(**with_crop)
    expected = processor(Image.fromarray(array), return_tensors="pt")["pixel_values"]
    image_size = expected.shape[-1]
    raw = stated if image_size == 32 else with_crop
    settings = processor_settings(Path("preprocessor_config.json"), raw, image_size)
    images = torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255
    found = preprocess(images, settings)
    assert found.shape == expected.shape
    spread = torch.tensor(settings.std).view(3, 1, 1) / settings.factor
    difference = ((found - expected) * spread).abs().max()  # of values in [0, 1]
    assert difference < (1e-6 if stated.get("do_resize") is False else 1.5 / 255)
    assert expected.float().std() > 0


def test_a_score_follows_the_settings_as_transformers_does(clip_folder: Path, tmp_path: Path):
    folder = shutil.copytree(clip_folder, tmp_path / "copy")
    file = folder / "preprocessor_config.json"
    pictures = [(image * 255).round().byte() for image in random_images(3, 3, 48, 40)]
    images = torch.stack(pictures).float() / 255
    published = ClipReward.from_pretrained(str(folder))(images, PROMPTS)
    for change in ({"rescale_factor": 1 / 127.5}, {"do_rescale": False}, {"do_resize": False}):
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        model, tokens = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
        pixels = CLIPImageProcessorPil.from_pretrained(folder)(pictures, return_tensors="pt")
        with torch.no_grad():
            inputs = tokens(PROMPTS, padding=True, return_tensors="pt")
            expected = model(**pixels, **inputs).logits_per_image.diagonal()
        found = ClipReward.from_pretrained(str(folder))(images, PROMPTS)
        # Pillow rounds to 8 bits where it resizes.
        near = 1e-3 if "do_resize" in change else 0.3
        torch.testing.assert_close(found, expected, atol=near, rtol=0)
        assert (found - published).abs().max() > 1


def test_preprocess_ignores_autocast_and_widens_half_precision():
    images = random_images(2, 3, 50, 40)
    expected = preprocess(images, CLIP_32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = preprocess(images, CLIP_32)
    assert torch.equal(under_autocast, expected)
    half = images.bfloat16()
    assert torch.equal(preprocess(half, CLIP_32), preprocess(half.float(), CLIP_32))


# --- Gradients


@pytest.mark.parametrize(("height", "width"), [(9, 13), (4, 3)])
def test_preprocess_gradient_equals_finite_differences(height: int, width: int):
    images = random_images(1, 3, height, width, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: preprocess(x, ImageSettings(5, 5)), images)


def test_clip_gradient_equals_finite_differences(clip_folder: Path):
    reward = ClipReward.from_pretrained(str(clip_folder), dtype=torch.float64)
    images = random_images(3, 3, 40, 36, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reward(x, PROMPTS), images, fast_mode=True)
    assert image_gradient(reward, images).abs().max() > 1e-3


def test_clip_does_not_clamp(clip_folder: Path):
    reward = ClipReward.from_pretrained(str(clip_folder))
    saturated = random_images(3, 3, 32, 32) + 1.5
    assert (image_gradient(reward, saturated) != 0).float().mean() > 0.99
    assert not torch.equal(reward(saturated, PROMPTS), reward(saturated.clamp(0, 1), PROMPTS))


def test_gradient_checkpointing_keeps_gradients_and_less_memory(clip_folder: Path):
    images = random_images(3, 3, 32, 32)
    saved: dict[bool, int] = {}
    gradients: dict[bool, Tensor] = {}
    for checkpointing in (False, True):
        reward = ClipReward.from_pretrained(
            str(clip_folder), gradient_checkpointing=checkpointing
        ).train()
        stored = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, stored=stored: stored.append(x.nbytes) or x, lambda x: x
        ):
            reward(images.clone().requires_grad_(), PROMPTS)
        saved[checkpointing] = sum(stored)
        gradients[checkpointing] = image_gradient(reward, images)
    torch.testing.assert_close(gradients[True], gradients[False], atol=1e-6, rtol=1e-5)
    assert saved[True] < 0.5 * saved[False]


def test_clip_is_frozen_and_never_drops_out(clip_folder: Path, tmp_path: Path):
    clip_copy = shutil.copytree(clip_folder, tmp_path / "copy")
    config = json.loads((clip_copy / "config.json").read_text())
    config["vision_config"]["attention_dropout"] = 0.5
    config["text_config"]["attention_dropout"] = 0.5
    (clip_copy / "config.json").write_text(json.dumps(config))
    images = random_images(3, 3, 32, 32)
    training = CLIPVisionModel.from_pretrained(clip_copy).train()
    assert not torch.equal(training(images)[1], training(images)[1])  # dropout would show
    for checkpointing in (False, True):
        reward = ClipReward.from_pretrained(str(clip_copy), gradient_checkpointing=checkpointing)
        nn.Sequential(reward).train()
        assert torch.equal(reward(images, PROMPTS), reward(images, PROMPTS))
        assert not any(parameter.requires_grad for parameter in reward.parameters())
        assert not reward(images, PROMPTS).requires_grad


def test_clip_refuses_unequal_numbers_of_images_and_prompts(clip_folder: Path):
    reward = ClipReward.from_pretrained(str(clip_folder))
    with pytest.raises(ValueError, match="3 images came with 1 prompts"):
        reward(random_images(3, 3, 32, 32), ["one for all"])
