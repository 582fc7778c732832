"""ImageReward's networks in plain tensors, small and random, by the names of the published file."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertTokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS)]
VISION = {
    "hidden_size": 24,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "vocab_size": len(VOCABULARY) + 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
PUBLISHED = {  # beside the sizes
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "model_type": "bert",
    "pad_token_id": 0,
    "add_type_embeddings": False,
    "encoder_width": 768,
    "add_cross_attention": True,
}
HEAD = (1024, 128, 64, 16, 1)


def write_tiny_image_reward(
    folder: Path, vision: Mapping[str, int] = VISION, text: Mapping[str, int] = TEXT
) -> dict[str, Tensor]:
    """Write ImageReward.pt, med_config.json and a tokenizer; return the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    state = random_state(vision, text)
    torch.save(state, folder / "ImageReward.pt")
    settings = {**PUBLISHED, **text, "vision_config": vision}
    (folder / "med_config.json").write_text(json.dumps(settings))
    vocabulary = {token: index for index, token in enumerate(VOCABULARY)}
    BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    return state


def random_state(vision: Mapping[str, int], text: Mapping[str, int]) -> dict[str, Tensor]:
    """Return weights of all networks in the published file."""
    width, deep = vision["hidden_size"], vision["intermediate_size"]
    patch, patches = vision["patch_size"], (vision["image_size"] // vision["patch_size"]) ** 2
    shapes: dict[str, tuple[int, ...]] = {
        "blip.visual_encoder.cls_token": (1, 1, width),
        "blip.visual_encoder.pos_embed": (1, patches + 1, width),
        "blip.visual_encoder.patch_embed.proj.weight": (width, 3, patch, patch),
        "blip.visual_encoder.patch_embed.proj.bias": (width,),
    }

    def linear(name: str, rows: int, columns: int) -> None:
        shapes.update({f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)})

    def norm(name: str, size: int) -> None:
        shapes.update({f"{name}.weight": (size,), f"{name}.bias": (size,)})

    for i in range(vision["num_hidden_layers"]):
        block = f"blip.visual_encoder.blocks.{i}"
        linear(f"{block}.attn.qkv", 3 * width, width)
        linear(f"{block}.attn.proj", width, width)
        linear(f"{block}.mlp.fc1", deep, width)
        linear(f"{block}.mlp.fc2", width, deep)
        norm(f"{block}.norm1", width)
        norm(f"{block}.norm2", width)
    norm("blip.visual_encoder.norm", width)
    size, words = text["hidden_size"], text["intermediate_size"]
    root = "blip.text_encoder."
    shapes[f"{root}embeddings.word_embeddings.weight"] = (text["vocab_size"], size)
    places = text["max_position_embeddings"]
    shapes[f"{root}embeddings.position_embeddings.weight"] = (places, size)
    norm(f"{root}embeddings.LayerNorm", size)
    for i in range(text["num_hidden_layers"]):
        layer = f"{root}encoder.layer.{i}"
        for kind, seen in (("attention", size), ("crossattention", width)):
            linear(f"{layer}.{kind}.self.query", size, size)
            linear(f"{layer}.{kind}.self.key", size, seen)
            linear(f"{layer}.{kind}.self.value", size, seen)
            linear(f"{layer}.{kind}.output.dense", size, size)
            norm(f"{layer}.{kind}.output.LayerNorm", size)
        linear(f"{layer}.intermediate.dense", words, size)
        linear(f"{layer}.output.dense", size, words)
        norm(f"{layer}.output.LayerNorm", size)
    linear("blip.vision_proj", 16, width)
    linear("blip.text_proj", 16, size)
    for place, a, b in zip((0, 2, 4, 6, 7), (size, *HEAD), HEAD, strict=False):
        linear(f"mlp.layers.{place}", b, a)
    rng = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(shape, generator=rng) * (0.2 if name.startswith("mlp") else 0.25)
        for name, shape in shapes.items()
    }
    state[f"{root}embeddings.position_ids"] = torch.arange(places)[None]
    return state


def score(state: dict[str, Tensor], pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Return ImageReward's score of normalised pixels, written from vit.py, med.py and the paper.

    Args:
        mask: 1 where a token counts.
    """
    s = state

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * s[f"{name}.weight"] + s[f"{name}.bias"]

    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | float = 0.0) -> Tensor:
        q, k, v = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (q, k, v))
        logits = q @ k.mT / q.shape[-1] ** 0.5 + bias
        return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)

    root = "blip.visual_encoder."
    embed = f"{root}patch_embed.proj"
    x = F.conv2d(pixels, s[f"{embed}.weight"], s[f"{embed}.bias"], stride=VISION["patch_size"])
    x = torch.cat([s[f"{root}cls_token"].expand(len(x), 1, -1), x.flatten(2).mT], 1)
    x = x + s[f"{root}pos_embed"]
    for i in range(VISION["num_hidden_layers"]):
        block = f"{root}blocks.{i}"
        qkv = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(f"{block}.attn.proj", attend(*qkv, VISION["num_attention_heads"]))
        inner = F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6)))
        x = x + linear(f"{block}.mlp.fc2", inner)
    seen = norm(f"{root}norm", x, 1e-6)
    root, heads = "blip.text_encoder.", TEXT["num_attention_heads"]
    h = s[f"{root}embeddings.word_embeddings.weight"][ids]
    h = h + s[f"{root}embeddings.position_embeddings.weight"][: ids.shape[1]]
    h = norm(f"{root}embeddings.LayerNorm", h, 1e-12)
    hidden = torch.where(mask[:, None, None] > 0, 0.0, -torch.inf)
    for i in range(TEXT["num_hidden_layers"]):
        layer = f"{root}encoder.layer.{i}"
        for kind, keys, bias in (("attention", None, hidden), ("crossattention", seen, 0.0)):
            other = h if keys is None else keys
            q = linear(f"{layer}.{kind}.self.query", h)
            k, v = (linear(f"{layer}.{kind}.self.{each}", other) for each in ("key", "value"))
            out = linear(f"{layer}.{kind}.output.dense", attend(q, k, v, heads, bias))
            h = norm(f"{layer}.{kind}.output.LayerNorm", out + h, 1e-12)
        inner = F.gelu(linear(f"{layer}.intermediate.dense", h))
        h = norm(f"{layer}.output.LayerNorm", linear(f"{layer}.output.dense", inner) + h, 1e-12)
    y = h[:, 0]
    for place in (0, 2, 4, 6, 7):
        y = linear(f"mlp.layers.{place}", y)
    return (y[:, 0] - 0.16717362830052426) / 1.0333394966054072
