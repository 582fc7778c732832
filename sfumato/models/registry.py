"""Registry of the families, and the loading of a checkpoint by its family."""

from pathlib import Path

from sfumato.config import ModelConfig, SamplerConfig
from sfumato.models.flux import Flux
from sfumato.models.formats import find_model, read_model_index
from sfumato.models.loading import check_family, load_family
from sfumato.models.model import TextToImageModel
from sfumato.models.origins import assemble_pipeline
from sfumato.models.pipeline_model import PipelineModel
from sfumato.models.qwen_image import QwenImage
from sfumato.models.stable_diffusion import StableDiffusion
from sfumato.models.stable_diffusion_3 import StableDiffusion3
from sfumato.models.stable_diffusion_xl import StableDiffusionXL

FAMILIES: dict[str, type[PipelineModel]] = {
    "stable_diffusion": StableDiffusion,
    "stable_diffusion_xl": StableDiffusionXL,
    "stable_diffusion_3": StableDiffusion3,
    "flux": Flux,
    "qwen_image": QwenImage,
}


def find_family(
    config: ModelConfig, sampler: SamplerConfig | None = None
) -> tuple[type[PipelineModel], Path]:
    """Return the family and folder of a checkpoint, without loading a weight.

    Args:
        sampler: checked against the model's limits, if given.

    Raises:
        ValueError: if the folder is incomplete, of an unknown family or of another than
            `config.family`, or cannot do what the sampler asks.
    """
    folder = _find_folder(config)
    pipeline = str(read_model_index(folder)["_class_name"])
    names = {family.pipeline_name: name for name, family in FAMILIES.items()}
    if pipeline not in names:
        raise ValueError(
            f"model.pretrained = {config.pretrained!r} is a {pipeline}; Sfumato knows "
            f"{', '.join(names)}"
        )
    name = names[pipeline]
    if config.family not in {None, name}:
        raise ValueError(
            f"model.pretrained = {config.pretrained!r} is of the family {name} ({pipeline}), and "
            f"model.family = {config.family!r}; give a folder of that family, or the recipe of "
            f"{name}"
        )
    check_family(FAMILIES[name], folder, config, sampler)
    return FAMILIES[name], folder


def _find_folder(config: ModelConfig) -> Path:
    """Return a pretrained folder, or one put together around a network that starts at random."""
    if (config.pretrained is None) == (config.network.config is None):
        raise ValueError(
            f"model.pretrained = {config.pretrained!r} and model.network.config = "
            f"{config.network.config!r}; give one of the two: a diffusers folder or hub id, "
            "or sd1, sd2 or a config.json to build a network at random"
        )
    if config.pretrained is None:
        return assemble_pipeline(config)
    return find_model(config.pretrained, allow_pickle=config.allow_pickle, variant=config.variant)


def load_encoders(config: ModelConfig) -> TextToImageModel:
    """Load only text encoders and autoencoder, frozen: a model that encodes and decodes.

    Raises:
        ValueError: as `load_model`.
    """
    family, folder = find_family(config)
    return load_family(family, folder, config, with_network=False)


def load_model(config: ModelConfig) -> TextToImageModel:
    """Load a text-to-image model from a diffusers folder or hub id.

    Raises:
        ValueError: if it is not there, not readable, or of an unknown family.
    """
    family, folder = find_family(config)
    return load_family(family, folder, config)
