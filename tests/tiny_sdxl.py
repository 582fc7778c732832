"""A diffusers folder of Stable Diffusion XL: the real classes, small enough for tests."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from tiny_clip import write_tiny_clip
from tiny_sd import _publish_text_keys
from torch import Tensor

LATENT = 8
PIXELS = 32
WIDTHS = (16, 32)  # of the two text encoders
POOLED = 24
SIZE_EMBEDDING = 8

# What scheduler_config.json says in stable-diffusion-xl-base-1.0.
SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "_diffusers_version": "0.19.0.dev0",
    "force_zeros_for_empty_prompt": True,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def write_tiny_sdxl(folder: Path, *, zeros_for_empty: bool = True, seed: int = 0) -> None:
    """Write a pipeline with the settings of SDXL base 1.0.

    The weights are random, and the same at every call. The U-Net's last layer is fitted by least
    squares, so that it denoises a little: states keep the size they have under trained weights.
    """
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {
            "text_encoder": text_tower(CLIPTextModel, WIDTHS[0], WIDTHS[0]),
            "text_encoder_2": text_tower(CLIPTextModelWithProjection, WIDTHS[1], POOLED),
            "unet": _tiny_unet(),
            "vae": _tiny_vae(),
        }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    _publish_text_keys(folder / "text_encoder" / "model.safetensors")
    write_clip_tokenizer(folder / "tokenizer")
    write_clip_tokenizer(folder / "tokenizer_2", pad_token="!")
    (folder / "scheduler").mkdir(exist_ok=True)
    _write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    _write_json(
        folder / "model_index.json", INDEX | {"force_zeros_for_empty_prompt": zeros_for_empty}
    )


def text_tower(kind: Any, width: int, projection: int) -> Any:
    """Return a CLIP text encoder of `write_clip_tokenizer`'s vocabulary, of two layers."""
    from transformers import CLIPTextConfig

    tower = kind(
        CLIPTextConfig(
            vocab_size=514,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=projection,
            bos_token_id=512,
            eos_token_id=513,
            pad_token_id=513,
        )
    )
    for name, parameter in tower.named_parameters():
        if "embedding" in name:  # the penultimate states of published encoders are about 1
            parameter.data *= 40
        if "text_projection" in name:
            parameter.data *= 2
    return tower.eval()


def write_clip_tokenizer(folder: Path, pad_token: str | None = None) -> None:
    """Write the files of a published CLIP tokenizer; a character is a token."""
    clip = folder.with_name(f"{folder.name}-clip")
    write_tiny_clip(clip)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(clip / name, folder / name)
    shutil.rmtree(clip)
    if pad_token is not None:
        file = folder / "tokenizer_config.json"
        _write_json(file, json.loads(file.read_text()) | {"pad_token": pad_token})


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _tiny_vae() -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        sample_size=PIXELS,
        scaling_factor=0.13025,
        force_upcast=True,
    )


def _tiny_unet() -> Any:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    unet: Any = UNet2DConditionModel(
        sample_size=LATENT,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=sum(WIDTHS),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=SIZE_EMBEDDING,
        projection_class_embeddings_input_dim=POOLED + 6 * SIZE_EMBEDDING,
    )
    for name, parameter in unet.named_parameters():
        # Prompts, pooled states and sizes matter as under trained weights.
        if name.endswith("attn2.to_out.0.weight") or name.startswith("add_embedding.linear"):
            parameter.data *= 2
    _fit_output(unet.eval())
    return unet


@torch.no_grad()
def _fit_output(unet: Any, rows: int = 128) -> None:
    from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

    x0 = torch.nn.functional.interpolate(torch.randn(rows, 4, 3, 3), LATENT, mode="bilinear")
    noise, t = torch.randn(rows, 4, LATENT, LATENT), torch.randint(0, 1000, (rows,))
    table = EulerDiscreteScheduler.from_config(SCHEDULER).alphas_cumprod[t].reshape(-1, 1, 1, 1)
    added = {
        "text_embeds": torch.randn(rows, POOLED),
        "time_ids": torch.randint(8, 64, (rows, 6)).float(),
    }
    seen: list[Tensor] = []
    hook = unet.conv_out.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x_t = table.sqrt() * x0 + (1 - table).sqrt() * noise
    unet(x_t, t, torch.randn(rows, 8, sum(WIDTHS)), added_cond_kwargs=added)
    hook.remove()
    patches = torch.nn.functional.unfold(seen[0], 3, padding=1).mT.flatten(0, 1).double()
    patches = torch.cat([patches, patches.new_ones(len(patches), 1)], 1)
    wanted = noise.flatten(2).mT.flatten(0, 1).double()
    ridge = 0.1 * torch.eye(patches.shape[1])
    solved = torch.linalg.solve(patches.mT @ patches + ridge, patches.mT @ wanted).float()
    unet.conv_out.weight.copy_(solved[:-1].mT.reshape(unet.conv_out.weight.shape))
    unet.conv_out.bias.copy_(solved[-1])


def reference_sdxl(folder: Path, **changes: Any) -> Any:
    """Load a folder with diffusers alone, quiet; `changes` replace components."""
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
        StableDiffusionXLPipeline,
    )

    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(
        folder, add_watermarker=False, **changes
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
