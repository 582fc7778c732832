"""Features of images by a frozen image tower, by which sets of images are compared.

What is taken: of a CLIP the projected embedding; of DINOv2 and SigLIP the pooled output; of an
image classifier what its last layer reads. None of them is normalised.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.clip.folder import load_clip, model_folder, processor_folder
from sfumato.clip.open_clip import is_open_clip
from sfumato.clip.preprocessing import ImageSettings, preprocess, read_processor
from sfumato.files import read_object
from sfumato.hub import fetch
from sfumato.precision import without_autocast
from sfumato.weights import load_whole

CLASSIFIER = "ForImageClassification"


@final
class VisionNetwork(nn.Module):
    """Maps images in [0, 1] to features, in float32.

    Attributes:
        kind: its type in transformers, such as clip or dinov2.
        source: the folder or hub id.
    """

    def __init__(self, kind: str, source: str, model: nn.Module, settings: ImageSettings) -> None:
        """Take over and freeze a model."""
        super().__init__()
        self.kind = kind
        self.source = source
        self.model: Any = model.requires_grad_(False)
        self.image_settings = settings
        self._read: list[Tensor] = []  # by the last layer of a classifier
        if kind.endswith(CLASSIFIER):
            last = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
            last.register_forward_pre_hook(lambda _, inputs: self._read.append(inputs[0]))
        self.eval()

    @property
    def resize(self) -> dict[str, Any]:
        """Return what is done to pictures before the network."""
        return asdict(self.image_settings)

    def train(self, mode: bool = True) -> "VisionNetwork":
        """Stay in evaluation mode: with dropout one image would have many features."""
        return super().train(False)

    @torch.no_grad()
    def features(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Return the features of images in [0, 1]."""
        pixels = preprocess(images, self.image_settings)
        with without_autocast(pixels):
            if self.kind == "clip":
                pooled = self.model.vision_model(pixel_values=pixels, return_dict=True)
                return self.model.visual_projection(pooled.pooler_output).float()
            out = self.model(pixel_values=pixels)
            return (
                self._read.pop() if self.kind.endswith(CLASSIFIER) else out.pooler_output
            ).float()


def load_vision(path_or_hub_id: str, setting: str) -> VisionNetwork:
    """Load the image tower of a CLIP, a DINOv2, a SigLIP or an image classifier, in float32.

    Args:
        path_or_hub_id: a folder as transformers saves it (a CLIP also as OpenCLIP does), or a hub
            id, which is looked up in the local cache, then on the hub.
        setting: that names it, for messages.

    Raises:
        ValueError: if a file is missing or unreadable, or the model is of another kind.
    """
    from transformers import (
        AutoModelForImageClassification,
        Dinov2Model,
        Dinov2WithRegistersModel,
        SiglipVisionModel,
    )

    towers = {
        "dinov2": Dinov2Model,
        "dinov2_with_registers": Dinov2WithRegistersModel,
        "siglip": SiglipVisionModel,
        "siglip_vision_model": SiglipVisionModel,
    }
    try:
        kind, classes = _kind(path_or_hub_id, setting)
        if kind == "clip":
            parts = load_clip(path_or_hub_id)
            return VisionNetwork("clip", path_or_hub_id, parts.model.float(), parts.image_settings)
        classifier = next((name for name in classes if name.endswith(CLASSIFIER)), None)
        if classifier is None and kind not in towers:
            raise ValueError(
                f"it holds a model of model_type {kind!r} ({', '.join(classes) or 'no class'}); "
                "choose a CLIP, a DINOv2, a SigLIP, or an image classifier"
            )
        loader: Any = AutoModelForImageClassification if classifier else towers[kind]
        folder = model_folder(path_or_hub_id)
        settings = read_processor(processor_folder(path_or_hub_id))
        model = load_whole(loader, folder, "feature network", use_safetensors=True).float()
        return VisionNetwork(classifier or kind, path_or_hub_id, model, settings)
    except ValueError as error:
        raise ValueError(f"{setting} = {path_or_hub_id!r} cannot give features: {error}") from error


def _kind(path_or_hub_id: str, setting: str) -> tuple[str, list[str]]:
    """Return the type that a config.json states, and its classes."""
    folder = Path(path_or_hub_id).expanduser()
    if not folder.is_dir():
        folder = fetch(path_or_hub_id, setting, ("config.json", "open_clip_config.json"))
    if is_open_clip(folder) and not (folder / "config.json").is_file():
        return "clip", []
    if not (folder / "config.json").is_file():
        raise ValueError("it has no config.json; choose the folder of a model of transformers")
    stated = read_object(folder / "config.json", "copy or download it again")
    return str(stated.get("model_type")), list(map(str, stated.get("architectures") or []))
