"""Folders that peft saved: merged and gone on from as peft does, with their alpha, or refused."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLora
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tiny_sdxl import write_tiny_sdxl
from torch import Tensor, nn

from sfumato.config import LoraConfig, MergeConfig, ModelConfig
from sfumato.models.registry import load_model

ADAPTER, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
DIFFUSERS = "pytorch_lora_weights.safetensors"
QV = ["to_q", "to_v"]


def normal(*shape: int, seed: int) -> Tensor:
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def load(folder: Path, **more: Any) -> Any:
    return load_model(ModelConfig(str(folder), **more))


def merged(folder: Path, path: Path, scale: float = 1.0) -> Any:
    """Return the model with a LoRA merged into its base."""
    merge = {"a": MergeConfig(str(path), scale)}
    return load(folder, trainable="full", reference=False, dtype="float32", merge=merge)


def save_adapter(network: nn.Module, place: Path, **settings: Any) -> dict[str, Tensor]:
    """Write an adapter that moves the weights; return them as peft merges them."""
    network = copy.deepcopy(network).float()
    adapted: Any = get_peft_model(network, PeftLora(**settings))  # type: ignore[arg-type]
    for i, (name, parameter) in enumerate(adapted.named_parameters()):
        if "lora_" in name:
            parameter.data = normal(*parameter.shape, seed=i)
    adapted.save_pretrained(place)
    whole = adapted.merge_and_unload()
    return {name: parameter.detach() for name, parameter in whole.named_parameters()}


def check_equal(network: nn.Module, expected: dict[str, Tensor], base: nn.Module) -> None:
    found = dict(network.named_parameters())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].detach(), tensor, atol=1e-5, rtol=1e-5)
    moved = [n for n, p in base.named_parameters() if (p - expected[n]).abs().max() > 0.01]
    assert len(moved) >= 2


def edit(place: Path, **changes: Any) -> None:
    content = json.loads((place / SETTINGS).read_text())
    (place / SETTINGS).write_text(json.dumps(content | changes))


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 16, "target_modules": QV},
        {"r": 4, "lora_alpha": 1, "target_modules": QV, "use_rslora": True},
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": [*QV, "to_k"],
            "rank_pattern": {"to_v": 2, r"mid_block\..*\.to_k": 3},
            "alpha_pattern": {"attn1.to_q": 3, r"mid_block\..*\.to_k": 30},
        },
        {"r": 2, "lora_alpha": 6, "target_modules": ["conv1", "conv_in", "proj_in"]},
        {"r": 4, "lora_alpha": 8, "target_modules": QV, "init_lora_weights": "gaussian"},
        {"r": 4, "lora_alpha": 8, "target_modules": QV, "layers_to_transform": [0, 1],
         "layers_pattern": "transformer_blocks", "lora_dropout": 0.3},
    ],
    ids=lambda settings: "-".join(settings),
)  # fmt: skip
@pytest.mark.parametrize("given", ["folder", "file"])
def test_an_adapter_is_merged_as_peft_merges_it(
    sd_folder: Path, tmp_path: Path, settings: dict[str, Any], given: str
):
    base = load(sd_folder, dtype="float32", trainable="full", reference=False).pipeline.unet
    expected = save_adapter(base, tmp_path / "peft", **settings)
    path = tmp_path / "peft" if given == "folder" else tmp_path / "peft" / ADAPTER
    check_equal(merged(sd_folder, path).pipeline.unet, expected, base)


def test_the_scale_of_the_merge_is_heeded_too(sd_folder: Path, tmp_path: Path):
    base = load(sd_folder, dtype="float32", trainable="full", reference=False).pipeline.unet
    expected = save_adapter(base, tmp_path, r=4, lora_alpha=16, target_modules=QV)
    half = {name: (p + expected[name]).detach() / 2 for name, p in base.named_parameters()}
    check_equal(merged(sd_folder, tmp_path, 0.5).pipeline.unet, half, base)


def diffusers_names(place: Path, component: str) -> None:
    """Rename an adapter for diffusers; the settings stay beside it."""
    names = {f"{component}.{k[17:]}": t for k, t in load_file(place / ADAPTER).items()}
    save_file(names, place / DIFFUSERS)
    (place / ADAPTER).unlink()


def test_settings_beside_a_file_of_diffusers_names_are_heeded(sd_folder: Path, tmp_path: Path):
    base = load(sd_folder, dtype="float32", trainable="full", reference=False).pipeline.unet
    expected = save_adapter(base, tmp_path, r=4, lora_alpha=16, target_modules=QV)
    diffusers_names(tmp_path, "unet")
    check_equal(merged(sd_folder, tmp_path).pipeline.unet, expected, base)
    # What the file itself states comes first: here alpha = rank, so a quarter of it.
    notes = {"unet.r": 4, "unet.lora_alpha": 4, "unet.target_modules": QV}
    file, noted = tmp_path / DIFFUSERS, {"lora_adapter_metadata": json.dumps(notes)}
    save_file(load_file(file), file, metadata=noted)
    quarter = {n: (p + (expected[n] - p) / 4).detach() for n, p in base.named_parameters()}
    check_equal(merged(sd_folder, tmp_path).pipeline.unet, quarter, base)


def test_settings_of_another_adapter_are_refused(sd_folder: Path, tmp_path: Path):
    base = load(sd_folder, dtype="float32", trainable="full", reference=False).pipeline.unet
    save_adapter(base, tmp_path, r=4, lora_alpha=16, target_modules=QV)
    edit(tmp_path, r=8)
    with pytest.raises(ValueError, match=r"has rank 4 at unet\..*states 8; these settings are of"):
        merged(sd_folder, tmp_path)
    diffusers_names(tmp_path, "unet")
    with pytest.raises(ValueError, match=r"has rank 4 at unet\..*states 8; these settings are of"):
        merged(sd_folder, tmp_path)


@pytest.mark.parametrize(
    ("component", "place", "noted"),
    [
        ("text_encoder", "anywhere", "CLIPTextModel"),
        ("text_encoder_2", "anywhere", "CLIPTextModelWithProjection"),
        ("text_encoder", "text_encoder", None),
        ("text_encoder_2", "text_encoder_2", "PreTrainedModel"),
        ("text_encoder", "anywhere", None),
    ],
)
def test_the_component_is_the_one_that_has_the_layers(
    tmp_path: Path, component: str, place: str, noted: str | None
):
    """SDXL's encoders name their layers alike: the folder's name decides, or the noted class."""
    write_tiny_sdxl(tmp_path / "sdxl")
    base = load(tmp_path / "sdxl", dtype="float32", trainable="full", reference=False).pipeline
    encoder = base.components[component]
    layers = ["q_proj", "fc1"]
    expected = save_adapter(encoder, tmp_path / place, r=2, lora_alpha=6, target_modules=layers)
    edit(tmp_path / place, auto_mapping={"base_model_class": noted})
    if place == "anywhere" and noted is None:
        with pytest.raises(ValueError, match=r"fits text_encoder and text_encoder_2 alike; rename"):
            merged(tmp_path / "sdxl", tmp_path / place)
        return
    found = merged(tmp_path / "sdxl", tmp_path / place).pipeline
    check_equal(found.components[component], expected, encoder)
    for name in {"text_encoder", "text_encoder_2", "unet"} - {component}:
        left, right = found.components[name], base.components[name]
        pairs = zip(left.parameters(), right.parameters(), strict=True)
        assert all(torch.equal(a.detach(), b.detach()) for a, b in pairs)


def test_training_goes_on_from_an_adapter(sd_folder: Path, tmp_path: Path):
    base = load(sd_folder, dtype="float32", trainable="full", reference=False).pipeline.unet
    expected = save_adapter(base, tmp_path, r=4, lora_alpha=16, target_modules=QV)
    lora = LoraConfig(rank=4, alpha=2.0, targets=[r".*\.to_[qv]"], start=str(tmp_path))
    model = load(sd_folder, dtype="float32", lora=lora)
    check_equal(model.parts["unet"].merged(), expected, base)
    with pytest.raises(ValueError, match=r"has rank 4 at unet.*set model\.lora\.rank=4"):
        load(sd_folder, lora=replace(lora, rank=8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, r"states use_dora = True, which is not read; merge"),
        ({"peft_type": "LOHA"}, "states peft_type = 'LOHA'"),
        ({"peft_type": "ADALORA"}, "states peft_type = 'ADALORA'"),
        ({"bias": "all"}, "states bias = 'all'"),
        ({"modules_to_save": ["conv_in"]}, r"states modules_to_save = \['conv_in'\]"),
        ({"fan_in_fan_out": True}, "states fan_in_fan_out = True"),
        ({"lora_bias": True}, "states lora_bias = True"),
        ({"init_lora_weights": "pissa_niter_4"}, "states init_lora_weights = 'pissa_niter_4'"),
        ({"layer_replication": [[0, 2]]}, "states layer_replication"),
        ({"target_parameters": ["weight"]}, "states target_parameters"),
        ({"a_key_of_tomorrow": 1}, "states a_key_of_tomorrow = 1"),
        ({"lora_alpha": "16"}, "states lora_alpha = '16', no number above 0"),
        ({"lora_alpha": None}, "states lora_alpha = None, no number"),
        ({"lora_alpha": float("nan")}, "states lora_alpha = nan, no number"),
        ({"r": 0}, "states r = 0, no number above 0"),
        ({"alpha_pattern": {"to_q": []}}, r"states to_q = \[\], no number"),
        ({"alpha_pattern": {"(to_q": 1}}, r"states \(to_q = 1"),
        ({"rank_pattern": [4]}, r"states rank_pattern = \[4\]"),
    ],
)
def test_what_is_no_plain_lora_is_refused_before_weights(
    sd_folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
):
    (tmp_path / ADAPTER).touch()  # nothing is read from it
    plain = PeftLora(r=4, lora_alpha=16, target_modules=QV)  # type: ignore[arg-type]
    plain.save_pretrained(str(tmp_path))
    edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=rf"{SETTINGS} {message}"):
        merged(sd_folder, tmp_path)


def spoil(place: Path) -> None:
    state = load_file(place / ADAPTER)
    next(iter(state.values()))[0, 0] = torch.nan
    save_file(state, place / ADAPTER)


def add_magnitudes(place: Path) -> None:
    state = load_file(place / ADAPTER)
    name = next(iter(state)).partition(".lora_")[0]
    save_file({**state, f"{name}.lora_magnitude_vector": torch.ones(4)}, place / ADAPTER)


def rename_layers(place: Path) -> None:
    state = load_file(place / ADAPTER)
    save_file({key.replace("to_q", "to_w"): t for key, t in state.items()}, place / ADAPTER)


def pickle(place: Path) -> None:
    (place / ADAPTER).rename(place / "adapter_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda place: (place / SETTINGS).unlink(), rf"{SETTINGS} is missing, which states alpha"),
        (
            lambda place: (place / SETTINGS).write_text("{"),
            f"{SETTINGS} is damaged: it is not JSON",
        ),
        (lambda place: (place / SETTINGS).write_text("[]"), f"{SETTINGS} holds a JSON list"),
        (pickle, "pickled adapter_model.bin can run code"),
        (spoil, "1 weights with NaN or infinity"),
        (add_magnitudes, r"no plain LoRA: 1 of its tensors .*lora_magnitude_vector"),
        (rename_layers, r"layers match none of the model, such as unet\..*to_w"),
    ],
)
def test_a_damaged_folder_is_named(
    sd_folder: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
):
    base = load(sd_folder, dtype="float32", trainable="full", reference=False).pipeline.unet
    save_adapter(base, tmp_path, r=4, lora_alpha=16, target_modules=QV)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        merged(sd_folder, tmp_path)


def test_a_file_of_pefts_names_needs_its_settings(sd_folder: Path, tmp_path: Path):
    base = load(sd_folder, dtype="float32", trainable="full", reference=False).pipeline.unet
    save_adapter(base, tmp_path / "peft", r=4, lora_alpha=16, target_modules=QV)
    shutil.copy(tmp_path / "peft" / ADAPTER, tmp_path / "style.safetensors")
    with pytest.raises(ValueError, match=rf"has peft's names, and no {SETTINGS} beside it"):
        merged(sd_folder, tmp_path / "style.safetensors")
