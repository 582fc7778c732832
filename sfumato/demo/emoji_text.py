"""Text models of the demo's emoji: a tokenizer, a text encoder, and a text-image model."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato.demo.emoji import BACKGROUNDS, IMAGE_SIZE, STYLES
from sfumato.demo.steps import Update, counted, muon_and_adamw
from sfumato.demo.text_image import normalize, save_clip
from sfumato.demo.tokenizer import TEXT_LENGTH, tokenize, write_tokenizer
from sfumato.images import load_images

CAPTIONS = ("text", "short", "words")
BATCH = 128
TOKENIZER = "emoji_tokenizer"  # the folder of its stage
Row = dict[str, str]


def read_rows(parts: Path) -> list[Row]:
    """Return the rows of metadata.jsonl of the pictures to train on."""
    file = parts.parent / "pictures" / "train" / "metadata.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write_emoji_tokenizer(folder: Path, parts: Path, _count: int) -> None:
    """Write a CLIP tokenizer that knows each word of the captions as one token."""
    texts = " ".join(row[key] for row in read_rows(parts) for key in CAPTIONS)
    write_tokenizer(folder, set(texts.lower().replace(",", " ").split()), size=20_000)


def build_emoji_clip(vocabulary: int) -> Any:
    """Return an untrained CLIPModel; its text tower becomes the base model's text encoder."""
    from transformers import CLIPConfig, CLIPModel

    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "projection_dim": 96, "hidden_act": "gelu"}
    text = sizes | {"vocab_size": vocabulary, "max_position_embeddings": TEXT_LENGTH}
    text |= {"bos_token_id": 0, "eos_token_id": 1}
    vision = dict(sizes)
    vision |= {"image_size": IMAGE_SIZE, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=96))


def _vocabulary(parts: Path) -> int:
    from transformers import CLIPTokenizer

    return len(CLIPTokenizer.from_pretrained(parts / TOKENIZER))


def train_emoji_text(folder: Path, parts: Path, steps: int) -> None:
    """Train a CLIPTextModel to tell from a caption the name, the style and the background.

    What a caption leaves open is a class of its own. The heads are then discarded.
    """
    from transformers import CLIPTextModel

    torch.manual_seed(1)
    rng, rows = random.Random("emoji text"), read_rows(parts)
    choices: list[list[str]] = [sorted({row["name"] for row in rows})]
    choices += [["", *STYLES], ["", *BACKGROUNDS]]
    settings = build_emoji_clip(_vocabulary(parts)).config.text_config
    encoder: Any = CLIPTextModel(settings)
    heads = nn.ModuleList(nn.Linear(settings.hidden_size, len(each)) for each in choices)
    update = Update(*muon_and_adamw([encoder, heads], lr=1e-3), steps=steps)
    for show in counted("text", steps):
        drawn = [(rng.choice(rows), rng.choice(CAPTIONS)) for _ in range(BATCH)]
        captions = [row[key] for row, key in drawn]
        pooled = encoder(**tokenize(parts / TOKENIZER, captions)).pooler_output
        losses, right = [], []
        for head, known, key in zip(heads, choices, ("name", "style", "background"), strict=True):
            asked = [
                row[key] if key == "name" or f"{row[key]} {key}" in caption else ""
                for (row, _), caption in zip(drawn, captions, strict=True)
            ]
            goal = torch.tensor([known.index(value) for value in asked])
            said = head(pooled)
            losses.append(F.cross_entropy(said, goal))
            right.append((said.argmax(1) == goal).float().mean().item())
        loss = torch.stack(losses).sum()
        update(loss)
        show(loss=loss.item(), right=min(right))
    encoder.save_pretrained(folder)
    # transformers 4 needs these names; without them it silently keeps random weights.
    state = {f"text_model.{name}": value for name, value in encoder.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def train_emoji_clip(folder: Path, parts: Path, steps: int) -> None:
    """Train by CLIP's symmetric contrastive loss on pictures and their captions.

    Half of the captions are complete, so that style and background are learned too.
    """
    torch.manual_seed(1)
    rng, rows = random.Random("emoji clip"), read_rows(parts)
    clip = build_emoji_clip(_vocabulary(parts))
    update = Update(*muon_and_adamw([clip], lr=1e-3), steps=steps)
    pictures = _pictures(parts, rows)
    for show in counted("text-image", steps):
        drawn = rng.sample(range(len(rows)), BATCH)
        captions = [rows[i]["text" if rng.random() < 0.5 else rng.choice(CAPTIONS)] for i in drawn]
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
