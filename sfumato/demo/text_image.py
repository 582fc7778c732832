"""Text-image model of the demo: a small CLIPModel."""

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.demo.steps import Update, counted, draw_scenes, muon_and_adamw, prompt_of
from sfumato.demo.tokenizer import TEXT_LENGTH, tokenize
from sfumato.demo.world import IMAGE_SIZE, Scene, random_scene, render


def build_clip(vocabulary: int) -> Any:
    """Return an untrained CLIPModel; its text tower becomes the base model's text encoder."""
    from transformers import CLIPConfig, CLIPModel

    shared = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "projection_dim": 96,
        "hidden_act": "gelu",
    }
    text = {
        **shared,
        "vocab_size": vocabulary,
        "max_position_embeddings": TEXT_LENGTH,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    vision = {**shared, "image_size": IMAGE_SIZE, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=96))


def build_processor() -> Any:
    """Return CLIP's preprocessing for 64-pixel pictures."""
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=IMAGE_SIZE)


def normalize(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """Return pixel values with CLIP's mean and standard deviation."""
    processor = build_processor()
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std)
    )
    return (images - mean) / std


def save_clip(folder: Path, clip: Any, tokenizer_folder: Path) -> None:
    """Write the files that transformers' CLIPModel, tokenizer and processor load."""
    from transformers import CLIPTokenizer

    clip.save_pretrained(folder)
    build_processor().save_pretrained(folder)
    CLIPTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)


def draw_alike(rng: random.Random, groups: int, each: int) -> list[Scene]:
    """Draw scenes in groups that share color and background, and differ in shape, size and place.

    Among scenes that differ in everything, colors would nearly always be enough to match them.
    """
    scenes = []
    for _ in range(groups):
        one = random_scene(rng)
        scenes += [
            replace(scene, color=one.color, background=one.background)
            for scene in draw_scenes(rng, each)
        ]
    return scenes


def train_text_image(folder: Path, parts: Path, steps: int) -> None:
    """Train by CLIP's symmetric contrastive loss on pictures and captions, complete and partial."""
    from transformers import CLIPTokenizer

    torch.manual_seed(1)
    rng = random.Random("text-image")
    clip = build_clip(len(CLIPTokenizer.from_pretrained(parts / "tokenizer")))
    update = Update(*muon_and_adamw([clip], lr=1e-3), steps=steps)
    for show in counted("text-image", steps):
        scenes = draw_alike(rng, groups=8, each=12)
        pixels = normalize(render(scenes, rng))
        tokens = tokenize(
            parts / "tokenizer", [prompt_of(scene, rng).caption() for scene in scenes]
        )
        loss = clip(**tokens, pixel_values=pixels, return_loss=True).loss
        update(loss)
        clip.logit_scale.data.clamp_(max=math.log(100))
        show(loss=loss.item(), scale=clip.logit_scale.exp().item())
    save_clip(folder, clip, parts / "tokenizer")
