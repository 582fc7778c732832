"""OpenCLIP's two towers as its own code has them, of torch's modules alone, with random weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_clip import write_tiny_clip
from torch import Tensor, nn
from torch.nn.functional import gelu, normalize

WEIGHTS = "open_clip_model.safetensors"
CONFIG = "open_clip_config.json"


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def blocks(width: int, heads: int, layers: int) -> nn.Module:
    """Return a transformer with OpenCLIP's names."""
    made = []
    for _ in range(layers):
        each = nn.Module()
        each.add_module("ln_1", nn.LayerNorm(width))
        each.add_module("ln_2", nn.LayerNorm(width))
        each.add_module("attn", nn.MultiheadAttention(width, heads, batch_first=True))
        mlp = nn.Module()
        mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        mlp.add_module("c_proj", nn.Linear(4 * width, width))
        each.add_module("mlp", mlp)
        made.append(each)
    transformer = nn.Module()
    transformer.add_module("resblocks", nn.ModuleList(made))
    return transformer


def run(
    transformer: nn.Module,
    x: Tensor,
    act: Callable[[Tensor], Tensor],
    mask: Tensor | None,
    skip: int,
) -> Tensor:
    """Run all blocks but the last `skip`."""
    each: Any
    for each in list(transformer.get_submodule("resblocks").children())[: -skip or None]:
        y = each.ln_1(x)
        x = x + each.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        x = x + each.mlp.c_proj(act(each.mlp.c_fc(each.ln_2(x))))
    return x


class OpenClipText(nn.Module):
    """OpenCLIP's text tower."""

    def __init__(
        self, vocabulary: int, width: int, layers: int, *, heads: int | None = None,
        length: int = 77, dim: int = 24, quick: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.act = quick_gelu if quick else gelu
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(0.1 * torch.randn(length, width))
        self.transformer = blocks(width, heads or width // 64, layers)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, dim))

    def states(self, tokens: Tensor, skip: int = 0) -> Tensor:
        """Return the states after the final norm, without the last `skip` layers."""
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        mask = torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1)
        return self.ln_final(run(self.transformer, x, self.act, mask, skip))

    def embed(self, tokens: Tensor) -> Tensor:
        pooled = self.states(tokens)[torch.arange(len(tokens)), tokens.argmax(1)]
        return normalize(pooled @ self.text_projection, dim=-1)


class OpenClipVision(nn.Module):
    """OpenCLIP's image tower."""

    def __init__(
        self, width: int, layers: int, *, heads: int, size: int, patch: int, dim: int, quick: bool
    ) -> None:
        super().__init__()
        self.act = quick_gelu if quick else gelu
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((size // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = blocks(width, heads, layers)
        self.proj = nn.Parameter(torch.randn(width, dim))

    def embed(self, pixels: Tensor) -> Tensor:
        x = self.conv1(pixels).flatten(2).mT
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
        x = self.ln_pre(x + self.positional_embedding)
        pooled = self.ln_post(run(self.transformer, x, self.act, None, 0)[:, 0])
        return normalize(pooled @ self.proj, dim=-1)


VISION = {"image_size": 32, "layers": 2, "width": 48, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 40, "width": 64, "heads": 4, "layers": 3}


def write_tiny_open_clip(
    folder: Path, *, quick: bool = False
) -> tuple[OpenClipText, OpenClipVision]:
    """Write a folder of OpenCLIP's layout with a tokenizer; return the two towers."""
    write_tiny_clip(folder)
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (folder / name).unlink()
    vocabulary = len(json.loads((folder / "vocab.json").read_text()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text = OpenClipText(
            vocabulary, TEXT["width"], TEXT["layers"], heads=TEXT["heads"],
            length=TEXT["context_length"], quick=quick,
        ).eval()  # fmt: skip
        vision = OpenClipVision(
            VISION["width"], VISION["layers"], heads=VISION["width"] // VISION["head_width"],
            size=VISION["image_size"], patch=VISION["patch_size"], dim=24, quick=quick,
        ).eval()  # fmt: skip
        for parameter in (*text.parameters(), *vision.parameters()):
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)
    state = {f"visual.{name}": tensor for name, tensor in vision.state_dict().items()}
    state |= {**text.state_dict(), "logit_scale": torch.tensor(2.5)}
    save_file(state, folder / WEIGHTS)
    model = {
        "embed_dim": 24,
        "vision_cfg": VISION,
        "text_cfg": {**TEXT, "vocab_size": vocabulary},
        **({"quick_gelu": True} if quick else {}),
    }
    (folder / CONFIG).write_text(json.dumps({"model_cfg": model}))
    return text, vision


def shard(folder: Path, name: str) -> None:
    """Cut a file of weights in two, with the index of transformers."""
    from safetensors.torch import load_file

    tensors = load_file(folder / name)
    names = sorted(tensors)
    stem = name.removesuffix(".safetensors")
    where = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"{stem}-{number:05d}-of-00002.safetensors"
        save_file({key: tensors[key] for key in part}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / name).unlink()
