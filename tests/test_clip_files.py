"""CLIP folders: found in folder and cache, settings read, damage named before weights load."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from tiny_clip import IMAGE_SIZE, write_tiny_clip
from tiny_open_clip import shard
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPVisionModel

from sfumato.rewards.clip import ClipReward

PROMPTS = ["a red star", "a small blue ring on a yellow background", "It's 7 o'clock!"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "clip"
    write_tiny_clip(folder)
    return folder


@pytest.fixture
def clip_copy(clip_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(clip_folder, tmp_path / "copy")


def random_images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def edit_json(path: Path, edit: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_hub_id_is_found_in_the_local_cache(
    clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    commit = "0" * 40
    cached = tmp_path / "models--someone--tiny-clip"
    shutil.copytree(clip_folder, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    reward = ClipReward.from_pretrained("someone/tiny-clip")
    images = random_images(3, 3, 32, 32)
    expected = ClipReward.from_pretrained(str(clip_folder))(images, PROMPTS)
    assert torch.equal(reward(images, PROMPTS), expected)
    with pytest.raises(ValueError, match=r"reward\.pretrained = 'someone/other' is no folder here"):
        ClipReward.from_pretrained("someone/other")


def test_shards_are_read_as_the_whole_file(clip_folder: Path, clip_copy: Path):
    shard(clip_copy, "model.safetensors")
    images = random_images(3, 3, 32, 32)
    expected = ClipReward.from_pretrained(str(clip_folder))(images, PROMPTS)
    assert torch.equal(ClipReward.from_pretrained(str(clip_copy))(images, PROMPTS), expected)


def test_processor_folder_gives_tokenizer_and_settings(clip_copy: Path, tmp_path: Path):
    processor = tmp_path / "processor"
    processor.mkdir()
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (clip_copy / name).rename(processor / name)
    settings = {"size": 40, "crop_size": 32, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5] * 3}
    (processor / "preprocessor_config.json").write_text(json.dumps(settings))
    reward = ClipReward.from_pretrained(str(clip_copy), processor=str(processor))
    found = reward.image_settings
    assert (found.size, found.crop) == (40, 32)
    assert (found.mean, found.std) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    assert reward(random_images(3, 3, 64, 48), PROMPTS).isfinite().all()


def test_settings_default_to_published_ones(clip_copy: Path):
    (clip_copy / "preprocessor_config.json").unlink()
    found = ClipReward.from_pretrained(str(clip_copy)).image_settings
    published = CLIPImageProcessorPil()
    assert (found.size, found.crop) == (IMAGE_SIZE, IMAGE_SIZE)
    assert (found.mean, found.std) == (tuple(published.image_mean), tuple(published.image_std))


def test_a_size_that_is_not_stated_is_transformers_own(clip_copy: Path):
    (clip_copy / "preprocessor_config.json").write_text(json.dumps({"crop_size": IMAGE_SIZE}))
    found = ClipReward.from_pretrained(str(clip_copy)).image_settings
    assert (found.size, found.crop) == (224, IMAGE_SIZE)
    assert CLIPImageProcessorPil.from_pretrained(clip_copy).size["shortest_edge"] == 224


def test_settings_are_read_from_processor_config(clip_copy: Path):
    (clip_copy / "preprocessor_config.json").unlink()
    settings = {"image_processor": {"size": {"shortest_edge": 50}, "resample": 3}}
    (clip_copy / "processor_config.json").write_text(json.dumps(settings))
    assert ClipReward.from_pretrained(str(clip_copy)).image_settings.size == 50


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def change(name: str, key: str, value: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / name, lambda content: content.update({key: value}))


def change_text(key: str, value: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(
        folder / "config.json", lambda content: content["text_config"].update({key: value})
    )


def save_vision_tower(folder: Path) -> None:
    CLIPVisionModel.from_pretrained(folder).save_pretrained(folder)


def drop_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["text_projection.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


PREPROCESSOR = "preprocessor_config.json"
DAMAGES = [
    (shutil.rmtree, "is no folder here"),
    (
        remove("config.json"),
        r"has no config.json or open_clip_config.json; choose the folder of a CLIPModel",
    ),
    (write("config.json", "{"), r"config.json is damaged: it is not JSON"),
    (write("config.json", "[]"), "not an object"),
    (change("config.json", "model_type", "blip"), "model_type 'blip', not 'clip'"),
    (save_vision_tower, "model_type 'clip_vision_model', not 'clip'"),
    (remove("vocab.json"), "has no tokenizer.json or vocab.json with merges.txt; save the"),
    (write("vocab.json", '{"a": 0'), r"vocab.json is damaged: it is not JSON"),
    (change_text("vocab_size", 500), "has 514 tokens, but the text tower knows 500"),
    (change_text("eos_token_id", 49407), "the score would ignore the prompt"),
    (change(PREPROCESSOR, "size", {"shortest_edge": 32, "longest_edge": 64}), "state one whole"),
    (change(PREPROCESSOR, "size", {"height": 24, "width": 40}), r"resizes to \(24, 40\) px and"),
    (change(PREPROCESSOR, "crop_size", {"height": 32, "width": 40}), "state one whole number"),
    (change(PREPROCESSOR, "crop_size", 224), "the image tower takes 32 px"),
    (change(PREPROCESSOR, "size", 24), "resizes to 24 px and crops 32 px"),
    (change(PREPROCESSOR, "resample", 1), "states resample = 1"),
    (change(PREPROCESSOR, "do_center_crop", False), "states do_center_crop = False"),
    (change(PREPROCESSOR, "image_mean", [0.5]), r"states image_mean = \[0.5\]; give 3 numbers"),
    (change(PREPROCESSOR, "image_mean", "0.5"), "states image_mean = '0.5'; give 3 numbers"),
    (change(PREPROCESSOR, "image_mean", [0.5, None, 1]), "states image_mean = "),
    (change(PREPROCESSOR, "image_std", [0, 1, 1]), r"states image_std = \[0, 1, 1\].*not 0"),
    (change(PREPROCESSOR, "image_std", [1, 1, float("inf")]), "states image_std = "),
    (change(PREPROCESSOR, "rescale_factor", 0), "states rescale_factor = 0; give a number, not 0"),
    (change(PREPROCESSOR, "rescale_factor", "1/255"), "states rescale_factor = '1/255'"),
    (change(PREPROCESSOR, "resample", 0), "states resample = 0, and only 2"),
    (change(PREPROCESSOR, "size", None), "state one whole number"),
    (change(PREPROCESSOR, "resample", "bicubic"), "states resample = 'bicubic'"),
    (change(PREPROCESSOR, "size", "32"), "cannot be read by transformers"),
    (change(PREPROCESSOR, "size", 32.5), "cannot be read by transformers"),
    (change(PREPROCESSOR, "size", {"shortest_edge": True}), "state one whole number"),
    (change(PREPROCESSOR, "size", {"longest_edge": 32}), "state one whole number"),
    (change(PREPROCESSOR, "crop_size", {"shortest_edge": 32}), "state one whole number"),
    (change(PREPROCESSOR, "do_pad", True), "states do_pad = True"),
    (change(PREPROCESSOR, "image_processor_type", "ViTImageProcessor"), "= 'ViTImageProcessor'"),
    (write(PREPROCESSOR, "[1]"), "not an object"),
    (remove("model.safetensors"), "pickled weights are not read"),
    (write("model.safetensors", "not safetensors"), "could not be read"),
    (drop_a_tensor, r"1 weights are missing \(text_projection.weight\)"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[message for _, message in DAMAGES])
def test_unusable_clip_folder_is_named(
    clip_copy: Path, damage: Callable[[Path], object], message: str
):
    damage(clip_copy)
    with pytest.raises(ValueError, match=message):
        ClipReward.from_pretrained(str(clip_copy))


def test_everything_else_is_checked_before_weights(clip_copy: Path):
    remove("model.safetensors", "merges.txt")(clip_copy)
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        ClipReward.from_pretrained(str(clip_copy))
