"""Rebuild of the shipped demo models: `sfumato demo --rebuild DIR`, a ladder of stages.

Stages here make what only the demo has: rendered data, an autoencoder, text models. Ordinary
recipes prepare the data, and train the base model and the reward. A stage writes one folder and is
skipped if that folder exists, so a stopped rebuild continues where it was.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from sfumato.compose import compose_command
from sfumato.demo.autoencoder import train_autoencoder, train_decoder
from sfumato.demo.classifier import write_classifier
from sfumato.demo.emoji_text import train_emoji_clip, train_emoji_text, write_emoji_tokenizer
from sfumato.demo.preference import write_pairs
from sfumato.demo.steps import draw_scenes, prompt_of
from sfumato.demo.text import train_text
from sfumato.demo.text_image import train_text_image
from sfumato.demo.tokenizer import world_words, write_tokenizer
from sfumato.demo.world import render
from sfumato.files import RECORD, new_folder, read_object, refuse_others, write_text
from sfumato.images import save_image
from sfumato.launch.launch import launch

AT_ONCE = 256  # pictures


def write_pictures(folder: Path, parts: Path, count: int) -> None:
    """Write pictures and metadata.jsonl; captions are complete in `text`, partial in `short`."""
    rng = random.Random("pictures")
    lines = []
    for start in range(0, count, AT_ONCE):
        scenes = draw_scenes(rng, min(AT_ONCE, count - start))
        for i, (scene, image) in enumerate(zip(scenes, render(scenes, rng), strict=True), start):
            save_image(image, folder / f"{i:05d}.png")
            captions = {"text": scene.caption(), "short": prompt_of(scene, rng).caption()}
            lines.append(json.dumps({"file_name": f"{i:05d}.png", **captions}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


STAGES: dict[str, Callable[[Path, Path, int], None]] = {
    "tokenizer": lambda folder, _parts, _count: write_tokenizer(folder, world_words()),
    "autoencoder": train_autoencoder,
    "text_image": train_text_image,
    "pairs": write_pairs,
    "text": train_text,
    "decoder": train_decoder,
    "pictures": write_pictures,
    "emoji_tokenizer": write_emoji_tokenizer,
    "emoji_text": train_emoji_text,
    "emoji_text_image": train_emoji_clip,
    "emoji_classifier": write_classifier,
}
SHIP = "ship"


def rebuild(out: Path) -> None:
    """Train every model of the demo by recipe=ladder/demo, and write the package's to out/model.

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
        count: training steps, pictures or pairs.

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
    """Write the package's folders base, reward and text_image, with float16 weights."""
    model = out / "model"
    with new_folder(model, older=_older(out)) as folder:
        runs, leave = out / "runs", shutil.ignore_patterns(RECORD)
        shutil.copytree(runs / "base_64" / "export" / "pipeline", folder / "base")
        shutil.copytree(runs / "reward" / "export" / "reward", folder / "reward")
        shutil.copytree(out / "parts" / "text_image", folder / "text_image", ignore=leave)
        for path in folder.rglob("*.safetensors"):
            halve(path)
        for path in folder.rglob("config.json"):
            settings = read_object(path, "run the stage that made it again")
            settings.pop("_name_or_path", None)  # a path of this machine
            path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    print(f"the models are in {model}; copy them to sfumato/demo/model to ship them")


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
