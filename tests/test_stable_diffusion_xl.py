"""Stable Diffusion XL: equal to diffusers' pipeline as released, step by step and part by part."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from tiny_sdxl import LATENT, PIXELS, reference_sdxl, write_tiny_sdxl
from torch import Tensor
from trajectories import PROMPTS, our_run, their_run

from sfumato.config import LoraConfig, ModelConfig, SamplerConfig
from sfumato.diffusion.process import VariancePreserving
from sfumato.diffusion.sampling import sample
from sfumato.models.loading import check_family, load_family
from sfumato.models.model import Framing
from sfumato.models.stable_diffusion_xl import StableDiffusionXL

SCALE = 5.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "sdxl"
    write_tiny_sdxl(folder)
    return folder


def load(folder: Path, **settings: Any) -> StableDiffusionXL:
    config = ModelConfig(str(folder), lora=LoraConfig(rank=4), **settings)
    model = load_family(StableDiffusionXL, folder, config)
    assert isinstance(model, StableDiffusionXL)
    return model


@pytest.fixture(scope="module")
def model(folder: Path) -> StableDiffusionXL:
    return load(folder)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    return reference_sdxl(folder)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- Whole trajectories


@pytest.mark.parametrize(
    ("steps", "scale", "size"),
    [
        (4, SCALE, (8, 8)),
        (10, SCALE, (8, 8)),
        (7, SCALE, (8, 8)),
        (10, 1.0, (8, 8)),
        (10, SCALE, (6, 10)),
    ],
)
def test_trajectory_equals_the_pipeline_as_it_is_released(
    model: StableDiffusionXL, pipeline: Any, steps: int, scale: float, size: tuple[int, int]
):
    noise = normal(2, 4, *size)
    ours, our_images = our_run(model, noise, steps, scale)
    theirs, their_images = their_run(model, pipeline, noise, steps, scale)
    sigmas = pipeline.scheduler.sigmas[1:]
    # Euler's state is x_t / alpha(t), and its sigma is sigma(t) / alpha(t).
    rescaled = [x / (1 + sigma**2).sqrt() for x, sigma in zip(theirs, sigmas, strict=True)]
    torch.testing.assert_close(torch.stack(ours), torch.stack(rescaled), atol=1e-4, rtol=0)
    torch.testing.assert_close(our_images, their_images, atol=1e-4, rtol=0)
    assert ours[-1].std() > 0.5
    assert our_images.std() > 0.05


@pytest.mark.parametrize(("steps", "scale"), [(10, SCALE), (7, SCALE), (10, 1.0)])
def test_trajectory_equals_the_pipeline_under_ddim(
    model: StableDiffusionXL, folder: Path, steps: int, scale: float
):
    pipeline = reference_sdxl(folder)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=True)
    noise = normal(2, 4, LATENT, LATENT)
    ours, our_images = our_run(model, noise, steps, scale)
    theirs, their_images = their_run(model, pipeline, noise, steps, scale)
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), atol=1e-4, rtol=0)
    torch.testing.assert_close(our_images, their_images, atol=1e-4, rtol=0)


def test_guidance_and_prompt_change_the_image(model: StableDiffusionXL):
    # Else the comparisons above would say nothing of them.
    noise = normal(1, 4, LATENT, LATENT).repeat(2, 1, 1, 1)
    (_, guided), (_, alone) = our_run(model, noise, 10, SCALE), our_run(model, noise, 10, 1.0)
    assert (guided - alone).abs().max() > 1e-2
    assert (guided[0] - guided[1]).abs().max() > 1e-2
    assert (alone[0] - alone[1]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("changes", "last", "atol"),
    [
        ({}, 0.0, 1e-4),
        # There Euler decodes x_t / alpha(t) at the table's first step, 4e-4 more than x_t.
        ({"final_sigmas_type": "sigma_min"}, 0.001, 1e-3),
        ({"_class_name": "DDIMScheduler"}, 0.001, 1e-4),
        ({"_class_name": "DDIMScheduler", "set_alpha_to_one": True}, 0.0, 1e-4),
    ],
)
def test_sampling_ends_where_the_released_scheduler_ends(
    folder: Path, tmp_path: Path, changes: dict[str, Any], last: float, atol: float
):
    copy = shutil.copytree(folder, tmp_path / "copy")
    edit(copy / "scheduler" / "scheduler_config.json", changes)
    kind = changes.get("_class_name", "EulerDiscreteScheduler")
    edit(copy / "model_index.json", {"scheduler": ["diffusers", kind]})
    model, noise = load(copy), normal(1, 4, LATENT, LATENT)
    assert model.times(10, PIXELS, PIXELS)[-1] == last
    _, found = our_run(model, noise, 10, SCALE)
    _, expected = their_run(model, reference_sdxl(copy), noise, 10, SCALE)
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def edit(file: Path, changes: dict[str, Any]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# --- Prompts


def test_prompts_are_encoded_as_the_pipeline_does(model: StableDiffusionXL, pipeline: Any):
    states, empty, pooled, empty_pooled = pipeline.encode_prompt(PROMPTS, device="cpu")
    found = model.encode_prompts(["", *PROMPTS]).tensors
    assert torch.equal(found["states"], torch.cat([empty[:1], states]))
    assert torch.equal(found["pooled"], torch.cat([empty_pooled[:1], pooled]))
    assert not found["states"][0].any()
    assert (states[0] - states[1]).std() > 0.1
    assert (pooled[0] - pooled[1]).std() > 0.1


def test_the_empty_prompt_is_read_where_the_release_says_so(folder: Path, tmp_path: Path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    edit(copy / "model_index.json", {"force_zeros_for_empty_prompt": False})
    model, pipeline = load(copy), reference_sdxl(copy)
    _, empty, _, pooled = pipeline.encode_prompt(PROMPTS[:1], device="cpu")
    found = model.encode_prompts([""]).tensors
    assert torch.equal(found["states"], empty)
    assert torch.equal(found["pooled"], pooled)
    assert empty.any()


def test_a_prompt_that_is_cut_is_warned_about_once(folder: Path):
    model, long = load(folder), "x" * 80  # a character is a token
    with pytest.warns(UserWarning, match=r"cut at 77 tokens; the first one cut has 82: 'xxx"):
        model.encode_prompts([long])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode_prompts([long])


# --- Framing


def framed(model: StableDiffusionXL, framing: list[Framing] | None, rows: int = 2) -> Tensor:
    cond = model.encode_prompts(PROMPTS[:rows], framing=framing)
    with torch.no_grad():
        return model.denoiser(cond)(normal(2, 4, 6, 10)[:rows], 0.5).raw


def test_framing_is_told_as_the_pipeline_tells_it(model: StableDiffusionXL, pipeline: Any):
    framing = Framing(original=(48, 64), crop=(4, 2))
    cond = model.encode_prompts(PROMPTS, framing=[framing] * 2)
    noise, times = normal(2, 4, 6, 10), model.times(4, 24, 40)
    with torch.no_grad():
        end = sample(model.denoiser(cond), model.process, noise, times).x
    latents, _ = their_run(
        model,
        pipeline,
        noise,
        4,
        1.0,
        original_size=framing.original,
        crops_coords_top_left=framing.crop,
    )
    torch.testing.assert_close(end, latents[-1], atol=1e-4, rtol=0)


def test_each_row_has_its_own_framing_and_none_is_the_uncropped_target(model: StableDiffusionXL):
    mine, whole = Framing((48, 64), (4, 2)), Framing((24, 40), (0, 0))
    torch.testing.assert_close(framed(model, None), framed(model, [whole] * 2))
    both = framed(model, [mine, whole])
    torch.testing.assert_close(both[:1], framed(model, [mine], 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(both[1], framed(model, None)[1], atol=1e-5, rtol=0)
    for other in (Framing((24, 64), (0, 0)), Framing((24, 40), (4, 0)), Framing((24, 40), (0, 4))):
        assert (framed(model, [other], 1) - framed(model, None, 1)).abs().max() > 1e-3


# --- Prediction


def test_one_time_per_row_equals_separate_calls(model: StableDiffusionXL):
    cond, uncond = model.encode_prompts(PROMPTS), model.encode_prompts(["", ""])
    x_t = normal(2, 4, LATENT, LATENT)
    with torch.no_grad():
        rows = model.denoiser(cond, uncond=uncond, guidance_scale=SCALE)(
            x_t, torch.tensor([0.2, 0.9])
        )
        for row, t in enumerate((0.2, 0.9)):
            one = slice(row, row + 1)
            single = model.denoiser(
                cond.rows(row, row + 1), uncond=uncond.rows(0, 1), guidance_scale=SCALE
            )(x_t[one], t)
            torch.testing.assert_close(rows.raw[one], single.raw, atol=1e-4, rtol=0)
            torch.testing.assert_close(rows.x0[one], single.x0, atol=1e-4, rtol=1e-4)


PARTS = ["network", "text_encoder", "text_encoder_2"]


def perturbed(folder: Path, **settings: Any) -> StableDiffusionXL:
    model = load(folder, **settings)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter += 0.1 * normal(*parameter.shape)
    return model


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("parts", [PARTS[:1], PARTS])
def test_every_trained_parameter_gets_a_gradient(folder: Path, parts: list[str], trainable: str):
    model = perturbed(folder, parts=parts, trainable=trainable)
    prediction = model.denoiser(model.encode_prompts(PROMPTS))(normal(2, 4, LATENT, LATENT), 0.5)
    prediction.raw.square().sum().backward()
    trained = model.trainable()
    # DDP waits for each of them.
    assert [name for name, parameter in trained.items() if parameter.grad is None] == []
    assert all("lora_" in name for name in trained) == (trainable == "lora")
    assert len({name.split(".")[0] for name in trained}) == len(parts)
    assert all(p.grad is None for p in model.pipeline.vae.parameters())


@pytest.mark.parametrize("name", ["lora", "pipeline"])
def test_exports_make_the_same_image_elsewhere(folder: Path, tmp_path: Path, name: str):
    model = perturbed(folder, parts=PARTS)
    (tmp_path / name).mkdir()
    if name == "lora":
        model.save_adapter(tmp_path / name)
    else:
        model.save_pipeline(tmp_path / name, torch.float32)
    noise = normal(1, 4, 6, 10)
    _, ours = our_run(model, noise, 4, SCALE)
    found = model.image_elsewhere(tmp_path, name, PROMPTS[0], noise, SamplerConfig(4, SCALE))
    torch.testing.assert_close(ours, found, atol=1e-4, rtol=0)
    _, base = our_run(load(folder), noise, 4, SCALE)
    assert (ours - base).abs().max() > 1e-2


# --- Images and latents


def test_autoencoder_is_diffusers_own(model: StableDiffusionXL, pipeline: Any):
    vae, images = pipeline.vae, 2 * torch.rand(2, 3, 24, 40) - 1
    latents = normal(2, 4, 6, 10)
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        mean = posterior.mode() * 0.13025
        drawn = posterior.sample(torch.Generator().manual_seed(0)) * 0.13025
        decoded = vae.decode(latents / 0.13025).sample / 2 + 0.5
        torch.testing.assert_close(model.encode_images(images), mean)
        torch.testing.assert_close(model.encode_images(images, latents), drawn)
        torch.testing.assert_close(model.decode(latents), decoded)
    assert (mean - drawn).abs().max() > 1e-2


@pytest.mark.parametrize(("upcast", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_an_autoencoder_that_overflows_stays_in_float32(
    folder: Path, tmp_path: Path, upcast: bool, dtype: torch.dtype
):
    copy = shutil.copytree(folder, tmp_path / "copy")
    edit(copy / "vae" / "config.json", {"force_upcast": upcast})
    model = load(copy, dtype="bfloat16")
    parts = model.pipeline
    assert {p.dtype for p in parts.vae.parameters()} == {dtype}
    assert {p.dtype for p in parts.text_encoder_2.parameters()} == {torch.bfloat16}
    assert model.encode_images(torch.zeros(1, 3, PIXELS, PIXELS)).dtype == torch.float32
    assert model.decode(normal(1, 4, LATENT, LATENT)).dtype == torch.float32
    raw = model.denoiser(model.encode_prompts(PROMPTS))(normal(2, 4, LATENT, LATENT), 0.5).raw
    exact = load(copy)
    wanted = exact.denoiser(exact.encode_prompts(PROMPTS))(normal(2, 4, LATENT, LATENT), 0.5).raw
    assert raw.dtype == torch.float32
    assert (raw - wanted).std() < 0.05 * wanted.std()


# --- Sizes and times


def test_sizes_and_steps_are_checked_before_a_weight_is_read(folder: Path):
    model, process = load(folder), load(folder).process
    assert model.image_size() == (PIXELS, PIXELS)
    assert model.latent_shape(24, 40) == (4, 6, 10)
    assert isinstance(process, VariancePreserving)
    assert process.num_train_timesteps == 1000
    config = ModelConfig(str(folder))
    for sampler, message in [
        (SamplerConfig(height=36), r"sampler\.height = 36 must be a multiple of 8 .* 32"),
        (SamplerConfig(width=45), r"sampler\.width = 45 .* 48"),
        (SamplerConfig(1001), r"num_inference_steps = 1001 is more than the 1000"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_family(StableDiffusionXL, folder, config, sampler)
    check_family(StableDiffusionXL, folder, config, SamplerConfig(10, height=24, width=40))


def test_the_autoencoder_stays_in_float32(folder: Path):
    """Where its settings say so: frozen weights and autocast in bfloat16 change nothing in it."""
    exact, model = (
        load_family(StableDiffusionXL, folder, ModelConfig(pretrained=str(folder), dtype=dtype))
        for dtype in ("float32", "bfloat16")
    )
    images = torch.rand(1, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        latents = model.encode_images(images)
        decoded = model.decode(latents)
    with torch.no_grad():
        assert torch.equal(latents, exact.encode_images(images))
        assert torch.equal(decoded, exact.decode(latents))
