"""Settings of published models in their real sizes, without their weights: enough to plan with."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tiny_clip import END, START, byte_vocabulary, write_tokenizer

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
    for name in (name for name in index if name.startswith("tokenizer")):
        write_tokenizer(folder / name, byte_vocabulary())
    return folder


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(dict(content), indent=2), encoding="utf-8")
