"""Text encoder of the demo: a CLIP text tower that tells name, style and background of captions."""

import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from sfumato.demo.images import Row, read_rows
from sfumato.demo.pictures import BACKGROUNDS, IMAGE_SIZE, KIND_OF, KINDS, STYLES
from sfumato.demo.steps import Update, counted, muon_and_adamw
from sfumato.demo.tokenizer import TEXT_LENGTH, tokenize, write_tokenizer

CAPTIONS = ("text", "short", "words", "kind")
BATCH = 128
TOKENIZER = "tokenizer"  # the folder of its stage


def captions_of(row: Row) -> dict[str, str]:
    """Return the captions of a picture by their columns; some pictures have no kind."""
    return {key: row[key] for key in CAPTIONS if key in row}


def asked_by(row: Row, column: str) -> tuple[str, str, str]:
    """Return the name or kind, the style and the background that a caption asks for, or ""."""
    name = KIND_OF[row["name"]] if column == "kind" else row["name"]
    style, background = (
        row[key] if f"{row[key]} {key}" in row[column] else "" for key in ("style", "background")
    )
    return name, style, background


def write_words(folder: Path, parts: Path, _count: int) -> None:
    """Write a CLIP tokenizer that knows each word of the captions as one token."""
    texts = " ".join(
        text
        for row in read_rows(parts.parent / "pictures" / "train")
        for text in captions_of(row).values()
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
    """Train a CLIPTextModel to tell from a caption the name or kind, the style and the background.

    What a caption leaves open is a class of its own. The heads are then discarded.
    """
    from transformers import CLIPTextModel

    torch.manual_seed(1)
    rng, rows = random.Random("text"), read_rows(parts.parent / "pictures" / "train")
    names = sorted({row["name"] for row in rows})
    choices: list[list[str]] = [[*names, *KINDS], ["", *STYLES], ["", *BACKGROUNDS]]
    settings = build_clip(vocabulary_size(parts)).config.text_config
    encoder: Any = CLIPTextModel(settings)
    heads = nn.ModuleList(nn.Linear(settings.hidden_size, len(each)) for each in choices)
    update = Update(*muon_and_adamw([encoder, heads], lr=1e-3), steps=steps)
    for show in counted("text", steps):
        drawn = [(row, rng.choice([*captions_of(row)])) for row in rng.choices(rows, k=BATCH)]
        captions = [row[key] for row, key in drawn]
        pooled = encoder(**tokenize(parts / TOKENIZER, captions)).pooler_output
        losses, right = [], []
        asked = zip(*(asked_by(row, column) for row, column in drawn), strict=True)
        for head, known, values in zip(heads, choices, asked, strict=True):
            goal = torch.tensor([known.index(value) for value in values])
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
