"""Text encoder of the demo: a CLIP text tower that tells name, style and background of captions."""

import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from sfumato.demo.images import read_rows
from sfumato.demo.pictures import BACKGROUNDS, IMAGE_SIZE, STYLES
from sfumato.demo.steps import Update, counted, muon_and_adamw
from sfumato.demo.tokenizer import TEXT_LENGTH, tokenize, write_tokenizer

CAPTIONS = ("text", "short", "words")
BATCH = 128
TOKENIZER = "tokenizer"  # the folder of its stage


def write_words(folder: Path, parts: Path, _count: int) -> None:
    """Write a CLIP tokenizer that knows each word of the captions as one token."""
    texts = " ".join(
        row[key] for row in read_rows(parts.parent / "pictures" / "train") for key in CAPTIONS
    )
    write_tokenizer(folder, set(texts.lower().replace(",", " ").split()), size=20_000)


def build_clip(vocabulary: int) -> Any:
    """Return an untrained CLIPModel; its text tower becomes the base model's text encoder."""
    from transformers import CLIPConfig, CLIPModel

    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "projection_dim": 96, "hidden_act": "gelu"}
    text = sizes | {"vocab_size": vocabulary, "max_position_embeddings": TEXT_LENGTH}
    text |= {"bos_token_id": 0, "eos_token_id": 1}
    vision = dict(sizes)
    vision |= {"image_size": IMAGE_SIZE, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=96))


def vocabulary_size(parts: Path) -> int:
    """Return how many tokens the tokenizer has."""
    from transformers import CLIPTokenizer

    return len(CLIPTokenizer.from_pretrained(parts / TOKENIZER))


def train_text(folder: Path, parts: Path, steps: int) -> None:
    """Train a CLIPTextModel to tell from a caption the name, the style and the background.

    What a caption leaves open is a class of its own. The heads are then discarded.
    """
    from transformers import CLIPTextModel

    torch.manual_seed(1)
    rng, rows = random.Random("text"), read_rows(parts.parent / "pictures" / "train")
    choices: list[list[str]] = [sorted({row["name"] for row in rows})]
    choices += [["", *STYLES], ["", *BACKGROUNDS]]
    settings = build_clip(vocabulary_size(parts)).config.text_config
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
