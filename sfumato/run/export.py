"""Exports for other programs, loaded back and compared: LoRA file, diffusers folder, reward."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.card import CARD, MARKS, hub_id, licence_of, model_card
from sfumato.config import ModelConfig, TrainConfig
from sfumato.data.sample import Sample
from sfumato.diffusion.randomness import Rng
from sfumato.files import new_folder, read_object, write_text
from sfumato.models.autoencoder_kl import posterior
from sfumato.models.generate import generate, image_size
from sfumato.models.learning_autoencoder import load_autoencoder
from sfumato.models.model import DTYPES, TextToImageModel
from sfumato.models.origins import unlike_original, write_original
from sfumato.models.registry import load_model
from sfumato.objectives.autoencoder import pixels_of
from sfumato.precision import without_tf32
from sfumato.rewards.clip import ClipReward
from sfumato.rewards.learning_clip import LearningClip
from sfumato.run.build import build_autoencoder, load_learner
from sfumato.run.open_data import held_out_samples
from sfumato.training.checkpoint import (
    best_step,
    find_fault,
    fingerprint,
    list_checkpoints,
    read_shown_weights,
    step_of,
)
from sfumato.training.folder import RunFolder, step_name
from sfumato.training.state import load_weights

NOTE = "export.json"
VERIFY_STEPS = 4
LARGEST_DIFFERENCE = 2e-3  # of a pixel, where nothing is rounded
VERIFY_ROWS, LARGEST_SCORE_DIFFERENCE = 4, 1e-5
SCALED_BY = 512  # pictures whose latents an autoencoder's scaling is measured on
MEAN_DIFFERENCE = {"bfloat16": 0.02, "float16": 0.005}  # of all pixels, where weights are rounded
_OLDER = ("pipeline/model_index.json", "pipeline/*", "lora/*", "original/*")


class ExportError(ValueError):
    """An export that cannot be written, or gives another image in another program."""


def export_run(
    config: TrainConfig,
    load: Callable[[ModelConfig], TextToImageModel] | None,
    prompts: Sequence[str],
    device: torch.device,
) -> None:
    """Export the checkpoint that `config.export` asks for, unless that was done; print where.

    Args:
        load: a script's own way to the model, if there is one.
        prompts: of validation images, the first of which verifies a model.
    """
    folder = RunFolder.of(config)
    note, path = folder.path / NOTE, chosen_checkpoint(config, folder)
    done: dict[str, Any] = {}
    if note.exists() and folder.export.exists():
        done = read_object(note, "remove it and run the same command again")
    origin = {"checkpoint": fingerprint(path), "verify": config.verify}
    if any(done.get(key) != value for key, value in origin.items()):
        if config.objective.trains == "reward":
            lines = export_reward(config, path, folder.export, device)
        elif config.objective.trains == "autoencoder":
            lines = export_autoencoder(config, path, folder.export, device)
        else:
            lines = export(config, path, folder.export, device, prompts[0], load or load_model)
            write_cards(config, folder.export, step_of(path))
        done = {"step": step_of(path), **origin, "exports": lines}
        write_text(note, json.dumps(done, indent=2) + "\n")
    for line in [f"exported is step {done['step']}", *done["exports"]]:
        print(f"  {line}")


def write_cards(config: TrainConfig, folder: Path, step: int) -> None:
    """Write a model card into each export that diffusers reads."""
    base = config.model.pretrained
    for name, mark in MARKS.items():
        if (folder / name / mark).is_file():
            card = model_card(config, name, step, base=hub_id(base), licence=licence_of(base))
            write_text(folder / name / CARD, card)


def chosen_checkpoint(config: TrainConfig, folder: RunFolder) -> Path:
    """Return the checkpoint to export: the last, or the best if that is asked for and whole."""
    last = list_checkpoints(folder.checkpoints)[-1]
    if config.export == "last":
        return last
    best = best_step(folder.checkpoints)
    path = folder.checkpoints / step_name(best) if best is not None else None
    fault = find_fault(path) if path is not None else "it is not there any more"
    if path is None or fault:
        print(f"the best checkpoint cannot be exported ({fault}), so the last is", file=sys.stderr)
        return last
    return path


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
    `prompt`, all in float32: in bfloat16 each program rounds at other points, and guidance
    amplifies the difference.

    Returns:
        One line per export: its path, and how it compared.

    Raises:
        ExportError: if the disk is full, or an image differs by more than rounding.
        CheckpointError: if the checkpoint is damaged.
    """
    # The checkpoint holds the weights that the network started from, whose file may be gone.
    network = replace(config.model.network, from_pretrained=None)
    model = load(replace(config.model, dtype="float32", network=network))
    load_weights(model, read_shown_weights(checkpoint), str(checkpoint))
    older = _OLDER if (folder.parent / NOTE).exists() else ()
    with new_folder(folder, older=older, failure=ExportError) as beside:
        names = _write(config, model, beside)
        lines = [_located(config, folder / name) for name in names]
        if config.verify:
            compared = _verify(config, model, beside, names, device, prompt)
            lines = [f"{line} (verified: {how})" for line, how in zip(lines, compared, strict=True)]
    return lines


def export_reward(
    config: TrainConfig, checkpoint: Path, folder: Path, device: torch.device
) -> list[str]:
    """Write the averaged weights of a trained reward as folder/reward, for `reward.pretrained`.

    With `config.verify`, loads it back as a reward and compares its scores.

    Returns:
        One line: its path, and how it compared.

    Raises:
        ExportError: if the disk is full, or a score differs.
        CheckpointError: if the checkpoint is damaged.
    """
    model = load_learner(config)
    load_weights(model, read_shown_weights(checkpoint), str(checkpoint))
    with new_folder(folder, failure=ExportError) as beside:
        model.save(beside / "reward")
        line = str(folder / "reward")
        if config.verify:
            line += f" (verified: {_compare_scores(model, beside / 'reward', device)})"
    return [line]


@torch.no_grad()
def export_autoencoder(
    config: TrainConfig, checkpoint: Path, folder: Path, device: torch.device
) -> list[str]:
    """Write the averaged weights of a trained autoencoder as folder/autoencoder, for diffusers.

    Its scaling gives the latents of the validation's pictures a deviation of 1. With
    `config.verify`, loads it back and compares these pictures.

    Returns:
        One line: its path, and how it compared.

    Raises:
        ExportError: if the disk is full, or a picture differs.
        CheckpointError: if the checkpoint is damaged.
    """
    model = build_autoencoder(config)
    load_weights(model, read_shown_weights(checkpoint), str(checkpoint))
    model.to(device)
    settings = replace(config, validation=replace(config.validation, loss_images=SCALED_BY))
    samples = [s for s in held_out_samples(settings, None) if isinstance(s, Sample)]
    with without_tf32(), new_folder(folder, failure=ExportError) as beside:
        batches = [pixels_of(samples[i : i + 32]).to(device) for i in range(0, len(samples), 32)]
        decoded, moments = zip(*(model.reconstruct(each, None) for each in batches), strict=True)
        noise = Rng(range(len(samples))).normal(*model.latent_shape(batches[0]), device=device)
        model.save(beside / "autoencoder", posterior(torch.cat(moments), noise))
        line = str(folder / "autoencoder")
        if config.verify:
            other: Any = load_autoencoder(str(beside / "autoencoder")).to(device)
            difference = (other(batches[0]).sample - decoded[0]).abs().max().item()
            if not difference <= LARGEST_DIFFERENCE:
                raise ExportError(
                    f"the exported autoencoder gives other pictures than here: a pixel differs by "
                    f"{difference:.3g} (allowed {LARGEST_DIFFERENCE}). The checkpoint is unharmed; "
                    "please report this with the version of diffusers, or train with verify=false"
                )
            same = f"diffusers gives the same pictures, largest difference {difference:.1e}"
            line += f" (verified: {same})"
    return [line]


@torch.no_grad()
def _compare_scores(model: LearningClip, folder: Path, device: torch.device) -> str:
    """Refuse a folder that scores noise otherwise than the reward does."""
    with without_tf32():
        images = Rng(range(VERIFY_ROWS)).normal(3, 64, 64, device=device) * 0.2 + 0.5
        prompts = [f"picture {i}" for i in range(VERIFY_ROWS)]
        model.to(device)
        expected = model.compare(images, prompts)[0]
        found = ClipReward.from_pretrained(str(folder)).to(device)(images, prompts)
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    if not difference <= LARGEST_SCORE_DIFFERENCE:
        raise ExportError(
            f"the exported reward scores otherwise than here: by {difference:.2g} of the score "
            f"(allowed {LARGEST_SCORE_DIFFERENCE}). The checkpoint is unharmed; please report "
            "this with the version of transformers, or train with verify=false"
        )
    return f"reward=clip gives the same scores, largest difference {difference:.1e} of them"


def _write(config: TrainConfig, model: TextToImageModel, folder: Path) -> list[str]:
    (folder / "pipeline").mkdir(parents=True)
    model.save_pipeline(folder / "pipeline", DTYPES[config.model.dtype])
    if config.model.trainable != "lora":
        has_original = write_original(folder / "pipeline", folder / "original")
        return ["pipeline", "original"] if has_original else ["pipeline"]
    (folder / "lora").mkdir()
    model.save_adapter(folder / "lora")
    return ["pipeline", "lora"]


def _located(config: TrainConfig, path: Path) -> str:
    """Return the path of an export, and which base an adapter is for if LoRA files are merged."""
    if path.name != "lora" or not config.model.merge:
        return str(path)
    merged = ", ".join(f"{m.path} x {m.scale:g}" for m in config.model.merge.values())
    return f"{path}, for the base with {merged} merged in"


def _verify(
    config: TrainConfig,
    model: TextToImageModel,
    folder: Path,
    names: list[str],
    device: torch.device,
    prompt: str,
) -> list[str]:
    with without_tf32():
        model.to(device)
        # As diffusers' pipelines sample: first order, guided at all times.
        sampler = replace(config.sampler, num_inference_steps=VERIFY_STEPS, eta=0.0)
        sampler = replace(sampler, solver="first_order", guidance_interval=None, prompt_cache=0)
        sampler = replace(sampler, scheduler=None)
        expected = generate(model, [prompt], [0], sampler)
        shape = model.latent_shape(*image_size(model, sampler))
        noise = Rng([0]).normal(*shape, device=model.device)
        compared = []
        for name in names:
            if name == "original":
                compared.append(_compare_original(folder))
                continue
            image = model.image_elsewhere(folder, name, prompt, noise, sampler).to(expected)
            compared.append(_compare(config, name, expected, image))
    return compared


def _compare_original(folder: Path) -> str:
    """Refuse a file in the original layout that diffusers reads as other weights."""
    if odd := unlike_original(folder / "pipeline", folder / "original"):
        raise ExportError(
            f"diffusers reads other weights from the exported original: {len(odd)} differ, among "
            f"them {odd[0]}. The checkpoint is unharmed; please report this with the version "
            "of diffusers, or train with verify=false"
        )
    return "diffusers reads it back as the same weights"


def _compare(config: TrainConfig, name: str, expected: Tensor, image: Tensor) -> str:
    difference = (expected - image).abs()
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
