"""Aesthetic scores: published heads that are affine in the unit embedding of an image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.clip import (
    ImageSettings,
    load_clip,
    model_folder,
    preprocess,
    processor_folder,
    read_processor,
    read_tensors,
)
from sfumato.precision import without_autocast
from sfumato.rewards.clip import ClipReward, unit
from sfumato.rewards.reward import Reward, Score
from sfumato.rewards.towers import recompute
from sfumato.weights import differences, load_whole, refuse_non_finite

if TYPE_CHECKING:
    import transformers

WIDTHS = (1024, 128, 64, 16, 1)  # of the layers of versions 2 and 2.5, from the embedding on
# By version, the names before `weight` and `bias` in a file, with the width of each layer. There
# is dropout between the layers, and no activation.
VERSIONS: Mapping[str, Mapping[str, int]] = {
    "1": {"": 1},
    "2": {f"layers.{i}.": width for i, width in zip((0, 2, 4, 6, 7), WIDTHS, strict=True)},
    "2.5": {f"scoring_head.{i}.": width for i, width in zip(range(0, 9, 2), WIDTHS, strict=True)},
}
ADVICE = (
    "on a CLIP, give LAION's sa_0_4_vit_l_14_linear.pth or sac+logos+ava1-l14-linearMSE.pth; on a "
    "SigLIP, give aesthetic_predictor_v2_5.pth"
)


@final
class AestheticReward(Reward):
    """Score how much people like an image, from 1 to 10, whatever its prompt.

    LAION's versions 1 and 2 read a CLIP's embedding, version 2.5 the pooled output of a SigLIP. As
    each published head is affine, its layers are multiplied once, in float64: a score is
    weight . embedding / |embedding| + bias.

    Attributes:
        version: of the head, as its file's names tell: 1, 2 or 2.5.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, tower: "ClipReward | SiglipTower", head: "Head") -> None:
        """Take over a tower, and put a head on it, in float32 or better."""
        super().__init__()
        self.version = head.version
        self.tower = tower
        parameter = next(tower.parameters())
        kept = {
            "device": parameter.device,
            "dtype": torch.promote_types(parameter.dtype, torch.float32),
        }
        weight, bias = head.collapsed()
        self.register_buffer("weight", weight.to(**kept))
        self.register_buffer("bias", bias.to(**kept))
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str,
        predictor: str,
        *,
        processor: str | None = None,
        squash: bool = False,
        dtype: torch.dtype = torch.float32,
        gradient_checkpointing: bool = False,
    ) -> "AestheticReward":
        """Load a tower from a folder or hub id, and the head on it from a file.

        Args:
            path_or_hub_id: the CLIP of versions 1 and 2, as `ClipReward` reads it; the SigLIP of
                version 2.5, as transformers saves it.
            predictor: the head's file; a pickle is read only if it has nothing but tensors.
            processor: folder or hub id of the preprocessing, by default `path_or_hub_id`.
            squash: bring images to the tower's square by a bicubic filter without antialias, as
                VGG-Flow's training does; otherwise as the preprocessing states.
            dtype: of the tower's frozen weights.
            gradient_checkpointing: as in `ClipReward`.

        Raises:
            ValueError: if a file is missing, unreadable, or of another kind of model.
        """
        head = read_head(predictor)
        if head.version == "2.5":
            tower = SiglipTower.from_pretrained(path_or_hub_id, processor)
            width = tower.width
            if gradient_checkpointing:
                recompute(tower.model.encoder.layers)
        else:
            parts = load_clip(path_or_hub_id, processor)
            tower = ClipReward(parts, gradient_checkpointing=gradient_checkpointing)
            tower.model.set_submodule("text_model", nn.Identity())  # unread, a third of a CLIP-L
            width = parts.model.visual_projection.out_features
        head.check(width)
        if squash:
            tower.image_settings = tower.image_settings.squashed()
        return cls(tower.to(dtype), head)

    def train(self, mode: bool = True) -> "AestheticReward":
        """Stay in evaluation mode."""
        return super().train(False)

    def score(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Score:
        """Score images, whatever their prompts."""
        # No product of matrices: autocast would round it.
        return Score((self.tower.image_features(images) * self.weight).sum(1) + self.bias)


@final
class SiglipTower(nn.Module):
    """Frozen image tower of a SigLIP."""

    def __init__(
        self, model: "transformers.SiglipVisionModel", image_settings: ImageSettings
    ) -> None:
        """Take over and freeze a model."""
        super().__init__()
        self.model = model.requires_grad_(False)
        self.width = model.config.hidden_size
        self.image_settings = image_settings

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str, processor: str | None) -> "SiglipTower":
        """Load the image tower of a SigLIP; inside `torch.device("meta")` without weights."""
        from transformers import AutoConfig, SiglipVisionModel

        folder = model_folder(path_or_hub_id, ("siglip", "siglip_vision_model"))
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
        config = config.vision_config if config.model_type == "siglip" else config
        place = processor_folder(processor or path_or_hub_id)
        settings = read_processor(place, config.image_size)
        if torch.get_default_device().type == "meta":
            return cls(SiglipVisionModel(config), settings)
        model = load_whole(SiglipVisionModel, folder, "SiglipVisionModel", use_safetensors=True)
        return cls(model, settings)

    def image_features(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Embed images in [0, 1] as unit vectors, differentiably."""
        pixels = preprocess(images, self.image_settings)
        with without_autocast(next(self.model.parameters())):
            return unit(self.model(pixel_values=pixels).pooler_output)


@dataclass(frozen=True)
class Head:
    """A published head.

    Attributes:
        tensors: of its file, by their names.
        source: what the file is and where it lies.
    """

    version: str
    tensors: Mapping[str, Tensor]
    source: str

    def check(self, width: int) -> None:
        """Refuse a head that is incomplete, or of an embedding of another width."""
        expected = {}
        for name, out in VERSIONS[self.version].items():
            expected |= {f"{name}weight": torch.empty(out, width, device="meta")}
            expected |= {f"{name}bias": torch.empty(out, device="meta")}
            width = out
        differences(self.tensors, expected, {}).refuse(self.source, ADVICE)
        refuse_non_finite(self.tensors.items(), self.source)

    def collapsed(self) -> tuple[Float[Tensor, " d"], Float[Tensor, ""]]:
        """Return the weight and the bias of the product of all layers, in float64."""
        exact = {"dtype": torch.float64, "device": "cpu"}  # a plan builds on the meta device
        weight, bias = torch.ones(1, 1, **exact), torch.zeros(1, **exact)
        for name in reversed([*VERSIONS[self.version]]):
            bias = bias + weight @ self.tensors[f"{name}bias"].double()
            weight = weight @ self.tensors[f"{name}weight"].double()
        return weight[0], bias[0]


def read_head(file: str) -> Head:
    """Read the file of a head; its names tell the version.

    Raises:
        ValueError: if the file is missing or damaged, has more than tensors, or is no such file.
    """
    setting = f"reward.predictor = {file!r}"
    path = Path(file).expanduser()
    tensors = read_tensors(path, setting, allow_pickle=True, strangers=False)
    for version, names in VERSIONS.items():
        if any(f"{name}{kind}" in tensors for name in names for kind in ("weight", "bias")):
            return Head(version, tensors, f"the head of version {version} in {setting}")
    raise ValueError(
        f"{setting} holds {len(tensors)} weights ({next(iter(tensors))} first), and those of no "
        f"aesthetic predictor; {ADVICE}"
    )
