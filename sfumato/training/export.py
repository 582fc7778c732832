"""Exports that load elsewhere: a LoRA file and a diffusers folder, loaded back and compared."""

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.config import TrainConfig
from sfumato.diffusion.randomness import Rng
from sfumato.models.generate import generate, image_size
from sfumato.models.model import TextToImageModel
from sfumato.models.registry import load_model
from sfumato.training.checkpoint import read_shown_weights
from sfumato.training.state import load_weights

VERIFY_STEPS = 4
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.1, "float16": 0.05}  # largest difference of a pixel


class ExportError(ValueError):
    """An export that does not give, elsewhere, the image that it gives here."""


def export(
    config: TrainConfig, checkpoint: Path, folder: Path, device: torch.device, prompt: str
) -> list[str]:
    """Write the averaged weights of a checkpoint for use in other programs.

    Writes folder/lora/pytorch_lora_weights.safetensors (under LoRA) and folder/pipeline, a
    diffusers folder with the adapter merged. With `config.verify`, loads both with diffusers alone
    and compares an image of `prompt`.

    Returns:
        One line per export, that says where it is and how it compared.

    Raises:
        ExportError: if an image differs by more than rounding.
        CheckpointError: if the checkpoint is damaged.
    """
    model = load_model(config.model)
    load_weights(model, read_shown_weights(checkpoint))
    beside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    writers = {"pipeline": model.save_pipeline}
    if config.model.trainable == "lora":
        writers["lora"] = model.save_adapter
    for name, write in writers.items():
        (beside / name).mkdir(parents=True)
        write(beside / name)
    lines = [f"{folder / name}" for name in writers]
    if config.verify:
        model.to(device)
        expected = _our_image(config, model, prompt)
        for i, name in enumerate(writers):
            found = _their_image(config, model, beside, name, prompt).to(expected)
            lines[i] += f" (verified: {_compare(config, name, expected, found)})"
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
    return lines


def _our_image(
    config: TrainConfig, model: TextToImageModel, prompt: str
) -> Float[Tensor, "b 3 H W"]:
    sampler = replace(config.sampler, num_inference_steps=VERIFY_STEPS, eta=0.0)
    return generate(model, [prompt], [0], sampler)


@torch.no_grad()
def _their_image(
    config: TrainConfig, model: TextToImageModel, exported: Path, name: str, prompt: str
) -> Float[Tensor, "b 3 H W"]:
    """Make the same image with diffusers alone, from the files."""
    pipeline = model.open_elsewhere(exported, name)
    height, width = image_size(model, config.sampler)
    noise = Rng([0]).normal(*model.latent_shape(height, width), device=model.device)
    pipeline.to(model.device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt,
        height=height,
        width=width,
        num_inference_steps=VERIFY_STEPS,
        guidance_scale=config.sampler.guidance_scale,
        latents=noise.to(pipeline.dtype),
        output_type="pt",
    ).images.float()


def _compare(config: TrainConfig, name: str, expected: Tensor, found: Tensor) -> str:
    worst = (expected - found).abs().max().item()
    allowed = TOLERANCE[config.model.dtype]
    if not worst <= allowed:
        raise ExportError(
            f"the exported {name} gives another image in diffusers than here: a pixel differs by "
            f"{worst:.3g} (allowed {allowed}). The checkpoint is unharmed; please report this with "
            "the versions of diffusers, transformers and peft, or train with verify=false"
        )
    return f"diffusers gives the same image, largest difference {worst:.1e}"
