"""Weights of rewards are read as they are stored: nothing beside them rounds them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_aesthetic import write_head, write_tiny_siglip
from tiny_classifiers import write_classifier
from tiny_clip import write_tiny_clip
from tiny_hps import FILE, save, write_tiny_hps
from tiny_image_reward import write_tiny_image_reward
from torch import Tensor

from sfumato.config import (
    AestheticRewardConfig,
    ClassifierRewardConfig,
    ClipRewardConfig,
    HpsRewardConfig,
    ImageRewardConfig,
    RewardConfig,
)
from sfumato.rewards.build import build_reward


def weights_of(config: RewardConfig) -> dict[str, Tensor]:
    return build_reward(config).state_dict()


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def write(folder: Path, kind: str) -> RewardConfig:
    """Write a model in transformers' layout; return the settings of a reward that reads it."""
    match kind:
        case "clip":
            write_tiny_clip(folder)
            return ClipRewardConfig(pretrained=str(folder))
        case "siglip":
            write_tiny_siglip(folder)
            write_head(folder / "head.pth", "2.5")
            predictor = str(folder / "head.pth")
            return AestheticRewardConfig(pretrained=str(folder), predictor=predictor)
    write_classifier(folder, kind)
    return ClassifierRewardConfig(pretrained=str(folder), label="0")


@pytest.mark.parametrize("kind", ["clip", "siglip", "resnet"])
@pytest.mark.parametrize("stated", ["float16", "bfloat16", None])
def test_a_dtype_in_config_json_rounds_no_weights(tmp_path: Path, kind: str, stated: str | None):
    config, file = write(tmp_path, kind), tmp_path / "config.json"
    exact = weights_of(config)
    settings = json.loads(file.read_text()) | {"dtype": stated}
    for tower in ("text_config", "vision_config"):
        settings.get(tower, {}).pop("dtype", None)
    file.write_text(json.dumps(settings))
    assert_equal(weights_of(config), exact)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_one_weight_in_half_precision_rounds_no_others(tmp_path: Path, half: torch.dtype):
    config, file = write(tmp_path, "clip"), tmp_path / "model.safetensors"
    state = load_file(file)
    name = "logit_scale"
    state[name] = state[name].to(half).float()
    save_file(state, file, metadata={"format": "pt"})
    exact = weights_of(config)
    save_file({**state, name: state[name].to(half)}, file, metadata={"format": "pt"})
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"dtype": None}))
    assert_equal(weights_of(config), exact)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["logit_scale", "visual.class_embedding", "visual.proj"])
def test_hps_in_mixed_precision_is_read_as_stored(tmp_path: Path, name: str, half: torch.dtype):
    write_tiny_hps(tmp_path)
    config = HpsRewardConfig(pretrained=str(tmp_path), processor=str(tmp_path))
    state = torch.load(tmp_path / FILE, weights_only=True)["state_dict"]
    rounded = state[name].to(half)
    save({**state, name: rounded.float()}, tmp_path / FILE)
    exact = weights_of(config)
    save({**state, name: rounded}, tmp_path / FILE)
    assert_equal(weights_of(config), exact)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("part", ["cls_token", "embeddings.word_embeddings", "mlp.layers.0"])
def test_image_reward_in_mixed_precision_is_read_as_stored(
    tmp_path: Path, part: str, half: torch.dtype
):
    state = write_tiny_image_reward(tmp_path)
    config = ImageRewardConfig(pretrained=str(tmp_path), processor=str(tmp_path))
    names = [name for name in state if part in name]
    assert names
    rounded = {name: state[name].to(half) for name in names}
    torch.save({**state, **{k: t.float() for k, t in rounded.items()}}, tmp_path / "ImageReward.pt")
    exact = weights_of(config)
    torch.save({**state, **rounded}, tmp_path / "ImageReward.pt")
    assert_equal(weights_of(config), exact)
