"""A diffusers folder of Stable Diffusion 3 or 3.5: the real classes, small enough for tests."""

import json
from pathlib import Path
from typing import Any

import torch
from tiny_sdxl import text_tower, write_clip_tokenizer

LATENT = 8
PIXELS = 32
CHANNELS = 16
WIDTHS = (16, 32)  # of the two CLIP encoders
POOLED = (16, 24)
T5_WIDTH = 64
LARGEST = 12  # patches of a side that have a position

# What scheduler_config.json says in stable-diffusion-3-medium and the 3.5 releases.
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.29.0.dev0",
    "num_train_timesteps": 1000,
    "shift": 3.0,
}
INDEX = {
    "_class_name": "StableDiffusion3Pipeline",
    "_diffusers_version": "0.29.0.dev0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "tokenizer_3": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def write_tiny_sd3(folder: Path, *, medium: bool = False, t5: bool = True, seed: int = 0) -> None:
    """Write a pipeline with the settings of SD 3; the weights are the same at every call.

    Args:
        medium: build as SD 3.5 medium: normalised queries and keys, and blocks of two attentions.
        t5: with the third text encoder; without, model_index.json says null.
    """
    from transformers import CLIPTextModelWithProjection

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {
            "text_encoder": text_tower(CLIPTextModelWithProjection, WIDTHS[0], POOLED[0]),
            "text_encoder_2": text_tower(CLIPTextModelWithProjection, WIDTHS[1], POOLED[1]),
            "transformer": _tiny_transformer(medium),
            "vae": _tiny_vae(),
        }
        if t5:
            parts["text_encoder_3"] = tiny_t5(T5_WIDTH)
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    write_clip_tokenizer(folder / "tokenizer")
    write_clip_tokenizer(folder / "tokenizer_2", pad_token="!")
    absent = {} if t5 else dict.fromkeys(("text_encoder_3", "tokenizer_3"), (None, None))
    if t5:
        write_t5_tokenizer(folder / "tokenizer_3")
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=2))
    (folder / "model_index.json").write_text(json.dumps(INDEX | absent, indent=2))


def tiny_t5(width: int) -> Any:
    """Return a T5 v1.1 encoder of `write_t5_tokenizer`'s vocabulary, of two layers."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(_characters()),
        d_model=width,
        d_kv=8,
        d_ff=32,
        num_heads=2,
        num_layers=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config).eval()


def write_t5_tokenizer(folder: Path) -> None:
    """Write the files of a T5 tokenizer of ASCII; a character is a token."""
    from transformers import T5TokenizerFast

    tokenizer = T5TokenizerFast(vocab=_characters(), extra_ids=0, model_max_length=512)
    tokenizer.save_pretrained(folder)


def _characters() -> list[tuple[str, float]]:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    return special + [(chr(code), -3.0) for code in range(33, 127)]


def _tiny_transformer(medium: bool) -> Any:
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    transformer: Any = SD3Transformer2DModel(
        sample_size=LATENT,
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=sum(POOLED),
        pos_embed_max_size=LARGEST,
        dual_attention_layers=(0, 1) if medium else (),
        qk_norm="rms_norm" if medium else None,
    )
    return transformer.eval()


def _tiny_vae() -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    settings: Any = {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
    }
    return AutoencoderKL(
        **settings,
        latent_channels=CHANNELS,
        norm_num_groups=4,
        sample_size=PIXELS,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def reference_sd3(folder: Path) -> Any:
    """Load a folder with diffusers alone, quiet; what its index leaves null is passed as None."""
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
        StableDiffusion3Pipeline,
    )

    index = json.loads((folder / "model_index.json").read_text())
    absent: Any = dict.fromkeys(name for name, kind in index.items() if kind == [None, None])
    pipeline: Any = StableDiffusion3Pipeline.from_pretrained(folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
