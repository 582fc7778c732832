"""Grids of images: a row is one starting noise, a column one model."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from sfumato.data.decode import Bounds, RefusedImageError, read_rgb
from sfumato.data.entries import FileBlob
from sfumato.report.losses import validation_loss
from sfumato.report.records import RunRecord, ShownImage, is_inside, read_pairs, read_scores
from sfumato.report.tables import Cell, number
from sfumato.training.checkpoint import list_checkpoints, step_of
from sfumato.training.folder import RunFolder

GRID_PROMPTS = 4
GRID_ROWS = 4
OVER_STEPS, STEP_PROMPTS, STEP_ROWS = 6, 2, 2  # of the grids with a slider
PAIRS = 8
PROMPT_LENGTH = 90  # characters of a prompt under an image
CRISP_SIDE = 128  # pixels; images up to this size are shown enlarged, pixel by pixel
EMBEDDED_SIDE = 384  # pixels; larger images are scaled down to this size


@dataclass(frozen=True)
class Picture:
    """An embedded image.

    Attributes:
        uri: empty where the file is missing or refused.
        outside: the path of a file that is not shown, because it lies outside the run folder.
    """

    uri: str
    crisp: bool
    alt: str
    note: str
    outside: str = ""


@dataclass(frozen=True)
class Grid:
    """A table of images under a caption.

    Attributes:
        frames: of a grid with a slider, the first and last place of the slider that shows a column.
    """

    caption: str
    header: Sequence[Cell]
    rows: Sequence[Sequence[Picture]]
    frames: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True)
class _Column:
    """The images of a model at an evaluated step, and the run folder that holds them."""

    name: str
    run: Path
    step: int
    images: Sequence[ShownImage]


def image_grids(
    columns: Sequence[tuple[str, RunRecord, int]],
    prompts: int = GRID_PROMPTS,
    rows: int = GRID_ROWS,
) -> list[Grid]:
    """Return a grid for each of the first few prompts, with the first few noises.

    Args:
        columns: the name of a model, its run, and its evaluated step.
        prompts: how many.
        rows: how many noises.

    Raises:
        ValueError: if scores cannot be read.
    """
    models = [
        _Column(name, record.folder.path, step, read_scores(record, step))
        for name, record, step in columns
    ]
    if not models:
        return []
    count = 1 + max((image.prompt_index for image in models[0].images), default=-1)
    return [_prompt_grid(models, prompt, rows) for prompt in range(min(count, prompts))]


def step_grids(
    first: Sequence[tuple[str, RunRecord, int]], records: Sequence[RunRecord]
) -> tuple[list[int], list[Grid]]:
    """Return a few evaluated steps, and grids with each run's last evaluation up to each of them.

    Args:
        first: columns that every step shows, as of `image_grids`.

    Returns:
        Nothing where fewer than two steps of trained weights are evaluated.
    """
    found = sorted({one.step for record in records for one in record.evaluations if one.step})
    if len(found) < 2:
        return [], []
    count = min(OVER_STEPS, len(found))
    steps = [found[round(i * (len(found) - 1) / (count - 1))] for i in range(count)]
    columns, frames = list(first), [(0, count - 1)] * len(first)
    for frame, step in enumerate(steps):
        for record in records:
            past = [one.step for one in record.evaluations if 0 < one.step <= step]
            column = (record.name, record, max(past, default=0))
            if past and column in columns:
                place = columns.index(column)
                frames[place] = (frames[place][0], frame)
            elif past:
                columns.append(column)
                frames.append((frame, frame))
    grids = image_grids(columns, STEP_PROMPTS, STEP_ROWS)
    return steps, [replace(grid, frames=frames) for grid in grids]


def validation_grid(record: RunRecord) -> Grid | None:
    """Return the pairs of the last validation, tuned beside base, or None without any.

    Raises:
        ValueError: if pairs.jsonl cannot be read.
    """
    folders = validations(record)
    if not folders:
        return None
    step = max(folders)
    run = record.folder.path
    tuned = read_pairs(folders[step], "tuned")[:PAIRS]
    base = read_pairs(folders[step], "base")[:PAIRS]
    rows = [
        [_picture(one, run, "tuned", one.prompt), _picture(other, run, "base", other.prompt)]
        for one, other in zip(tuned, base, strict=True)
    ]
    return Grid(f"{record.name}, step {step}", [Cell("tuned"), Cell("base")], rows)


def before_and_after(record: RunRecord) -> Grid | None:
    """Return validation images before training, at the best and the last step; None without any.

    Raises:
        ValueError: if pairs.jsonl cannot be read, or validations have different prompts.
    """
    folders = validations(record)
    if not folders:
        return None
    loss, last = validation_loss(record), max(folders)
    best = loss.lowest.step if loss and loss.lowest else None
    before = read_pairs(folders[last], "base")[:PAIRS]
    run, header = record.folder.path, [Cell("base model")]
    columns = [[_picture(one, run, "base", one.prompt) for one in before]]
    for step in sorted({best, last} & (folders.keys() - {0})):
        marks = {"lowest validation loss": best, "last": last}
        notes = [text for text, marked in marks.items() if marked == step]
        header.append(Cell(f"step {step}", ", ".join(notes)))
        tuned = read_pairs(folders[step], "tuned")[:PAIRS]
        columns.append([_picture(one, run, f"step {step}") for one in tuned])
    if len({len(column) for column in columns}) > 1:
        folder = record.folder.path / "samples"
        raise ValueError(f"{folder} holds validations of different lengths; remove the older ones")
    return Grid(record.name, header, list(zip(*columns, strict=True)))


def validations(record: RunRecord) -> dict[int, Path]:
    """Return the folders of validation images, by step."""
    folders = list_checkpoints(record.folder.path / "samples")
    return {step_of(folder): folder for folder in folders}


def _prompt_grid(models: Sequence[_Column], prompt: int, rows: int) -> Grid:
    header, columns, text = [], [], ""
    for one in models:
        name, step = one.name, one.step
        selected = [image for image in one.images if image.prompt_index == prompt]
        rewards = [image.reward for image in selected if image.reward is not None]
        notes = [f"step {step}"] if step else []
        if rewards:
            notes.append(f"mean reward {number(sum(rewards) / len(rewards))}")
        header.append(Cell(name, ", ".join(notes)))
        columns.append([_picture(image, one.run, name) for image in selected[:rows]])
        text = text or next((image.prompt for image in selected), "")
    if len({len(column) for column in columns}) > 1:
        folders = ", ".join(str(RunFolder(one.run).evaluation(one.step)) for one in models)
        raise ValueError(
            f"the evaluations {folders} have different numbers of images of prompt {prompt}; "
            "remove the damaged one and evaluate again"
        )
    return Grid(text, header, list(zip(*columns, strict=True)))


def _picture(image: ShownImage, run: Path, model: str, text: str = "") -> Picture:
    alt = f"{model}: {image.prompt}, image {image.index}"
    notes = [f"{text[:PROMPT_LENGTH]}…" if len(text) > PROMPT_LENGTH else text] if text else []
    if image.reward is not None:
        notes.append(number(image.reward))
    note = ": ".join(notes)
    path = Path(image.image)
    if not is_inside(path, run):
        return Picture("", False, alt, note, str(path))
    try:
        picture = read_rgb(FileBlob(path), Bounds())
    except RefusedImageError:
        return Picture("", False, alt, note)
    if max(picture.size) <= CRISP_SIDE:
        return Picture(_uri(picture, "png", {}), True, alt, note)
    picture.thumbnail((EMBEDDED_SIDE, EMBEDDED_SIDE))
    return Picture(_uri(picture, "jpeg", {"quality": 88}), False, alt, note)


def _uri(picture: Image.Image, kind: str, options: Mapping[str, int]) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
