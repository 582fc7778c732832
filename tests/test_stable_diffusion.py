"""Stable Diffusion: equal to diffusers part by part; one copy in memory; roles and precisions."""

import gc
import json
import shutil
import warnings
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tiny_sd import (
    LATENT,
    PIXELS,
    load_tiny_sd,
    perturb_adapters,
    reference_pipeline,
    unet_parameters,
)
from torch import Tensor, nn

from sfumato.config import LoraConfig, ModelConfig, SamplerConfig
from sfumato.diffusion.process import VariancePreserving
from sfumato.models.generate import generate
from sfumato.models.model import Role
from sfumato.models.stable_diffusion import StableDiffusion

PROMPTS = ["a red star", "a small blue ring on a yellow background"]
SCALE = 7.5


def config(folder: Path, trainable: str = "lora", dtype: str = "float32") -> ModelConfig:
    return ModelConfig(str(folder), trainable=trainable, dtype=dtype, lora=LoraConfig(rank=4))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=["sd_folder", "sd2_folder"])
def both(request: pytest.FixtureRequest) -> tuple[StableDiffusion, Any]:
    """Return the same weights as Sfumato's model and as diffusers' pipeline."""
    folder: Path = request.getfixturevalue(request.param)
    return load_tiny_sd(folder), reference_pipeline(folder)


@pytest.fixture
def model(sd_folder: Path) -> StableDiffusion:
    return load_tiny_sd(sd_folder, config(sd_folder))


def predict(model: StableDiffusion, role: Role, t: Any = 0.5, scale: float = SCALE) -> Tensor:
    cond = model.encode_prompts(PROMPTS)
    uncond = model.encode_prompts(["", ""])
    denoiser = model.denoiser(cond, uncond=uncond, guidance_scale=scale, role=role)
    return denoiser(normal(2, 4, LATENT, LATENT), t).raw


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_a_guidance_scale_up_to_one_guides_nothing_as_in_diffusers(
    model: StableDiffusion, scale: float
):
    cond = model.encode_prompts(PROMPTS)
    alone = model.denoiser(cond)(normal(2, 4, LATENT, LATENT), 0.5).raw
    assert torch.equal(predict(model, "policy", scale=scale), alone)


# --- Prompts


def test_prompts_are_encoded_as_the_pipeline_does(both: tuple[StableDiffusion, Any]):
    model, pipeline = both
    states, empty = pipeline.encode_prompt(PROMPTS, torch.device("cpu"), 1, True)
    assert torch.equal(model.encode_prompts(PROMPTS).tensors["states"], states)
    assert torch.equal(model.encode_prompts([""]).tensors["states"], empty[:1])
    assert (states[0] - states[1]).std() > 0.1


def test_encoded_prompts_can_be_cut_stacked_and_repeated(model: StableDiffusion):
    cond = model.encode_prompts([*PROMPTS, "a square"])
    assert (len(cond), len(cond.rows(1, 3))) == (3, 2)
    again = type(cond).stack([cond.rows(0, 1), cond.rows(1, 3)])
    assert torch.equal(again.tensors["states"], cond.tensors["states"])
    twice = cond.rows(0, 2).repeat(2).tensors["states"]
    assert torch.equal(twice[2:], cond.tensors["states"][:2])


def test_long_prompts_are_cut_as_the_pipeline_does_and_warned_about_once(sd_folder: Path):
    model, pipeline = load_tiny_sd(sd_folder), reference_pipeline(sd_folder)
    fits, long, longer = "x" * 75, "x" * 74 + "yz", "z" * 200  # a character is a token
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode_prompts([fits])
    with pytest.warns(UserWarning, match=r"cut at 77 tokens; the first one cut has 78: 'xxx"):
        found = model.encode_prompts([fits, long])
    expected, _ = pipeline.encode_prompt([fits, long], torch.device("cpu"), 1, False)
    assert torch.equal(found.tensors["states"], expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode_prompts([longer])


# --- Images and latents


def test_autoencoder_is_diffusers_own(sd_folder: Path, model: StableDiffusion):
    vae: Any = AutoencoderKL.from_pretrained(sd_folder, subfolder="vae")
    images = torch.rand(2, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = normal(2, 4, LATENT, LATENT)
    with torch.no_grad():
        encoded = vae.encode(images).latent_dist.mode() * vae.config.scaling_factor
        decoded = vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5
        assert torch.equal(model.encode_images(images), encoded)
        torch.testing.assert_close(model.decode(latents), decoded, atol=1e-7, rtol=1e-7)


def test_decoding_is_differentiable_and_not_clamped(model: StableDiffusion):
    latents = normal(1, 4, LATENT, LATENT).requires_grad_()
    with torch.no_grad():
        model.pipeline.vae.decoder.conv_out.bias += 5
    images = model.decode(latents)
    assert images.min() > 1
    (gradient,) = torch.autograd.grad(images.square().sum(), latents)
    direction, step = normal(1, 4, LATENT, LATENT, seed=1), 1e-2
    with torch.no_grad():
        ahead, behind = (
            model.decode(latents + sign * step * direction).double().square().sum()
            for sign in (1, -1)
        )
    slope = float(ahead - behind) / (2 * step)
    assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-2)
    assert all(p.grad is None for p in model.pipeline.vae.parameters())


def test_latent_shape_and_image_size(model: StableDiffusion):
    assert model.image_size() == (PIXELS, PIXELS)
    assert model.latent_shape(32, 48) == (4, 8, 12)
    assert model.encode_images(torch.zeros(1, 3, 32, 48)).shape[1:] == (4, 8, 12)
    for size, message in [
        ((30, 32), r"sampler\.height = 30 must be a multiple of 4 .* nearest is 32"),
        ((32, 45), r"sampler\.width = 45 .* nearest is 44"),
        ((0, 32), r"sampler\.height = 0 .* nearest is 4"),
        ((-8, 32), r"sampler\.height = -8 .* nearest is 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.latent_shape(*size)


# --- Times


@pytest.mark.parametrize("steps", [1, 7, 10, 30, 50, 999])
def test_times_are_the_timesteps_of_ddim(both: tuple[StableDiffusion, Any], steps: int):
    model, pipeline = both
    scheduler: Any = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(steps)
    times = model.times(steps, PIXELS, PIXELS)
    process = model.process
    assert isinstance(process, VariancePreserving)
    assert [process.index(t) for t in times[:-1]] == scheduler.timesteps.tolist()
    # set_alpha_to_one is False: the last step ends at alphas_cumprod[0], not at clean data.
    assert float(process.alpha(times[-1])) ** 2 == pytest.approx(
        float(scheduler.final_alpha_cumprod), abs=1e-12
    )
    assert all(t > s for t, s in pairwise(times))


@pytest.mark.parametrize(
    "changes",
    [{"set_alpha_to_one": True}, {"timestep_spacing": "trailing"}, {"beta_schedule": "linear"}],
    ids=lambda changes: next(iter(changes)),
)
def test_settings_of_the_scheduler_are_followed(
    sd_folder: Path, tmp_path: Path, changes: dict[str, Any]
):
    folder = shutil.copytree(sd_folder, tmp_path / "copy")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    images = [
        reference_pipeline(each)(
            PROMPTS,
            num_inference_steps=10,
            generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
            output_type="pt",
        ).images
        for each in (folder, sd_folder)
    ]
    found = generate(load_tiny_sd(folder), PROMPTS, [3, 4], SamplerConfig(10))
    torch.testing.assert_close(found, images[0], atol=1e-4, rtol=0)
    assert (images[0] - images[1]).abs().max() > 1e-3


def test_as_many_steps_as_were_trained_and_no_more(model: StableDiffusion):
    # diffusers' own grid of 1000 steps with steps_offset 1 leaves the table.
    assert max(model.times(1000, PIXELS, PIXELS)) == 1.0
    with pytest.raises(ValueError, match=r"num_inference_steps = 1001 is more than the 1000 steps"):
        model.times(1001, PIXELS, PIXELS)


# --- Prediction and roles


@pytest.mark.parametrize("scale", [1.0, SCALE])
def test_prediction_is_the_networks_at_the_timestep(
    both: tuple[StableDiffusion, Any], scale: float
):
    model, pipeline = both
    x_t, index = normal(2, 4, LATENT, LATENT), 481
    states, empty = pipeline.encode_prompt(PROMPTS, torch.device("cpu"), 1, True)
    with torch.no_grad():
        cond, uncond = (pipeline.unet(x_t, index, e).sample for e in (states, empty))
        found = predict(model, "reference", (index + 1) / 1000, scale)
    torch.testing.assert_close(found, uncond + scale * (cond - uncond), atol=2e-5, rtol=1e-5)
    rows = predict(model, "reference", torch.tensor([(index + 1) / 1000] * 2), scale)
    torch.testing.assert_close(rows, found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_reference_is_the_base_network_exactly_and_has_no_gradient(sd_folder: Path, trainable: str):
    model = load_tiny_sd(sd_folder, config(sd_folder, trainable))
    before = predict(model, "policy")
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter += 0.01
    base: Any = UNet2DConditionModel.from_pretrained(sd_folder, subfolder="unet")
    states = torch.cat([model.encode_prompts([p]).tensors["states"] for p in ["", "", *PROMPTS]])
    with torch.no_grad():
        raw = base(normal(2, 4, LATENT, LATENT).repeat(2, 1, 1, 1), 499, states).sample
    expected = raw[:2] + SCALE * (raw[2:] - raw[:2])
    reference, policy = predict(model, "reference"), predict(model, "policy")
    torch.testing.assert_close(reference, expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(reference, before)
    assert (policy - reference).abs().max() > 0.01
    assert (reference.requires_grad, policy.requires_grad) == (False, True)


def test_only_what_is_trained_gets_a_gradient(sd_folder: Path):
    for trainable, named in (("lora", "lora_"), ("full", "")):
        model = load_tiny_sd(sd_folder, config(sd_folder, trainable))
        if trainable == "lora":
            perturb_adapters(model)
        predict(model, "policy").sum().backward()
        everything = dict(model.network.named_parameters())
        assert unet_parameters(model).keys() == {n for n in everything if named in n}
        assert all(p.grad is not None for p in model.trainable().values())
        frozen = [p for n, p in everything.items() if named not in n]
        frozen += [*model.pipeline.vae.parameters(), *model.pipeline.text_encoder.parameters()]
        assert all(p.grad is None and not p.requires_grad for p in frozen)


# --- Memory


def live_bytes() -> int:
    """Return the bytes of all tensors that exist, shared storage counted once."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if type(found) in (Tensor, nn.Parameter):  # not the fakes of a compiler
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def size(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


@pytest.mark.parametrize(("trainable", "copies"), [("lora", 1), ("full", 2)])
def test_copies_of_the_network_in_memory(sd_folder: Path, trainable: str, copies: int):
    base: Any = UNet2DConditionModel.from_pretrained(sd_folder, subfolder="unet")
    unet = size(base)
    before = live_bytes()
    model = load_tiny_sd(sd_folder, config(sd_folder, trainable))
    predict(model, "policy"), predict(model, "reference")
    held = live_bytes() - before
    others = size(model.pipeline.vae) + size(model.pipeline.text_encoder)
    adapters = sum(4 * p.numel() for n, p in model.trainable().items() if "lora_" in n)
    assert held == pytest.approx(copies * unet + others + adapters, abs=0.02 * unet)


# --- Precision and checkpointing


def test_frozen_weights_in_bfloat16_leave_lora_in_float32(sd_folder: Path):
    model = load_tiny_sd(sd_folder, config(sd_folder, dtype="bfloat16"))
    exact = load_tiny_sd(sd_folder, config(sd_folder))
    trained = unet_parameters(model)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    rest = [p for n, p in model.network.named_parameters() if n not in trained]
    rest += [*model.pipeline.vae.parameters(), *model.pipeline.text_encoder.parameters()]
    assert {p.dtype for p in rest} == {torch.bfloat16}
    for each in (model, exact):
        perturb_adapters(each)
    found, expected = predict(model, "policy", scale=1.0), predict(exact, "policy", scale=1.0)
    assert found.dtype == torch.float32
    assert (found - expected).std() < 0.03 * expected.std()
    images = model.decode(normal(1, 4, LATENT, LATENT))
    assert images.dtype == torch.float32
    found.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in trained.items():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        other = unet_parameters(exact)[name].grad
        assert (parameter.grad - other).norm() < 0.1 * other.norm()  # type: ignore[union-attr]


def test_full_fine_tuning_trains_in_float32_beside_a_frozen_float32_copy(sd_folder: Path):
    model = load_tiny_sd(sd_folder, config(sd_folder, "full", "bfloat16"))
    policy, frozen = model.roles.networks()
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    # Rounded to bfloat16 it would begin at a distance from the policy.
    assert {p.dtype for p in frozen.parameters()} == {torch.float32}
    assert {p.dtype for p in model.pipeline.vae.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in frozen.parameters())
    before = predict(model, "reference")
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=1e-2)
    predict(model, "policy").square().sum().backward()
    optimizer.step()
    assert torch.equal(predict(model, "reference"), before)
    assert (predict(model, "policy") - before).abs().max() > 0.1


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_gradient_checkpointing_recomputes_and_gives_the_same_gradients(
    sd_folder: Path, trainable: str
):
    results, runs = [], []
    for checkpointing in (False, True):
        settings = config(sd_folder, trainable)
        settings.gradient_checkpointing = checkpointing
        model = load_tiny_sd(sd_folder, settings)
        if trainable == "lora":
            perturb_adapters(model)
        unet: Any = model.network
        watched = unet.up_blocks[1].resnets[0], model.pipeline.vae.decoder.mid_block
        calls: Counter[nn.Module] = Counter()
        for module in watched:
            module.register_forward_pre_hook(lambda ran, _, calls=calls: calls.update([ran]))
        latents = predict(model, "policy")
        loss = model.decode(latents).square().mean()
        # The policy's recomputation comes when the adapters have been off in between.
        loss = loss + (latents - predict(model, "reference")).square().mean()
        forwards = [calls[module] for module in watched]
        loss.backward()
        runs.append(
            [calls[module] - before for module, before in zip(watched, forwards, strict=True)]
        )
        results.append([p.grad for p in model.trainable().values()])
    assert runs == [[0, 0], [1, 1]]
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-6, rtol=1e-5)
