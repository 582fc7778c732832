"""Diversity of images of one prompt: their mean pairwise distance, by one of three measures.

diversity = mean over i < j of distance(image_i, image_j), per prompt, then over prompts
"""

import abc
from collections.abc import Callable
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sfumato.clip import VisionNetwork, load_vision
from sfumato.training.gauges import pixel_distances

LPIPS_PAIRS = 16  # pairs per batch of AlexNet
NAMES = {"clip": "CLIP", "dinov2": "DINOv2", "siglip": "SigLIP", "siglip_vision_model": "SigLIP"}


class Distance(abc.ABC):
    """Measures every pair of a set of images.

    Attributes:
        label: the name of the mean over pairs, for display.
    """

    label: str

    @abc.abstractmethod
    def pairs(self, images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, " p"]:
        """Return the distances of all p = n (n - 1) / 2 pairs, (0, 1), (0, 2), ... (1, 2), ...

        Args:
            images: in [0, 1].
        """

    def mean(self, images: Float[Tensor, "n 3 H W"]) -> float:
        """Return the mean over all pairs.

        Raises:
            ValueError: if there are fewer than two images.
        """
        if len(images) < 2:
            raise ValueError(
                f"{len(images)} image of a prompt has no pairs; set num_images to 2 or more"
            )
        return self.pairs(images).mean().item()


@final
class PixelDistance(Distance):
    """Root mean squared difference of pixels after a resize to 16 x 16."""

    label = "mean pairwise pixel distance (RMS at 16 x 16)"

    @torch.no_grad()
    def pairs(self, images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, " p"]:
        return pixel_distances(images)


@final
class CosineDistance(Distance):
    """1 - cosine of the features of a CLIP, a DINOv2, a SigLIP or an image classifier."""

    def __init__(self, network: VisionNetwork) -> None:
        self._network = network
        self.label = f"mean pairwise {NAMES.get(network.kind, network.kind)} cosine distance"

    @torch.no_grad()
    def pairs(self, images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, " p"]:
        features = F.normalize(self._network.features(images), dim=-1)
        first, second = torch.triu_indices(len(images), len(images), 1)
        return 1 - (features @ features.T)[first, second]


@final
class LpipsDistance(Distance):
    """LPIPS (arXiv 1801.03924) with AlexNet.

    Args:
        network: maps two batches of images in [-1, 1] to one distance per row.
    """

    label = "mean pairwise LPIPS (AlexNet)"

    def __init__(self, network: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._network = network

    @torch.no_grad()
    def pairs(self, images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, " p"]:
        scaled = 2 * images.float() - 1
        first, second = torch.triu_indices(len(images), len(images), 1)
        parts = [
            self._network(scaled[i], scaled[j]).flatten()
            for i, j in zip(first.split(LPIPS_PAIRS), second.split(LPIPS_PAIRS), strict=True)
        ]
        return torch.cat(parts)


def build_distance(features: str, device: torch.device) -> Distance:
    """Return the distance that `features` names.

    Args:
        features: `pixels`, `lpips`, or the folder or hub id of a network, as `load_vision` reads.

    Raises:
        ValueError: if the model is missing or cannot be read.
    """
    if features == "pixels":
        return PixelDistance()
    if features == "lpips":
        return LpipsDistance(_load_lpips(device))
    try:
        network = load_vision(features, "features")
    except ValueError as error:
        raise ValueError(
            f"features = {features!r} must be pixels, lpips, or the folder or hub id of a CLIP, a "
            f"DINOv2, a SigLIP or an image classifier: {error}"
        ) from error
    return CosineDistance(network.to(device))


def _load_lpips(device: torch.device) -> Any:
    """Load the optional package; an unfit torchvision raises RuntimeError when it is imported."""
    try:
        import lpips  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"features = 'lpips' needs the lpips package ({error}): pip install 'sfumato[lpips]', "
            "or choose pixels or a folder"
        ) from error
    try:
        network = lpips.LPIPS(net="alex", verbose=False)
    except OSError as error:
        raise ValueError(
            f"features = 'lpips' found no AlexNet weights ({error}): pip install "
            "'sfumato[lpips]' and connect once to the network, so that torchvision can fetch "
            "them, or choose pixels or a folder"
        ) from error
    return network.eval().requires_grad_(False).to(device)
