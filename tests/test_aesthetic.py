"""Aesthetic scores: equal to the published heads on transformers' towers, and affine."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from refusals import assert_explained
from safetensors.torch import save_file
from tiny_aesthetic import (
    CLIP_WIDTH,
    SIGLIP_SIZE,
    WIDTHS,
    PublishedHead,
    write_head,
    write_tiny_siglip,
)
from tiny_clip import IMAGE_SIZE, write_tiny_clip
from torch import Tensor, nn
from transformers import CLIPModel, SiglipImageProcessorPil, SiglipVisionModel

from sfumato.clip import ImageSettings, preprocess, read_processor
from sfumato.rewards.aesthetic import AestheticReward, read_head

VERSIONS = ["1", "2", "2.5"]
SIGLIP = ImageSettings((SIGLIP_SIZE, SIGLIP_SIZE), None, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
NO_PROMPTS = ["", "", ""]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_tiny_clip(folder / "clip")
    write_tiny_siglip(folder / "siglip")
    for version in VERSIONS:
        write_head(folder / f"{version}.pth", version)
    return folder


def tower_of(models: Path, version: str) -> Path:
    return models / ("siglip" if version == "2.5" else "clip")


def load(models: Path, version: str, **options: Any) -> AestheticReward:
    tower, file = tower_of(models, version), models / f"{version}.pth"
    return AestheticReward.from_pretrained(str(tower), str(file), **options)


def random_images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def published(models: Path, version: str, images: Tensor, *, squash: bool = False) -> Tensor:
    """Return the score as it is published: preprocessing, tower, norm, and layer by layer."""
    head = write_head(models / f"{version}.pth", version)
    side = SIGLIP_SIZE if version == "2.5" else IMAGE_SIZE
    settings = SIGLIP if version == "2.5" else ImageSettings(side, side)
    if squash:
        images = F.interpolate(images, (side, side), mode="bicubic")
        settings = ImageSettings(None, None, settings.mean, settings.std)
    pixels = preprocess(images, settings)
    if version == "2.5":
        tower: Any = SiglipVisionModel.from_pretrained(models / "siglip").eval()
        embedding = tower(pixel_values=pixels).pooler_output
    else:
        clip: Any = CLIPModel.from_pretrained(models / "clip").eval()
        embedding = clip.get_image_features(pixel_values=pixels).pooler_output
    return head(embedding / embedding.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_score_and_gradient_equal_the_published_formula(models: Path, version: str, squash: bool):
    reward = load(models, version, squash=squash)
    contrast = torch.tensor([0.2, 0.6, 1]).view(3, 1, 1, 1)
    images = (random_images(3, 3, 45, 60) * contrast).requires_grad_()
    expected, score = published(models, version, images, squash=squash), reward.score(images, [""])
    assert reward.version == version
    assert reward.differentiable
    assert score.parts == {}
    torch.testing.assert_close(score.value, expected, atol=1e-5, rtol=1e-5)
    assert score.value.std() > 1e-3
    (found,) = torch.autograd.grad(score.value.sum(), images)
    (wanted,) = torch.autograd.grad(expected.sum(), images)
    torch.testing.assert_close(found, wanted, atol=1e-4 * wanted.abs().max().item(), rtol=1e-4)
    assert wanted.abs().max() > 1e-4


@pytest.mark.parametrize("version", VERSIONS)
def test_the_resize_makes_a_difference(models: Path, version: str):
    images = random_images(3, 3, 45, 60)
    scores = [load(models, version, squash=squash)(images, NO_PROMPTS) for squash in (False, True)]
    assert (scores[0] - scores[1]).abs().max() > 1e-3


@pytest.mark.parametrize("version", VERSIONS)
def test_a_head_is_one_dot_product(models: Path, tmp_path: Path, version: str):
    width = WIDTHS[version]
    layers = write_head(tmp_path / "head.pth", version).double()
    bias = layers(torch.zeros(1, width).double())
    weight = layers(torch.eye(width).double()) - bias
    reward = load(models, version)
    torch.testing.assert_close(reward.weight.double(), weight, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(reward.bias.double(), bias[0], atol=1e-6, rtol=1e-6)
    assert weight.std() > 0.01
    assert sum(p.numel() for p in reward.parameters()) == sum(
        p.numel() for p in reward.tower.parameters()
    )


def test_a_head_in_safetensors_scores_alike(models: Path, tmp_path: Path):
    file = tmp_path / "head.safetensors"
    save_file(dict(torch.load(models / "2.pth", weights_only=True)), file)
    images = random_images(3, 3, 32, 32)
    reward = AestheticReward.from_pretrained(str(models / "clip"), str(file))
    assert torch.equal(reward(images, NO_PROMPTS), load(models, "2")(images, NO_PROMPTS))


@pytest.mark.parametrize("version", VERSIONS)
def test_gradient_equals_finite_differences(models: Path, version: str):
    reward = load(models, version, dtype=torch.float64)
    images = random_images(2, 3, 30, 26, dtype=torch.float64).requires_grad_()
    assert reward.weight.dtype == torch.float64
    assert torch.autograd.gradcheck(lambda x: reward(x, ["", ""]), images, fast_mode=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_head_stays_exact_in_half_precision_and_under_autocast(models: Path, version: str):
    exact, half = load(models, version), load(models, version, dtype=torch.bfloat16)
    images = random_images(3, 3, 32, 32)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.weight.dtype == half(images, NO_PROMPTS).dtype == torch.float32
    assert torch.equal(half.weight, exact.weight)
    expected = exact(images, NO_PROMPTS)
    torch.testing.assert_close(half(images, NO_PROMPTS), expected, atol=0.3, rtol=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(exact(images, NO_PROMPTS), expected)


@pytest.mark.parametrize("version", VERSIONS)
def test_it_is_frozen_and_recomputes_layers_if_asked(models: Path, version: str):
    images = random_images(3, 3, 32, 32).requires_grad_()
    gradients = []
    for checkpointing in (False, True):
        reward = load(models, version, gradient_checkpointing=checkpointing)
        nn.Sequential(reward).train()
        assert not any(module.training for module in reward.modules())
        assert not any(parameter.requires_grad for parameter in reward.parameters())
        gradients += torch.autograd.grad(reward(images, NO_PROMPTS).sum(), images)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_plan_reads_no_tower(models: Path, tmp_path: Path, version: str):
    tower = shutil.copytree(tower_of(models, version), tmp_path / "tower")
    (tower / "model.safetensors").write_bytes(b"damaged")
    with torch.device("meta"):
        reward = AestheticReward.from_pretrained(str(tower), str(models / f"{version}.pth"))
        score = reward(torch.empty(2, 3, 40, 40), ["", ""])
    assert score.is_meta
    assert score.shape == (2,)
    assert {t.device.type for t in (*reward.parameters(), *reward.buffers())} == {"meta"}


# --- Preprocessing


@pytest.mark.parametrize(
    ("height", "width"), [(64, 64), (40, 99), (99, 40), (24, 24), (7, 9), (3, 30), (1, 1)]
)
def test_siglip_preprocessing_equals_transformers(models: Path, height: int, width: int):
    array = np.random.default_rng(0).integers(64, 192, (height, width, 3), dtype=np.uint8)
    processor = SiglipImageProcessorPil.from_pretrained(models / "siglip")
    expected = processor(Image.fromarray(array), return_tensors="pt")["pixel_values"]
    images = torch.from_numpy(array).permute(2, 0, 1)[None] / 255
    found = preprocess(images, read_processor(models / "siglip", SIGLIP_SIZE))
    assert found.shape == expected.shape
    assert (found - expected).abs().max() * 0.5 < 1.5 / 255  # see test_clip_reward.py
    assert (found - expected).abs().mean() * 0.5 < 0.5 / 255


def test_another_folder_gives_siglips_preprocessing(models: Path, tmp_path: Path):
    stated = (models / "siglip" / "preprocessor_config.json").read_text()
    (tmp_path / "preprocessor_config.json").write_text(stated.replace("3", "2", 1))
    assert load(models, "2.5", processor=str(tmp_path)).tower.image_settings.mode == "bilinear"
    assert load(models, "2.5").tower.image_settings.mode == "bicubic"
    with pytest.raises(ValueError, match=r"reward\.processor = 'no/such'"):
        load(models, "2.5", processor="no/such")


# --- Bad files


class Runs:
    """An object whose pickle runs code."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return (Path.touch, (Path("ran"),))


def save(content: object) -> Callable[[Path], object]:
    return lambda file: torch.save(content, file)


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def act(file: Path) -> None:
        content = dict(torch.load(file, weights_only=True))
        change(content)
        torch.save(content, file)

    return act


def half_of(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


NOT_ONE = "those of no aesthetic predictor; on a CLIP, give LAION"
FAULTS: list[tuple[str, Callable[[Path], object], str]] = [
    ("2", lambda file: file.unlink(), "there is no file"),
    ("2", half_of, "cannot be read"),
    ("1", half_of, "cannot be read"),
    ("2", lambda file: file.write_bytes(b""), "cannot be read"),
    ("2", save({"mlp.layers.0.weight": torch.zeros(3)}), NOT_ONE),  # ImageReward's
    ("2", save({"visual.proj": torch.zeros(3)}), NOT_ONE),  # HPS's
    ("2", save({}), "holds no named tensors"),
    ("2", save({"layers.0.weight": Runs()}), "holds more than weights"),
    ("2", lambda file: file.write_bytes(pickle.dumps(Runs())), "holds more than weights"),
    ("2.5", edit(lambda own: own.update(extra=Runs())), "holds more than weights"),
    ("2", edit(lambda own: own.pop("layers.4.bias")), "1 weights are missing (layers.4.bias)"),
    ("2.5", edit(lambda own: own.pop("scoring_head.8.weight")), "(scoring_head.8.weight)"),
    ("1", edit(lambda own: own.pop("bias")), "1 weights are missing (bias)"),
    (
        "2",
        edit(lambda own: [own.pop(f"layers.{i}.{kind}") for i in (4, 6, 7) for kind in KINDS]),
        "6 weights are missing",
    ),
    ("2", edit(lambda own: own.update({"layers.9.bias": torch.ones(1)})), "unexpected"),
    ("1", edit(lambda own: own["weight"].view(-1)[3:4].fill_(torch.nan)), "NaN or infinity"),
    ("2", edit(lambda own: own["layers.6.bias"].fill_(torch.inf)), "(layers.6.bias)"),
    ("2", lambda file: write_head(file, "2", 12), "another width"),
    ("2.5", lambda file: write_head(file, "2.5", CLIP_WIDTH), "another width"),
    ("1", lambda file: write_head(file, "1", 512), "(1, 512) in the file, (1, 16) in the network"),
    ("2", lambda file: write_head(file, "2.5"), "model_type 'clip', not 'siglip'"),
    ("2.5", lambda file: write_head(file, "2"), "model_type 'siglip', not 'clip'"),
]
KINDS = ("weight", "bias")


@pytest.mark.parametrize(("version", "damage", "expected"), FAULTS)
def test_a_bad_head_is_refused(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    damage: Callable[[Path], object],
    expected: str,
):
    monkeypatch.chdir(tmp_path)
    file = Path(shutil.copy(models / f"{version}.pth", tmp_path / "head.pth"))
    damage(file)
    with pytest.raises(ValueError) as refused:
        AestheticReward.from_pretrained(str(tower_of(models, version)), str(file))
    if "model_type" not in expected:
        assert_explained(str(refused.value), "reward.predictor", str(file))
    assert expected in str(refused.value)
    assert not Path("ran").exists()


def test_a_head_with_activations_is_not_read_as_affine(tmp_path: Path):
    """The variant with ReLU, ava+logos-l14-reluMSE, counts its layers otherwise."""
    names = {f"layers.{i}.{kind}": torch.zeros(1) for i in (0, 3, 6, 9, 11) for kind in KINDS}
    torch.save(names, tmp_path / "relu.pth")
    with pytest.raises(ValueError, match="unexpected"):
        read_head(str(tmp_path / "relu.pth")).check(CLIP_WIDTH)


def test_the_reference_has_the_published_layers():
    """The test's own heads have dropout, which no score may feel."""
    head = PublishedHead("2.5", 4).train()
    assert {*head.state_dict()} == {f"scoring_head.{i}.{k}" for i in range(0, 9, 2) for k in KINDS}
    assert {*PublishedHead("2", 4).state_dict()} == {
        f"layers.{i}.{kind}" for i in (0, 2, 4, 6, 7) for kind in KINDS
    }
