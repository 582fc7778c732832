"""A diffusers folder of Qwen-Image: the real classes, small enough for tests."""

import json
from pathlib import Path
from typing import Any

import torch
from tiny_flux import enlarge

CHANNELS = 16  # of latents, as published
FACTOR = 4  # pixels of a side per latent; 8 as published
TEXT = 32  # channels of the text encoder

# What scheduler_config.json says in Qwen-Image.
SETTINGS = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.34.0.dev0",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "invert_sigmas": False,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_dynamic_shifting": True,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}

# The pipeline puts this before every prompt, and drops the 34 tokens that it is to Qwen; the
# SUFFIX, 5 tokens, it keeps.
PREFIX = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n"
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def write_tiny_qwen_image(folder: Path, *, seed: int = 0) -> None:
    """Write a pipeline. The weights are random, and the same at every call."""
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import QwenImagePipeline
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler,
    )
    from diffusers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = _tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = _tiny_text_encoder(tokenizer)
        transformer = _tiny_transformer()
        vae = _tiny_vae()
    QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(SETTINGS),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    ).save_pretrained(folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SETTINGS))
    _publish_tokenizer(tokenizer, folder / "tokenizer")


def _tiny_tokenizer() -> Any:
    """Return a tokenizer of Qwen's class for which each word of the template is a token."""
    from transformers import Qwen2Tokenizer

    plain = Qwen2Tokenizer(extra_special_tokens=list(SPECIAL[1:]))
    return plain.train_new_from_iterator([PREFIX + SUFFIX], vocab_size=1000)


def _publish_tokenizer(tokenizer: Any, folder: Path) -> None:
    # Qwen-Image is published without the tokenizer.json that transformers 5 writes.
    for file in folder.iterdir():
        file.unlink()
    tokenizer.backend_tokenizer.model.save(str(folder))
    added = {
        str(tokenizer.convert_tokens_to_ids(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token in SPECIAL
    }
    settings = {
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL[1:]),
        "bos_token": None,
        "eos_token": SPECIAL[2],
        "model_max_length": 131072,
        "pad_token": SPECIAL[0],
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def _tiny_text_encoder(tokenizer: Any) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    size = {"hidden_size": TEXT, "intermediate_size": 2 * TEXT}
    config = Qwen2_5_VLConfig(
        text_config={
            **size,
            "vocab_size": len(tokenizer),
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000000.0,
                "mrope_section": [2, 3, 3],
            },
        },
        vision_config={**size, "depth": 1, "num_heads": 2, "out_hidden_size": TEXT},
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _tiny_transformer() -> Any:
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel

    transformer: Any = QwenImageTransformer2DModel(
        in_channels=4 * CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        axes_dims_rope=(4, 6, 6),
    )
    enlarge(transformer)
    for block in transformer.transformer_blocks:  # prompts matter as under trained weights
        block.attn.to_out[0].weight.data *= 4
    return transformer


def _tiny_vae() -> Any:
    """Return an autoencoder with the published means and deviations of its latents."""
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
    )


def reference_qwen_image(folder: Path) -> Any:
    """Load a folder with diffusers alone, quiet."""
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import QwenImagePipeline

    pipeline: Any = QwenImagePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
