"""Log-probabilities of labels: equal to transformers' classifiers and their image processors."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import assert_explained
from safetensors.torch import load_file, save_file
from tiny_classifiers import LABELS, SIDE, STATED, write_classifier
from tiny_clip import write_tiny_clip
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig

from sfumato.clip import preprocess, read_processor
from sfumato.rewards.classifier import ClassifierReward, find_label
from sfumato.training.gauges import sharpness

KINDS = list(STATED)
NO_PROMPTS = ["", "", ""]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        write_classifier(folder / kind, kind)
    return folder


def load(folder: Path, label: str | None = "espresso", **options: Any) -> ClassifierReward:
    return ClassifierReward.from_pretrained(str(folder), label, **options)


def random_images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_score_and_gradient_equal_transformers(models: Path, kind: str):
    reward, images = load(models / kind), random_images(3, 3, 45, 60).requires_grad_()
    model = AutoModelForImageClassification.from_pretrained(models / kind).eval()
    pixels = preprocess(images, read_processor(models / kind))
    expected = torch.log_softmax(model(pixel_values=pixels).logits, 1)
    score = reward.score(images, NO_PROMPTS)
    torch.testing.assert_close(score.value, expected[:, 2], atol=1e-5, rtol=1e-5)
    assert reward.differentiable
    assert score.parts == {}
    assert (score.value < 0).all()
    assert expected.std() > 0.05
    (found,) = torch.autograd.grad(score.value.sum(), images)
    (wanted,) = torch.autograd.grad(expected[:, 2].sum(), images)
    torch.testing.assert_close(found, wanted, atol=1e-4 * wanted.abs().max().item(), rtol=1e-4)
    assert wanted.abs().max() > 1e-5
    logs = [load(models / kind, str(i))(images, NO_PROMPTS) for i in range(len(LABELS))]
    torch.testing.assert_close(torch.stack(logs).exp().sum(0), torch.ones(3))


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_gradient_equals_finite_differences(models: Path, kind: str):
    reward = load(models / kind, dtype=torch.float64)
    images = random_images(2, 3, 30, 26, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reward(x, ["", ""]), images, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_frozen_and_exact_under_autocast(models: Path, kind: str):
    reward, images = load(models / kind), random_images(3, 3, 40, 40)
    nn.Sequential(reward).train()
    assert not any(module.training for module in reward.modules())
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    expected = reward(images, NO_PROMPTS)
    assert torch.equal(reward(images, NO_PROMPTS), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reward(images, NO_PROMPTS), expected)
    half = load(models / kind, dtype=torch.bfloat16)(images, NO_PROMPTS)
    assert half.dtype == torch.float32
    if kind != "mobilenet_v2":  # whose random layers double each rounding
        torch.testing.assert_close(half, expected, atol=0.3, rtol=0.2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_reads_no_weights(models: Path, tmp_path: Path, kind: str):
    folder = shutil.copytree(models / kind, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with torch.device("meta"):
        reward, each = load(folder), load(folder, None)
        score = reward(torch.empty(2, 3, 40, 44), ["", ""])
        assert each(torch.empty(2, 3, 40, 44), ["", ""]).is_meta
    assert score.is_meta
    assert score.shape == (2,)
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        load(folder)


# --- Labels


@pytest.mark.parametrize(
    ("label", "index"),
    [
        ("tabby, tabby cat", 0),
        ("tabby", 0),
        (" Tabby Cat ", 0),
        ("0", 0),
        ("3", 3),
        ("ESPRESSO", 2),
        ("lifting crane", 3),
        ("crane", 1),  # the whole text of one label, and a part of another's
        ("7", 4),
    ],
)
def test_a_label_is_named_by_text_or_index(label: str, index: int):
    assert find_label(label, LABELS, "x") == index


@pytest.mark.parametrize(
    ("names", "label", "expected"),
    [
        (LABELS, "tabbi", "did you mean 'tabby'?"),
        (LABELS, "5", "nor an index from 0 to 4; give one of id2label"),
        (LABELS, "-1", "none of the 5 labels"),
        (LABELS, "", "none of the 5 labels"),
        ({0: "crane", 1: "crane"}, "crane", "a text of labels 0 and 1 of x; give the index"),
        ({0: "missile", 1: "projectile, missile", 2: "a, missile"}, "a", "give"),
        ({0: "b, missile", 1: "a, missile"}, "Missile", "labels 0 and 1"),
    ],
)
def test_an_unknown_label_is_refused(names: dict[int, str], label: str, expected: str):
    if label == "a":
        assert find_label(label, names, "x") == 2
        return
    with pytest.raises(ValueError) as refused:
        find_label(label, names, "x")
    assert_explained(str(refused.value), "reward.label", label, expected)


@pytest.mark.parametrize(
    ("prompt", "labels"),
    [
        ("a tabby, watercolor", [0]),
        ("A TABBY CAT", [0]),  # the longest text that begins there
        ("a crane at dawn", [1, 3]),  # either counts
        ("a lifting crane", [3]),
        ("espresso beside a tabby", [2]),  # the first
    ],
)
def test_a_prompt_names_its_own_label(models: Path, prompt: str, labels: list[int]):
    images = random_images(1, 3, 40, 40)
    every = torch.cat([load(models / "resnet", str(i))(images, [""]) for i in range(len(LABELS))])
    found = load(models / "resnet", None)(images, [prompt])
    torch.testing.assert_close(found[0], every[labels].logsumexp(0))


@pytest.mark.parametrize("prompt", ["", "a dog", "espressos", "the crane2", "lifting"])
def test_a_prompt_without_a_label_is_refused(models: Path, prompt: str):
    with pytest.raises(ValueError) as refused:
        load(models / "resnet", None)(random_images(2, 3, 40, 40), ["a tabby", prompt])
    assert_explained(str(refused.value), "reward.label", prompt, "names no label")


def test_several_sizes_give_their_mean(models: Path):
    images = random_images(2, 3, 24, 24)
    settings = read_processor(models / "resnet")
    model = AutoModelForImageClassification.from_pretrained(models / "resnet").eval()
    values = []
    for size in (16, 40):
        view = replace(settings, size=(size, size), crop=None)
        logits = model(pixel_values=preprocess(images, view)).logits
        values.append(logits.log_softmax(1)[:, 2])
    found = load(models / "resnet", sizes=[16, 40])(images, ["", ""])
    torch.testing.assert_close(found, torch.stack(values).mean(0))
    assert not torch.allclose(values[0], values[1])


def test_training_sees_random_crops_and_others_see_whole_images(models: Path):
    images = random_images(2, 3, 40, 24)
    reward = load(models / "resnet", sizes=[16, 32], crop=0.5)
    whole = load(models / "resnet", sizes=[16, 32])
    assert torch.equal(reward(images, ["", ""]), whole(images, ["", ""]))

    images.requires_grad_()
    seen = set[tuple[int, ...]]()
    for seed in range(20):
        torch.manual_seed(seed)
        with torch.no_grad():
            crops = [reward.cropped(images) for _ in reward.views]
        torch.manual_seed(seed)
        found = reward(images, ["", ""])
        parts = [
            load(models / "resnet", sizes=[size])(crop, ["", ""])
            for size, crop in zip((16, 32), crops, strict=True)
        ]
        torch.testing.assert_close(found, torch.stack(parts).mean(0))
        seen |= {tuple(crop.shape[-2:]) for crop in crops}
    (gradient,) = torch.autograd.grad(found.sum(), images)
    assert gradient.any()
    heights, widths = zip(*seen, strict=True)
    assert min(heights) >= 20 and min(widths) >= 12 and len(seen) > 5
    assert all(abs(height / width - 40 / 24) < 0.15 for height, width in seen)


def test_the_gauge_of_sharpness_crops_nothing(models: Path):
    images = random_images(2, 3, 40, 24)
    reward = load(models / "resnet", sizes=[16, 32], crop=0.5)
    whole = load(models / "resnet", sizes=[16, 32])
    drawn = torch.get_rng_state()
    found = sharpness(reward, images, ["", ""])
    assert torch.equal(found, sharpness(whole, images, ["", ""])) and found.all()
    assert torch.equal(drawn, torch.get_rng_state()) and reward.crop == 0.5


def test_a_size_that_the_model_does_not_take_is_refused(models: Path):
    with pytest.raises(ValueError, match="is no image classifier that can be read"):
        load(models / "vit", sizes=[SIDE, SIDE + 8])


# --- Preprocessing

SIZES = [(64, 64), (99, 40), (40, 99), (33, 50), (9, 7), (3, 30), (1, 1)]
WHOLE = {"height": SIDE, "width": SIDE}
PROCESSORS: list[dict[str, Any]] = [
    *STATED.values(),
    {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}},
    {"image_processor_type": "ConvNextImageProcessor", "size": 30, "crop_pct": 0.9},
    {"image_processor_type": "ConvNextImageProcessor", "size": 20, "do_normalize": False},
    {"image_processor_type": "DeiTImageProcessor", "size": 36, "crop_size": SIDE},
    {"image_processor_type": "DeiTImageProcessor", "size": WHOLE, "do_center_crop": False},
    {"image_processor_type": "ViTImageProcessor", "size": {"height": 24, "width": 40}},
    {"image_processor_type": "ViTImageProcessorFast", "size": WHOLE, "rescale_factor": 1 / 127.5},
    {"image_processor_type": "PvtImageProcessor", "size": WHOLE, "do_rescale": False},
    {"image_processor_type": "MobileNetV1ImageProcessor", "size": 36, "crop_size": 32},
    {"image_processor_type": "SiglipImageProcessor", "size": WHOLE, "image_mean": [0.1, 0.2, 0.3]},
]


@pytest.mark.parametrize("stated", PROCESSORS, ids=str)
def test_preprocessing_equals_transformers(tmp_path: Path, stated: dict[str, Any]):
    ViTConfig().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    settings = read_processor(tmp_path)
    for height, width in SIZES:
        array = np.random.default_rng(0).integers(64, 192, (height, width, 3), dtype=np.uint8)
        expected = processor(Image.fromarray(array), return_tensors="pt")["pixel_values"]
        found = preprocess(torch.from_numpy(array).permute(2, 0, 1)[None] / 255, settings)
        assert found.shape == expected.shape
        spread = torch.tensor(settings.std).view(3, 1, 1) / settings.factor
        assert ((found - expected) * spread).abs().max() < 1.5 / 255  # see test_clip_reward.py


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"image_processor_type": "MobileViTImageProcessor"}, "states MobileViTImageProcessor"),
        ({"image_processor_type": "EfficientNetImageProcessor"}, "only BitImageProcessor, CLIP"),
        ({"image_processor_type": "ImageGPTImageProcessor"}, "states ImageGPT"),
        ({"image_processor_type": "Nonsense"}, "cannot be read by transformers"),
        ({"resample": 0}, "resample = 0"),
        ({"resample": 1}, "resample = 1"),
        ({"do_resize": False}, "so that images would not have one size"),
        ({"size": {"shortest_edge": 32}}, "so that images would not have one size"),
        ({"size": {"shortest_edge": 32, "longest_edge": 64}}, "state one whole"),
        ({"size": "large"}, "cannot be read by transformers"),
        ({"do_pad": True}, "do_pad = True"),
        ({"image_std": [0.5, 0.5]}, "image_std"),
        ({"do_center_crop": True, "size": 32, "crop_size": 64}, "resizes to"),
        (
            {"image_processor_type": "ConvNextImageProcessor", "size": {"height": 9, "width": 9}},
            "only a shortest_edge",
        ),
        (
            {"image_processor_type": "ConvNextImageProcessor", "size": 32, "crop_pct": 0},
            "crop_pct = 0",
        ),
        (
            {"image_processor_type": "ConvNextImageProcessor", "do_center_crop": True, "size": 32},
            "do_center_crop = True",
        ),
    ],
    ids=str,
)
def test_unknown_preprocessing_is_refused(tmp_path: Path, stated: dict[str, Any], expected: str):
    ViTConfig().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
    with pytest.raises(ValueError) as refused:
        read_processor(tmp_path)
    assert "preprocessor_config.json" in str(refused.value)
    assert expected in str(refused.value)
    assert len(str(refused.value)) < 500


# --- Bad files


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def change(name: str, **values: Any) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | values))

    return act


def edit(alter: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        alter(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return act


def halve(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def another(folder: Path) -> None:
    preprocessing = (folder / "preprocessor_config.json").read_text()
    shutil.rmtree(folder)
    write_tiny_clip(folder)
    (folder / "preprocessor_config.json").write_text(preprocessing)


RUNNING = "resnet.embedder.embedder.normalization.running_var"
FAULTS: list[tuple[str, Callable[[Path], object], str]] = [
    ("resnet", shutil.rmtree, "is no folder here"),
    ("resnet", remove("config.json"), "has no config.json; choose the folder"),
    ("resnet", remove("preprocessor_config.json"), "save the model's image processor"),
    ("resnet", remove("model.safetensors"), "has no model.safetensors"),
    ("resnet", pickled, "pickled weights are not read"),
    ("vit", halve, "could not be read"),
    ("vit", edit(lambda own: own.pop("classifier.bias")), "missing (classifier.bias)"),
    ("vit", edit(lambda own: own.update(extra=torch.ones(1))), "unexpected (extra)"),
    ("vit", edit(lambda own: own["classifier.bias"].fill_(torch.nan)), "NaN or infinity"),
    ("resnet", edit(lambda own: own[RUNNING].fill_(torch.inf)), RUNNING),
    ("vit", change("config.json", hidden_size=48), "of another shape"),
    ("vit", change("config.json", image_size=64), "is no image classifier that can be read"),
    ("vit", change("config.json", model_type="bert"), "is no image classifier that can be read"),
    ("vit", change("config.json", model_type="nonsense"), "is no image classifier that"),
    ("vit", change("config.json", model_type="timm_wrapper"), "is no image classifier that"),
    ("vit", change("config.json", auto_map={"AutoConfig": "code.Own"}), ""),
    ("vit", change("config.json", problem_type="multi_label_classification"), "only a choice"),
    ("vit", change("config.json", problem_type="regression"), "only a choice"),
    ("vit", change("config.json", id2label={"0": "one"}, label2id={"one": 0}), "states 1 labels"),
]


@pytest.mark.parametrize(("kind", "damage", "expected"), FAULTS)
def test_a_bad_folder_is_refused(
    models: Path, tmp_path: Path, kind: str, damage: Callable[[Path], object], expected: str
):
    folder = shutil.copytree(models / kind, tmp_path / "model")
    damage(folder)
    if not expected:  # code of a folder is never run; transformers' own class is
        assert load(folder)(random_images(3, 3, 32, 32), NO_PROMPTS).isfinite().all()
        return
    with pytest.raises(ValueError) as refused:
        load(folder, "0")
    assert str(folder) in str(refused.value)
    assert expected in str(refused.value)
    assert "\n" not in str(refused.value)
