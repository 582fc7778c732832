"""Qwen-Image: trajectories equal to diffusers' pipeline, whatever the prompts' lengths."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_qwen_image import (
    CHANNELS,
    FACTOR,
    PREFIX,
    SUFFIX,
    reference_qwen_image,
    write_tiny_qwen_image,
)
from torch import Tensor, nn
from trajectories import PROMPTS, our_run, their_run

from sfumato.config import LoraConfig, ModelConfig, SamplerConfig
from sfumato.diffusion.guidance import CfgGradient
from sfumato.diffusion.sampling import Denoiser, sample
from sfumato.models.flux import pack, unpack
from sfumato.models.loading import check_family, load_family
from sfumato.models.model import Conditioning
from sfumato.models.qwen_image import QwenImage, rescaled_guidance

HEIGHT, WIDTH = 32, 64
SCALE = 4.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "qwen-image"
    write_tiny_qwen_image(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> QwenImage:
    return load(folder)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    return reference_qwen_image(folder)


def load(folder: Path, **settings: Any) -> Any:
    return load_family(
        QwenImage, folder, ModelConfig(str(folder), lora=LoraConfig(rank=4), **settings)
    )


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def starting_noise(rows: int = 2, seed: int = 0) -> Tensor:
    return normal(rows, CHANNELS, HEIGHT // FACTOR, WIDTH // FACTOR, seed=seed)


def guided_denoiser(model: QwenImage, scale: float, prompts: Sequence[str] = PROMPTS) -> Denoiser:
    uncond = model.encode_prompts([""]).repeat(len(prompts))
    return model.denoiser(model.encode_prompts(prompts), uncond=uncond, guidance_scale=scale)


@torch.no_grad()
def image(model: QwenImage, scale: float, prompts: Sequence[str] = PROMPTS) -> Tensor:
    denoiser, noise = guided_denoiser(model, scale, prompts), starting_noise(len(prompts))
    end = sample(denoiser, model.process, noise, model.times(4, HEIGHT, WIDTH)).x
    return model.decode(end).clamp(0, 1)


@torch.no_grad()
def perturb(model: QwenImage, size: float = 0.1) -> None:
    """Move what is trained, so that policy and reference differ: an adapter's B starts at 0."""
    for seed, parameter in enumerate(model.trainable().values()):
        parameter += size * normal(*parameter.shape, seed=seed)


# --- Whole trajectories


@pytest.mark.parametrize("scale", [1.0, SCALE])
@pytest.mark.parametrize("steps", [4, 7, 10])
def test_trajectory_equals_diffusers_pipeline(
    model: QwenImage, pipeline: Any, steps: int, scale: float
):
    noise = starting_noise()
    ours, our_images = our_run(model, noise, steps, scale)
    theirs, images = their_run(model, pipeline, noise, steps, scale)
    torch.testing.assert_close(our_images, images, atol=1e-4, rtol=0)
    assert len(ours) == len(theirs) == steps
    packed = torch.stack([pack(x) for x in ours])
    torch.testing.assert_close(packed, torch.stack(theirs), atol=1e-4, rtol=0)
    end = ours[-1]
    assert 0.5 < end.std() < 5
    assert images.std() > 0.05


def test_guidance_and_prompt_change_the_image(model: QwenImage):
    # Else the comparisons above would say nothing of them.
    plain = image(model, 1.0)
    assert (image(model, SCALE) - plain).abs().max() > 0.02
    assert (image(model, 1.0, PROMPTS[::-1]) - plain).abs().max() > 0.02


# --- Guidance


def test_guidance_keeps_the_norm_of_each_token():
    cond, uncond = starting_noise(), starting_noise(seed=1)
    guided = rescaled_guidance(cond, uncond, SCALE)
    norms = pack(guided).norm(dim=-1), pack(cond).norm(dim=-1)
    torch.testing.assert_close(*norms)
    linear = pack(uncond + SCALE * (cond - uncond))
    torch.testing.assert_close(
        torch.cosine_similarity(pack(guided), linear, dim=-1), torch.ones(linear.shape[:2])
    )


@pytest.mark.parametrize(
    ("gradient", "kept"), [("full", math.hypot(SCALE, SCALE - 1)), ("rescale", 1.0)]
)
def test_gradient_of_guidance(gradient: CfgGradient, kept: float):
    cond, uncond = starting_noise().requires_grad_(), starting_noise(seed=1).requires_grad_()
    guided = rescaled_guidance(cond, uncond, SCALE, gradient)
    torch.testing.assert_close(guided, rescaled_guidance(cond, uncond, SCALE))
    # Across a token, where the norm has no gradient, both branches get the linear one's, shrunk.
    tokens, given = pack(guided.detach()), pack(starting_noise(seed=2))
    given -= (given * tokens).sum(-1, True) / tokens.square().sum(-1, True) * tokens
    given = unpack(given, guided.shape[2] // 2, guided.shape[3] // 2)
    both = torch.cat([pack(g) for g in torch.autograd.grad(guided, (cond, uncond), given)], -1)
    linear = pack(uncond + SCALE * (cond - uncond)).detach()
    shrunk = pack(cond).detach().norm(dim=-1) / linear.norm(dim=-1)
    expected = kept * shrunk * pack(given).norm(dim=-1)
    torch.testing.assert_close(both.norm(dim=-1), expected, atol=1e-4, rtol=1e-4)


def test_guidance_can_stop_the_gradient_without_prompt():
    cond, uncond = starting_noise().requires_grad_(), starting_noise(seed=1).requires_grad_()
    guided = rescaled_guidance(cond, uncond, SCALE, "detach_uncond")
    found = torch.autograd.grad(guided.square().sum(), (cond, uncond), allow_unused=True)
    assert found[0].abs().max() > 0.1
    assert found[1] is None


# --- Times and sizes


def test_times_shift_with_the_size_and_stop_before_the_end(model: QwenImage):
    shifts = {(64, 64): 0.5 - 0.4 * 192 / 7936, (128, 128): 0.5, (512, 1024): 0.9}
    for (height, width), mu in shifts.items():  # 64, 256 and 8192 tokens
        clean = [1 - 1 / (1 + (1 / (1 - i / 7) - 1) / math.exp(mu)) for i in range(7)]
        expected = [1 - part / clean[-1] * 0.98 for part in clean]
        assert model.times(7, height, width) == pytest.approx([*expected, 0.0], abs=1e-6)


@pytest.mark.parametrize("steps", [2, 4, 50, 1000])
def test_times_fall_from_noise_to_data(model: QwenImage, steps: int):
    times = model.times(steps, HEIGHT, WIDTH)
    assert len(times) == steps + 1
    assert (times[0], times[-1]) == (1.0, 0.0)
    assert all(t > s for t, s in pairwise(times))


def test_one_step_is_too_few(model: QwenImage):
    with pytest.raises(ValueError, match=r"num_inference_steps = 1 is too few .* take 2 or more"):
        model.times(1, HEIGHT, WIDTH)


def test_sizes(folder: Path, model: QwenImage):
    assert model.image_size() == (128 * FACTOR, 128 * FACTOR)
    assert model.latent_shape(32, 48) == (CHANNELS, 8, 12)
    for size, message in [
        ((36, 32), r"sampler\.height = 36 must be a multiple of 8 pixels .* nearest is 32"),
        ((32, 45), r"sampler\.width = 45 .* nearest is 48"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.latent_shape(*size)
        with pytest.raises(ValueError, match=message):
            check_family(
                QwenImage,
                folder,
                ModelConfig(str(folder)),
                SamplerConfig(height=size[0], width=size[1]),
            )


# --- Prompts


def test_prompts_are_encoded_as_the_pipeline_does(folder: Path, pipeline: Any):
    assert len(pipeline.tokenizer(PREFIX).input_ids) == pipeline.prompt_template_encode_start_idx
    prompts = [*PROMPTS, "", "x" * 600]  # a character is a token
    with torch.no_grad():
        states, mask = pipeline.encode_prompt(prompts, max_sequence_length=512)
    with pytest.warns(UserWarning, match=r"cut at 512 tokens; .* has 600: 'xxx"):
        found = load(folder).encode_prompts(prompts).tensors
    assert torch.equal(found["states"], states)
    assert torch.equal(found["mask"], mask)
    assert states.shape[1] == 512
    assert (states[0, :10] - states[1, :10]).std() > 0.1
    kept = len(pipeline.tokenizer(SUFFIX).input_ids)
    assert found["mask"].sum(1).tolist()[2:] == [kept, 512]


@torch.no_grad()
def test_the_length_of_other_prompts_changes_nothing(model: QwenImage):
    x_t = starting_noise(1)
    alone = model.encode_prompts(PROMPTS[:1])
    together = Conditioning.stack([alone, model.encode_prompts(PROMPTS[1:])]).rows(0, 1)
    beside = model.encode_prompts([PROMPTS[0], "x" * 200]).rows(0, 1)
    lengths = [cond.tensors["states"].shape[1] for cond in (alone, together, beside)]
    assert len(set(lengths)) == 3
    expected = model.denoiser(alone)(x_t, 0.5).raw
    for cond in (together, beside):
        torch.testing.assert_close(model.denoiser(cond)(x_t, 0.5).raw, expected, atol=1e-5, rtol=0)
        seen = {**cond.tensors, "mask": torch.ones_like(cond.tensors["mask"])}
        unmasked = model.denoiser(Conditioning(seen))(x_t, 0.5).raw
        assert (unmasked - expected).abs().max() > 0.01


# --- Images and latents


def test_autoencoder_is_diffusers_own(model: QwenImage, pipeline: Any):
    vae = pipeline.vae
    mean, std = (
        torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    images = normal(2, 3, HEIGHT, WIDTH).clamp(-1, 1)
    latents, noise = starting_noise(), starting_noise(seed=1)
    with torch.no_grad():
        posterior = vae.encode(images[:, :, None]).latent_dist
        expected = ((posterior.mean - mean) / std)[:, :, 0]
        decoded = vae.decode(latents[:, :, None] * std + mean).sample[:, :, 0] / 2 + 0.5
        encoded, drawn = model.encode_images(images), model.encode_images(images, noise)
        torch.testing.assert_close(encoded, expected)
        torch.testing.assert_close(
            drawn - encoded, (posterior.std / std)[:, :, 0] * noise, atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(model.decode(latents), decoded)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_decoding_is_differentiable_and_not_clamped(folder: Path, checkpointing: bool):
    model = load(folder, gradient_checkpointing=checkpointing)
    decoder = model.pipeline.vae.decoder
    with torch.no_grad():
        decoder.conv_out.bias += 5
    calls: list[nn.Module] = []
    decoder.up_blocks[1].resnets[0].register_forward_pre_hook(lambda ran, _: calls.append(ran))
    latents = starting_noise(1).requires_grad_()
    images = model.decode(latents)
    assert images.min() > 1
    (gradient,) = torch.autograd.grad(images.square().sum(), latents)
    assert len(calls) == (2 if checkpointing else 1)
    direction, step = starting_noise(1, seed=1), 1e-2
    with torch.no_grad():
        ahead, behind = (
            model.decode(latents + sign * step * direction).double().square().sum()
            for sign in (1, -1)
        )
    slope = float(ahead - behind) / (2 * step)
    assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-2)


# --- Prediction


@pytest.mark.parametrize("scale", [1.0, SCALE])
@torch.no_grad()
def test_a_time_per_row_equals_separate_calls(model: QwenImage, scale: float):
    x_t = starting_noise()
    rows = guided_denoiser(model, scale)(x_t, torch.tensor([0.3, 0.8])).raw
    for row, t in enumerate((0.3, 0.8)):
        alone = guided_denoiser(model, scale, [PROMPTS[row]])(x_t[row : row + 1], t).raw
        torch.testing.assert_close(rows[row : row + 1], alone, atol=2e-5, rtol=0)
    assert (rows - guided_denoiser(model, scale)(x_t, 0.3).raw)[1].abs().max() > 0.01


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_reaches_every_adapter(folder: Path, checkpointing: bool):
    model = load(folder, gradient_checkpointing=checkpointing)
    perturb(model)
    x = starting_noise()
    end = sample(guided_denoiser(model, SCALE), model.process, x, [0.2, 0.0], grad_steps=1).x0
    model.decode(end).mean().backward()
    trained = model.trainable()
    assert all(p.grad is not None for p in trained.values())
    # The text's queries of the last block end with its text, which nothing reads.
    moved = [p.grad.norm() > 0 for n, p in trained.items() if "blocks.1.attn.add_q_proj" not in n]
    assert all(moved)
    assert len(moved) == len(trained) - 2


def test_full_fine_tuning_leaves_no_weight_without_gradient(folder: Path):
    model = load(folder, trainable="full")  # DDP would wait for it for ever
    guided_denoiser(model, SCALE)(starting_noise(), 0.5).raw.square().mean().backward()
    assert all(p.grad is not None for p in model.trainable().values())
    frozen = {n for n, p in model.network.named_parameters() if not p.requires_grad}
    idle = ("transformer_blocks.1.attn.to_add_out.", "transformer_blocks.1.txt_mlp.")
    assert len(frozen) == 6
    assert all(name.startswith(idle) for name in frozen)


def test_a_network_in_bfloat16_answers_in_float32(folder: Path):
    found, expected = (
        guided_denoiser(load(folder, dtype=dtype), 1.0)(starting_noise(), 0.5).raw.detach()
        for dtype in ("bfloat16", "float32")
    )
    assert found.dtype == torch.float32
    assert (found - expected).std() < 0.05 * expected.std()


# --- Exports


def test_exports_make_the_same_image_elsewhere(folder: Path, tmp_path: Path):
    model = load(folder)
    base = image(model, SCALE, PROMPTS[:1])
    perturb(model)
    expected = image(model, SCALE, PROMPTS[:1])
    assert (expected - base).abs().max() > 0.02
    model.save_pipeline(tmp_path / "pipeline", torch.float32)
    (tmp_path / "lora").mkdir()
    model.save_adapter(tmp_path / "lora")
    sampler = SamplerConfig(num_inference_steps=4, guidance_scale=SCALE)
    for name in ("pipeline", "lora"):
        found = model.image_elsewhere(tmp_path, name, PROMPTS[0], starting_noise(1), sampler)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
