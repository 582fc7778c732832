"""Published scales of CLIP rewards, and CLIP-IQA: equal to transformers' CLIP and a softmax."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_clip import write_tiny_clip
from tiny_open_clip import write_tiny_open_clip
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer

from sfumato.clip import preprocess
from sfumato.config import ClipIqaRewardConfig, ClipRewardConfig
from sfumato.evaluation.evaluate import _by_content
from sfumato.rewards.build import build_reward
from sfumato.rewards.clip import ClipReward

PROMPTS = ["a red star", "a small blue ring", "It's 7 o'clock!"]
IMAGES = torch.rand(3, 3, 45, 60, generator=torch.Generator().manual_seed(1))
GOOD, BAD = ["Good photo.", "Sharp"], ["Bad photo.", "Blurry, out of focus"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models") / "clip"
    write_tiny_clip(made)
    return made


def clip(folder: Path, **settings: Any) -> Any:
    return build_reward(ClipRewardConfig(pretrained=str(folder), **settings))


def iqa(folder: Path, **settings: Any) -> Any:
    return build_reward(ClipIqaRewardConfig(pretrained=str(folder), **settings))


@pytest.mark.parametrize(
    ("score", "factor"),
    [("model", None), ("model_over_26", None), ("cosine", 1.0), ("cosine_100", 100.0)],
)
def test_scales_are_those_of_the_publications(folder: Path, score: str, factor: float | None):
    model = CLIPModel.from_pretrained(folder)
    reward = clip(folder, score=score)
    tokens = CLIPTokenizer.from_pretrained(folder)(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(**tokens, pixel_values=preprocess(IMAGES, reward.image_settings))
        cosine = (out.image_embeds * out.text_embeds).sum(1)
        learned = float(model.logit_scale.exp())
    factor = factor or learned / (26 if score == "model_over_26" else 1)
    torch.testing.assert_close(reward(IMAGES, PROMPTS), factor * cosine, atol=1e-5, rtol=1e-5)
    assert reward.scale == pytest.approx(factor, rel=1e-6)
    default = ClipReward.from_pretrained(str(folder))
    assert torch.equal(default(IMAGES, PROMPTS), clip(folder)(IMAGES, PROMPTS))


def test_clipscore_is_zero_below_zero(folder: Path):
    cosine = clip(folder, score="cosine")(IMAGES, PROMPTS)
    reward = clip(folder, score="clipscore")
    found = reward(IMAGES, PROMPTS)
    with torch.no_grad():
        reward.model.visual_projection.weight.neg_()
    opposite = reward(IMAGES, PROMPTS)
    torch.testing.assert_close(found, 2.5 * cosine.clamp(min=0))
    torch.testing.assert_close(opposite, 2.5 * (-cosine).clamp(min=0))
    assert (found + opposite > 0.01).all()


def test_a_scale_that_nobody_published_is_refused(folder: Path):
    with pytest.raises(ValueError, match="score='percent' is unknown; choose one of model, "):
        ClipReward.from_pretrained(str(folder), score="percent")


def test_older_evaluations_compare_with_the_default_scale():
    older = {"kind": "clip", "scale": 1.0, "parts": {"a": {"pretrained": "CLIP"}}}
    newer = {**older, "score": "model", "parts": {"a": {"pretrained": "CLIP", "score": "model"}}}
    assert _by_content(newer, "reward.", {}) == older
    assert _by_content({**newer, "score": "cosine"}, "reward.", {}) == {**older, "score": "cosine"}


# --- CLIP-IQA


def softmax(folder: Path, pixels: Tensor) -> Tensor:
    """Return the mean over pairs of the softmax of transformers' logits."""
    model = CLIPModel.from_pretrained(folder)
    tokens = CLIPTokenizer.from_pretrained(folder)([*GOOD, *BAD], padding=True, return_tensors="pt")
    logits = model(**tokens, pixel_values=pixels).logits_per_image
    return logits.unflatten(1, (2, 2)).softmax(1)[:, 0].mean(1)


def test_clip_iqa_equals_the_softmax_over_pairs(folder: Path):
    reward = iqa(folder, good=GOOD, bad=BAD)
    images = IMAGES.clone().requires_grad_()
    found = reward(images, [""] * 3)
    expected = softmax(folder, preprocess(images, reward.clip.image_settings))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert expected.std() > 1e-3
    gradients = [torch.autograd.grad(each.sum(), images)[0] for each in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-4 * float(gradients[1].abs().max()), rtol=1e-4)
    assert torch.equal(found, reward(IMAGES, PROMPTS))  # the prompts of the images do not count


def test_clip_iqa_gradient_equals_finite_differences(folder: Path):
    reward = iqa(folder).double()
    images = IMAGES.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reward(x, PROMPTS), images, fast_mode=True)


def test_clip_iqa_reads_open_clips_layout_and_exchanged_pairs_add_up_to_one(tmp_path: Path):
    write_tiny_open_clip(tmp_path)
    found = iqa(tmp_path)(IMAGES, PROMPTS) + iqa(
        tmp_path, good=["Bad photo."], bad=["Good photo."]
    )(IMAGES, PROMPTS)
    torch.testing.assert_close(found, torch.ones(3))


def test_clip_iqa_embeds_its_prompts_once(folder: Path):
    reward, calls = iqa(folder, good=GOOD, bad=BAD), []
    reward.clip.model.text_model.register_forward_hook(lambda *_: calls.append(1))
    first = reward(IMAGES, PROMPTS)
    assert torch.equal(reward(IMAGES, PROMPTS), first)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_clip_iqa_embeds_its_prompts_again_in_another_precision(folder: Path, dtype: torch.dtype):
    used = iqa(folder)
    assert used(IMAGES, PROMPTS).dtype == torch.float32
    new = iqa(folder).to(dtype)
    images = IMAGES.to(torch.promote_types(dtype, torch.float32))
    assert torch.equal(used.to(dtype)(images, PROMPTS), new(images, PROMPTS))


def test_clip_iqa_is_frozen_and_the_same_in_training_mode_and_under_autocast(folder: Path):
    reward = iqa(folder)
    expected = reward(IMAGES, PROMPTS)
    nn.Sequential(reward).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for each in (reward, iqa(folder)):
            assert torch.equal(each(IMAGES, PROMPTS), expected)
    assert not any(each.requires_grad for each in (expected, *reward.parameters()))
    with pytest.warns(UserWarning, match="reads 77 of the"):
        iqa(folder, good=["z" * 100])(IMAGES, PROMPTS)


@pytest.mark.parametrize(("good", "bad"), [(GOOD, BAD[:1]), (GOOD[:1], BAD)])
def test_prompts_that_are_no_pairs_are_refused_before_anything_is_read(
    good: list[str], bad: list[str]
):
    said = rf"reward\.good has {len(good)} prompts and reward\.bad has {len(bad)}; give"
    with pytest.raises(ValueError, match=said):
        iqa(Path("/no/such"), good=good, bad=bad)
