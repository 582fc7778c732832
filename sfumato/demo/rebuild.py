"""Makes the shipped demo models again: `sfumato demo --rebuild DIR`.

Each stage writes one folder and is skipped where that is complete, so a rebuild that was stopped
goes on where it was.
"""

import json
import shutil
from pathlib import Path

import torch

from sfumato.demo.autoencoder import train_autoencoder, train_decoder
from sfumato.demo.base import assemble, train_base
from sfumato.demo.preference import train_preference
from sfumato.demo.text_image import train_text_image
from sfumato.demo.tokenizer import write_tokenizer

STAGES = {
    "autoencoder": train_autoencoder,
    "text_image": train_text_image,
    "reward": train_preference,
    "base": train_base,
    "decoder": train_decoder,
}
STEPS = {"autoencoder": 1800, "text_image": 1500, "reward": 900, "base": 3600, "decoder": 1500}


def rebuild(out: Path) -> None:
    """Train every model of the demo into out/parts, and put the shipped folders into out/model."""
    parts = out / "parts"
    for name in ("tokenizer", *STAGES):
        if (parts / name).exists():
            print(f"{name}: done before")
            continue
        beside = parts / f".{name}.tmp"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        if name == "tokenizer":
            write_tokenizer(beside)
        else:
            STAGES[name](beside, parts, STEPS[name])
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
    for file in model.rglob("config.json"):  # where a part was loaded from says nothing elsewhere
        settings = json.loads(file.read_text())
        settings.pop("_name_or_path", None)
        file.write_text(json.dumps(settings, indent=2) + "\n")


def halve(file: Path) -> None:
    """Rewrite a safetensors file with its float32 tensors as float16."""
    from safetensors.torch import load_file, save_file

    tensors = {
        name: tensor.half() if tensor.dtype == torch.float32 else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
