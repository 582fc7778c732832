"""Heads of aesthetic scores and a SigLIP, of random weights, in the files of published ones."""

import json
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

SIGLIP_SIZE, SIGLIP_WIDTH, CLIP_WIDTH = 24, 20, 16
WIDTHS = {"1": CLIP_WIDTH, "2": CLIP_WIDTH, "2.5": SIGLIP_WIDTH}


class PublishedHead(nn.Module):
    """A head layer by layer, as it was trained."""

    def __init__(self, version: str, width: int) -> None:
        super().__init__()
        sizes = (width, 1024, 128, 64, 16, 1)
        layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
        drops = [nn.Dropout(0.5) for _ in layers]
        if version == "1":
            self.layers = nn.Linear(width, 1)
        elif version == "2":
            pairs = zip(layers[:3], drops, strict=False)
            self.layers = nn.Sequential(*(m for pair in pairs for m in pair), *layers[3:])
        else:
            pairs = list(zip(layers, drops, strict=True))
            self.scoring_head = nn.Sequential(*[m for pair in pairs for m in pair][:-1])

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        (layers,) = self.children()
        return layers(embedding)[:, 0]


def write_head(file: Path, version: str, width: int | None = None) -> PublishedHead:
    """Write the file of a head under the published names; return the head, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        head = PublishedHead(version, width or WIDTHS[version]).eval().requires_grad_(False)
        for name, tensor in head.named_parameters():
            tensor.mul_(1.7 if name.endswith("weight") else 3.0)  # so that scores differ
    if version == "2.5":
        head.bfloat16()  # as the file is published
    state = head.layers.state_dict() if version == "1" else head.state_dict()
    torch.save(state, file)
    return head.float()


def write_tiny_siglip(folder: Path, **sizes: int) -> None:
    """Write a SiglipModel of random weights, with both towers and its image processor.

    Args:
        sizes: settings of a larger image tower.
    """
    from transformers import SiglipConfig, SiglipModel

    tower = {
        "hidden_size": SIGLIP_WIDTH,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    vision = {"image_size": SIGLIP_SIZE, "patch_size": 8, **sizes}
    side = vision["image_size"]
    config = SiglipConfig(
        text_config={**tower, "vocab_size": 50}, vision_config={**tower, **vision}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SiglipModel(config)
        for parameter in model.vision_model.parameters():
            nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folder)
    stated = {
        "do_convert_rgb": None,
        "image_processor_type": "SiglipImageProcessor",
        "resample": 3,
        "size": {"height": side, "width": side},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(stated))
