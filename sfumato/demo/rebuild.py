"""Makes the shipped demo models again: `sfumato demo --rebuild DIR`.

Each stage writes one folder and is skipped where that is complete, so a rebuild that was stopped
goes on where it was.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from sfumato.demo.autoencoder import train_autoencoder, train_decoder
from sfumato.demo.base import assemble, train_base
from sfumato.demo.preference import train_preference
from sfumato.demo.text_image import train_text_image
from sfumato.demo.tokenizer import write_tokenizer

# The folder of each stage and what makes it, in order.
STAGES: dict[str, Callable[[Path, Path], None]] = {
    "tokenizer": lambda folder, _: write_tokenizer(folder),
    "autoencoder": lambda folder, _: train_autoencoder(folder, steps=1800),
    "text_image": lambda folder, parts: train_text_image(folder, parts, steps=600),
    "base": lambda folder, parts: train_base(folder, parts, steps=3200),
    "decoder": lambda folder, parts: train_decoder(folder, parts, steps=1500),
    "reward": lambda folder, parts: train_preference(folder, parts, steps=350),
}


def rebuild(out: Path) -> None:
    """Train every model of the demo into out/parts, and put the shipped folders into out/model."""
    parts = out / "parts"
    for name, stage in STAGES.items():
        if (parts / name).exists():
            print(f"{name}: done before")
            continue
        beside = parts / f".{name}.tmp"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        stage(beside, parts)
        beside.rename(parts / name)
    ship(parts, out / "model")
    print(f"the models are in {out / 'model'}; copy them to sfumato/demo/model to ship them")


def ship(parts: Path, model: Path) -> None:
    """Write the three folders of the package: base, reward, text_image; weights as float16."""
    shutil.rmtree(model, ignore_errors=True)
    assemble(model / "base", parts)
    for name in ("reward", "text_image"):
        shutil.copytree(parts / name, model / name)
    for file in model.rglob("*.safetensors"):
        halve(file)


def halve(file: Path) -> None:
    """Rewrite a safetensors file with its float32 tensors as float16."""
    from safetensors.torch import load_file, save_file

    tensors = {
        name: tensor.half() if tensor.dtype == torch.float32 else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
