"""Rewards as one writes them by hand with transformers: what Sfumato's are measured against.

Each takes images in [0, 1], (b, 3, h, w), and their prompts, and returns a number for each image.
Images are square. The published files of HPSv2 and ImageReward are in no layout of transformers:
Sfumato loads these networks, and they are called here.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


def redness(images: Tensor, prompts: list[str]) -> Tensor:
    red, green, blue = images.mean((2, 3)).unbind(1)
    return 20 * (red - (green + blue) / 2)


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    return 20 * images.mean((1, 2, 3))


def sharpness(images: Tensor, prompts: list[str]) -> Tensor:
    """Return the mean square of neighbouring pixels' differences, of reward=function too."""
    return sum(images.diff(dim=dim).square().mean((1, 2, 3)) for dim in (2, 3))  # pyright: ignore


class Frozen(nn.Module):
    """What rewards with networks share."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], **networks: Any) -> None:
        super().__init__()
        for name, network in networks.items():
            self.add_module(name, network)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def pixels(self, images: Tensor, side: int) -> Tensor:
        images = F.interpolate(images, (side, side), mode="bicubic", antialias=True)
        return (images - self.mean) / self.std  # pyright: ignore


class Clip(Frozen):
    """scale x cosine of image and prompt; without a scale it is exp(logit_scale)."""

    def __init__(self, model: Any, tokenizer: Any, scale: float | None = None) -> None:
        super().__init__(CLIP_MEAN, CLIP_STD, model=model)
        self.tokenizer = tokenizer
        self.scale = model.logit_scale.exp().item() if scale is None else scale

    def image(self, images: Tensor) -> Tensor:
        model: Any = self.model
        pixels = self.pixels(images, model.config.vision_config.image_size)
        pooled = model.vision_model(pixels.to(model.dtype)).pooler_output
        return F.normalize(model.visual_projection(pooled).float(), dim=1)

    @torch.no_grad()
    def text(self, prompts: list[str]) -> Tensor:
        model: Any = self.model
        tokens = self.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
        pooled = model.text_model(**tokens.to(model.device)).pooler_output
        return F.normalize(model.text_projection(pooled).float(), dim=1)

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        text = self.text(prompts)
        return self.scale * (self.image(images) * text).sum(1)


def load_clip(folder: Path, scale: float | None = None) -> Clip:
    from transformers import CLIPModel, CLIPTokenizer

    model: Any = CLIPModel.from_pretrained(folder)
    return Clip(model, CLIPTokenizer.from_pretrained(folder), scale)


class ClipScore(nn.Module):
    """2.5 x the cosine, which is 0 where it is below."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.clip = load_clip(folder, 1.0)

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        return 2.5 * self.clip(images, prompts).clamp(min=0)


class ClipIqa(nn.Module):
    """Probability of a good prompt against a bad one, which are embedded once."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.clip = load_clip(folder)
        self.anchors = self.clip.text(["Good photo.", "Bad photo."])

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        return (self.clip.scale * self.clip.image(images) @ self.anchors.T).softmax(1)[:, 0]


class OnClip(nn.Module):
    """LAION's aesthetic head, layer by layer, on the unit embedding of a CLIP."""

    def __init__(self, folder: Path, head: nn.Module) -> None:
        super().__init__()
        self.clip, self.head = load_clip(folder), head

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.head(self.clip.image(images))


class OnSiglip(Frozen):
    """The aesthetic head of version 2.5, layer by layer, on a SigLIP."""

    def __init__(self, folder: Path, head: nn.Module) -> None:
        from transformers import SiglipVisionModel

        model: Any = SiglipVisionModel.from_pretrained(folder)
        super().__init__(HALF, HALF, model=model, head=head)

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        model: Any = self.model
        pooled = model(self.pixels(images, model.config.image_size)).pooler_output
        return self.head(F.normalize(pooled, dim=1))  # pyright: ignore


class Classifier(Frozen):
    """Log-probability of a label by a ResNet, which sees the middle 7/8 of an image."""

    def __init__(self, folder: Path, label: int, side: int) -> None:
        from transformers import AutoModelForImageClassification

        model: Any = AutoModelForImageClassification.from_pretrained(folder)
        super().__init__(IMAGENET_MEAN, IMAGENET_STD, model=model)
        self.label, self.side = label, side

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        larger = self.side * 8 // 7
        start = (larger - self.side) // 2
        middle = slice(start, start + self.side)
        pixels = self.pixels(images, larger)[..., middle, middle]
        return self.model(pixels).logits.log_softmax(1)[:, self.label]  # pyright: ignore


class ImageReward(Frozen):
    """A BLIP that reads image and prompt, and a head without activations."""

    def __init__(self, parts: Any) -> None:
        networks = {"vision": parts.vision, "text": parts.text, "head": parts.head}
        super().__init__(CLIP_MEAN, CLIP_STD, **networks)
        self.tokenizer = parts.tokenizer

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        vision: Any = self.vision
        seen = vision(self.pixels(images, vision.config.image_size)).last_hidden_state
        tokens = self.tokenizer(
            prompts, padding=True, truncation=True, max_length=35, return_tensors="pt"
        )
        read = self.text(  # pyright: ignore
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=seen,
        ).last_hidden_state
        raw = self.head(read[:, 0])[:, 0]  # pyright: ignore
        return (raw - 0.16717362830052426) / 1.0333394966054072
