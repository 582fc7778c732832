"""The demo's supervised recipe: its pictures, its judge, what it holds out, and that it runs."""

import json
import random
from pathlib import Path

import pytest
from moons import (
    ALL_SHAPES,
    CONCEPT,
    NUM_HELD_OUT,
    NUM_OLD,
    NUM_TRAIN,
    old_scenes,
    split,
)
from torch.testing import assert_close

from sfumato.compose import DEMO_IMAGES, compose_train
from sfumato.demo.reader import read_image
from sfumato.demo.tokenizer import TEXT_LENGTH
from sfumato.demo.world import SHAPES, parse_caption, random_scene, render
from sfumato.images import load_images, save_image
from sfumato.run.run import train
from sfumato.training.distribution import Distribution

KILOBYTE = 2**10
FOLDERS = {"moons": NUM_TRAIN, "moons_held_out": NUM_HELD_OUT, "shapes": NUM_OLD}


def captions(folder: Path) -> list[str]:
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def write_images(folder: Path) -> None:
    """Write the shipped folders: moons and shapes for training, moons_held_out for validation."""
    parts = split()
    groups = {"moons": parts.train, "shapes": old_scenes(), "moons_held_out": parts.held_out}
    for name, scenes in groups.items():
        (folder / name).mkdir(parents=True)
        lines = []
        images = render(scenes, random.Random(name), ALL_SHAPES)
        for i, (scene, image) in enumerate(zip(scenes, images, strict=True)):
            save_image(image, folder / name / f"{i:03d}.png")
            row = {"file_name": f"{i:03d}.png", "text": scene.caption()}
            lines.append(json.dumps(row) + "\n")
        (folder / name / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def test_the_shipped_pictures_are_those_of_the_function(tmp_path: Path) -> None:
    write_images(tmp_path)
    files = sorted(file.relative_to(tmp_path) for file in tmp_path.rglob("*.*"))
    assert files == sorted(file.relative_to(DEMO_IMAGES) for file in DEMO_IMAGES.glob("*/*.*"))
    for name, count in FOLDERS.items():
        assert captions(tmp_path / name) == captions(DEMO_IMAGES / name)
        pictures = [file for file in files if file.parts[0] == name and file.suffix == ".png"]
        assert len(pictures) == count
        made, shipped = (
            load_images([folder / file for file in pictures]) for folder in (tmp_path, DEMO_IMAGES)
        )
        assert_close(shipped, made, rtol=0, atol=1.01 / 255)  # rounding to 8 bits
    size = sum(file.stat().st_size for file in DEMO_IMAGES.rglob("*") if file.is_file())
    assert size < 300 * KILOBYTE


@pytest.mark.parametrize("name", FOLDERS)
def test_pictures_show_what_their_captions_say(name: str) -> None:
    files = sorted((DEMO_IMAGES / name).glob("*.png"))
    for caption, image in zip(captions(DEMO_IMAGES / name), load_images(files), strict=True):
        assert read_image(image, ALL_SHAPES) == parse_caption(caption, ALL_SHAPES)


def test_held_out_scenes_are_in_no_training_caption() -> None:
    parts = split()
    scenes = [*parts.train, *parts.held_out, *parts.rest]
    assert len(scenes) == len(set(scenes)) == 8 * 7 * 3 * 5
    trained = set(captions(DEMO_IMAGES / "moons"))
    assert trained == {scene.caption() for scene in parts.train}
    assert trained.isdisjoint(scene.caption() for scene in (*parts.held_out, *parts.rest))
    for i in range(1, 5):  # each color, size, background and place has been seen with the concept
        assert {s.values()[i] for s in parts.train} == {s.values()[i] for s in scenes}
    assert all(scene.shape in SHAPES for scene in old_scenes())


def test_the_concept_is_new_to_the_world() -> None:
    assert CONCEPT not in SHAPES
    with pytest.raises(ValueError, match="names no shape"):
        parse_caption(f"a {CONCEPT}")


def test_the_judge_tells_the_concept_from_the_old_shapes() -> None:
    rng = random.Random(1)
    scenes = [*split().rest[:200], *(random_scene(rng) for _ in range(200))]
    seen = [read_image(image, ALL_SHAPES) for image in render(scenes, rng, ALL_SHAPES)]
    assert sum(want == found for want, found in zip(scenes, seen, strict=True)) >= 396


def test_captions_fit_the_text_encoder() -> None:
    from transformers import CLIPTokenizer

    config, _ = compose_train(["recipe=demo_finetune"])
    tokenizer = CLIPTokenizer.from_pretrained(Path(config.model.pretrained) / "tokenizer")
    parts = split()
    for scene in (*parts.train, *parts.held_out, *parts.rest, *old_scenes()):
        assert len(tokenizer(scene.caption())["input_ids"]) <= TEXT_LENGTH


def test_two_steps_of_the_recipe_run_whole(tmp_path: Path) -> None:
    config, plain = compose_train(
        [
            "recipe=demo_finetune",
            f"runs_dir={tmp_path}",
            "training.max_steps=2",
            "training.checkpoint_every_steps=1",
            "training.micro_batch_size=2",
            "training.global_batch_size=2",
            "training.tensorboard=false",
            "sampler.num_inference_steps=2",
            "validation.num_images=2",
            "validation.every_steps=2",
            "validation.loss_images=4",
        ]
    )
    assert config.data.images.sources["moons"].path == str(DEMO_IMAGES / "moons")
    outcome = train(config, plain, Distribution(config.training))
    run = tmp_path / config.name
    assert outcome.step == 2
    assert (run / "export" / "lora" / "pytorch_lora_weights.safetensors").exists()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [record["validation/loss"] for record in records if "validation/loss" in record]
    assert len(losses) == 2  # before and after
    pairs = (run / "samples" / "step-000002" / "pairs.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in pairs]
    assert prompts == captions(DEMO_IMAGES / "moons_held_out")[:2]
