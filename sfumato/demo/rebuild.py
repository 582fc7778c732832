"""Makes the shipped demo models again: `sfumato demo --rebuild DIR`, a ladder of stages.

What only the demo has (a renderer, an autoencoder, text models, a reward) is a stage here; data and
base model are prepared and trained by the recipes that anybody's would be. A stage is one folder,
and is skipped where that is complete, so a rebuild that was stopped goes on where it was.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from sfumato.compose import compose_command
from sfumato.demo.autoencoder import train_autoencoder, train_decoder
from sfumato.demo.pictures import write_pictures
from sfumato.demo.preference import train_preference
from sfumato.demo.text import train_text
from sfumato.demo.text_image import train_text_image
from sfumato.demo.tokenizer import write_tokenizer
from sfumato.launch.launch import launch

STAGES: dict[str, Callable[[Path, Path, int], None]] = {
    "tokenizer": lambda folder, _parts, _count: write_tokenizer(folder),
    "autoencoder": train_autoencoder,
    "text_image": train_text_image,
    "reward": train_preference,
    "text": train_text,
    "decoder": train_decoder,
    "pictures": write_pictures,
}
SHIP = "ship"


def rebuild(out: Path) -> None:
    """Train every model of the demo by recipe=ladder/demo; the shipped folders are in out/model.

    Raises:
        ValueError: if a stage fails or is stopped.
    """
    settings, _ = compose_command("launch", ["recipe=ladder/demo", f"given.out={out}"])
    if not launch(settings):
        raise ValueError("the rebuild was stopped; the same command goes on where it was")


def run_stage(out: Path, name: str, count: int) -> None:
    """Run one stage that only the demo has, into out/parts/NAME, or `ship` into out/model.

    Args:
        count: training steps, or pictures.

    Raises:
        ValueError: if there is no such stage, or it was made with another count.
    """
    if name == SHIP:
        ship(out)
        return
    if name not in STAGES:
        raise ValueError(f"--stage {name} is none; there are {', '.join([*STAGES, SHIP])}")
    parts = out / "parts"
    note = parts / f".{name}.count"
    if (parts / name).exists():
        before = note.read_text() if note.exists() else str(count)
        if before != str(count):
            raise ValueError(
                f"{parts / name} was made with --count={before}, and now it is {count}; remove it "
                "and what was made of it, or choose another folder"
            )
        print(f"{name}: done before")
        return
    beside = parts / f".{name}.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    STAGES[name](beside, parts, count)
    note.write_text(str(count))
    beside.rename(parts / name)


def ship(out: Path) -> None:
    """Write the three folders of the package: base, reward, text_image; weights as float16."""
    model = out / "model"
    beside = out / ".model.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(out / "runs" / "base_64" / "export" / "pipeline", beside / "base")
    for name in ("reward", "text_image"):
        shutil.copytree(out / "parts" / name, beside / name)
    for file in beside.rglob("*.safetensors"):
        halve(file)
    for file in beside.rglob("config.json"):  # where a part was loaded from says nothing elsewhere
        settings = json.loads(file.read_text())
        settings.pop("_name_or_path", None)
        file.write_text(json.dumps(settings, indent=2) + "\n")
    shutil.rmtree(model, ignore_errors=True)
    beside.rename(model)
    print(f"the models are in {model}; copy them to sfumato/demo/model to ship them")


def halve(file: Path) -> None:
    """Rewrite a safetensors file with its float32 tensors as float16."""
    from safetensors.torch import load_file, save_file

    tensors = {
        name: tensor.half() if tensor.dtype == torch.float32 else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
