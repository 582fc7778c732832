"""Text-image model of the demo: a small CLIPModel, the judge that no reward sees."""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from sfumato.demo.images import Row, read_rows
from sfumato.demo.pictures import IMAGE_SIZE
from sfumato.demo.steps import Update, counted, muon_and_adamw
from sfumato.demo.text import (
    BATCH,
    TOKENIZER,
    build_clip,
    captions_of,
    vocabulary_size,
)
from sfumato.demo.tokenizer import tokenize
from sfumato.images import load_images


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


def train_text_image(folder: Path, parts: Path, steps: int) -> None:
    """Train by CLIP's symmetric contrastive loss on pictures and their captions.

    Half of the captions are complete, so that style and background are learned too.
    """
    torch.manual_seed(1)
    rng, rows = random.Random("text-image"), read_rows(parts.parent / "pictures" / "train")
    clip = build_clip(vocabulary_size(parts))
    update = Update(*muon_and_adamw([clip], lr=1e-3), steps=steps)
    pictures = _pictures(parts, rows)
    for show in counted("text-image", steps):
        drawn = rng.sample(range(len(rows)), BATCH)
        captions = [
            rows[i]["text" if rng.random() < 0.5 else rng.choice([*captions_of(rows[i])])]
            for i in drawn
        ]
        pixels = normalize(pictures[drawn].float() / 255)
        loss = clip(
            **tokenize(parts / TOKENIZER, captions), pixel_values=pixels, return_loss=True
        ).loss
        update(loss)
        clip.logit_scale.data.clamp_(max=math.log(100))
        show(loss=loss.item(), scale=clip.logit_scale.exp().item())
    save_clip(folder, clip, parts / TOKENIZER)


def _pictures(parts: Path, rows: Sequence[Row]) -> UInt8[Tensor, "n 3 h w"]:
    folder = parts.parent / "pictures" / "train"
    files = [folder / row["file_name"] for row in rows]
    loaded = (load_images(files[i : i + 512]) for i in range(0, len(files), 512))
    return torch.cat([(images * 255).round().to(torch.uint8) for images in loaded])
