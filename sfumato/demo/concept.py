"""A concept that the tiny world never had, as images with captions: the moon.

Neither tokenizer nor base model has met the word or the shape; the tokenizer spells the word in
pieces (m, o, on). Pictures of the old shapes lie beside those of the moon: a network that trains on
moons alone bends everything into moons.
"""

import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sfumato.demo.world import (
    PALETTE,
    PLACES,
    RADII,
    SHAPES,
    Distance,
    Scene,
    random_scene,
    render,
)
from sfumato.images import save_image

CONCEPT = "moon"
NUM_TRAIN, NUM_HELD_OUT = 96, 32  # pictures of the concept
NUM_OLD = 168  # pictures of the other shapes
PLACE_X = 0.351  # in radii, what puts the centre of mass at the origin


def _moon(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    x = x - PLACE_X * r
    return torch.maximum(torch.hypot(x, y) - r, 0.8 * r - torch.hypot(x - 0.62 * r, y))


ALL_SHAPES: dict[str, Distance] = {**SHAPES, CONCEPT: _moon}


@dataclass(frozen=True)
class Split:
    """Scenes of the concept; no two share all their attributes.

    Attributes:
        train: what is learned from.
        held_out: what the validation loss is of.
        rest: never shown to a training, not even in validation; for measuring.
    """

    train: Sequence[Scene]
    held_out: Sequence[Scene]
    rest: Sequence[Scene]


def split() -> Split:
    """Divide all 840 scenes of the concept, always in the same way."""
    scenes = [
        Scene(CONCEPT, color, size, background, place)
        for color, size, background, place in itertools.product(PALETTE, RADII, PALETTE, PLACES)
        if color != background
    ]
    random.Random("concept").shuffle(scenes)
    known = NUM_TRAIN + NUM_HELD_OUT
    return Split(scenes[:NUM_TRAIN], scenes[NUM_TRAIN:known], scenes[known:])


def old_scenes() -> Sequence[Scene]:
    """Return scenes of the old shapes, equally many of each, always the same."""
    rng = random.Random("old shapes")
    names = list(SHAPES)
    return [Scene(names[i % len(names)], *random_scene(rng).values()[1:]) for i in range(NUM_OLD)]


def write_images(folder: Path) -> None:
    """Write the shipped folders, each with a metadata.jsonl of captions.

    moons/ and shapes/ are to train on, moons_held_out/ is for validation.
    """
    parts = split()
    groups = {"moons": parts.train, "shapes": old_scenes(), "moons_held_out": parts.held_out}
    for name, scenes in groups.items():
        place = folder / name
        place.mkdir(parents=True)
        lines = []
        images = render(scenes, random.Random(name), ALL_SHAPES)
        for i, (scene, image) in enumerate(zip(scenes, images, strict=True)):
            file = f"{i:03d}.png"
            save_image(image, place / file)
            lines.append(json.dumps({"file_name": file, "text": scene.caption()}) + "\n")
        (place / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
