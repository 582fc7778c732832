"""Text encoder of the demo: a CLIP text tower trained to name the attributes of a caption.

A contrastive loss hardly needs shapes and places, and leaves the states of these words too similar.
Here five linear heads, which are then discarded, must name every attribute.
"""

import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from sfumato.demo.steps import Update, counted, draw_scenes, prompt_of
from sfumato.demo.text_image import build_clip
from sfumato.demo.tokenizer import tokenize
from sfumato.demo.world import PALETTE, PLACES, RADII, SHAPES

CHOICES = [[*SHAPES], *([None, *values] for values in (PALETTE, RADII, PALETTE, PLACES))]
BATCH = 64


def train_text(folder: Path, parts: Path, steps: int) -> None:
    """Train a CLIPTextModel to tell the attributes of captions, open ones too."""
    from transformers import CLIPTextModel, CLIPTokenizer

    torch.manual_seed(1)
    rng = random.Random("text")
    settings = build_clip(len(CLIPTokenizer.from_pretrained(parts / "tokenizer"))).config
    encoder: Any = CLIPTextModel(settings.text_config)
    heads = nn.ModuleList(nn.Linear(settings.text_config.hidden_size, len(c)) for c in CHOICES)
    trained = [*encoder.parameters(), *heads.parameters()]
    update = Update(torch.optim.AdamW(trained, 1e-3, weight_decay=0.0), steps=steps)
    for show in counted("text", steps):
        asked = [prompt_of(scene, rng) for scene in draw_scenes(rng, BATCH)]
        pooled = encoder(
            **tokenize(parts / "tokenizer", [one.caption() for one in asked])
        ).pooler_output
        losses, right = [], []
        for i, (head, choices) in enumerate(zip(heads, CHOICES, strict=True)):
            goal = torch.tensor([choices.index(one.values()[i]) for one in asked])
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
