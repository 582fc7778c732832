"""Pictures of emoji: which are drawn, their captions, what is held back, and what is left out."""

import io
import json
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import start
from transformers import CLIPTokenizer

from sfumato.cli import run_command
from sfumato.compose import compose_command
from sfumato.config import ModelConfig
from sfumato.demo import emoji, emoji_text
from sfumato.files import sha256_of
from sfumato.launch.jobs import read_jobs
from sfumato.models.registry import load_model
from sfumato.planning.memory import count_parameters
from sfumato.preparation.prepare import prepare
from sfumato.rewards.clip import ClipReward

THINGS = ("red-apple", "rocket", "grapes", "cactus", "orange-book")
BODY = '<circle cx="16" cy="16" r="12" fill="red"/>'


def write_package(folder: Path, package: emoji.Package, files: dict[str, object]) -> emoji.Package:
    """Write a package's file as npm does; return the package with its SHA-256."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / package.file, "w:gz") as tar:
        for name, content in files.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return replace(package, sha256=sha256_of(folder / package.file))


def drawings(**bodies: str) -> dict[str, object]:
    icons = {name.replace("_", "-"): {"body": body} for name, body in bodies.items()}
    return {"icons": icons, "width": 32, "height": 32}


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write tiny packages in the place of npm's; return the folder that holds them."""
    folder = tmp_path / "packages"
    every = drawings(**{name.replace("-", "_"): BODY for name in THINGS})
    noto = {
        "icons.json": {**every, "icons": {**every["icons"], "one-oclock": {"body": BODY}}},  # type: ignore[dict-item]
        "info.json": {"license": {"spdx": "Apache-2.0"}},
        "metadata.json": {
            "categories": {"Objects": [*THINGS, "one-oclock"], "Flags": ["white-flag"]}
        },
        "chars.json": {"1f34e": "red-apple"},
    }
    others = {"info.json": {"license": {"spdx": "MIT"}}}
    few = drawings(red_apple=BODY, rocket="<circle r=", grapes="<g/>", white_flag=BODY)
    contents: dict[str, dict[str, object]] = {
        "noto": noto,
        "classic": {**others, "icons.json": few},
        "fluent": {**others, "icons.json": every},
        "flat": {"icons.json": every, "info.json": {"license": {"spdx": "CC-BY-SA-4.0"}}},
    }
    for style, files in contents.items():
        monkeypatch.setitem(emoji.STYLES, style, write_package(folder, emoji.STYLES[style], files))
    words = {"\U0001f34e": ["red_apple", "fruit", "School"]}
    keywords = write_package(folder, emoji.KEYWORDS, {"dist/emoji-en-US.json": words})
    monkeypatch.setattr(emoji, "KEYWORDS", keywords)
    return folder


def test_counts_what_is_drawn_and_what_is_left_out(tmp_path: Path, packages: Path) -> None:
    counts = emoji.write_pictures(tmp_path, workers=1)

    assert counts == {
        "train": (5 + 1 + 5) * emoji.VARIANTS,  # clocks and flags are not drawn
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
        emoji.write_pictures(tmp_path / name, workers=1)
        files = sorted((tmp_path / name / "pictures").rglob("*"))
        found.append([(path.name, path.read_bytes()) for path in files if path.is_file()])
    assert found[0] == found[1]
    rows = (tmp_path / "a" / "pictures" / "train" / "metadata.jsonl").read_text().splitlines()
    names = [json.loads(row)["file_name"] for row in rows]
    assert len(set(names)) == len(names) == 11 * emoji.VARIANTS


def test_every_stage_of_the_ladder_runs(
    tmp_path: Path, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emoji, "HELD_NAMES", 0)
    monkeypatch.setattr(emoji, "HELD_STYLE_NAMES", 1)
    monkeypatch.setattr(emoji_text, "BATCH", 16)  # there are 66 pictures
    free = {"icons.json": drawings(red_apple=BODY), "info.json": {"license": {"spdx": "MIT"}}}
    monkeypatch.setitem(emoji.STYLES, "flat", write_package(packages, emoji.STYLES["flat"], free))
    ladder = ["recipe=ladder/emoji", f"given.out={tmp_path}"]
    ladder += [f"given.steps.{name}=1" for name in ("autoencoder", "text", "text_image", "base")]
    for job in read_jobs(compose_command("launch", ladder)[0]):
        match job.command:
            case "demo":
                run_command(["demo", *job.arguments])
            case "prepare":
                prepare(job.settings)
            case "train":
                few = [] if "recipe=autoencoder" in job.arguments else ["validation.num_images=1"]
                assert start([*job.arguments, *few]).step == 1
    runs = tmp_path / "runs"
    model = load_model(ModelConfig(pretrained=str(runs / "base" / "export" / "pipeline")))
    assert count_parameters(model.trained) < 12e6
    clip = ClipReward.from_pretrained(str(tmp_path / "parts" / "emoji_text_image"))
    images = torch.rand(2, 3, 64, 64)
    assert clip(images, ["a red apple, noto style", "grapes"]).isfinite().all()
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "parts" / "emoji_tokenizer")
    assert len(tokenizer("a red apple, flat style").input_ids) == 2 + 6  # each word, and the comma


def test_a_picture_shows_what_its_caption_says() -> None:
    one = emoji.Emoji("noto", "red-apple", ("fruit",), _svg(BODY))
    pictures = emoji.draw(one)
    assert pictures is not None
    for png, captions in pictures:
        pixels = np.asarray(Image.open(io.BytesIO(png)), np.int64)
        assert pixels.shape == (64, 64, 3)
        background = captions["text"].split()[-2]
        assert np.abs(pixels[0, 0] - emoji.BACKGROUNDS[background]).max() <= emoji.JITTER
        red = (np.abs(pixels - (255, 0, 0)).sum(-1) < 6).sum()
        size = np.sqrt(red / np.pi) * 32 / 12  # of the emoji whose circle this is
        assert 36 <= size <= 62
        assert captions["text"].startswith("a red apple, noto style, on a")
        assert captions["text"].startswith(captions["short"].split(",")[0])
        assert captions["words"] == "a red apple, fruit"


def test_the_first_picture_is_centred_on_white() -> None:
    drawn = emoji.draw(emoji.Emoji("flat", "grapes", (), _svg(BODY)))
    assert drawn is not None
    png, captions = drawn[0]
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
    assert emoji.phrase(name) == expected


def test_names_are_held_back_in_all_styles_and_in_one() -> None:
    everything = [
        emoji.Emoji(style, f"thing-{i}", (), "") for style in emoji.STYLES for i in range(400)
    ]
    partly = [emoji.Emoji("noto", f"rare-{i}", (), "") for i in range(400)]
    splits = emoji.split_names(everything + partly)

    names = {split: {n for (_, n), s in splits.items() if s == split} for split in splits.values()}
    assert len(names["held_names"]) == emoji.HELD_NAMES
    assert len(names["held_style"]) == emoji.HELD_STYLE_NAMES
    assert not names["held_names"] & names["held_style"]
    assert Counter(split for split in splits.values()) == {
        "held_names": emoji.HELD_NAMES * len(emoji.STYLES),
        "held_style": emoji.HELD_STYLE_NAMES,
    }
    assert {style for (style, _), split in splits.items() if split == "held_style"} == {"fluent"}
    assert not any(name.startswith("rare") for _, name in splits)


def test_another_file_than_npm_gives_is_refused(tmp_path: Path, packages: Path) -> None:
    file = packages / emoji.KEYWORDS.file
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(ValueError, match=f"{file.name} has the SHA-256 .* remove it"):
        emoji.write_pictures(tmp_path, workers=1)
    assert not (tmp_path / "pictures").exists()


def test_without_npm_the_error_names_the_file(
    tmp_path: Path, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (packages / emoji.KEYWORDS.file).unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"npm, .* is not installed; .* emojilib-4.0.3.tgz"):
        emoji.write_pictures(tmp_path, workers=1)


def test_npm_fetches_what_is_missing_and_its_failure_is_said(
    tmp_path: Path, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept.tgz"
    (packages / emoji.KEYWORDS.file).rename(kept)
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text("#!/bin/sh\necho no such host >&2; exit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}:/usr/bin:/bin")
    with pytest.raises(ValueError, match=r"emojilib@4.0.3 \(no such host\)"):
        emoji.read_package(packages, emoji.KEYWORDS)
    npm.write_text(
        f'#!/bin/sh\ntest "$3" = emojilib@4.0.3 && cp {kept} "$5/{emoji.KEYWORDS.file}"\n'
    )
    assert list(emoji.read_package(packages, emoji.KEYWORDS)) == ["dist/emoji-en-US.json"]


def _svg(body: str) -> str:
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{body}</svg>'
