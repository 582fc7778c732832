"""A diffusers folder of Stable Diffusion: the real classes, small enough for tests."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from tiny_clip import write_tiny_clip
from torch import Tensor

from sfumato.config import ModelConfig
from sfumato.models.adapters import LoraRoles
from sfumato.models.loading import load_family
from sfumato.models.stable_diffusion import StableDiffusion

LATENT = 8
PIXELS = 32
CHANNELS = (32, 64)

# What scheduler_config.json says in both stable-diffusion-v1-5 and stable-diffusion-2-1.
SETTINGS = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}


def write_tiny_sd(folder: Path, *, prediction_type: str = "epsilon", seed: int = 0) -> None:
    """Write a pipeline: SD 1.5's PNDM settings for `epsilon`, SD 2.1's DDIM ones for others.

    The weights are random, and the same at every call. The U-Net's last layer is fitted by least
    squares, so that it denoises a little: states keep the size they have under trained weights.
    """
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
        StableDiffusionPipeline,
    )
    from diffusers.utils.logging import disable_progress_bar
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    disable_progress_bar()
    clip = folder.with_name(f"{folder.name}-clip")
    write_tiny_clip(clip)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder: Any = CLIPTextModel(CLIPTextConfig.from_pretrained(clip))
        unet = _tiny_unet(prediction_type, text_encoder.config.hidden_size)
        vae = _tiny_vae()
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(clip),
        unet=unet,
        scheduler=_ddim(prediction_type),
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    ).save_pretrained(folder)
    _publish_text_keys(folder / "text_encoder" / "model.safetensors")
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(clip / name, folder / "tokenizer" / name)
    kind = "PNDMScheduler" if prediction_type == "epsilon" else "DDIMScheduler"
    settings: dict[str, Any] = {"_class_name": kind, "_diffusers_version": "0.8.0", **SETTINGS}
    if prediction_type != "epsilon":
        settings["prediction_type"] = prediction_type
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", kind]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def _ddim(prediction_type: str) -> Any:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    return DDIMScheduler.from_config({**SETTINGS, "prediction_type": prediction_type})


def _tiny_vae() -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        sample_size=PIXELS,
    )


def _tiny_unet(prediction_type: str, text_size: int) -> Any:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    unet: Any = UNet2DConditionModel(
        sample_size=LATENT,
        block_out_channels=CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=text_size,
        use_linear_projection=prediction_type == "v_prediction",  # as SD 2.x has it
    )
    for name, parameter in unet.named_parameters():
        if name.endswith("attn2.to_out.0.weight"):  # prompts matter as under trained weights
            parameter.data *= 4
    _fit_output(unet, prediction_type, text_size)
    return unet


@torch.no_grad()
def _fit_output(unet: Any, prediction_type: str, text_size: int, rows: int = 128) -> None:
    scheduler = _ddim(prediction_type)
    x0 = torch.nn.functional.interpolate(torch.randn(rows, 4, 3, 3), LATENT, mode="bilinear")
    noise, t = torch.randn(rows, 4, LATENT, LATENT), torch.randint(0, 1000, (rows,))
    targets = {"epsilon": noise, "sample": x0, "v_prediction": scheduler.get_velocity(x0, noise, t)}
    seen: list[Tensor] = []
    hook = unet.conv_out.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    unet(scheduler.add_noise(x0, noise, t), t, torch.randn(rows, 8, text_size))
    hook.remove()
    patches = torch.nn.functional.unfold(seen[0], 3, padding=1).mT.flatten(0, 1).double()
    patches = torch.cat([patches, patches.new_ones(len(patches), 1)], 1)
    wanted = targets[prediction_type].flatten(2).mT.flatten(0, 1).double()
    ridge = 0.1 * torch.eye(patches.shape[1])
    solved = torch.linalg.solve(patches.mT @ patches + ridge, patches.mT @ wanted).float()
    unet.conv_out.weight.copy_(solved[:-1].mT.reshape(unet.conv_out.weight.shape))
    unet.conv_out.bias.copy_(solved[-1])


def _publish_text_keys(file: Path) -> None:
    # Published files say text_model.*, which transformers 5 reads but no longer writes.
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    named = {f"text_model.{key.removeprefix('text_model.')}": t for key, t in tensors.items()}
    save_file(named, file, metadata={"format": "pt"})


def load_tiny_sd(folder: Path, config: ModelConfig | None = None) -> StableDiffusion:
    """Load a folder as Sfumato does; `config.pretrained` need not be stated."""
    model = load_family(StableDiffusion, folder, config or ModelConfig(pretrained=str(folder)))
    assert isinstance(model, StableDiffusion)
    return model


def reference_pipeline(folder: Path) -> Any:
    """Load a folder with diffusers alone, as a quiet DDIM pipeline."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
        StableDiffusionPipeline,
    )
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    pipeline: Any = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def unet_parameters(model: StableDiffusion) -> dict[str, torch.nn.Parameter]:
    """Return what is trained by its name in the U-Net."""
    return {name.removeprefix("unet."): p for name, p in model.trainable().items()}


@torch.no_grad()
def perturb_adapters(model: StableDiffusion, size: float = 0.1, seed: int = 0) -> None:
    """Draw A and B from a seed, so that policy and reference differ; B alone starts at 0."""
    assert isinstance(model.roles, LoraRoles)
    generator = torch.Generator().manual_seed(seed)
    for layer in model.roles.layers:
        for part in (layer.lora_A, layer.lora_B):
            weight = part["default"].weight
            weight.copy_(size * torch.randn(weight.shape, generator=generator))
