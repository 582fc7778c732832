"""Rebuild of the shipped demo models: `sfumato demo --rebuild DIR`, a ladder of stages.

Stages here make what only the demo has: text models, the classifier's folder and the pictures to
fine-tune on. Ordinary recipes train the autoencoder, prepare the data, and train the base model. A
stage writes one folder and is skipped if that folder exists, so a stopped rebuild continues where
it was.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from sfumato.compose import compose_command
from sfumato.demo.classifier import write_classifier
from sfumato.demo.images import write_images
from sfumato.demo.text import train_text, write_words
from sfumato.demo.text_image import train_text_image
from sfumato.files import RECORD, new_folder, read_object, refuse_others, sha256_of, write_text
from sfumato.launch.launch import launch

STAGES: dict[str, Callable[[Path, Path, int], None]] = {
    "tokenizer": write_words,
    "classifier": write_classifier,
    "text": train_text,
    "text_image": train_text_image,
    "images": write_images,
}
SUMS = "SHA256SUMS"
SHIP = "ship"


def rebuild(out: Path) -> None:
    """Train every model of the demo by recipe=ladder/demo, and write the package's files.

    Raises:
        ValueError: if a stage fails or is stopped, or out/model holds files of others.
    """
    refuse_others(out / "model", _older(out))
    settings, _ = compose_command("launch", ["recipe=ladder/demo", f"given.out={out}"])
    if not launch(settings):
        raise ValueError("the rebuild was stopped; the same command continues it")


def run_stage(out: Path, name: str, count: int) -> None:
    """Run a stage of the demo into out/parts/NAME, or `ship` into out/model.

    Args:
        count: training steps.

    Raises:
        ValueError: if the stage is unknown, was run with another count, or cannot be written.
    """
    if name == SHIP:
        ship(out)
        return
    if name not in STAGES:
        raise ValueError(f"--stage {name} is unknown; choose one of {', '.join([*STAGES, SHIP])}")
    parts = out / "parts"
    note = parts / f".{name}.count"
    if (parts / name).exists():
        before = note.read_text() if note.exists() else str(count)
        if before != str(count):
            raise ValueError(
                f"{parts / name} was made with --count={before}, not --count={count}; remove it "
                "and the stages after it, or choose another folder"
            )
        print(f"{name}: done before")
        return
    with new_folder(parts / name) as folder:
        STAGES[name](folder, parts, count)
        write_text(note, str(count))


def ship(out: Path) -> None:
    """Write out/model: base, classifier and text_image with float16 weights, and their SHA-256."""
    model = out / "model"
    with new_folder(model, older=_older(out)) as folder:
        parts, leave = out / "parts", shutil.ignore_patterns(RECORD)
        export, card = out / "runs" / "base" / "export", shutil.ignore_patterns("README.md")
        shutil.copytree(export / "pipeline", folder / "base", ignore=card)
        for name in ("classifier", "text_image"):
            shutil.copytree(parts / name, folder / name, ignore=leave)
        for path in folder.rglob("*.safetensors"):
            halve(path)
        for path in folder.rglob("config.json"):
            settings = read_object(path, "run the stage that made it again")
            settings.pop("_name_or_path", None)  # a path of this machine
            path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != RECORD)
        sums = [f"{sha256_of(path)}  {path.relative_to(folder)}\n" for path in files]
        write_text(folder / SUMS, "".join(sums))
    print(f"the models are in {model}; copy them to sfumato/demo/model to ship them, and")
    print(f"{out / 'parts' / 'images'} to sfumato/demo/images")


def _older(out: Path) -> tuple[str, ...]:
    """Return what an older version's rebuild wrote to out/model; see `new_folder`."""
    marker = "base/model_index.json"
    return (marker, "base/*", "reward/*", "text_image/*") if (out / "parts").is_dir() else ()


def halve(path: Path) -> None:
    """Rewrite a safetensors file with its float32 tensors as float16."""
    from safetensors.torch import load_file, save_file

    tensors = {
        name: tensor.half() if tensor.dtype == torch.float32 else tensor
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
