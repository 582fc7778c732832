"""Image classifiers of random weights, in the files of transformers' published ones."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

SIDE = 32
LABELS = {0: "tabby, tabby cat", 1: "crane", 2: "espresso", 3: "crane, lifting crane", 4: "7"}
STATED: dict[str, dict[str, Any]] = {
    "resnet": {
        "feature_extractor_type": "ConvNextFeatureExtractor",
        "size": SIDE,
        "crop_pct": 0.875,
        "resample": 3,
    },
    "vit": {"size": SIDE},  # without a class, as older releases
    "mobilenet_v2": {
        "image_processor_type": "MobileNetV2ImageProcessor",
        "size": {"shortest_edge": 40},
        "crop_size": {"height": SIDE, "width": SIDE},
        "resample": 2,
    },
}


def write_classifier(folder: Path, kind: str) -> Path:
    """Write config, weights and image processor of a kind; the weights are always the same."""
    from transformers import (
        MobileNetV2Config,
        MobileNetV2ForImageClassification,
        ResNetConfig,
        ResNetForImageClassification,
        ViTConfig,
        ViTForImageClassification,
    )

    names = {"id2label": LABELS, "label2id": {name: i for i, name in LABELS.items()}}
    small: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any
        match kind:
            case "resnet":
                sizes = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1]}
                model = ResNetForImageClassification(ResNetConfig(**sizes, **names))
            case "vit":
                sizes = {"image_size": SIDE, "patch_size": 8, "intermediate_size": 64}
                config = ViTConfig(**small, **sizes, **names, hidden_dropout_prob=0.5)
                model = ViTForImageClassification(config)
            case _:
                config = MobileNetV2Config(depth_multiplier=0.1, min_depth=4, **names)
                model = MobileNetV2ForImageClassification(config)
        for name, tensor in model.named_parameters():
            if tensor.ndim > 1:
                nn.init.normal_(
                    tensor, std=0.3 if "classifier" in name else tensor[0].numel() ** -0.5
                )
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        with torch.no_grad():  # so that what reaches the last layer differs among pictures
            model.train()(pixel_values=torch.randn(16, 3, SIDE, SIDE))
        model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(STATED[kind]))
    return folder
