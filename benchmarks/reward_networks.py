"""Files of rewards with random networks of 25 to 65 M parameters, in the published layouts."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from bare_rewards import IMAGENET_MEAN, IMAGENET_STD
from networks import SIZES, write_reward
from safetensors.torch import load_file, save_file
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # published layouts

from tiny_aesthetic import write_head, write_tiny_siglip
from tiny_classifiers import STATED
from tiny_clip import byte_vocabulary, write_tokenizer
from tiny_hps import FILE, save
from tiny_image_reward import TEXT, write_tiny_image_reward
from tiny_open_clip import CONFIG, OpenClipText, OpenClipVision

SIDE, PATCH, WIDTH, LAYERS, HEADS = 224, 16, 512, 8, 8
TOWER = {
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}


def write_rewards(folder: Path) -> None:
    """Write clip, hps, blip, siglip and resnet, and the heads 2.pth and 2.5.pth."""
    pixels = {"image_size": SIDE, "patch_size": PATCH}
    write_reward(folder / "clip", SIZES["6m"])
    turn_round(folder / "clip" / "model.safetensors")
    write_hps(folder / "hps")
    write_tiny_image_reward(
        folder / "blip",
        {**TOWER, **pixels},
        {**TOWER, "vocab_size": TEXT["vocab_size"], "max_position_embeddings": 512},
    )
    write_tiny_siglip(folder / "siglip", **TOWER, **pixels)
    write_resnet(folder / "resnet")
    for version in ("2", "2.5"):
        write_head(folder / f"{version}.pth", version, WIDTH)


def turn_round(file: Path) -> None:
    """Turn the images' embeddings round: most cosines are above 0 then, as CLIPScore needs."""
    tensors = load_file(file)
    tensors["visual_projection.weight"] *= -1
    save_file(tensors, file, metadata={"format": "pt"})


def write_hps(folder: Path) -> None:
    """Write OpenCLIP's weights as HPSv2.1's pickle has them, settings and tokenizer."""
    write_tokenizer(folder, vocabulary := byte_vocabulary())
    torch.manual_seed(0)
    text = OpenClipText(len(vocabulary), WIDTH, 6, heads=HEADS, dim=WIDTH)
    size: dict[str, Any] = {"heads": HEADS, "size": SIDE, "patch": PATCH, "dim": WIDTH}
    vision = OpenClipVision(WIDTH, LAYERS, **size, quick=False)
    state = {f"visual.{name}": tensor for name, tensor in vision.state_dict().items()}
    state |= {**text.state_dict(), "logit_scale": torch.tensor(2.5)}
    save(state, folder / FILE)
    sizes = {"image_size": SIDE, "patch_size": PATCH, "head_width": WIDTH // HEADS}
    words = {"context_length": 77, "vocab_size": len(vocabulary), "heads": HEADS, "layers": 6}
    model = {
        "embed_dim": WIDTH,
        "vision_cfg": {**sizes, "layers": LAYERS, "width": WIDTH},
        "text_cfg": {**words, "width": WIDTH},
    }
    (folder / CONFIG).write_text(json.dumps({"model_cfg": model}))


def write_resnet(folder: Path) -> None:
    """Write a ResNet-50 whose running means are of random pictures."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config: Any = ResNetConfig
    model: Any = ResNetForImageClassification(config(num_labels=1000))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(pixel_values=torch.randn(4, 3, SIDE, SIDE))
    model.save_pretrained(folder)
    stated = {"size": SIDE, "image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
    (folder / "preprocessor_config.json").write_text(json.dumps({**STATED["resnet"], **stated}))
