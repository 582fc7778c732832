"""Moon, a concept that is new to the tiny world, and the split of its scenes.

The tokenizer and the base model know neither the word nor the shape; the tokenizer spells the word
in pieces (m, o, on). The recipe also trains on pictures of the old shapes, because a network that
trains on moons only turns everything into moons.
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

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
)

CONCEPT = "moon"
NUM_TRAIN, NUM_HELD_OUT = 96, 32  # pictures of the concept
NUM_OLD = 168  # pictures of the other shapes
PLACE_X = 0.351  # shift, in radii, that puts the centre of mass at the origin


def _moon(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    x = x - PLACE_X * r
    return torch.maximum(torch.hypot(x, y) - r, 0.8 * r - torch.hypot(x - 0.62 * r, y))


ALL_SHAPES: dict[str, Distance] = {**SHAPES, CONCEPT: _moon}


@dataclass(frozen=True)
class Split:
    """Scenes of the concept; no two are equal.

    Attributes:
        train: training data.
        held_out: images of the validation loss.
        rest: for measuring; no training or validation sees them.
    """

    train: Sequence[Scene]
    held_out: Sequence[Scene]
    rest: Sequence[Scene]


def split() -> Split:
    """Divide all 840 scenes of the concept, the same way at every call."""
    scenes = [
        Scene(CONCEPT, color, size, background, place)
        for color, size, background, place in itertools.product(PALETTE, RADII, PALETTE, PLACES)
        if color != background
    ]
    random.Random("concept").shuffle(scenes)
    known = NUM_TRAIN + NUM_HELD_OUT
    return Split(scenes[:NUM_TRAIN], scenes[NUM_TRAIN:known], scenes[known:])


def old_scenes() -> Sequence[Scene]:
    """Return scenes of the old shapes, equally many of each, the same at every call."""
    rng = random.Random("old shapes")
    names = list(SHAPES)
    return [Scene(names[i % len(names)], *random_scene(rng).values()[1:]) for i in range(NUM_OLD)]
