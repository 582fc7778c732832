"""Settings of published models in their real sizes, without their weights: enough to plan with."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tiny_clip import END, START, byte_vocabulary, write_tokenizer
from tiny_flux import SETTINGS as FLUX_SCHEDULER
from tiny_sd3 import INDEX as SD3_INDEX
from tiny_sd3 import SCHEDULER as SD3_SCHEDULER
from tiny_sd3 import write_t5_tokenizer

from sfumato.planning.described import AUTOENCODER

VOCABULARY = 49_408
TABLE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}
CLIP_L = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
BIG_G = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 20}
SDXL_UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

T5_XXL = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32_128,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False,
    "tie_word_embeddings": False,
}
SD35_MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
FLUX_DEV = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
VAE_OF_16 = {
    **AUTOENCODER,
    "latent_channels": 16,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def write_sd15(folder: Path) -> Path:
    """Write the settings of stable-diffusion-v1-5."""
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "PNDMScheduler"],
    }
    parts = {
        "unet": {"sample_size": 64, "cross_attention_dim": 768},
        "vae": AUTOENCODER,
        "text_encoder": _tower(CLIP_L),
    }
    return _write(
        folder, index, parts, {**TABLE, "set_alpha_to_one": False, "skip_prk_steps": True}
    )


def write_sdxl(folder: Path) -> Path:
    """Write the settings of stable-diffusion-xl-base-1.0."""
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    }
    parts = {
        "unet": SDXL_UNET,
        "vae": {**AUTOENCODER, "sample_size": 1024, "force_upcast": True},
        "text_encoder": _tower(CLIP_L),
        "text_encoder_2": _tower({**BIG_G, "projection_dim": 1280}),
    }
    return _write(folder, index, parts, TABLE)


def write_sd35_medium(folder: Path) -> Path:
    """Write the settings of stable-diffusion-3.5-medium."""
    parts = {
        "transformer": SD35_MEDIUM,
        "vae": {**VAE_OF_16, "scaling_factor": 1.5305, "shift_factor": 0.0609},
        "text_encoder": _tower({**CLIP_L, "projection_dim": 768}),
        "text_encoder_2": _tower({**BIG_G, "projection_dim": 1280}),
        "text_encoder_3": T5_XXL,
    }
    _write(folder, SD3_INDEX, parts, SD3_SCHEDULER)
    write_t5_tokenizer(folder / "tokenizer_3")
    return folder


def write_flux_dev(folder: Path) -> Path:
    """Write the settings of FLUX.1-dev."""
    index = {
        "_class_name": "FluxPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    parts = {
        "transformer": FLUX_DEV,
        "vae": {**VAE_OF_16, "scaling_factor": 0.3611, "shift_factor": 0.1159},
        "text_encoder": _tower(CLIP_L),
        "text_encoder_2": T5_XXL,
    }
    _write(folder, index, parts, FLUX_SCHEDULER)
    write_t5_tokenizer(folder / "tokenizer_2")
    return folder


def write_pickscore(folder: Path) -> Path:
    """Write the settings of PickScore_v1: CLIP ViT-H/14."""
    text = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16}
    settings = {
        "model_type": "clip",
        "projection_dim": 1024,
        "text_config": _tower(text),
        "vision_config": {**vision, "intermediate_size": 5120, "patch_size": 14},
    }
    _write_json(folder / "config.json", settings)
    write_tokenizer(folder, byte_vocabulary())
    return folder


def _tower(sizes: Mapping[str, int]) -> dict[str, Any]:
    vocabulary = byte_vocabulary()
    tokens = {"bos_token_id": vocabulary[START], "eos_token_id": vocabulary[END]}
    return {
        "intermediate_size": 4 * sizes["hidden_size"],
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 77,
        **tokens,
        **sizes,
    }


def _write(
    folder: Path,
    index: Mapping[str, Any],
    parts: Mapping[str, Mapping[str, Any]],
    scheduler: Mapping[str, Any],
) -> Path:
    _write_json(folder / "model_index.json", index)
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    for name, settings in parts.items():
        _write_json(folder / name / "config.json", settings)
        (folder / name / "weights.safetensors").touch()  # a plan asks whether they are there
    clip = ["transformers", "CLIPTokenizer"]
    for name in (name for name, kind in index.items() if kind == clip):
        write_tokenizer(folder / name, byte_vocabulary())
    return folder


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(dict(content), indent=2), encoding="utf-8")
