"""OpenCLIP's layout as a reward: equal to its own towers; its config is honoured or refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_clip import write_tiny_clip
from tiny_open_clip import CONFIG, TEXT, VISION, WEIGHTS, shard, write_tiny_open_clip
from torch import Tensor

from sfumato.clip import ImageSettings, load_clip, preprocess
from sfumato.clip.preprocessing import open_clip_settings
from sfumato.config import ModelConfig, NetworkConfig
from sfumato.models.origins import unet_settings
from sfumato.models.registry import find_family
from sfumato.rewards.clip import ClipReward
from sfumato.run.identity import digests

PROMPTS = ["a red star", "a small blue ring"]
IMAGES = torch.rand(2, 3, 32, 47, generator=torch.Generator().manual_seed(0))


def set_config(folder: Path, section: str, **changes: Any) -> None:
    content = json.loads((folder / CONFIG).read_text())
    model = content["model_cfg"]
    part = model if section == "model_cfg" else model.get(section)
    if section == "preprocess_cfg":
        part = content.setdefault(section, {})
    part.update(changes)
    (folder / CONFIG).write_text(json.dumps(content))


def tokens_of(folder: Path) -> Tensor:
    vocabulary = json.loads((folder / "vocab.json").read_text())
    rows = [
        [
            vocabulary["<|startoftext|>"],
            *(vocabulary[s] for word in prompt.split() for s in (*word[:-1], f"{word[-1]}</w>")),
            vocabulary["<|endoftext|>"],
        ]
        for prompt in PROMPTS
    ]
    return torch.tensor([[*row, *[0] * (TEXT["context_length"] - len(row))] for row in rows])


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_reward_in_open_clips_layout_scores_as_its_own_towers_do(
    tmp_path: Path, quick: bool, is_sharded: bool
):
    text, vision = write_tiny_open_clip(tmp_path, quick=quick)
    if is_sharded:
        shard(tmp_path, WEIGHTS)
    reward = ClipReward.from_pretrained(str(tmp_path))
    settings = ImageSettings(32, 32, rounds=True)
    with torch.no_grad():
        images = vision.embed(preprocess(IMAGES, settings))
        prompts = text.embed(tokens_of(tmp_path))
    torch.testing.assert_close(reward.image_features(IMAGES), images, atol=1e-5, rtol=0)
    torch.testing.assert_close(reward.text_features(PROMPTS), prompts, atol=1e-5, rtol=0)
    expected = np.exp(2.5) * (images * prompts).sum(1)
    torch.testing.assert_close(reward(IMAGES, PROMPTS), expected, atol=1e-4, rtol=0)
    assert reward.max_tokens == TEXT["context_length"]
    assert expected.std() > 0.1


def test_the_activations_differ(tmp_path: Path):
    """Else equality with the towers would say nothing of quick_gelu."""
    write_tiny_open_clip(tmp_path)
    exact = ClipReward.from_pretrained(str(tmp_path))(IMAGES, PROMPTS)
    set_config(tmp_path, "model_cfg", quick_gelu=True)
    quick = ClipReward.from_pretrained(str(tmp_path))(IMAGES, PROMPTS)
    assert (exact - quick).abs().max() > 0.01


def test_transformers_layout_is_read_where_it_is_whole(tmp_path: Path):
    """Hub folders hold both; without transformers' weights OpenCLIP's are read."""
    write_tiny_clip(tmp_path / "clip")
    write_tiny_open_clip(tmp_path / "open")
    for name in (CONFIG, WEIGHTS):
        shutil.copy(tmp_path / "open" / name, tmp_path / "clip" / name)
    theirs = load_clip(str(tmp_path / "clip"))
    assert theirs.model.config.projection_dim == 16
    assert theirs.image_settings.rounds is False
    (tmp_path / "clip" / "model.safetensors").unlink()
    assert load_clip(str(tmp_path / "clip")).model.config.projection_dim == 24


def in_hub_cache(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a folder into the hub's local cache as someone/tiny, and take the network away."""
    cached = cache / "models--someone--tiny"
    shutil.copytree(folder, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_a_hub_id_of_open_clips_layout_is_read(
    tmp_path: Path, sd_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    write_tiny_open_clip(tmp_path / "open")
    in_hub_cache(tmp_path / "open", tmp_path / "cache", monkeypatch)
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "parts"))
    expected = ClipReward.from_pretrained(str(tmp_path / "open"))(IMAGES, PROMPTS)
    assert torch.equal(ClipReward.from_pretrained("someone/tiny")(IMAGES, PROMPTS), expected)
    named = {"reward.pretrained": "someone/tiny"}
    local = {"reward.pretrained": str(tmp_path / "open")}
    assert digests(named, tmp_path) == digests(local, tmp_path) != {}
    wide = {**unet_settings("sd1"), "cross_attention_dim": TEXT["width"]}
    (tmp_path / "unet.json").write_text(json.dumps(wide))
    _, folder = find_family(
        ModelConfig(
            pretrained=None,
            network=NetworkConfig(config=str(tmp_path / "unet.json")),
            autoencoder=str(sd_folder),
            text_encoder="someone/tiny",
            trainable="full",
        )
    )
    settings = json.loads((folder / "text_encoder" / "config.json").read_text())
    assert settings["num_hidden_layers"] == TEXT["layers"]


def test_a_processor_in_open_clips_layout_gives_its_preprocessing(tmp_path: Path):
    write_tiny_clip(tmp_path / "clip")
    write_tiny_open_clip(tmp_path / "open")
    set_config(tmp_path / "open", "preprocess_cfg", mean=[0.5, 0.5, 0.5], interpolation="bilinear")
    found = load_clip(str(tmp_path / "clip"), str(tmp_path / "open")).image_settings
    assert (found.mean, found.mode, found.rounds) == ((0.5, 0.5, 0.5), "bilinear", True)


@pytest.mark.parametrize(
    ("stated", "size", "filter_"),
    [
        ({}, (32, 32), "bicubic"),
        ({"interpolation": "bilinear", "mean": 0.5, "std": 0.25}, (45, 32), "bilinear"),
        ({"interpolation": "random", "resize_mode": "shortest"}, (64, 94), "bicubic"),
        ({"resize_mode": "squash", "size": [32, 32], "mode": "RGB"}, (50, 40), "bicubic"),
        ({"fill_color": 7, "std": [0.2, 0.3, 0.4], "mean": None}, (99, 64), "bicubic"),
    ],
)
def test_preprocessing_equals_open_clips(
    stated: dict[str, Any], size: tuple[int, int], filter_: str
):
    """Its steps by Pillow: torchvision's Resize and CenterCrop, which rounds half a pixel."""
    generator = np.random.default_rng(0)
    array = generator.integers(64, 192, (*size, 3), dtype=np.uint8)
    picture, (height, width) = Image.fromarray(array), size
    kind = Image.Resampling[filter_.upper()]
    short, squash = min(size), stated.get("resize_mode") == "squash"
    shape = (32, 32) if squash else (int(32 * width / short), int(32 * height / short))
    picture = picture.resize(shape, kind)
    left, top = (round((side - 32) / 2.0) for side in picture.size)
    pixels = np.asarray(picture.crop((left, top, left + 32, top + 32))) / 255
    settings = open_clip_settings(Path(CONFIG), stated, 32)
    mean, std = np.array(settings.mean), np.array(settings.std)
    images = torch.from_numpy(array).permute(2, 0, 1)[None] / 255
    found = preprocess(images, settings)[0].permute(1, 2, 0).numpy()
    assert np.abs((found - (pixels - mean) / std) * std).max() < 1.5 / 255
    if stated.get("mean") == 0.5:
        assert (settings.mean, settings.std) == ((0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("model_cfg", "custom_text", True),
        ("model_cfg", "init_logit_bias", -10),
        ("model_cfg", "multimodal_cfg", {"width": 4}),
        ("vision_cfg", "timm_model_name", "vit_base"),
        ("vision_cfg", "pool_type", "avg"),
        ("vision_cfg", "no_ln_pre", True),
        ("vision_cfg", "ls_init_value", 1e-4),
        ("vision_cfg", "attentional_pool", True),
        ("vision_cfg", "norm_kwargs", {"eps": 1e-6}),
        ("vision_cfg", "a_key_of_tomorrow", 1),
        ("text_cfg", "hf_model_name", "roberta-base"),
        ("text_cfg", "hf_tokenizer_name", "bert-base-uncased"),
        ("text_cfg", "pool_type", "last"),
        ("text_cfg", "no_causal_mask", True),
        ("text_cfg", "act_kwargs", {"approximate": "tanh"}),
        ("text_cfg", "proj_bias", True),
        ("preprocess_cfg", "resize_mode", "longest"),
        ("preprocess_cfg", "interpolation", "nearest"),
        ("preprocess_cfg", "size", 64),
        ("preprocess_cfg", "mean", "0.5"),
        ("preprocess_cfg", "std", [0.2, 0, 0.2]),
        ("vision_cfg", "layers", [2, 2, 2, 2]),
        ("vision_cfg", "width", 50),
        ("text_cfg", "width", 0),
        ("text_cfg", "heads", "4"),
    ],
)
def test_a_key_that_is_not_computed_is_refused_by_name(
    tmp_path: Path, section: str, key: str, value: Any
):
    write_tiny_open_clip(tmp_path)
    (tmp_path / WEIGHTS).unlink()  # before a weight is read
    set_config(tmp_path, section, **{key: value})
    with pytest.raises(ValueError, match=rf"{CONFIG}.*{section}.{key}"):
        load_clip(str(tmp_path))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("model_cfg", "custom_text", False),
        ("vision_cfg", "pool_type", "tok"),
        ("vision_cfg", "patch_dropout", 0.5),
        ("vision_cfg", "timm_model_name", None),
        ("text_cfg", "pool_type", "argmax"),
        ("text_cfg", "hf_tokenizer_name", ""),
    ],
)
def test_a_key_that_changes_nothing_is_passed_over(
    tmp_path: Path, section: str, key: str, value: Any
):
    write_tiny_open_clip(tmp_path)
    set_config(tmp_path, section, **{key: value})
    assert load_clip(str(tmp_path)).model.config.vision_config.image_size == VISION["image_size"]


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


def spoiled(state: dict[str, Tensor]) -> dict[str, Tensor]:
    state["visual.proj"][0, 0] = torch.nan
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("visual.proj"), r"1 weights are missing \(visual.proj\)"),
        (without("ln_final.bias"), r"missing \(ln_final.bias\)"),
        (
            without("transformer.resblocks.0.attn.in_proj_bias"),
            r"3 weights are missing \(transformer.resblocks.0.attn.in_proj_bias",
        ),
        (lambda s: {f"module.{k}": t for k, t in s.items()}, "as DistributedDataParallel writes"),
        (lambda s: {**s, "logit_bias": torch.zeros(1)}, r"1 weights are unexpected \(logit_bias\)"),
        (lambda s: {**s, "ln_final.bias": torch.zeros(9)}, r"ln_final.bias: \(9,\) in the file"),
        (spoiled, "1 weights with NaN or infinity"),
    ],
)
def test_weights_are_whole_or_refused(tmp_path: Path, change: Any, message: str):
    write_tiny_open_clip(tmp_path)
    save_file(change(load_file(tmp_path / WEIGHTS)), tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=message) as caught:
        load_clip(str(tmp_path))
    assert str(caught.value).startswith(f"OpenCLIP model: {tmp_path}")


def test_pickled_weights_and_lost_shards_are_named(tmp_path: Path):
    write_tiny_open_clip(tmp_path)
    shard(tmp_path, WEIGHTS)
    next(tmp_path.glob("open_clip_model-00002*")).unlink()
    with pytest.raises(ValueError, match=r"index.json names files that are not there"):
        load_clip(str(tmp_path))
    (tmp_path / f"{WEIGHTS}.index.json").unlink()
    (tmp_path / "open_clip_pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"pickled weights are not read; load them once"):
        load_clip(str(tmp_path))
