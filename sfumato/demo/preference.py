"""Preference reward of the demo: a CLIP model trained on pairs that a stated rule judged.

    loss = KL(labels || softmax(r_0, r_1))       r = exp(logit_scale) cosine(image, text)

as PickScore was trained (arXiv 2305.01569, eq. 2); labels are (1, 0), (0, 1), or halves for ties.
"""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sfumato.demo.steps import Update, counted, draw_scenes, muon_and_adamw
from sfumato.demo.text_image import normalize, save_clip
from sfumato.demo.tokenizer import tokenize
from sfumato.demo.world import Scene, partial, random_scene, render

NUM_PAIRS = 40
KEEP = 0.3  # the chance that a prompt states an attribute
LOGIT_SCALE = 30.0  # at the start: similar pictures have similar cosines, judged pairs differ
TASTE = {"red": 2, "orange": 2, "yellow": 1, "large": 2, "medium": 1}


def judged_value(asked: Scene, shown: Scene) -> tuple[int, int]:
    """Return what the judge compares: asked attributes that are shown, then taste.

    The judge prefers the picture that shows more of what was asked for; between equals the one
    with warm color (red and orange 2 points, yellow 1) and size (large 2, medium 1).
    """
    pairs = zip(asked.values(), shown.values(), strict=True)
    right = sum(want == seen for want, seen in pairs if want is not None)
    return right, TASTE.get(shown.color or "", 0) + TASTE.get(shown.size or "", 0)


def judge(
    asked: Sequence[Scene], firsts: Sequence[Scene], seconds: Sequence[Scene]
) -> Float[Tensor, "b 2"]:
    """Return the labels of pairs: 1 for the preferred picture, 0 for the other, 1/2 for ties."""
    labels = []
    for want, one, two in zip(asked, firsts, seconds, strict=True):
        a, b = judged_value(want, one), judged_value(want, two)
        labels.append([0.5, 0.5] if a == b else [float(a > b), float(a < b)])
    return torch.tensor(labels)


def vary(scene: Scene, rng: random.Random) -> Scene:
    """Redraw a random part of a scene's attributes."""
    other, share = random_scene(rng), rng.random()
    pairs = zip(scene.values(), other.values(), strict=True)
    shape, *rest = [a if rng.random() < share else b for a, b in pairs]
    mixed = Scene(str(shape), *rest)
    return other if mixed.color == mixed.background else mixed


def train_preference(folder: Path, parts: Path, steps: int) -> None:
    """Fine-tune the text-image model on judged pairs.

    Most prompts leave so much open that taste decides. Half of the pictures pass through the
    autoencoder first, because every sampled image does.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from transformers import CLIPModel

    torch.manual_seed(3)
    rng = random.Random("preference")
    clip: Any = CLIPModel.from_pretrained(parts / "text_image")
    clip.logit_scale.data.fill_(math.log(LOGIT_SCALE))
    vae: Any = AutoencoderKL.from_pretrained(parts / "autoencoder")
    update = Update(*muon_and_adamw([clip], lr=1e-3), steps=steps, warmup=30)
    for show in counted("preference", steps):
        firsts = draw_scenes(rng, NUM_PAIRS)
        seconds = [vary(scene, rng) for scene in firsts]
        pairs = zip(firsts, seconds, strict=True)
        asked = [partial(rng.choice(pair), rng, KEEP) for pair in pairs]
        labels = judge(asked, firsts, seconds)
        images = render([*firsts, *seconds], rng)
        with torch.no_grad():
            half = torch.rand(len(images)) < 0.5
            decoded = vae.decode(vae.encode(images[half] * 2 - 1).latent_dist.sample()).sample
            images[half] = ((decoded + 1) / 2).clamp(0, 1)
        tokens = tokenize(parts, [scene.caption() for scene in asked])
        scores = clip(**tokens, pixel_values=normalize(images)).logits_per_text
        rewards = torch.stack(
            [scores[:, :NUM_PAIRS].diagonal(), scores[:, NUM_PAIRS:].diagonal()], dim=1
        )
        loss = F.kl_div(rewards.log_softmax(1), labels, reduction="batchmean")
        update(loss)
        right = ((rewards[:, 0] > rewards[:, 1]) == (labels[:, 0] > 0.5))[labels[:, 0] != 0.5]
        show(loss=loss.item(), accuracy=right.float().mean().item())
    save_clip(folder, clip, parts / "tokenizer")
