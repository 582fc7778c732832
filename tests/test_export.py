"""Exports: diffusers loads them and gives the same image; a damaged one is caught."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_sd import perturb_adapters, reference_pipeline
from torch import Tensor

from sfumato.config import LoraConfig, ModelConfig, SamplerConfig, TrainConfig
from sfumato.models.generate import generate
from sfumato.models.pipeline_model import PipelineModel
from sfumato.models.registry import load_model
from sfumato.models.stable_diffusion import StableDiffusion
from sfumato.run.export import ExportError, export
from sfumato.training.checkpoint import Snapshot, write_checkpoint

PROMPT, CPU = "a red star", torch.device("cpu")
SAMPLER = SamplerConfig(num_inference_steps=4)


def config(folder: Path, trainable: str = "lora", alpha: float | None = None) -> TrainConfig:
    model = ModelConfig(str(folder), trainable=trainable, lora=LoraConfig(rank=4, alpha=alpha))
    return TrainConfig(model=model)


def trained(settings: TrainConfig, seed: int = 0) -> StableDiffusion:
    """Return a model whose weights have moved."""
    model = load_model(settings.model)
    assert isinstance(model, StableDiffusion)
    if settings.model.trainable == "lora":
        perturb_adapters(model, 0.2, seed)
    else:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.trainable().values():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def checkpoint(root: Path, model: StableDiffusion, ema: StableDiffusion | None = None) -> Path:
    weights, shadow = (
        {n: p.detach() for n, p in m.trainable().items()} if m else {} for m in (model, ema)
    )
    return write_checkpoint(root, Snapshot(3, weights, shadow, {}, {}))


def our_image(model: StableDiffusion) -> Tensor:
    return generate(model, [PROMPT], [0], SAMPLER)


def their_image(pipeline: Any) -> Tensor:
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPT,
        num_inference_steps=SAMPLER.num_inference_steps,
        guidance_scale=SAMPLER.guidance_scale,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images


@pytest.mark.parametrize("alpha", [None, 1.0])
def test_lora_export_gives_the_same_image_in_diffusers(
    sd_folder: Path, tmp_path: Path, alpha: float | None
):
    settings = config(sd_folder, alpha=alpha)
    model = trained(settings)
    lines = export(settings, checkpoint(tmp_path, model), tmp_path / "out", CPU, PROMPT)
    expected, base = our_image(model), their_image(reference_pipeline(sd_folder))

    with_lora: Any = reference_pipeline(sd_folder)
    with_lora.load_lora_weights(tmp_path / "out" / "lora")
    torch.testing.assert_close(their_image(with_lora), expected, atol=1e-4, rtol=0)
    merged = StableDiffusionPipeline.from_pretrained(tmp_path / "out" / "pipeline")
    torch.testing.assert_close(their_image(merged), expected, atol=1e-4, rtol=0)
    assert (expected - base).abs().max() > 0.02

    file = tmp_path / "out" / "lora" / "pytorch_lora_weights.safetensors"
    assert {key.partition(".")[0] for key in load_file(file)} == {"unet"}
    assert [line.partition(" (")[0] for line in lines] == [
        str(tmp_path / "out" / name) for name in ("pipeline", "lora")
    ]
    assert all("verified: diffusers gives the same image, largest" in line for line in lines)


def test_full_fine_tuning_exports_no_adapter(sd2_folder: Path, tmp_path: Path):
    settings = config(sd2_folder, "full")
    model = trained(settings)
    lines = export(settings, checkpoint(tmp_path, model), tmp_path / "out", CPU, PROMPT)
    assert len(lines) == 2
    assert {path.name for path in (tmp_path / "out").glob("[!.]*")} == {"pipeline", "original"}
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out" / "pipeline")
    torch.testing.assert_close(their_image(pipeline), our_image(model), atol=1e-4, rtol=0)
    base = their_image(reference_pipeline(sd2_folder))
    assert (base - our_image(model)).abs().max() > 0.02
    with pytest.raises(ValueError, match=r"trainable = full trains no adapter; export the pipe"):
        model.save_adapter(tmp_path)


def test_averaged_weights_are_exported(sd_folder: Path, tmp_path: Path):
    settings = config(sd_folder)
    last, average = trained(settings, 1), trained(settings, 2)
    export(settings, checkpoint(tmp_path, last, average), tmp_path / "out", CPU, PROMPT)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out" / "pipeline")
    torch.testing.assert_close(their_image(pipeline), our_image(average), atol=1e-4, rtol=0)
    assert (our_image(last) - our_image(average)).abs().max() > 0.02


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_have_the_mode_of_the_umask(sd_folder: Path, tmp_path: Path, umask: int):
    settings = config(sd_folder)
    settings.verify = False
    before = os.umask(umask)
    try:
        path = checkpoint(tmp_path, trained(settings))
        export(settings, path, tmp_path / "out", CPU, PROMPT)
    finally:
        os.umask(before)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    names = {file.name for file in files}
    assert names >= {"weights.safetensors", "manifest.json", "pytorch_lora_weights.safetensors"}
    assert {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~umask}


def test_frozen_parts_keep_the_names_of_the_source(sd_folder: Path, tmp_path: Path):
    source = shutil.copytree(sd_folder, tmp_path / "source")
    index = json.loads((source / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (source / "model_index.json").write_text(json.dumps(index))
    settings = config(source)
    settings.verify = False
    export(settings, checkpoint(tmp_path, trained(settings)), tmp_path / "out", CPU, PROMPT)
    exported = tmp_path / "out" / "pipeline"
    for part in ("text_encoder", "tokenizer", "vae", "scheduler"):
        for file in (source / part).iterdir():
            assert (exported / part / file.name).read_bytes() == file.read_bytes()
    # transformers 4 finds a CLIPTextModel under these names alone.
    keys = load_file(exported / "text_encoder" / "model.safetensors")
    assert all(key.startswith("text_model.") for key in keys)
    # Without a safety checker in the folder, its index must not name one.
    loaded: Any = StableDiffusionPipeline.from_pretrained(exported)
    assert loaded.safety_checker is None


def test_bfloat16_weights_are_exported_and_verified(sd2_folder: Path, tmp_path: Path):
    settings = config(sd2_folder)
    settings.model.dtype = "bfloat16"
    export(settings, checkpoint(tmp_path, trained(settings)), tmp_path / "out", CPU, PROMPT)
    unet = load_file(tmp_path / "out/pipeline/unet/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in unet.values()} == {torch.bfloat16}
    lora = load_file(tmp_path / "out/lora/pytorch_lora_weights.safetensors")
    assert {tensor.dtype for tensor in lora.values()} == {torch.float32}


def test_the_export_of_a_variant_loads_without_it(sd_folder: Path, tmp_path: Path):
    source = shutil.copytree(sd_folder, tmp_path / "source")
    for part in ("unet", "vae", "text_encoder"):
        for file in (source / part).glob("*.safetensors"):
            state = {name: tensor.half() for name, tensor in load_file(file).items()}
            named = file.with_name(f"{file.stem}.fp16.safetensors")
            save_file(state, named, metadata={"format": "pt"})
    settings = config(source)
    settings.model.variant = "fp16"
    export(settings, checkpoint(tmp_path, trained(settings)), tmp_path / "out", CPU, PROMPT)
    exported = tmp_path / "out" / "pipeline"
    assert [file.name for file in (exported / "vae").glob("*.safetensors")] == [
        "diffusion_pytorch_model.safetensors"
    ]
    model = trained(settings)
    pipeline = StableDiffusionPipeline.from_pretrained(exported)
    torch.testing.assert_close(their_image(pipeline), our_image(model), atol=1e-4, rtol=0)


@pytest.mark.parametrize("error", [OSError("No space left"), SafetensorError("No space left")])
def test_a_full_disk_leaves_nothing_half_written(
    sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    def full(model: StableDiffusion, folder: Path) -> None:
        (folder / "part").write_text("half")
        raise error

    monkeypatch.setattr(StableDiffusion, "save_adapter", full)
    settings = config(sd_folder)
    place = checkpoint(tmp_path / "run", trained(settings))
    with pytest.raises(ExportError, match=r"out could not be written: .*[Nn]o space"):
        export(settings, place, tmp_path / "run" / "out", CPU, PROMPT)
    assert list((tmp_path / "run").iterdir()) == [place]


def test_latents_are_not_clipped_where_the_scheduler_does_not_say(sd_folder: Path, tmp_path: Path):
    # DDIM clips by default, to the range of pixels; a PNDM file need not say clip_sample: false.
    source = shutil.copytree(sd_folder, tmp_path / "source")
    file = source / "scheduler" / "scheduler_config.json"
    content = json.loads(file.read_text())
    del content["clip_sample"]
    file.write_text(json.dumps(content))
    settings = config(source)
    model = trained(settings)
    export(settings, checkpoint(tmp_path, model), tmp_path / "out", CPU, PROMPT)
    unchanged = trained(config(sd_folder))
    assert torch.equal(our_image(model), our_image(unchanged))


# --- Damage


def edit_tensors(file: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(edit(load_file(file)), file, metadata={"format": "pt"})


def double_lora(folder: Path) -> None:
    edit_tensors(
        folder / "pytorch_lora_weights.safetensors",
        lambda state: {n: 2 * t if "lora_B" in n else t for n, t in state.items()},
    )


def shift_unet(folder: Path) -> None:
    edit_tensors(
        folder / "unet" / "diffusion_pytorch_model.safetensors",
        lambda state: {n: t + 0.05 if n == "conv_out.bias" else t for n, t in state.items()},
    )


def rename_text_keys(folder: Path) -> None:
    """Leave names that nobody finds, so that the text encoder is loaded at random."""
    edit_tensors(
        folder / "text_encoder" / "model.safetensors",
        lambda state: {f"lost.{n}": t for n, t in state.items()},
    )


@pytest.mark.parametrize(
    ("method", "damage"),
    [
        ("save_adapter", double_lora),
        ("save_pipeline", shift_unet),
        ("save_pipeline", rename_text_keys),
    ],
)
def test_an_export_that_gives_another_image_is_caught(
    sd_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    damage: Callable[[Path], None],
):
    write = vars(PipelineModel)[method]

    def write_and_damage(model: StableDiffusion, folder: Path, *dtype: torch.dtype) -> None:
        write(model, folder, *dtype)
        damage(folder)

    monkeypatch.setattr(StableDiffusion, method, write_and_damage)
    settings = config(sd_folder)
    place, out = checkpoint(tmp_path / "run", trained(settings)), tmp_path / "out"
    torch.manual_seed(0)  # transformers draws what it does not find
    with pytest.raises(ExportError, match=r"another image in diffusers .* differs by (0\.\d|1 )"):
        export(settings, place, out, CPU, PROMPT)
    assert not out.exists()
    settings.verify = False
    export(settings, place, out, CPU, PROMPT)
    assert out.exists()
