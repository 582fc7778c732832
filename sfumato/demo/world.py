"""Tiny world: scenes of one shape with five attributes, their captions, and their pictures.

A picture is 64 x 64 pixels. A shape is the set where a signed distance d (in pixels) is below
zero; its coverage of a pixel, antialiased, is clip(1/2 - d, 0, 1).
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

IMAGE_SIZE = 64
Distance: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]  # of x, y and the radius

PALETTE: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.10, 0.12),
    "orange": (0.96, 0.55, 0.10),
    "yellow": (0.96, 0.90, 0.20),
    "green": (0.12, 0.62, 0.22),
    "blue": (0.14, 0.28, 0.88),
    "purple": (0.58, 0.16, 0.72),
    "white": (0.96, 0.96, 0.96),
    "black": (0.05, 0.05, 0.05),
}
RADII: dict[str, float] = {"small": 7.0, "medium": 11.5, "large": 17.0}  # pixels
PLACES: dict[str, tuple[int, int]] = {
    "in the center": (0, 0),
    "on the left": (-1, 0),
    "on the right": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
}
PLACE_OFFSET = 13.0  # pixels from the middle of the picture
MARGIN = 2.5  # pixels between a shape and the frame


def _folded(n: int, inner: float, turn: float) -> Distance:
    """Return the distance to an n-fold star polygon with `inner` over outer radius, turned."""
    half = math.pi / n
    tip = torch.tensor([1.0, 0.0])
    dent = torch.tensor([inner * math.cos(half), inner * math.sin(half)])
    edge = dent - tip
    normal = torch.stack([edge[1], -edge[0]]) / edge.norm()

    def distance(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
        angle = torch.atan2(y, x) - turn
        angle = torch.remainder(angle + half, 2 * half) - half
        rho = torch.hypot(x, y)
        px, py = rho * angle.cos(), rho * angle.sin().abs()
        return (px - r) * normal[0] + py * normal[1]

    return distance


def _circle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return torch.hypot(x, y) - r


def _ring(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    rho = torch.hypot(x, y)
    return torch.maximum(rho - r, 0.55 * r - rho)


def _cross(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    long, short = torch.maximum(x, y), torch.minimum(x, y)
    return torch.maximum(long - r, short - 0.34 * r)


SHAPES: dict[str, Distance] = {
    "circle": _circle,
    "square": _folded(4, math.cos(math.pi / 4), math.pi / 4),
    "triangle": _folded(3, 0.5, -math.pi / 2),
    "star": _folded(5, 0.42, -math.pi / 2),
    "ring": _ring,
    "cross": _cross,
}


@dataclass(frozen=True)
class Scene:
    """The five attributes of a picture; None where a prompt leaves one open."""

    shape: str
    color: str | None = None
    size: str | None = None
    background: str | None = None
    place: str | None = None

    def caption(self) -> str:
        """Describe the scene in words, without the attributes that are None."""
        words = ["a", self.size, self.color, self.shape]
        text = " ".join(word for word in words if word)
        if self.background:
            article = "an" if self.background[0] in "aeiou" else "a"
            text += f" on {article} {self.background} background"
        if self.place:
            text += f", {self.place}" if self.background else f" {self.place}"
        return text.replace("a orange", "an orange")

    def values(self) -> tuple[str | None, ...]:
        """Return the attributes in the order of ATTRIBUTES."""
        return (self.shape, self.color, self.size, self.background, self.place)

    def matches(self, seen: "Scene | None") -> bool:
        """Say whether everything that this prompt asks for is seen."""
        return seen is not None and all(
            asked is None or asked == shown
            for asked, shown in zip(self.values(), seen.values(), strict=True)
        )


ATTRIBUTES = tuple(field.name for field in fields(Scene))


def random_scene(rng: random.Random) -> Scene:
    """Draw a fully specified scene, uniform over attributes with color unequal to background."""
    color, background = rng.sample(list(PALETTE), 2)
    return Scene(
        shape=rng.choice(list(SHAPES)),
        color=color,
        size=rng.choice(list(RADII)),
        background=background,
        place=rng.choice(list(PLACES)),
    )


def partial(scene: Scene, rng: random.Random, keep: float = 0.5) -> Scene:
    """Leave open each attribute but the shape with probability 1 - keep."""
    values = [value if rng.random() < keep else None for value in scene.values()[1:]]
    return Scene(scene.shape, *values)


def parse_caption(caption: str, shapes: Mapping[str, Distance] = SHAPES) -> Scene:
    """Read a caption of this world back into its scene.

    Raises:
        ValueError: if the caption names no shape of this world.
    """
    head, _, tail = caption.lower().partition(" on a")
    words = head.replace(",", " ").split()
    shape = next((word for word in words if word in shapes), None)
    if shape is None:
        raise ValueError(
            f"the prompt {caption!r} names no shape of the demo world; name one of "
            f"{', '.join(shapes)}"
        )
    background = next((name for name in PALETTE if f"{name} background" in tail), None)
    return Scene(
        shape=shape,
        color=next((word for word in words if word in PALETTE), None),
        size=next((word for word in words if word in RADII), None),
        background=background,
        place=next((place for place in PLACES if place in caption.lower()), None),
    )


def coverage(
    shape: Distance, x: Float[Tensor, " b"], y: Float[Tensor, " b"], radius: Float[Tensor, " b"]
) -> Float[Tensor, "b 64 64"]:
    """Return how much of each pixel a shape covers, in [0, 1]; centres and radii in pixels."""
    grid = torch.arange(IMAGE_SIZE, dtype=x.dtype, device=x.device) + 0.5
    dx = grid[None, None, :] - x[:, None, None]
    dy = grid[None, :, None] - y[:, None, None]
    dx, dy = torch.broadcast_tensors(dx, dy)
    return (0.5 - shape(dx, dy, radius[:, None, None])).clamp(0, 1)


def render(
    scenes: Sequence[Scene], rng: random.Random, shapes: Mapping[str, Distance] = SHAPES
) -> Float[Tensor, "b 3 64 64"]:
    """Paint fully specified scenes in [0, 1], with jitter of place, radius and colors.

    Raises:
        ValueError: if a scene leaves an attribute open.
    """
    pictures = []
    for scene in scenes:
        shape, color, size, background, place = scene.values()
        if not (shape and color and size and background and place):
            raise ValueError(f"{scene} leaves an attribute open; draw it with random_scene")
        radius = RADII[size] + rng.uniform(-1, 1)
        low, high = radius + MARGIN, IMAGE_SIZE - radius - MARGIN
        centre = [
            min(max(IMAGE_SIZE / 2 + PLACE_OFFSET * side + rng.uniform(-2, 2), low), high)
            for side in PLACES[place]
        ]
        x, y, r = torch.tensor([[*centre, radius]]).T
        mask = coverage(shapes[shape], x, y, r)
        fore, back = (
            torch.tensor([min(max(c + rng.uniform(-0.04, 0.04), 0), 1) for c in PALETTE[name]])
            for name in (color, background)
        )
        pictures.append(back[:, None, None] + (fore - back)[:, None, None] * mask)
    return torch.stack(pictures)
