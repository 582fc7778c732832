"""The demo's supervised recipe: its pictures, what they hold out, and that it runs."""

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from transformers import CLIPTokenizer

from sfumato.compose import DEMO_IMAGES, compose_train
from sfumato.demo.images import HELD_OUT, NEW_NAMES, OLD, TRAINED, read_rows
from sfumato.demo.pictures import IMAGE_SIZE, STYLES, THINGS, phrase
from sfumato.demo.tokenizer import TEXT_LENGTH
from sfumato.run.run import train
from sfumato.training.distribution import Distribution

KILOBYTE = 2**10
NEW = len(NEW_NAMES) * len(STYLES)
FOLDERS = {"new": NEW * TRAINED, "new_held_out": NEW * HELD_OUT, "old": OLD}


def captions(name: str) -> list[str]:
    return [row["text"] for row in read_rows(DEMO_IMAGES / name)]


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_has_its_pictures_and_a_caption_for_each(name: str) -> None:
    files = sorted((DEMO_IMAGES / name).glob("*.png"))
    assert sorted(row["file_name"] for row in read_rows(DEMO_IMAGES / name)) == [
        file.name for file in files
    ]
    assert len(files) == FOLDERS[name]
    for file in files:
        with Image.open(file) as picture:
            assert picture.size == (IMAGE_SIZE, IMAGE_SIZE)


def test_no_picture_is_in_two_folders_and_they_are_small() -> None:
    content = [file.read_bytes() for name in FOLDERS for file in (DEMO_IMAGES / name).glob("*.png")]
    assert len(set(content)) == len(content) == sum(FOLDERS.values())
    assert sum(map(len, content)) < 2048 * KILOBYTE


@pytest.mark.parametrize(("name", "each"), [("new", TRAINED), ("new_held_out", HELD_OUT)])
def test_each_new_name_is_shown_in_each_style(name: str, each: int) -> None:
    found = Counter(tuple(text.split(", ")[:2]) for text in captions(name))
    assert found == {(phrase(one), f"{style} style"): each for one in NEW_NAMES for style in STYLES}


def test_the_old_pictures_show_only_what_the_base_model_draws() -> None:
    assert {text.split(", ")[0] for text in captions("old")} <= set(map(phrase, THINGS))
    assert set(NEW_NAMES).isdisjoint(THINGS)


@pytest.mark.parametrize("name", FOLDERS)
def test_captions_fit_the_text_encoder(name: str) -> None:
    config, _ = compose_train(["recipe=demo_finetune"])
    tokenizer = CLIPTokenizer.from_pretrained(Path(str(config.model.pretrained)) / "tokenizer")
    assert max(map(len, tokenizer(captions(name)).input_ids)) <= TEXT_LENGTH


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
    assert config.data.images.sources["new"].path == str(DEMO_IMAGES / "new")
    outcome = train(config, plain, Distribution(config.training))
    run = tmp_path / config.name
    assert outcome.step == 2
    assert (run / "export" / "lora" / "pytorch_lora_weights.safetensors").exists()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [record["validation/loss"] for record in records if "validation/loss" in record]
    assert len(losses) == 2  # before and after
    pairs = (run / "samples" / "step-000002" / "pairs.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in pairs]
    assert prompts == captions("new_held_out")[:2]
