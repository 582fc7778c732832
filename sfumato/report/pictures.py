"""The report's tables of images: a row is one starting noise, a column a model."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sfumato.report.records import RunRecord, ShownImage, read_scores
from sfumato.report.tables import Cell, number
from sfumato.training.checkpoint import step_of

GRID_PROMPTS = 4
GRID_ROWS = 4
PAIRS = 8
PROMPT_LENGTH = 90  # characters that stand under an image
CRISP_SIDE = 128  # pixels; up to here images are shown enlarged, pixel by pixel
EMBEDDED_SIDE = 384  # pixels; larger images are scaled down to it


@dataclass(frozen=True)
class Picture:
    """An embedded image; `uri` is empty where its file is missing."""

    uri: str
    crisp: bool
    alt: str
    note: str


@dataclass(frozen=True)
class Grid:
    """A table of images under a caption."""

    caption: str
    header: Sequence[Cell]
    rows: Sequence[Sequence[Picture]]


def image_grids(shown: Sequence[tuple[str, RunRecord, int]]) -> list[Grid]:
    """Return a grid per prompt, of the first few prompts and noises.

    Args:
        shown: the columns: a model's name, the run and the evaluated step that it stands for.

    Raises:
        ValueError: if scores cannot be read.
    """
    columns = [(name, step, read_scores(record, step)) for name, record, step in shown]
    if not columns:
        return []
    count = 1 + max(image.prompt_index for image in columns[0][2])
    return [_grid(columns, prompt) for prompt in range(min(count, GRID_PROMPTS))]


def validation_grid(record: RunRecord) -> Grid | None:
    """Return the last validation's pairs (tuned | base), or None without any.

    Raises:
        ValueError: if pairs.jsonl cannot be read.
    """
    places = validated(record)
    if not places:
        return None
    step = max(places)
    sides = [(side, _side(places[step], side)) for side in ("tuned", "base")]
    columns = [[_picture(image, side, image.prompt) for image in images] for side, images in sides]
    header = [Cell(side) for side, _ in sides]
    return Grid(f"{record.name}, step {step}", header, list(zip(*columns, strict=True)))


def before_and_after(record: RunRecord, best: int | None) -> Grid | None:
    """Return what validation made before training, at a best step and at the last; None without.

    Raises:
        ValueError: if pairs.jsonl cannot be read.
    """
    places = validated(record)
    if not places:
        return None
    last = max(places)
    before = _side(places[last], "base")
    header, columns = [Cell("base model")], [[_picture(one, "base", one.prompt) for one in before]]
    for step in sorted({best, last} & (places.keys() - {0})):
        notes = [
            text for text, at in (("lowest validation loss", best), ("last", last)) if at == step
        ]
        header.append(Cell(f"step {step}", ", ".join(notes)))
        columns.append([_picture(one, f"step {step}") for one in _side(places[step], "tuned")])
    if len({len(column) for column in columns}) > 1:
        folder = record.folder.path / "samples"
        raise ValueError(f"{folder} holds validations of different lengths; remove the older ones")
    return Grid(record.name, header, list(zip(*columns, strict=True)))


def validated(record: RunRecord) -> dict[int, Path]:
    """Return the folders of validation images, by step."""
    places = (record.folder.path / "samples").glob("step-*")
    return {step_of(place): place for place in sorted(places)}


def _side(place: Path, side: str) -> list[ShownImage]:
    """Return the tuned or the base images of a validation, the first few."""
    file = place / "pairs.jsonl"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()[:PAIRS]
        pairs: list[dict[str, Any]] = [json.loads(line) for line in lines]
        return [
            ShownImage(
                pair["prompt"],
                pair["index"],
                0,
                pair.get(f"reward_{side}"),
                place / f"{pair['index']:03d}-{side}.png",
            )
            for pair in pairs
        ]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{file} cannot be read ({error}); remove {place}") from error


def _grid(columns: Sequence[tuple[str, int, Sequence[ShownImage]]], prompt: int) -> Grid:
    header, shown = [], []
    for name, step, images in columns:
        mine = [image for image in images if image.prompt_index == prompt]
        rewards = [image.reward for image in mine if image.reward is not None]
        notes = [f"step {step}"] if step else []
        if rewards:
            notes.append(f"mean reward {number(sum(rewards) / len(rewards))}")
        header.append(Cell(name, ", ".join(notes)))
        shown.append([_picture(image, name) for image in mine[:GRID_ROWS]])
    text = next(image.prompt for image in columns[0][2] if image.prompt_index == prompt)
    return Grid(text, header, list(zip(*shown, strict=True)))


def _picture(image: ShownImage, model: str, text: str = "") -> Picture:
    alt = f"{model}: {image.prompt}, image {image.index}"
    notes = [f"{text[:PROMPT_LENGTH]}…" if len(text) > PROMPT_LENGTH else text] if text else []
    if image.reward is not None:
        notes.append(number(image.reward))
    note = ": ".join(notes)
    try:
        with Image.open(image.file) as opened:
            picture = opened.convert("RGB")
    except OSError:
        return Picture("", False, alt, note)
    if max(picture.size) <= CRISP_SIDE:
        return Picture(_uri(picture, "png", {}), True, alt, note)
    picture.thumbnail((EMBEDDED_SIDE, EMBEDDED_SIDE))
    return Picture(_uri(picture, "jpeg", {"quality": 88}), False, alt, note)


def _uri(picture: Image.Image, kind: str, options: Mapping[str, int]) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
