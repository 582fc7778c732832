"""Which file serves which pipeline class."""

from pathlib import Path

from sfumato.config import ModelConfig, SamplerConfig
from sfumato.models.formats import find_model, read_model_index
from sfumato.models.model import TextToImageModel
from sfumato.models.stable_diffusion import StableDiffusion

FAMILIES: dict[str, type[StableDiffusion]] = {"StableDiffusionPipeline": StableDiffusion}


def find_family(
    config: ModelConfig, sampler: SamplerConfig | None = None
) -> tuple[type[StableDiffusion], Path]:
    """Return the family and folder of a checkpoint, without loading a weight.

    Args:
        sampler: checked against what the model can do, if given.

    Raises:
        ValueError: if the folder is incomplete, of a family that Sfumato does not know, or cannot
            do what the sampler asks.
    """
    folder = find_model(config.pretrained, allow_pickle=config.allow_pickle)
    name = str(read_model_index(folder)["_class_name"])
    if name not in FAMILIES:
        raise ValueError(
            f"model.pretrained = {config.pretrained!r} is a {name}; Sfumato knows "
            f"{', '.join(FAMILIES)}"
        )
    FAMILIES[name].check(folder, config, sampler)
    return FAMILIES[name], folder


def load_model(config: ModelConfig) -> TextToImageModel:
    """Load a text-to-image model from a diffusers folder or hub id.

    Raises:
        ValueError: if it is not there, not readable, or of an unknown family.
    """
    family, folder = find_family(config)
    return family.load(folder, config)
