"""Features of images by networks of transformers, as those give them; refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_aesthetic import write_tiny_siglip
from tiny_classifiers import STATED, write_classifier
from tiny_clip import write_tiny_clip

from sfumato.clip import load_vision, preprocess

SIDE = 32


def images_of(count: int = 3, side: int = 40) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def write_dinov2(folder: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    sizes: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Dinov2Config(**sizes, image_size=SIDE, patch_size=8, initializer_range=0.2)
        Dinov2Model(config).save_pretrained(folder)
    stated = {"image_processor_type": "BitImageProcessor", "resample": 3, "do_rescale": True}
    stated |= {"size": {"shortest_edge": 36}, "crop_size": {"height": SIDE, "width": SIDE}}
    stated |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (folder / "preprocessor_config.json").write_text(json.dumps(stated))


@pytest.mark.parametrize(
    ("kind", "width"), [("clip", 16), ("dinov2", 24), ("siglip", None), ("resnet", 32), ("vit", 32)]
)
def test_features_are_those_of_transformers(tmp_path: Path, kind: str, width: int | None) -> None:
    from transformers import (
        AutoModelForImageClassification,
        CLIPModel,
        Dinov2Model,
        SiglipVisionModel,
    )

    if kind in STATED:
        write_classifier(tmp_path, kind)
    else:
        write = {"clip": write_tiny_clip, "dinov2": write_dinov2, "siglip": write_tiny_siglip}
        write[kind](tmp_path)
    network = load_vision(str(tmp_path), "metric_features").train()
    images = images_of()
    found = network.features(images)
    pixels = preprocess(images, network.image_settings)
    with torch.no_grad():
        match kind:
            case "clip":
                clip = CLIPModel.from_pretrained(tmp_path).eval()
                pooled = clip.vision_model(pixel_values=pixels).pooler_output
                expected = clip.visual_projection(pooled)
            case "dinov2":
                expected = Dinov2Model.from_pretrained(tmp_path).eval()(pixels).pooler_output
            case "siglip":
                expected = SiglipVisionModel.from_pretrained(tmp_path).eval()(pixels).pooler_output
            case _:  # the last layer of what was taken gives the logits
                model: Any = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
                last = model.classifier if kind == "vit" else model.classifier[-1]
                torch.testing.assert_close(last(found), model(pixels).logits)
                expected = found
    torch.testing.assert_close(found, expected)
    assert found.dtype == torch.float32 and not found.requires_grad
    assert found.shape[1] == (width or found.shape[1])
    assert (found[0] - found[1]).abs().max() > 1e-4
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_one_image_has_the_features_that_it_has_among_others(tmp_path: Path) -> None:
    write_classifier(tmp_path, "vit")  # which has dropout
    network, images = load_vision(str(tmp_path), "x"), images_of()
    torch.testing.assert_close(network.features(images)[1:2], network.features(images[1:2]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no config.json"),
        ("{", "config.json is damaged"),
        ('{"model_type": "bert", "architectures": ["BertModel"]}', r"'bert' \(BertModel\); choose"),
        ("{}", "'None'"),
    ],
)
def test_what_is_no_image_tower_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"metric_features = '.*' cannot .*: .*{message}"):
        load_vision(str(tmp_path), "metric_features")


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    write_dinov2(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"0")
    with pytest.raises(ValueError, match=r"metric_features = .*cannot give features"):
        load_vision(str(tmp_path), "metric_features")
