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

OVER_STEPS, STEP_PROMPTS, STEP_ROWS = 6, 2, 2  # of the grids with a slider, at most
MANY_PROMPTS = 2  # of which many images are shown, at most
PAIRS = 8
PROMPT_LENGTH = 90  # characters of a prompt under an image
CRISP_SIDE = 128  # pixels; images up to this size are shown enlarged, pixel by pixel
CELL, SMALL = 136, 72  # pixels of the page that an image may take; among many, a small one


@dataclass(frozen=True)
class Sizes:
    """How much of the images a page shows.

    Attributes:
        side: pixels; larger images are scaled down to it.
        prompts: of a grid of images.
        rows: noises of each prompt.
        many: images of one prompt, where many are shown.
        cell: pixels of the page that an image may take.
    """

    side: int = 384
    prompts: int = 4
    rows: int = 4
    many: int = 12
    cell: int = CELL


# From the most to the least; a page has the first that keeps it small.
SIZES = (Sizes(), Sizes(256), Sizes(192, 4, 3), Sizes(128, 3, 3, 8), Sizes(96, 2, 2, 8))
SMALLEST = Sizes(64, 1, 1, 4)


@dataclass(frozen=True)
class Picture:
    """An embedded image.

    Attributes:
        uri: empty where the file is missing or refused.
        crisp: whether the page enlarges it, pixel by pixel.
        width: pixels of the page; a multiple of its own if it is crisp.
        outside: the path of a file that is not shown, because it lies outside the run folder.
    """

    uri: str
    crisp: bool
    alt: str
    note: str
    width: int = CELL
    outside: str = ""


@dataclass(frozen=True)
class Sheet:
    """Many images of one prompt: a row of them for each model."""

    prompt: str
    rows: Sequence[tuple[Cell, Sequence[Picture]]]


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

    @property
    def narrow(self) -> int:
        """Return the columns that fit beside each other on a telephone; 2 x 2 of four."""
        places = {first for first, _ in self.frames}
        shown = max(
            (sum(first <= at <= last for first, last in self.frames) for at in places),
            default=len(self.header),
        )
        return 2 if shown == 4 else min(shown, 3)


@dataclass(frozen=True)
class _Column:
    """The images of a model at an evaluated step, and the run folder that holds them."""

    name: str
    run: Path
    step: int
    images: Sequence[ShownImage]


def image_grids(columns: Sequence[tuple[str, RunRecord, int]], sizes: Sizes) -> list[Grid]:
    """Return a grid for each of the first few prompts, with the first few noises.

    Args:
        columns: the name of a model, its run, and its evaluated step.

    Raises:
        ValueError: if scores cannot be read.
    """
    models = _read(columns)
    prompts = range(min(_num_prompts(models), sizes.prompts))
    return [_prompt_grid(models, prompt, sizes) for prompt in prompts]


def sheets(columns: Sequence[tuple[str, RunRecord, int]], sizes: Sizes) -> list[Sheet]:
    """Return many images of each of the first prompts; columns are those of `image_grids`.

    Returns:
        [] where the grids show as many.

    Raises:
        ValueError: if scores cannot be read.
    """
    models = _read(columns)
    found = []
    for prompt in range(min(_num_prompts(models), sizes.prompts, MANY_PROMPTS)):
        rows, text = [], ""
        for model, (_, record, _) in zip(models, columns, strict=True):
            images = [image for image in model.images if image.prompt_index == prompt]
            text = text or next((image.prompt for image in images), "")
            known = [one.per_prompt for one in record.evaluations if one.step == model.step]
            notes = [f"step {model.step}"] if model.step else []
            if known and prompt < len(known[0]):
                notes.append(f"diversity {number(known[0][prompt])}")
            small = replace(sizes, side=min(sizes.side, CRISP_SIDE), cell=SMALL)
            shown = [_picture(one, model.run, model.name, small) for one in images[: sizes.many]]
            rows.append((Cell(model.name, ", ".join(notes)), shown))
        found.append(Sheet(text, rows))
    return [one for one in found if any(len(shown) > sizes.rows for _, shown in one.rows)]


def _read(columns: Sequence[tuple[str, RunRecord, int]]) -> list[_Column]:
    return [
        _Column(name, record.folder.path, step, read_scores(record, step))
        for name, record, step in columns
    ]


def _num_prompts(models: Sequence[_Column]) -> int:
    return 1 + max((image.prompt_index for one in models[:1] for image in one.images), default=-1)


def step_grids(
    first: Sequence[tuple[str, RunRecord, int]], records: Sequence[RunRecord], sizes: Sizes
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
    for record in records:
        for frame, step in enumerate(steps):
            past = [one.step for one in record.evaluations if 0 < one.step <= step]
            column = (record.name, record, max(past, default=0))
            if past and column in columns:
                place = columns.index(column)
                frames[place] = (frames[place][0], frame)
            elif past:
                columns.append(column)
                frames.append((frame, frame))
    few = replace(sizes, prompts=min(sizes.prompts, STEP_PROMPTS), rows=min(sizes.rows, STEP_ROWS))
    grids = image_grids(columns, few)
    return steps, [replace(grid, frames=frames) for grid in grids]


def validation_grid(record: RunRecord, sizes: Sizes) -> Grid | None:
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
        [
            _picture(one, run, "tuned", sizes, one.prompt),
            _picture(other, run, "base", sizes, other.prompt),
        ]
        for one, other in zip(tuned, base, strict=True)
    ]
    return Grid(f"{record.name}, step {step}", [Cell("tuned"), Cell("base")], rows)


def before_and_after(record: RunRecord, sizes: Sizes) -> Grid | None:
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
    columns = [[_picture(one, run, "base", sizes, one.prompt) for one in before]]
    for step in sorted({best, last} & (folders.keys() - {0})):
        marks = {"lowest validation loss": best, "last": last}
        notes = [text for text, marked in marks.items() if marked == step]
        header.append(Cell(f"step {step}", ", ".join(notes)))
        tuned = read_pairs(folders[step], "tuned")[:PAIRS]
        columns.append([_picture(one, run, f"step {step}", sizes) for one in tuned])
    if len({len(column) for column in columns}) > 1:
        folder = record.folder.path / "samples"
        raise ValueError(f"{folder} holds validations of different lengths; remove the older ones")
    return Grid(record.name, header, list(zip(*columns, strict=True)))


def validations(record: RunRecord) -> dict[int, Path]:
    """Return the folders of validation images, by step."""
    folders = list_checkpoints(record.folder.path / "samples")
    return {step_of(folder): folder for folder in folders}


def _prompt_grid(models: Sequence[_Column], prompt: int, sizes: Sizes) -> Grid:
    header, columns, text = [], [], ""
    for one in models:
        name, step = one.name, one.step
        selected = [image for image in one.images if image.prompt_index == prompt]
        rewards = [image.reward for image in selected if image.reward is not None]
        notes = [f"step {step}"] if step else []
        if rewards:
            notes.append(f"mean reward {number(sum(rewards) / len(rewards))}")
        header.append(Cell(name, ", ".join(notes)))
        columns.append([_picture(image, one.run, name, sizes) for image in selected[: sizes.rows]])
        text = text or next((image.prompt for image in selected), "")
    if len({len(column) for column in columns}) > 1:
        folders = ", ".join(str(RunFolder(one.run).evaluation(one.step)) for one in models)
        raise ValueError(
            f"the evaluations {folders} have different numbers of images of prompt {prompt}; "
            "remove the damaged one and evaluate again"
        )
    return Grid(text, header, list(zip(*columns, strict=True)))


def _picture(image: ShownImage, run: Path, model: str, sizes: Sizes, text: str = "") -> Picture:
    alt = f"{model}: {image.prompt}, image {image.index}"
    notes = [f"{text[:PROMPT_LENGTH]}…" if len(text) > PROMPT_LENGTH else text] if text else []
    if image.reward is not None:
        notes.append(number(image.reward))
    note = ": ".join(notes)
    path = Path(image.image)
    if not is_inside(path, run):
        return Picture("", False, alt, note, outside=str(path))
    try:
        picture = read_rgb(FileBlob(path), Bounds())
    except RefusedImageError:
        return Picture("", False, alt, note)
    if max(picture.size) <= min(CRISP_SIDE, sizes.side):
        return Picture(_uri(picture, "png", {}), True, alt, note, _width(picture.width, sizes.cell))
    picture.thumbnail((sizes.side, sizes.side))
    return Picture(_uri(picture, "jpeg", {"quality": 88}), False, alt, note, sizes.cell)


def _width(own: int, most: int) -> int:
    """Return the largest multiple of an image's own width that fits; its own if none does."""
    return max(1, most // own) * own


def _uri(picture: Image.Image, kind: str, options: Mapping[str, int]) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
