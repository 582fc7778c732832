"""Gauges of reward hacking: numbers of validation images that move when a reward is exploited.

Each gauge gives one number an image, of the picture alone. Y is the luma .299 R + .587 G + .114 B.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sfumato.rewards.reward import Reward, Score, whole_images
from sfumato.training.guards import GAUGES, SHARPNESS

Images = Float[Tensor, "b 3 H W"]
Rows = Float[Tensor, " b"]

LUMA = (0.299, 0.587, 0.114)  # of R, G and B: ITU-R BT.601
DARK = 0.15  # of luma, as Tencent-Hunyuan/UniRL#407 counts dark pixels
EDGE = 0.1  # of luma, between neighbours
BINS = 8  # of each channel
STEP = 1e-2  # of the whole image, as RSA-FT moves it
FLAT = 1e-15  # of the mean square of luma: below, an image has one luma
PIXEL_GRID = 16  # pixels a side: composition and colour count, texture does not


def dark_share(images: Images) -> Rows:
    """Return the share of pixels whose luma is below .15."""
    return (_luma(images) < DARK).double().mean((1, 2))


def saturated_share(images: Images) -> Rows:
    """Return the share of pixels with a channel at level 0 or 255 of an 8-bit picture."""
    levels = (images * 255).round()
    return ((levels <= 0) | (levels >= 255)).any(1).double().mean((1, 2))


def edge_density(images: Images) -> Rows:
    """Return the share of pairs of neighbours, across and down, whose luma differs by over .1."""
    luma = _luma(images)
    across, down = luma.diff(dim=2).abs().flatten(1), luma.diff(dim=1).abs().flatten(1)
    return (torch.cat([across, down], dim=1) > EDGE).double().mean(1)


def color_entropy(images: Images) -> Rows:
    """Return the entropy, in bits, of the colours in 8 x 8 x 8 equal boxes: 0 to 9."""
    red, green, blue = (images * BINS).long().clamp(0, BINS - 1).flatten(2).unbind(1)
    boxes = (red * BINS + green) * BINS + blue
    counts = torch.stack([row.bincount(minlength=BINS**3) for row in boxes]).double()
    shares = counts / counts.sum(1, keepdim=True)
    return -torch.special.xlogy(shares, shares).sum(1) / torch.log(torch.tensor(2.0)).item()


def high_frequencies(images: Images) -> Rows:
    """Return the share of luma's variance in the highest octave: 1/4 to 1/2 period a pixel.

    A wave counts by the larger of its two frequencies. White noise has 3/4.
    """
    luma = _centred(_luma(images))
    power = torch.fft.fft2(luma).abs().square()
    down, across = (torch.fft.fftfreq(n, device=luma.device).abs() for n in luma.shape[1:])
    high = torch.maximum(down[:, None], across[None, :]) >= 0.25
    return _share((power * high).sum((1, 2)), power.sum((1, 2)), luma.shape[1:].numel() ** 2)


def grid_share(images: Images, period: int) -> Rows:
    """Return the share of luma's variance that repeats every `period` pixels, across and down.

    That is the variance of the mean over all tiles of period x period pixels. White noise of n
    pixels has (period^2 - 1) / (n - 1).
    """
    luma = _luma(images)
    down, across = (max(size // period, 1) for size in luma.shape[1:])
    whole = _centred(luma[:, : down * period, : across * period])
    tile = whole.unflatten(2, (across, -1)).unflatten(1, (down, -1)).mean((1, 3))
    return _share(tile.square().mean((1, 2)), whole.square().mean((1, 2)), 1)


def sharpness(reward: Reward, images: Images, prompts: Sequence[str]) -> Rows:
    """Return S1 of RSA-FT (arXiv 2603.21175): how far the reward falls one small step downhill.

    S1 = r(x) - r(x - .01 g / |g|), g = dr/dx, with the norm over the whole image.
    """
    with torch.enable_grad(), whole_images(reward):
        x = images.detach().requires_grad_()
        value = reward(x, prompts)
        if not value.requires_grad:
            return torch.zeros_like(value)
        (gradient,) = torch.autograd.grad(value.sum(), x)
    norm = gradient.flatten(1).norm(dim=1).clamp_min(torch.finfo(gradient.dtype).tiny)
    with torch.no_grad():
        moved = images - STEP * gradient / norm.view(-1, 1, 1, 1)
        return value.detach() - reward(moved, prompts)


def pixel_distances(images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, " p"]:
    """Return the root mean squared differences of all pairs, after a resize to 16 x 16."""
    size = (PIXEL_GRID, PIXEL_GRID)
    small = F.interpolate(images.float(), size, mode="bilinear", antialias=True).flatten(1)
    return torch.pdist(small) / small.shape[1] ** 0.5


def diversity(images: Float[Tensor, "n 3 H W"], prompts: Sequence[str]) -> float | None:
    """Return the mean distance of 8-bit pictures of one prompt, then the mean over prompts.

    Where no prompt has two pictures, it is the mean over all pairs; None if there is one picture.
    """
    pictures = (images * 255).round() / 255
    rows: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(i)
    groups = [group for group in rows.values() if len(group) > 1] or [list(range(len(prompts)))]
    means = [pixel_distances(pictures[group]).mean() for group in groups if len(group) > 1]
    return torch.stack(means).mean().item() if means else None


@final
class Gauge(Reward):
    """A gauge where scores of images and prompts are taken.

    Args:
        measure: of images and prompts.
    """

    differentiable = False

    def __init__(self, measure: Callable[[Images, Sequence[str]], Rows]) -> None:
        super().__init__()
        self._measure = measure

    def score(self, images: Images, prompts: Sequence[str]) -> Score:
        # In half precision the rounding of a reward would hide its sharpness.
        with torch.autocast(images.device.type, enabled=False):
            return Score(self._measure(images.float(), prompts))


def build_gauges(reward: Reward, period: int) -> dict[str, Reward]:
    """Return all gauges by name.

    Args:
        reward: has a sharpness if it is differentiable.
        period: of `grid_share`.
    """
    pictures: Sequence[Callable[[Images], Rows]] = (
        *(dark_share, saturated_share, edge_density, color_entropy, high_frequencies),
        partial(grid_share, period=period),
    )
    gauges: dict[str, Reward] = {
        name: Gauge(lambda images, prompts, measure=measure: measure(images))
        for name, measure in zip(GAUGES, pictures, strict=True)
    }
    if reward.differentiable:
        gauges[SHARPNESS] = Gauge(partial(sharpness, reward))
    return gauges


def _luma(images: Images) -> Float[Tensor, "b H W"]:
    weights = torch.tensor(LUMA, dtype=torch.float64, device=images.device)
    return torch.einsum("c,bchw->bhw", weights, images.double())


def _centred(luma: Float[Tensor, "b H W"]) -> Float[Tensor, "b H W"]:
    return luma - luma.mean((1, 2), keepdim=True)


def _share(part: Rows, total: Rows, count: int) -> Rows:
    """Return part of total; 0 for an image of one luma, whose variance is rounding."""
    flat = total <= FLAT * count
    return torch.where(flat, 0.0, part / total.where(~flat, torch.ones_like(total)))
