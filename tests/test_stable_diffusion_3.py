"""Stable Diffusion 3 and 3.5: equal to diffusers' pipeline, step by step and part by part."""

import json
import shutil
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_sd3 import CHANNELS, LATENT, PIXELS, reference_sd3, write_tiny_sd3
from torch import Tensor
from trajectories import PROMPTS, our_run, their_run

from sfumato.config import LoraConfig, ModelConfig, SamplerConfig
from sfumato.models.loading import check_family, load_family
from sfumato.models.stable_diffusion_3 import StableDiffusion3

SCALE = 7.0
VARIANTS: dict[str, dict[str, bool]] = {
    "sd3": {},
    "sd35-medium": {"medium": True},
    "sd3-without-t5": {"t5": False},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name, settings in VARIANTS.items():
        write_tiny_sd3(root / name, **settings)
    return {name: root / name for name in VARIANTS}


@pytest.fixture(scope="module")
def folder(folders: dict[str, Path]) -> Path:
    return folders["sd3"]


def load(folder: Path, **settings: Any) -> StableDiffusion3:
    config = ModelConfig(str(folder), lora=LoraConfig(rank=4), **settings)
    model = load_family(StableDiffusion3, folder, config)
    assert isinstance(model, StableDiffusion3)
    return model


@pytest.fixture(scope="module", params=VARIANTS)
def both(request: pytest.FixtureRequest, folders: dict[str, Path]) -> tuple[StableDiffusion3, Any]:
    """Return the same weights as Sfumato's model and as diffusers' pipeline."""
    folder = folders[request.param]
    return load(folder), reference_sd3(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> StableDiffusion3:
    return load(folder)


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
def test_trajectory_equals_the_pipeline(
    both: tuple[StableDiffusion3, Any], steps: int, scale: float, size: tuple[int, int]
):
    model, pipeline = both
    noise = normal(2, CHANNELS, *size)
    ours, our_images = our_run(model, noise, steps, scale)
    theirs, their_images = their_run(model, pipeline, noise, steps, scale)
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), atol=1e-4, rtol=0)
    torch.testing.assert_close(our_images, their_images, atol=1e-4, rtol=0)
    assert ours[-1].std() > 0.5
    assert our_images.std() > 0.05


def test_guidance_and_prompt_change_the_image(both: tuple[StableDiffusion3, Any]):
    # Else the comparisons above would say nothing of them.
    model, _ = both
    noise = normal(1, CHANNELS, LATENT, LATENT).repeat(2, 1, 1, 1)
    (_, guided), (_, alone) = our_run(model, noise, 10, SCALE), our_run(model, noise, 10, 1.0)
    assert (guided - alone).abs().max() > 1e-2
    assert (guided[0] - guided[1]).abs().max() > 1e-2
    assert (alone[0] - alone[1]).abs().max() > 1e-2


def test_settings_of_the_scheduler_are_followed(folder: Path, tmp_path: Path):
    # The dynamic shift depends on the image's size.
    copy = shutil.copytree(folder, tmp_path / "copy")
    edit(copy / "scheduler" / "scheduler_config.json", {"use_dynamic_shifting": True})
    model, pipeline, noise = load(copy), reference_sd3(copy), normal(2, CHANNELS, 6, 10)
    ours, _ = our_run(model, noise, 10, SCALE)
    theirs, _ = their_run(model, pipeline, noise, 10, SCALE)
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), atol=1e-4, rtol=0)
    static = load(folder).times(10, 24, 40)
    assert max(abs(a - b) for a, b in zip(static, model.times(10, 24, 40), strict=True)) > 0.1


def edit(file: Path, changes: dict[str, Any]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("steps", [1, 4, 7, 28])
def test_times_go_from_noise_to_data_shifted_by_three(model: StableDiffusion3, steps: int):
    times = model.times(steps, PIXELS, PIXELS)
    even = torch.linspace(1, shifted(0.001), steps, dtype=torch.float64).tolist()
    assert times == pytest.approx([*map(shifted, even), 0.0], abs=1e-6)
    assert times[0] == 1.0
    assert all(t > s for t, s in pairwise(times))


def shifted(t: float) -> float:
    return 3 * t / (1 + 2 * t)


# --- Prompts


def test_prompts_are_encoded_as_the_pipeline_does(both: tuple[StableDiffusion3, Any]):
    model, pipeline = both
    states, empty, pooled, empty_pooled = pipeline.encode_prompt(PROMPTS, None, None, device="cpu")
    found = model.encode_prompts(["", *PROMPTS]).tensors
    # On some CPUs float32 products round by batch and alignment: up to 1.3e-5 of a state of 1.6.
    rounding = {"rtol": 1e-5, "atol": 2e-5}
    torch.testing.assert_close(found["states"], torch.cat([empty[:1], states]), **rounding)
    torch.testing.assert_close(found["pooled"], torch.cat([empty_pooled[:1], pooled]), **rounding)
    assert found["states"].shape[1] == 77 + 256
    assert (states[0] - states[1])[:77].std() > 0.1
    without_t5 = pipeline.text_encoder_3 is None
    assert ((states[0] - states[1])[77:].std() > 0.1) == (not without_t5)
    assert (pooled[0] - pooled[1]).std() > 0.1


@pytest.mark.parametrize(
    ("variant", "limit", "count"), [("sd3", 256, 302), ("sd3-without-t5", 77, 302)]
)
def test_a_prompt_that_nobody_reads_to_its_end_is_warned_about_once(
    folders: dict[str, Path], variant: str, limit: int, count: int
):
    model = load(folders[variant])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode_prompts(["x" * (limit - 2)])  # a character is a token
    with pytest.warns(UserWarning, match=rf"cut at {limit} tokens; the first one cut has {count}"):
        model.encode_prompts(["x" * 300])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode_prompts(["x" * 300])


# --- Prediction


def test_one_time_per_row_equals_separate_calls(model: StableDiffusion3):
    cond, uncond = model.encode_prompts(PROMPTS), model.encode_prompts(["", ""])
    x_t = normal(2, CHANNELS, LATENT, LATENT)
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
            torch.testing.assert_close(rows.x0[one], single.x0, atol=1e-4, rtol=0)
    assert (rows.raw[0] - rows.raw[1]).abs().max() > 1e-2


PARTS = ["network", "text_encoder", "text_encoder_2"]


def perturbed(folder: Path, **settings: Any) -> StableDiffusion3:
    model = load(folder, **settings)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter += 0.1 * normal(*parameter.shape)
    return model


@pytest.mark.parametrize("variant", ["sd3", "sd35-medium"])
@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_every_trained_parameter_gets_a_gradient(
    folders: dict[str, Path], variant: str, trainable: str
):
    model = perturbed(folders[variant], parts=PARTS, trainable=trainable)
    prediction = model.denoiser(model.encode_prompts(PROMPTS))(
        normal(2, CHANNELS, LATENT, LATENT), 0.5
    )
    prediction.raw.square().sum().backward()
    trained = model.trainable()
    # DDP waits for each of them.
    assert [name for name, parameter in trained.items() if parameter.grad is None] == []
    assert all("lora_" in name for name in trained) == (trainable == "lora")
    assert len({name.split(".")[0] for name in trained}) == len(PARTS)
    frozen = [*model.pipeline.vae.parameters(), *model.pipeline.text_encoder_3.parameters()]
    assert all(p.grad is None for p in frozen)


@pytest.mark.parametrize("name", ["lora", "pipeline"])
@pytest.mark.parametrize("variant", ["sd35-medium", "sd3-without-t5"])
def test_exports_make_the_same_image_elsewhere(
    folders: dict[str, Path], tmp_path: Path, variant: str, name: str
):
    model = perturbed(folders[variant], parts=PARTS)
    (tmp_path / name).mkdir()
    if name == "lora":
        model.save_adapter(tmp_path / name)
    else:
        model.save_pipeline(tmp_path / name, torch.float32)
    noise = normal(1, CHANNELS, 6, 10)
    _, ours = our_run(model, noise, 4, SCALE)
    found = model.image_elsewhere(tmp_path, name, PROMPTS[0], noise, SamplerConfig(4, SCALE))
    torch.testing.assert_close(ours, found, atol=1e-4, rtol=0)
    _, base = our_run(load(folders[variant]), noise, 4, SCALE)
    assert (ours - base).abs().max() > 1e-2


def test_frozen_weights_in_bfloat16_predict_in_float32(folder: Path):
    model, exact = load(folder, dtype="bfloat16"), load(folder)
    t = torch.tensor([0.3, 0.999])
    raw, wanted = (
        each.denoiser(each.encode_prompts(PROMPTS))(normal(2, CHANNELS, LATENT, LATENT), t).raw
        for each in (model, exact)
    )
    assert model.pipeline.text_encoder_3.dtype == torch.bfloat16
    assert raw.dtype == torch.float32
    assert (raw - wanted).std() < 0.05 * wanted.std()
    assert model.decode(normal(1, CHANNELS, LATENT, LATENT)).dtype == torch.float32


# --- Images and latents


def test_autoencoder_is_diffusers_own(model: StableDiffusion3, folder: Path):
    vae = reference_sd3(folder).vae
    images = 2 * torch.rand(2, 3, 24, 40, generator=torch.Generator().manual_seed(0)) - 1
    latents = normal(2, CHANNELS, 6, 10)
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        mean = (posterior.mode() - 0.0609) * 1.5305
        drawn = (posterior.sample(torch.Generator().manual_seed(0)) - 0.0609) * 1.5305
        decoded = vae.decode(latents / 1.5305 + 0.0609).sample / 2 + 0.5
        torch.testing.assert_close(model.encode_images(images), mean)
        torch.testing.assert_close(model.encode_images(images, latents), drawn)
        torch.testing.assert_close(model.decode(latents), decoded)
    assert (mean - drawn).abs().max() > 1e-2


# --- Sizes


def test_sizes_are_checked_before_a_weight_is_read(folder: Path):
    model = load(folder)
    assert model.image_size() == (PIXELS, PIXELS)
    assert model.latent_shape(24, 40) == (CHANNELS, 6, 10)
    config = ModelConfig(str(folder))
    for sampler, message in [
        (SamplerConfig(height=36), r"sampler\.height = 36 must be a multiple of 8 .* 32"),
        (SamplerConfig(width=45), r"sampler\.width = 45 .* 48"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_family(StableDiffusion3, folder, config, sampler)
    check_family(StableDiffusion3, folder, config, SamplerConfig(10, height=24, width=40))


def test_a_folder_without_t5_is_complete_and_one_that_lost_it_is_not(
    folders: dict[str, Path], tmp_path: Path
):
    without = folders["sd3-without-t5"]
    check_family(StableDiffusion3, without, ModelConfig(str(without)))
    copy = shutil.copytree(folders["sd3"], tmp_path / "copy")
    shutil.rmtree(copy / "text_encoder_3")
    with pytest.raises(ValueError, match=r"lacks text_encoder_3/config\.json"):
        check_family(StableDiffusion3, copy, ModelConfig(str(copy)))
