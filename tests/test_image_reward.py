"""ImageReward: equal to its formula on small random networks in the published layout."""

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_image_reward import TEXT, VOCABULARY, score, write_tiny_image_reward
from torch import Tensor, nn
from transformers import BertTokenizer

from sfumato.clip import preprocess
from sfumato.clip.preprocessing import CLIP_MEAN, CLIP_STD
from sfumato.config import ImageRewardConfig
from sfumato.rewards.build import build_reward

PROMPTS = ["a red star", "ring", "a small blue ring on a yellow ground"]
IMAGES = torch.rand(3, 3, 40, 57, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models") / "image_reward"
    write_tiny_image_reward(made)
    return made


def build(folder: Path, **settings: Any) -> Any:
    named = {"pretrained": str(folder), "processor": str(folder), **settings}
    return build_reward(ImageRewardConfig(**named))


def tokens_of(prompts: list[str], length: int = 35) -> tuple[Tensor, Tensor]:
    """Return BERT's tokens by hand: a letter each, filled up to `length` as published."""
    rows = [
        ["[CLS]", *(t for w in p.split() for t in (w[0], *(f"##{c}" for c in w[1:]))), "[SEP]"]
        for p in prompts
    ]
    rows = [[VOCABULARY.index(token) for token in row] for row in rows]
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])


def expected_of(state: dict[str, Tensor], images: Tensor, settings: Any) -> Tensor:
    state = {k: t.to(images.dtype) if t.is_floating_point() else t for k, t in state.items()}
    return score(state, preprocess(images, settings), *tokens_of(PROMPTS))


@pytest.mark.parametrize("form", ["folder", "file", "safetensors"])
def test_score_and_gradient_equal_the_formula(tmp_path: Path, form: str):
    state = write_tiny_image_reward(tmp_path)
    if form == "safetensors":
        save_file(state, tmp_path / "ImageReward.safetensors")
        (tmp_path / "ImageReward.pt").unlink()
    place = tmp_path / "ImageReward.pt" if form == "file" else tmp_path
    reward = build(tmp_path, pretrained=str(place))
    images = IMAGES.clone().requires_grad_()
    found = reward(images, PROMPTS)
    expected = expected_of(state, images, reward.image_settings)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.05
    gradients = [torch.autograd.grad(each.sum(), images)[0] for each in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-4 * float(gradients[1].abs().max()), rtol=1e-4)
    assert reward.scale == pytest.approx(1 / 1.0333394966054072)


def test_gradient_equals_finite_differences(folder: Path):
    reward = build(folder).double()
    images = IMAGES.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reward(x, PROMPTS), images, fast_mode=True)


def test_images_and_prompts_move_the_score(folder: Path):
    reward = build(folder)
    same = IMAGES[:1].expand(2, -1, -1, -1)
    assert (reward(same, PROMPTS[:2]).diff()).abs() > 1e-3
    assert (reward(IMAGES[:2], [PROMPTS[0]] * 2).diff()).abs() > 1e-3
    with pytest.raises(ValueError, match="3 images came with 1 prompts"):
        reward(IMAGES, PROMPTS[:1])


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 111), (99, 41), (9, 7)])
def test_preprocessing_equals_pils(folder: Path, height: int, width: int):
    array = np.random.default_rng(0).integers(64, 192, (height, width, 3), dtype=np.uint8)
    short, side = min(height, width), 32
    size = int(side * height / short), int(side * width / short)
    picture = Image.fromarray(array).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    top, left = round((size[0] - side) / 2), round((size[1] - side) / 2)
    picture = picture.crop((left, top, left + side, top + side))
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    images = torch.from_numpy(array).permute(2, 0, 1)[None] / 255
    found = preprocess(images, build(folder).image_settings)[0] * std + mean
    assert (found - pixels).abs().max() < 1.5 / 255


def test_it_is_frozen_and_the_same_in_training_mode_and_under_autocast(folder: Path):
    reward = build(folder)
    expected = reward(IMAGES, PROMPTS)
    nn.Sequential(reward).train()
    assert torch.equal(reward(IMAGES, PROMPTS), expected)
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reward(IMAGES, PROMPTS), expected)
    half = build(folder, dtype="bfloat16")
    assert half(IMAGES, PROMPTS).dtype == torch.float32
    assert half.head[0].weight.dtype == torch.float32
    torch.testing.assert_close(half(IMAGES, PROMPTS), expected, atol=0.2, rtol=0)


def test_checkpointed_layers_give_the_same_gradient(folder: Path):
    gradients = []
    for checkpointing in (False, True):
        images = IMAGES.clone().requires_grad_()
        reward = build(folder, gradient_checkpointing=checkpointing)
        gradients.append(torch.autograd.grad(reward(images, PROMPTS).sum(), images)[0])
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-5)


def test_a_long_prompt_is_cut_and_warned_of_once(folder: Path):
    reward = build(folder)
    with pytest.warns(UserWarning, match="reads 35 of the 42 tokens"):
        cut = reward(IMAGES[:1], ["z" * 40])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(reward(IMAGES[:1], ["z" * 33]), cut)
        reward(IMAGES[:1], ["z" * 50])


def test_a_plan_reads_no_weights(folder: Path, tmp_path: Path):
    home = shutil.copytree(folder, tmp_path / "copy")
    (home / "ImageReward.pt").unlink()
    with torch.device("meta"):
        reward = build(home)
    assert {each.device.type for each in reward.parameters()} == {"meta"}
    score = reward(torch.empty(2, 3, 64, 64, device="meta", requires_grad=True), ["a", "star"])
    assert score.shape == (2,)
    assert score.requires_grad


def test_the_published_sizes_are_the_default(tmp_path: Path):
    names = [*VOCABULARY, *(f"word{i}" for i in range(30522 - len(VOCABULARY)))]
    BertTokenizer(vocab={name: i for i, name in enumerate(names)}).save_pretrained(tmp_path)
    with torch.device("meta"):
        reward = build(tmp_path)
    sizes = [sum(p.numel() for p in part.parameters()) for part in (reward.vision, reward.text)]
    # Each layer: self-attention, cross-attention to 1024 channels, and two linear layers.
    own, seen = 768 * 768 + 768, 768 * 1024 + 768
    layer = 6 * own + 2 * seen + 2 * 768 * 3072 + 3072 + 768 + 3 * 2 * 768
    assert sizes[1] == 12 * layer + (30524 + 512 + 2) * 768
    # ViT-L/16: its 24 layers, patches, positions and class token, and the last norm.
    layer = 12 * 1024**2 + (3 + 1 + 4 + 1 + 4) * 1024
    assert sizes[0] == 24 * layer + (3 * 256 + 1 + 197 + 1 + 2) * 1024
    assert [tuple(reward.head[i].weight.shape) for i in (0, 2, 4, 6, 7)] == [
        (1024, 768), (128, 1024), (64, 128), (16, 64), (1, 16)
    ]  # fmt: skip


# --- Bad files


def change(state: dict[str, Tensor], fault: str) -> dict[str, Tensor]:
    name = "blip.text_encoder.encoder.layer.1.crossattention.self.key.weight"
    match fault:
        case "other":
            return {"layers.0.weight": torch.ones(1024, 768), "layers.0.bias": torch.ones(1024)}
        case "part":
            return {k: t for k, t in state.items() if not k.startswith("mlp")}
        case "width":
            return {**state, name: torch.ones(TEXT["hidden_size"], 40)}
        case "patch":
            return {**state, "blip.visual_encoder.pos_embed": torch.ones(1, 5, 24)}
        case "nan":
            return {**state, name: torch.full_like(state[name], torch.nan)}
        case "infinity":
            return {**state, "mlp.layers.7.bias": torch.full((1,), torch.inf)}
        case "more":
            return {**state, "blip.text_encoder.pooler.dense.weight": torch.ones(2, 2)}
    raise AssertionError(fault)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("other", "weights are missing (blip.visual_encoder.cls_token"),
        ("part", "10 weights are missing (mlp.layers.0.weight"),
        ("width", "crossattention.self.key.weight: (32, 40) in the file, (32, 24) in the network"),
        ("patch", "blip.visual_encoder.pos_embed: (1, 5, 24) in the file"),
        ("nan", "1 weights with NaN or infinity"),
        ("infinity", "1 weights with NaN or infinity"),
        ("more", "unexpected (blip.text_encoder.pooler.dense.weight)"),
    ],
)
def test_other_weights_are_refused(tmp_path: Path, fault: str, said: str):
    state = write_tiny_image_reward(tmp_path)
    torch.save(change(state, fault), tmp_path / "ImageReward.pt")
    with pytest.raises(ValueError, match=re.escape(said)):
        build(tmp_path)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code ran",))


@pytest.mark.parametrize("fault", ["half", "code", "empty", "text", "missing", "list"])
def test_damaged_files_are_refused(tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]):
    state = write_tiny_image_reward(tmp_path)
    file = tmp_path / "ImageReward.pt"
    match fault:
        case "half":
            content = file.read_bytes()
            file.write_bytes(content[: len(content) // 2])
        case "code":
            torch.save({**state, "hook": Harmful()}, file)
        case "empty":
            file.write_bytes(b"")
        case "text":
            file.write_text("<html>Not Found</html>")
        case "missing":
            file.unlink()
        case "list":
            torch.save([1, 2, 3], file)
    with pytest.raises(ValueError, match=r"ImageReward\.pt") as caught:
        build(tmp_path)
    assert "reward.pretrained" in str(caught.value)
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 30}, "hidden_size = 30, which 4 heads do not share evenly"),
        ({"hidden_size": "wide"}, "hidden_size = 'wide'"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ({"num_hidden_layers": 3}, "encoder.layer.2"),
        ({"vision_config": {"num_attention_heads": 0}}, "0 heads"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, Any], said: str):
    write_tiny_image_reward(tmp_path)
    file = tmp_path / "med_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=re.escape(said)):
        build(tmp_path)


@pytest.mark.parametrize("fault", ["none", "short", "damaged"])
def test_a_tokenizer_that_does_not_fit_is_refused(folder: Path, tmp_path: Path, fault: str):
    if fault == "short":
        vocabulary = {token: index for index, token in enumerate(VOCABULARY[:-3])}
        BertTokenizer(vocab=vocabulary).save_pretrained(tmp_path)
    if fault == "damaged":
        (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(ValueError, match="tokenizer") as caught:
        build(folder, processor=str(tmp_path))
    assert fault == "damaged" or "google-bert/bert-base-uncased" in str(caught.value)
