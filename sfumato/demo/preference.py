"""Preference pairs of the demo, which a stated rule judged: what its reward is trained on."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.demo.steps import draw_scenes
from sfumato.demo.world import Scene, partial, random_scene, render
from sfumato.images import save_image

KEEP = 0.3  # the chance that a prompt states an attribute
TASTE = {"red": 2, "orange": 2, "yellow": 1, "large": 2, "medium": 1}
AT_ONCE = 128  # pairs


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


@torch.no_grad()
def write_pairs(folder: Path, parts: Path, count: int) -> None:
    """Write pictures and metadata.jsonl, in the columns that `data.pairs` reads.

    Most prompts leave so much open that taste decides. Half of the pictures pass through the
    autoencoder first, because every sampled image does.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(3)
    rng = random.Random("preference")
    vae: Any = AutoencoderKL.from_pretrained(parts / "autoencoder")
    lines = []
    for start in range(0, count, AT_ONCE):
        firsts = draw_scenes(rng, min(AT_ONCE, count - start))
        seconds = [vary(scene, rng) for scene in firsts]
        sides = zip(firsts, seconds, strict=True)
        asked = [partial(rng.choice(pair), rng, KEEP) for pair in sides]
        labels = judge(asked, firsts, seconds).tolist()
        images = render([*firsts, *seconds], rng)
        half = torch.rand(len(images)) < 0.5
        decoded = vae.decode(vae.encode(images[half] * 2 - 1).latent_dist.sample()).sample
        images[half] = ((decoded + 1) / 2).clamp(0, 1)
        for i, (want, label) in enumerate(zip(asked, labels, strict=True)):
            names = [f"{start + i:05d}-{side}.png" for side in range(2)]
            for name, image in zip(names, (images[i], images[len(firsts) + i]), strict=True):
                save_image(image, folder / name)
            row = {f"jpg_{side}": names[side] for side in range(2)}
            row |= {f"label_{side}": label[side] for side in range(2)}
            lines.append(json.dumps({**row, "caption": want.caption()}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
