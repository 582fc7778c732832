"""Blueprint of a recipe: its model on the meta device, and sizes; no weight is read."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from sfumato.config import TrainConfig
from sfumato.models.formats import read_model_index
from sfumato.models.loading import load_on_meta
from sfumato.models.pipeline_model import PipelineModel
from sfumato.models.registry import FAMILIES, find_family
from sfumato.planning.described import describe_pipeline, is_described
from sfumato.planning.step import forward_flops
from sfumato.run.open_data import frame_size


@dataclass(frozen=True)
class Blueprint:
    """The model of a recipe without memory.

    Attributes:
        model: on the meta device; under LoRA its network has adapters.
        size: height and width of the images, in pixels.
        assumed: what the recipe leaves open, in words.
    """

    model: PipelineModel
    size: tuple[int, int]
    assumed: tuple[str, ...]

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """The autoencoder and the text encoders by name; all frozen."""
        networks = self.model.networks()
        return {"autoencoder": networks["vae"], **{name: networks[name] for name in self.texts}}

    @property
    def texts(self) -> dict[str, int]:
        """The text encoders by name, with the most tokens of a prompt that each reads."""
        return self.model.tokens

    @property
    def latent(self) -> tuple[int, int, int]:
        """Shape (c, h, w) of the latents of one image."""
        return self.model.latent_shape(*self.size)

    def predictor(self, rows: int) -> Callable[[], Tensor]:
        """Return a call of the network with a micro-batch of `rows`."""
        model, cond = self.model, self.model.blank_prompts(rows)
        t = torch.empty(rows, device="meta")
        shape = (rows, *self.latent)
        return lambda: model.predict(model.network, torch.empty(shape, device="meta"), t, cond, 1.0)

    def encoding_flops(self) -> int:
        """Return the FLOPs of encoding one image and its caption."""
        model, networks = self.model, self.model.networks()
        image = torch.empty(1, 3, *self.size, device="meta")
        flops = forward_flops(lambda: model.encode_moments(image))
        for name, tokens in self.texts.items():
            prompt = torch.zeros(1, tokens, dtype=torch.long, device="meta")
            flops += forward_flops(partial(networks[name], input_ids=prompt))
        return flops


def read_blueprint(config: TrainConfig) -> Blueprint:
    """Build the model of a recipe on the meta device.

    Raises:
        ValueError: if the settings neither name nor describe the network, or a part is unknown.
    """
    if not is_described(config.model):
        family, folder = find_family(config.model, config.sampler)
        return _blueprint(config, family, folder)
    with TemporaryDirectory() as name:
        folder = Path(name)
        assumed = describe_pipeline(config.model, folder)
        pipeline = read_model_index(folder)["_class_name"]
        family = next(each for each in FAMILIES.values() if each.pipeline_name == pipeline)
        return _blueprint(config, family, folder, assumed)


def _blueprint(
    config: TrainConfig, family: type[PipelineModel], folder: Path, *assumed: str
) -> Blueprint:
    model = load_on_meta(family, folder, config.model)
    model.network.train()
    if family.prompts_vary:
        tokens = max(model.tokens.values())
        assumed = (*assumed, f"prompts of {tokens} tokens; shorter ones cost less")
    return Blueprint(model, frame_size(config, model.limits), assumed)
