"""Flux: trajectories equal to diffusers' pipeline, with guidance embedded and without."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import start_cli
from tiny_flux import CHANNELS, FACTOR, reference_flux, write_tiny_flux
from torch import Tensor
from trajectories import PROMPTS, our_run, their_run

from sfumato.compose import compose_train
from sfumato.conditions import typed_keys
from sfumato.config import CONF, LoraConfig, ModelConfig, SamplerConfig
from sfumato.diffusion.sampling import Denoiser, sample
from sfumato.models.flux import Flux, pack, unpack
from sfumato.models.loading import check_family, load_family
from sfumato.models.pipeline_model import PipelineModel
from sfumato.run.run import check_model
from sfumato.training.folder import RunFolder

HEIGHT, WIDTH = 32, 64


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "flux-dev"
    write_tiny_flux(folder)
    return folder


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "flux-schnell"
    write_tiny_flux(folder, distilled=False)
    return folder


@pytest.fixture(scope="module", params=["dev", "schnell"])
def both(request: pytest.FixtureRequest) -> tuple[PipelineModel, Any]:
    """Return the same weights as Sfumato's model and as diffusers' pipeline."""
    folder: Path = request.getfixturevalue(request.param)
    return load(folder), reference_flux(folder)


def load(folder: Path, parts: Sequence[str] = ("network",), **settings: Any) -> Any:
    lora = LoraConfig(rank=4)
    return load_family(
        Flux, folder, ModelConfig(str(folder), parts=list(parts), lora=lora, **settings)
    )


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def starting_noise(rows: int = 2) -> Tensor:
    return normal(rows, CHANNELS, HEIGHT // FACTOR, WIDTH // FACTOR)


def guided_denoiser(
    model: PipelineModel, scale: float, prompts: Sequence[str] = PROMPTS
) -> Denoiser:
    uncond = model.encode_prompts([""]).repeat(len(prompts))
    return model.denoiser(model.encode_prompts(prompts), uncond=uncond, guidance_scale=scale)


@torch.no_grad()
def image(model: PipelineModel, scale: float, prompts: Sequence[str] = PROMPTS) -> Tensor:
    denoiser, noise = guided_denoiser(model, scale, prompts), starting_noise(len(prompts))
    end = sample(denoiser, model.process, noise, model.times(4, HEIGHT, WIDTH)).x
    return model.decode(end).clamp(0, 1)


@torch.no_grad()
def perturb(model: PipelineModel, size: float = 0.1) -> None:
    """Move what is trained, so that policy and reference differ: an adapter's B starts at 0."""
    for seed, parameter in enumerate(model.trainable().values()):
        parameter += size * normal(*parameter.shape, seed=seed)


# --- Whole trajectories


@pytest.mark.parametrize("scale", [1.0, 3.5])
@pytest.mark.parametrize("steps", [4, 7, 10])
def test_trajectory_equals_diffusers_pipeline(
    both: tuple[PipelineModel, Any], steps: int, scale: float
):
    model, pipeline = both
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


def test_guidance_and_prompt_change_the_image(both: tuple[PipelineModel, Any]):
    # Else the comparisons above would say nothing of them.
    model, _ = both
    plain = image(model, 1.0)
    assert (image(model, 3.5) - plain).abs().max() > 0.05
    assert (image(model, 1.0, PROMPTS[::-1]) - plain).abs().max() > 0.05


def test_guidance_is_embedded_or_takes_a_second_prediction(dev: Path, schnell: Path):
    distilled, other = load(dev), load(schnell)
    assert (distilled.has_cfg, other.has_cfg) == (False, True)
    x_t, cond = starting_noise(), distilled.encode_prompts(PROMPTS)
    told = [distilled.denoiser(cond, guidance_scale=scale)(x_t, 0.5).raw for scale in (1.0, 3.5)]
    assert (told[0] - told[1]).abs().max() > 0.01
    assert torch.equal(guided_denoiser(distilled, 3.5)(x_t, 0.5).raw, told[1])
    with torch.no_grad():
        alone = other.denoiser(other.encode_prompts(PROMPTS))(x_t, 0.5).raw
        empty = other.denoiser(other.encode_prompts(["", ""]))(x_t, 0.5).raw
        guided = guided_denoiser(other, 3.5)(x_t, 0.5).raw
    torch.testing.assert_close(guided, empty + 3.5 * (alone - empty), atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["rescale", "detach_uncond"])
@pytest.mark.parametrize("objective", ["draft", "direct", "direct_align"])
def test_a_gradient_through_guidance_needs_guidance(
    dev: Path, schnell: Path, tmp_path: Path, objective: str, mode: str
):
    given = ["data.prompts=P", "reward=color", f"runs_dir={tmp_path}", f"objective={objective}"]

    def check(folder: Path, mode: str) -> None:
        typed = [*given, f"model.pretrained={folder}", f"objective.cfg_gradient={mode}"]
        config, _ = compose_train(typed)
        check_model(config, RunFolder.of(config), typed_keys(typed))

    with pytest.raises(ValueError, match=rf"objective\.cfg_gradient={mode} has no effect on this"):
        check(dev, mode)
    check(dev, "full")
    check(schnell, mode)
    (tmp_path / "run" / "checkpoints" / "step-000001").mkdir(parents=True)
    check(dev, mode)  # a run that began with it goes on


METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
DETACHED = {"flowbp_bridge", "flowbp_lagrange", "flowbp_sparse", "rsm"}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_goes_with_embedded_guidance(
    dev: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
):
    """What a method says of guidance is no mistake of the user's: it is said, once."""
    given = ["recipe=flux_reward", f"method={method}", "data.prompts=P", "reward.pretrained=R"]
    given += ["data.images.path=I"] if method == "ddrl" else []
    typed = [*given, f"model.pretrained={dev}", f"runs_dir={tmp_path}"]
    config, _ = compose_train(typed)
    for process in range(2):
        check_model(config, RunFolder.of(config), typed_keys(typed), say=process == 0)
    said = "the recipe's objective.cfg_gradient=detach_uncond has no effect on this model"
    assert capsys.readouterr().out.count(said) == (method in DETACHED)


def test_the_command_knows_what_was_typed(
    dev: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.argv", [])  # what the command line sets, it leaves
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    given = ["recipe=flux_reward", "method=rsm", "data.prompts=P", "reward.pretrained=R"]
    given += [f"model.pretrained={dev}", f"runs_dir={tmp_path}", "training.precision=no"]
    with pytest.raises(SystemExit):
        start_cli([*given, "objective.cfg_gradient=rescale"])
    assert "objective.cfg_gradient=rescale has no effect on this model" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # there is no file P
        start_cli(given)
    out, err = capsys.readouterr()
    assert "the recipe's objective.cfg_gradient=detach_uncond has no effect on this model" in out
    assert "cfg_gradient" not in err


# --- Times and sizes


def test_times_shift_with_the_size_where_the_settings_say_so(dev: Path, schnell: Path):
    shifts = {(64, 64): 0.5 - 0.65 * 192 / 3840, (128, 128): 0.5, (512, 512): 1.15}
    for (height, width), mu in shifts.items():  # 64, 256 and 4096 tokens
        sigmas = [1 - i / 7 for i in range(7)]
        expected = [1 / (1 + (1 / sigma - 1) / math.exp(mu)) for sigma in sigmas]
        assert load(dev).times(7, height, width) == pytest.approx([*expected, 0.0], abs=1e-6)
        assert load(schnell).times(7, height, width) == pytest.approx([*sigmas, 0.0], abs=1e-6)


@pytest.mark.parametrize("steps", [1, 4, 28, 1000])
def test_times_fall_from_noise_to_data(both: tuple[PipelineModel, Any], steps: int):
    times = both[0].times(steps, HEIGHT, WIDTH)
    assert len(times) == steps + 1
    assert (times[0], times[-1]) == (1.0, 0.0)
    assert all(t > s for t, s in pairwise(times))


def test_sizes(dev: Path):
    model = load(dev)
    assert model.image_size() == (128 * FACTOR, 128 * FACTOR)
    assert model.latent_shape(32, 48) == (CHANNELS, 8, 12)
    config = ModelConfig(str(dev))
    for size, message in [
        ((36, 32), r"sampler\.height = 36 must be a multiple of 8 pixels .* nearest is 32"),
        ((32, 45), r"sampler\.width = 45 .* nearest is 48"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.latent_shape(*size)
        with pytest.raises(ValueError, match=message):
            check_family(Flux, dev, config, SamplerConfig(height=size[0], width=size[1]))
    check_family(Flux, dev, config, SamplerConfig(num_inference_steps=2000))


# --- Prompts


def test_prompts_are_encoded_as_the_pipeline_does(both: tuple[PipelineModel, Any]):
    model, pipeline = load(both[0].source), both[1]
    limit = 256 if model.has_cfg else 512
    prompts = [*PROMPTS, "", "x" * 600]  # a character is a token
    with torch.no_grad():
        states, pooled, _ = pipeline.encode_prompt(prompts, max_sequence_length=limit)
    with pytest.warns(UserWarning, match=rf"cut at {limit} tokens; .* has 60\d: 'xxx"):
        found = model.encode_prompts(prompts).tensors
    assert torch.equal(found["states"], states)
    assert torch.equal(found["pooled"], pooled)
    assert states.shape[1] == limit
    assert (states[0] - states[1]).std() > 0.1
    assert (pooled[0] - pooled[1]).std() > 0.1


# --- Images and latents


def test_autoencoder_is_diffusers_own(both: tuple[PipelineModel, Any]):
    model, pipeline = both
    vae = pipeline.vae
    scale, shift = 0.3611, 0.1159
    images = normal(2, 3, HEIGHT, WIDTH).clamp(-1, 1)
    latents, noise = starting_noise(), normal(*starting_noise().shape, seed=1)
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(latents / scale + shift).sample / 2 + 0.5
        encoded, drawn = model.encode_images(images), model.encode_images(images, noise)
        torch.testing.assert_close(encoded, (posterior.mean - shift) * scale)
        torch.testing.assert_close(drawn - encoded, posterior.std * noise * scale)
        torch.testing.assert_close(model.decode(latents), decoded)


def test_packing_is_the_pipelines_and_unpacking_its_inverse(dev: Path):
    x = normal(2, CHANNELS, 6, 10)
    pipeline = reference_flux(dev)
    assert torch.equal(pack(x), pipeline._pack_latents(x, *x.shape))
    assert torch.equal(unpack(pack(x), 3, 5), x)


# --- Prediction


@pytest.mark.parametrize("scale", [1.0, 3.5])
@torch.no_grad()
def test_a_time_per_row_equals_separate_calls(both: tuple[PipelineModel, Any], scale: float):
    model, x_t = both[0], starting_noise()
    rows = guided_denoiser(model, scale)(x_t, torch.tensor([0.3, 0.8])).raw
    for row, t in enumerate((0.3, 0.8)):
        alone = guided_denoiser(model, scale, [PROMPTS[row]])(x_t[row : row + 1], t).raw
        torch.testing.assert_close(rows[row : row + 1], alone, atol=2e-5, rtol=0)
    assert (rows - guided_denoiser(model, scale)(x_t, 0.3).raw)[1].abs().max() > 0.01


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_reaches_every_adapter(schnell: Path, checkpointing: bool):
    parts = ("network", "text_encoder")
    model = load(schnell, parts, gradient_checkpointing=checkpointing)
    perturb(model)
    x = starting_noise()
    end = sample(guided_denoiser(model, 3.5), model.process, x, [0.2, 0.0], grad_steps=1).x0
    model.decode(end).mean().backward()
    trained = model.trainable()
    assert {name.split(".")[0] for name in trained} == {"transformer", "text_encoder"}
    assert all(p.grad is not None and p.grad.norm() > 0 for p in trained.values())


def test_full_fine_tuning_leaves_no_weight_without_gradient(dev: Path):
    model = load(dev, trainable="full")  # DDP would wait for it for ever
    guided_denoiser(model, 3.5)(starting_noise(), 0.5).raw.square().mean().backward()
    assert all(p.grad is not None for p in model.trainable().values())


def test_a_network_in_bfloat16_answers_in_float32(dev: Path):
    # The network itself rounds the scale to bfloat16: 2 it can tell, 3.5 would be 3.504.
    found, expected = (
        guided_denoiser(load(dev, dtype=dtype), 2.0)(starting_noise(), 0.5).raw.detach()
        for dtype in ("bfloat16", "float32")
    )
    assert found.dtype == torch.float32
    assert (found - expected).std() < 0.05 * expected.std()


# --- Exports


def test_exports_make_the_same_image_elsewhere(schnell: Path, tmp_path: Path):
    model = load(schnell, ("network", "text_encoder"))
    base = image(model, 3.5, PROMPTS[:1])
    perturb(model)
    expected = image(model, 3.5, PROMPTS[:1])
    assert (expected - base).abs().max() > 0.05
    model.save_pipeline(tmp_path / "pipeline", torch.float32)
    (tmp_path / "lora").mkdir()
    model.save_adapter(tmp_path / "lora")
    sampler = SamplerConfig(num_inference_steps=4, guidance_scale=3.5)
    for name in ("pipeline", "lora"):
        found = model.image_elsewhere(tmp_path, name, PROMPTS[0], starting_noise(1), sampler)
        torch.testing.assert_close(found, expected[:1], atol=1e-4, rtol=0)
