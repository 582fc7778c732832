"""A diffusers folder of Flux: the real classes, small enough for tests."""

import json
from pathlib import Path
from typing import Any

import torch
from tiny_clip import write_tiny_clip
from tiny_sd import _publish_text_keys

CHANNELS = 16  # of latents, as published
FACTOR = 4  # pixels of a side per latent; 8 as published
TEXT = 32  # channels of both text encoders

# What scheduler_config.json says in FLUX.1-dev; FLUX.1-schnell differs in the last two.
SETTINGS = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.30.0.dev0",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
SCHNELL = {"shift": 1.0, "use_dynamic_shifting": False}


def write_tiny_flux(folder: Path, *, distilled: bool = True, seed: int = 0) -> None:
    """Write a pipeline: FLUX.1-dev, with embedded guidance, or FLUX.1-schnell, without.

    The weights are random, and the same at every call.
    """
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler,
    )
    from diffusers.utils.logging import disable_progress_bar
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    disable_progress_bar()
    clip = folder.with_name(f"{folder.name}-clip")
    write_tiny_clip(clip)
    settings = SETTINGS if distilled else SETTINGS | SCHNELL
    tokenizer_2 = tiny_t5_tokenizer(512 if distilled else 256)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder: Any = CLIPTextModel(CLIPTextConfig.from_pretrained(clip))
        text_encoder_2 = tiny_t5(len(tokenizer_2), TEXT)
        transformer = _tiny_transformer(distilled)
        vae = _tiny_vae()
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(settings),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(clip),
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    ).save_pretrained(folder)
    _publish_text_keys(folder / "text_encoder" / "model.safetensors")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    index = json.loads((folder / "model_index.json").read_text())
    for name in ("image_encoder", "feature_extractor"):  # published before these were thought of
        del index[name]
    index["tokenizer_2"] = ["transformers", "T5TokenizerFast"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def tiny_t5_tokenizer(max_length: int) -> Any:
    """Return a tokenizer of T5's class for which a printable ASCII character is a token."""
    from transformers import T5TokenizerFast

    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab += [(chr(code), -3.0) for code in range(33, 127)]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=max_length)


def tiny_t5(vocab_size: int, channels: int) -> Any:
    """Return a T5 encoder with the gated feed-forward of t5-v1_1-xxl."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=vocab_size,
            d_model=channels,
            d_kv=channels // 2,
            d_ff=2 * channels,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            tie_word_embeddings=False,
        )
    )


def _tiny_transformer(distilled: bool) -> Any:
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    transformer: Any = FluxTransformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        pooled_projection_dim=TEXT,
        guidance_embeds=distilled,
        axes_dims_rope=(4, 6, 6),
    )
    enlarge(transformer)
    return transformer


@torch.no_grad()
def enlarge(network: torch.nn.Module) -> None:
    """Scale torch's initial linear weights to keep variance: prompts, times and places matter."""
    for module in network.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.mul_(3**0.5)


def _tiny_vae() -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=CHANNELS,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def reference_flux(folder: Path) -> Any:
    """Load a folder with diffusers alone, quiet."""
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

    pipeline: Any = FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
