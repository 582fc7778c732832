"""Exports that load elsewhere: a LoRA file and a diffusers folder, loaded back and compared."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.config import ModelConfig, TrainConfig
from sfumato.diffusion.randomness import Rng
from sfumato.models.formats import WRITE_ERRORS
from sfumato.models.generate import generate, image_size
from sfumato.models.model import DTYPES, TextToImageModel
from sfumato.models.origins import unlike_original, write_original
from sfumato.models.registry import load_model
from sfumato.training.checkpoint import read_shown_weights
from sfumato.training.state import load_weights

VERIFY_STEPS = 4
LARGEST_DIFFERENCE = 2e-3  # of a pixel, where nothing is rounded
MEAN_DIFFERENCE = {"bfloat16": 0.02, "float16": 0.005}  # of all pixels, where weights are rounded


class ExportError(ValueError):
    """An export that cannot be written, or does not give elsewhere the image that it gives here."""


def export(
    config: TrainConfig,
    checkpoint: Path,
    folder: Path,
    device: torch.device,
    prompt: str,
    load: Callable[[ModelConfig], TextToImageModel] = load_model,
) -> list[str]:
    """Write the averaged weights of a checkpoint for use in other programs.

    Writes folder/lora/pytorch_lora_weights.safetensors (under LoRA) and folder/pipeline, a
    diffusers folder with the adapter merged, its network in `model.dtype`; of a Stable Diffusion 1
    or 2 that was trained in full also folder/original/unet.safetensors, in the names of its
    original code. With `config.verify`, loads each of them elsewhere and compares an image of
    `prompt`, all in float32: in bfloat16 each program rounds in its own places, and guidance makes
    much of that.

    Returns:
        One line per export, that says where it is and how it compared.

    Raises:
        ExportError: if the disk is full, or an image differs by more than rounding.
        CheckpointError: if the checkpoint is damaged.
    """
    # What the network started from is in the checkpoint, and need not be there any more.
    network = replace(config.model.network, from_pretrained=None)
    model = load(replace(config.model, dtype="float32", network=network))
    load_weights(model, read_shown_weights(checkpoint))
    beside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        names = _write(config, model, beside)
        lines = [_told(config, folder / name) for name in names]
        if config.verify:
            compared = _verify(config, model, beside, names, device, prompt)
            lines = [f"{line} (verified: {how})" for line, how in zip(lines, compared, strict=True)]
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)
    except WRITE_ERRORS as error:
        raise ExportError(
            f"{folder} could not be written ({error}). The checkpoint is unharmed: make room, and "
            "give the same command again"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return lines


def _write(config: TrainConfig, model: TextToImageModel, folder: Path) -> list[str]:
    """Write each kind of export; return their names."""
    (folder / "pipeline").mkdir(parents=True)
    model.save_pipeline(folder / "pipeline", DTYPES[config.model.dtype])
    if config.model.trainable != "lora":
        has_original = write_original(folder / "pipeline", folder / "original")
        return ["pipeline", "original"] if has_original else ["pipeline"]
    (folder / "lora").mkdir()
    model.save_adapter(folder / "lora")
    return ["pipeline", "lora"]


def _told(config: TrainConfig, place: Path) -> str:
    """Return where an export is, and which base an adapter is for if it is not the source."""
    if place.name != "lora" or not config.model.merge:
        return str(place)
    merged = ", ".join(f"{m.path} x {m.scale:g}" for m in config.model.merge.values())
    return f"{place}, for the base with {merged} merged in"


def _verify(
    config: TrainConfig,
    model: TextToImageModel,
    folder: Path,
    names: list[str],
    device: torch.device,
    prompt: str,
) -> list[str]:
    """Return how each export's image compares with ours."""
    with _full_precision():
        model.to(device)
        sampler = replace(config.sampler, num_inference_steps=VERIFY_STEPS, eta=0.0)
        expected = generate(model, [prompt], [0], sampler)
        shape = model.latent_shape(*image_size(model, sampler))
        noise = Rng([0]).normal(*shape, device=model.device)
        compared = []
        for name in names:
            if name == "original":
                compared.append(_compare_original(folder))
                continue
            found = model.image_elsewhere(folder, name, prompt, noise, sampler).to(expected)
            compared.append(_compare(config, name, expected, found))
    return compared


def _compare_original(folder: Path) -> str:
    """Refuse a file in the original layout that diffusers reads as other weights."""
    if odd := unlike_original(folder / "pipeline", folder / "original"):
        raise ExportError(
            f"the exported original is read otherwise by diffusers: {len(odd)} weights differ, "
            f"among them {odd[0]}. The checkpoint is unharmed; please report this with the version "
            "of diffusers, or train with verify=false"
        )
    return "diffusers reads it back as the same weights"


@contextmanager
def _full_precision() -> Iterator[None]:
    """Leave out TF32, in which a merged matrix and its parts round differently."""
    matmul: Any = torch.backends.cuda.matmul
    convolution: Any = torch.backends.cudnn
    before = matmul.allow_tf32, convolution.allow_tf32
    matmul.allow_tf32 = convolution.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, convolution.allow_tf32 = before


def _compare(config: TrainConfig, name: str, expected: Tensor, found: Tensor) -> str:
    difference = (expected - found).abs()
    value, allowed, words = difference.max().item(), LARGEST_DIFFERENCE, "a pixel differs by"
    if name == "pipeline" and config.model.dtype in MEAN_DIFFERENCE:
        value, allowed = difference.mean().item(), MEAN_DIFFERENCE[config.model.dtype]
        words = "pixels on average differ by"
    if not value <= allowed:
        raise ExportError(
            f"the exported {name} gives another image in diffusers than here: {words} "
            f"{value:.3g} (allowed {allowed}). The checkpoint is unharmed; please report this with "
            "the versions of diffusers, transformers and peft, or train with verify=false"
        )
    what = "largest" if allowed == LARGEST_DIFFERENCE else "mean"
    return f"diffusers gives the same image, {what} difference {value:.1e}"
