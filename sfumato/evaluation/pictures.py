"""The report's tables of images: a row is one starting noise, a column a model."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from sfumato.evaluation.records import RunRecord, ShownImage, read_scores
from sfumato.evaluation.tables import Cell, number

GRID_PROMPTS = 4
GRID_ROWS = 4
PAIRS = 8
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
    places = sorted((record.folder.path / "samples").glob("step-*"))
    if not places:
        return None
    file = places[-1] / "pairs.jsonl"
    rows = []
    try:
        for line in file.read_text(encoding="utf-8").splitlines()[:PAIRS]:
            pair = json.loads(line)
            rows.append(
                [
                    _picture(
                        ShownImage(
                            pair["prompt"],
                            pair["index"],
                            0,
                            pair[f"reward_{side}"],
                            places[-1] / f"{pair['index']:03d}-{side}.png",
                        ),
                        side,
                        f"{pair['prompt']}: ",
                    )
                    for side in ("tuned", "base")
                ]
            )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{file} cannot be read ({error}); remove {places[-1]}") from error
    step = int(places[-1].name.removeprefix("step-"))
    return Grid(f"{record.name}, step {step}", [Cell("tuned"), Cell("base")], rows)


def _grid(columns: Sequence[tuple[str, int, Sequence[ShownImage]]], prompt: int) -> Grid:
    header, shown = [], []
    for name, step, images in columns:
        mine = [image for image in images if image.prompt_index == prompt]
        mean = sum(image.reward for image in mine) / len(mine)
        at = f"step {step}, " if step else ""
        header.append(Cell(name, f"{at}mean reward {number(mean)}"))
        shown.append([_picture(image, name) for image in mine[:GRID_ROWS]])
    text = next(image.prompt for image in columns[0][2] if image.prompt_index == prompt)
    return Grid(text, header, list(zip(*shown, strict=True)))


def _picture(image: ShownImage, model: str, before: str = "") -> Picture:
    alt = f"{model}: {image.prompt}, image {image.index}"
    note = f"{before}{number(image.reward)}"
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
