"""Attribute reader: it measures what a picture of the tiny world shows, without a network.

Medians give the colors of background and shape. Projecting the picture onto the line between the
two colors gives a coverage, which is compared with that of every shape of the same area.
"""

from collections.abc import Mapping, Sequence
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.demo.world import (
    IMAGE_SIZE,
    PALETTE,
    PLACE_OFFSET,
    PLACES,
    RADII,
    SHAPES,
    Distance,
    Scene,
    coverage,
    parse_caption,
)

MIN_CONTRAST = 0.15  # distance in RGB; below it a picture is empty
MIN_OVERLAP = 0.70  # intersection over union; below it a shape is not recognised


def _nearest_color(rgb: Float[Tensor, "3"]) -> str:
    names = list(PALETTE)
    distances = (torch.tensor([PALETTE[name] for name in names]) - rgb).norm(dim=1)
    return names[int(distances.argmin())]


@cache
def _unit_area(shape: Distance) -> float:
    """Return a shape's area in units of its radius squared."""
    middle, radius = torch.tensor([IMAGE_SIZE / 2]), 24.0
    return float(coverage(shape, middle, middle, torch.tensor([radius])).sum()) / radius**2


def _fit(mask: Float[Tensor, "64 64"], shapes: Mapping[str, Distance]) -> tuple[str, float, float]:
    """Return the shape that fits a coverage best, its radius in pixels and the overlap."""
    area = mask.sum()
    grid = torch.arange(IMAGE_SIZE) + 0.5
    x = (mask.sum(0) * grid).sum() / area
    y = (mask.sum(1) * grid).sum() / area
    best = ("", 0.0, 0.0)
    for name, shape in shapes.items():
        radius = (area / _unit_area(shape)).sqrt()
        for stretch in (0.96, 1.0, 1.04):
            candidate = coverage(shape, x[None], y[None], (radius * stretch)[None])[0]
            overlap = float(
                torch.minimum(mask, candidate).sum() / torch.maximum(mask, candidate).sum()
            )
            if overlap > best[2]:
                best = (name, float(radius), overlap)
    return best


def _place(mask: Float[Tensor, "64 64"]) -> str:
    grid = torch.arange(IMAGE_SIZE) + 0.5 - IMAGE_SIZE / 2
    centre = torch.stack([(mask.sum(0) * grid).sum(), (mask.sum(1) * grid).sum()]) / mask.sum()
    targets = torch.tensor(list(PLACES.values())) * PLACE_OFFSET
    return list(PLACES)[int((targets - centre).norm(dim=1).argmin())]


def read_image(
    image: Float[Tensor, "3 64 64"], shapes: Mapping[str, Distance] = SHAPES
) -> Scene | None:
    """Return the attributes that a picture in [0, 1] shows, or None if it shows no known shape.

    Args:
        shapes: the known shapes; each has its centre of mass at the origin.
    """
    image = image.detach().float().cpu().clamp(0, 1)
    frame = torch.cat([image[:, :2].flatten(1), image[:, -2:].flatten(1),
                       image[:, :, :2].flatten(1), image[:, :, -2:].flatten(1)], dim=1)  # fmt: skip
    back = frame.median(dim=1).values
    distance = (image - back[:, None, None]).norm(dim=0)
    peak = torch.quantile(distance.flatten(), 0.99)
    if peak < MIN_CONTRAST:
        return None
    fore = image[:, distance > 0.75 * peak].median(dim=1).values
    axis = fore - back
    mask = ((image - back[:, None, None]) * axis[:, None, None]).sum(0) / (axis @ axis)
    mask = mask.clamp(0, 1)
    mask = torch.where(mask < 0.15, torch.zeros(()), mask)
    shape, radius, overlap = _fit(mask, shapes)
    if overlap < MIN_OVERLAP:
        return None
    return Scene(
        shape=shape,
        color=_nearest_color(fore),
        size=min(RADII, key=lambda name: abs(RADII[name] - radius)),
        background=_nearest_color(back),
        place=_place(mask),
    )


def read_attributes(images: Float[Tensor, "b 3 64 64"], prompts: Sequence[str]) -> Tensor:
    """Return 1 for each picture that shows all its prompt asks for, 0 for others; shape (b,)."""
    pairs = zip(images, map(parse_caption, prompts), strict=True)
    return torch.tensor([float(asked.matches(read_image(image))) for image, asked in pairs])
