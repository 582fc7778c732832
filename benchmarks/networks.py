"""Random networks of the real classes in the sizes that are measured, written as model folders."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

MAX_TOKENS = 77
START, END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class Size:
    """Shapes of a pipeline and of its CLIP reward; CLIP towers are (width, layers, heads)."""

    pixels: int
    unet: tuple[int, ...]
    unet_layers: int
    unet_heads: int
    autoencoder: tuple[int, ...]
    text: tuple[int, int, int]
    reward_text: tuple[int, int, int]
    reward_image: tuple[int, int, int]
    reward_pixels: int
    reward_patch: int

    @property
    def latent(self) -> int:
        return self.pixels // 2 ** (len(self.autoencoder) - 1)


@dataclass(frozen=True)
class MmditSize:
    """Shapes of a pipeline of Stable Diffusion 3 without T5; CLIP towers as above."""

    pixels: int
    layers: int
    heads: int
    head_width: int
    joint: int  # channels of the text states
    autoencoder: tuple[int, ...]
    texts: tuple[tuple[int, int, int], tuple[int, int, int]]


SIZES = {
    "6m": Size(
        pixels=128,
        unet=(48, 96, 128, 192),
        unet_layers=1,
        unet_heads=4,
        autoencoder=(32, 64, 96, 128),
        text=(256, 4, 4),
        reward_text=(512, 6, 8),
        reward_image=(512, 8, 8),
        reward_pixels=224,
        reward_patch=16,
    ),
    "60m": Size(
        pixels=256,
        unet=(128, 256, 384, 512),
        unet_layers=1,
        unet_heads=8,
        autoencoder=(64, 128, 256, 256),
        text=(512, 6, 8),
        reward_text=(512, 6, 8),
        reward_image=(384, 6, 6),
        reward_pixels=224,
        reward_patch=32,
    ),
    "860m": Size(  # Stable Diffusion 1.5 with PickScore's ViT-H/14
        pixels=512,
        unet=(320, 640, 1280, 1280),
        unet_layers=2,
        unet_heads=8,
        autoencoder=(128, 256, 512, 512),
        text=(768, 12, 12),
        reward_text=(1024, 24, 16),
        reward_image=(1280, 32, 16),
        reward_pixels=224,
        reward_patch=14,
    ),
}


MMDIT_SIZES = {
    "mmdit": MmditSize(
        pixels=256,
        layers=6,
        heads=8,
        head_width=64,
        joint=1024,
        autoencoder=(64, 128, 256, 256),
        texts=((384, 6, 6), (512, 6, 8)),
    ),
}


def write_pipeline(folder: Path, size: Size) -> None:
    """Write a StableDiffusionPipeline with Stable Diffusion 1.5's schedule."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
        StableDiffusionPipeline,
    )
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    vocab = _write_tokenizer(folder / "tokenizer")
    torch.manual_seed(0)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        set_alpha_to_one=False,
        steps_offset=1,
        clip_sample=False,
    )
    pipeline: Any = StableDiffusionPipeline
    pipeline(
        vae=_autoencoder(size.pixels, size.autoencoder),
        text_encoder=CLIPTextModel(CLIPTextConfig(**_text(size.text, vocab))),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=_unet(size),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def write_mmdit(folder: Path, size: MmditSize) -> None:
    """Write a StableDiffusion3Pipeline with the published schedule, and no T5."""
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
        StableDiffusion3Pipeline,
    )
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    names = ("tokenizer", "tokenizer_2")
    vocab, _ = (_write_tokenizer(folder / name) for name in names)
    torch.manual_seed(0)
    encoders = [
        CLIPTextModelWithProjection(
            CLIPTextConfig(**_text(shape, vocab), projection_dim=shape[0], hidden_act="gelu")
        )
        for shape in size.texts
    ]
    tokenizers = [CLIPTokenizer.from_pretrained(folder / name) for name in names]
    vae = _autoencoder(
        *(size.pixels, size.autoencoder),
        latent_channels=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    pipeline: Any = StableDiffusion3Pipeline
    pipeline(
        transformer=_mmdit(size),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizers[0],
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizers[1],
        text_encoder_3=None,
        tokenizer_3=None,
    ).save_pretrained(folder)


def _mmdit(size: MmditSize) -> Any:
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=size.pixels // 2 ** (len(size.autoencoder) - 1),
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=size.layers,
        attention_head_dim=size.head_width,
        num_attention_heads=size.heads,
        joint_attention_dim=size.joint,
        caption_projection_dim=size.heads * size.head_width,
        pooled_projection_dim=sum(width for width, _, _ in size.texts),
        pos_embed_max_size=96,
    )


def write_reward(folder: Path, size: Size) -> None:
    """Write a CLIPModel with tokenizer and preprocessing."""
    from transformers import CLIPConfig, CLIPModel

    vocab = _write_tokenizer(folder)
    width, layers, heads = size.reward_image
    vision = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "image_size": size.reward_pixels,
        "patch_size": size.reward_patch,
    }
    torch.manual_seed(0)
    config = CLIPConfig(text_config=_text(size.reward_text, vocab), vision_config=vision)
    CLIPModel(config).save_pretrained(folder)
    side = size.reward_pixels
    settings = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def _unet(size: Size) -> Any:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    deeper = len(size.unet) - 1
    return UNet2DConditionModel(
        sample_size=size.latent,
        block_out_channels=size.unet,
        layers_per_block=size.unet_layers,
        down_block_types=("CrossAttnDownBlock2D",) * deeper + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * deeper,
        cross_attention_dim=size.text[0],
        attention_head_dim=size.unet_heads,
        norm_num_groups=16,
    )


def _autoencoder(pixels: int, channels: tuple[int, ...], **settings: Any) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    blocks, kind = len(channels), cast(Any, AutoencoderKL)  # its annotations are too narrow
    return kind(
        sample_size=pixels,
        block_out_channels=channels,
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        norm_num_groups=min(32, channels[0] // 2),
        **settings,
    )


def _text(shape: tuple[int, int, int], vocab: dict[str, int]) -> dict[str, Any]:
    width, layers, heads = shape
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "max_position_embeddings": MAX_TOKENS,
        "vocab_size": len(vocab),
        "bos_token_id": vocab[START],
        "eos_token_id": vocab[END],
        "pad_token_id": vocab[END],
    }


def _write_tokenizer(folder: Path) -> dict[str, int]:
    """Write a tokenizer with a token per character; return its vocabulary."""
    from tokenizers.pre_tokenizers import ByteLevel

    folder.mkdir(parents=True, exist_ok=True)
    symbols = sorted(ByteLevel.alphabet())
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), START, END]
    vocab = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_TOKENS,
        "bos_token": START,
        "eos_token": END,
        "pad_token": END,
        "unk_token": END,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return vocab
